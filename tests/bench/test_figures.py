"""Tables and figures of README and docs are what `prefuse bench figures` makes of the results: a hand edit shows."""

import re
import shutil

import pytest

from prefuse.bench import figures
from prefuse.bench.record import ROOT, BadRecord


def test_every_table_and_figure_is_what_the_results_say():
    """Mend with `prefuse bench figures`."""
    assert figures.stale(ROOT) == []


def test_every_result_is_shown_by_a_page():
    """README or docs link each file of results."""
    text = "".join(page.read_text(encoding="utf-8") for page in figures.pages(ROOT))
    unseen = [path.name for path in (ROOT / "bench" / "results").glob("*.json") if f"/{path.name})" not in text]
    assert unseen == []


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The pages, the results and the figures, elsewhere."""
    root = tmp_path_factory.mktemp("root")
    (root / "bench").mkdir()
    for name in ("README.md", "bench/README.md"):
        shutil.copy(ROOT / name, root / name)
    shutil.copytree(ROOT / "bench" / "results", root / "bench" / "results")
    shutil.copytree(ROOT / "docs", root / "docs")
    return root


def test_a_number_changed_by_hand_is_found(copy):
    page, drawing = copy / "docs" / "trl.md", copy / "docs" / "figures" / "accuracy.svg"
    text = page.read_text()
    block = text[text.index("<!-- bench: trl step -->") :]
    number = re.search(r"\| +(\d+\.\d\d) \|", block)[1]  # the first: TRL's seconds of a step
    page.write_text(text.replace(number, f"{float(number) + 0.3:.2f}", 1))
    lines = drawing.read_text().splitlines()
    (first, *_) = [i for i, line in enumerate(lines) if line.startswith("L ")]
    x, y = map(float, lines[first].split()[1:3])
    lines[first] = f"L {x} {y + 1}"
    drawing.write_text("\n".join(lines) + "\n")
    assert figures.stale(copy) == ["docs/trl.md", "docs/figures/accuracy.svg"]


def test_the_last_digit_of_a_drawing_may_differ_and_no_more():
    svg = "<svg>\n<path id='p0123456789' d='M 1.25 3e-05 L 10.001 2'/>\n<use href='#p0123456789'/></svg>"
    assert figures.same(svg, svg.replace("10.001", "10.002").replace("p0123456789", "pabcdef0123"))
    assert not figures.same(svg, svg.replace("10.001", "10.101"))
    assert not figures.same(svg, svg.replace("path", "line"))
    assert not figures.same("15.22", "15.221")


@pytest.mark.parametrize(
    "text", ["<!-- bench: furlongs -->\n<!-- end of bench: furlongs -->", "<!-- bench: trl step -->\nno end",
             "<!-- bench: trl step -->\n<!-- end of bench: measured -->"],
)  # fmt: skip
def test_a_block_that_is_unknown_or_open_is_named(text):
    with pytest.raises(BadRecord, match=r"page\.md"):
        figures.with_tables(text, figures.Results([]), "page.md")
