"""Hooks of mkdocs: README.md is the first page, and files of the repository that pages link to come along.

A page says ../bench/README.md, as it must for who reads it in the repository; on the site that file lies in files/.
"""

import re
import shutil
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\]\(|src=\"|href=\")([^)\s\"#:]+)(#[^)\s\"]*)?(?=[)\"\s])")
PAGES = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}  # {page: file of the repository}


PACKAGE = ROOT / "build" / "package" / "prefuse"  # the four folders as one package, for who reads docstrings from files


def on_startup(**_):
    """Before mkdocstrings looks where packages are: a folder that is not there yet is passed over."""
    PACKAGE.mkdir(parents=True, exist_ok=True)
    wanted = {path.name: path for path in (ROOT / "bindings").iterdir() if path.name != "__pycache__"}
    wanted |= {name: ROOT / name for name in ("kernels", "engine")}
    for old in PACKAGE.iterdir():
        old.unlink()
    for name, path in wanted.items():
        if path.is_dir():
            (PACKAGE / name).symlink_to(path)
        else:  # a package whose __init__.py is a link is taken to lie where that leads
            shutil.copyfile(path, PACKAGE / name)


def on_config(config):
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    more = sorted(page for page in pages if page not in str(config.nav))
    config.nav += [{"More": more}] if more else []
    return config


def on_files(files, config):
    pages = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")
    }
    pages |= {source: (ROOT / source).read_text(encoding="utf-8") for source in PAGES.values()}
    brought = {linked for name, text in pages.items() for linked in _outside(name, text)}
    for linked in sorted(brought):
        files.append(File.generated(config, f"files/{_brought(linked)}", abs_src_path=str(ROOT / linked)))
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=_moved(source, page, pages[source])))
    return files


def on_page_markdown(markdown, page, **_):
    source = page.file.src_uri
    return markdown if source in PAGES else _moved(f"docs/{source}", source, markdown)


def _target(name: str, link: str) -> str:
    """Where a link of the repository's file `name` leads, from the root of the repository; "" for outside of it."""
    path = (ROOT / name).parent.joinpath(link).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""


def _outside(name: str, text: str):
    """Files of the repository beyond docs/ that a page links to."""
    for _, link, _ in LINK.findall(text):
        target = _target(name, link)
        if (ROOT / target).is_file() and not target.startswith("docs/") and target not in PAGES.values():
            yield target


def _brought(target: str) -> str:
    return target + ".txt" if target.endswith((".md", ".html")) else target  # as it stands, no page of the site


def _moved(name: str, page: str, text: str) -> str:
    """The page's text with links as the site has them; of a folder the text alone stays."""
    depth = "../" * page.count("/")
    back = {source: own for own, source in PAGES.items()}

    def moved(match: re.Match) -> str:
        opening, link, anchor = match[1], match[2], match[3] or ""
        target = _target(name, link)
        if target in back:
            return f"{opening}{depth}{back[target]}{anchor}"
        if target.startswith("docs/"):
            return f"{opening}{depth}{target.removeprefix('docs/')}{anchor}"
        if (ROOT / target).is_file():
            return f"{opening}{depth}files/{_brought(target)}"
        return match[0]

    without_folders = re.sub(
        r"\[([^\]]+)\]\(([^)\s#:]+)\)", lambda m: m[1] if (ROOT / _target(name, m[2])).is_dir() else m[0], text
    )
    return LINK.sub(moved, without_folders)
