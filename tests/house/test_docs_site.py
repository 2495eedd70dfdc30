"""The documentation builds as a site without a warning, and has a place for every public name and every page."""

import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import prefuse

pytest.importorskip("mkdocs")
pytest.importorskip("mkdocstrings")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def hooks():
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs" / "site_hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_public_name_has_its_place_with_its_docstring(site):
    pages = "".join(path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html"))
    for name in prefuse.__all__:
        place = re.search(rf'id="prefuse\.{name}".*?</h3>(.*?)(?=<h[23]|$)', pages, re.DOTALL)
        assert place, name
        text = " ".join(re.sub(r"<[^>]+>", " ", place[1]).split())
        assert getattr(prefuse, name).__doc__.split()[0].strip("`*") in text, name


def test_every_page_is_reached_and_the_readme_is_the_first(site):
    first = (site / "index.html").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).is_file()
        assert f'href="{page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()}"' in first, page
    assert "Preference optimization of language models" in re.sub(r"<[^>]+>", "", first)


class _Links(HTMLParser):
    """The places of a page, and what it links to and shows."""

    def __init__(self, text):
        super().__init__()
        self.places, self.links = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [given[name] for name in ("href", "src") if given.get(name) is not None]


def test_every_link_leads_to_a_file_of_the_site_and_to_a_place_in_it(site):
    pages = {path: _Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    wrong, seen = [], 0
    for path, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            seen += 1
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            if not target.is_file() or (url.fragment and unquote(url.fragment) not in pages[target].places):
                wrong.append(f"{path.name}: {link}")
    assert seen > 3000
    assert not wrong


def test_nothing_is_fetched(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(
            r'<(?:script|img|link)[^>]+(?:src|href)="https?://(?!www\.w3\.org)[^"]*\.(?:js|css|woff2?|png)"', text
        ), page


def test_links_out_of_the_docs_lead_to_files_that_come_along(hooks):
    moved = hooks._moved(
        "docs/pytorch.md", "pytorch.md", "[a](../examples/padded_loop.py) [b](losses.md#x) [c](../bench)"
    )
    assert moved == "[a](files/examples/padded_loop.py) [b](losses.md#x) c"
    readme = hooks._moved("README.md", "index.md", '[d](docs/losses.md) <img src="docs/figures/losses.png">')
    assert readme == '[d](losses.md) <img src="figures/losses.png">'
    assert hooks._moved("docs/api/head.md", "api/head.md", "[e](../losses.md)") == "[e](../losses.md)"
