"""Writes every table and figure of README and docs from the results; nothing there is typed by hand.

    prefuse bench figures            # after a new result
    prefuse bench figures --check    # exit status 1, and the names, if a file differs from what would be written

Tables stand between `<!-- bench: NAME -->` and `<!-- end of bench: NAME -->` in any page (blocks.py); figures are SVG
files in docs/figures (plots.py). The same results give the same bytes with the same matplotlib; `--check` lets numbers
in a drawing differ in the last digit, which the processor may round otherwise.
"""

from __future__ import annotations

import re
from pathlib import Path

from prefuse.bench.blocks import BLOCKS
from prefuse.bench.found import Results
from prefuse.bench.record import RESULTS, ROOT, BadRecord, load_results, write_text
from prefuse.engine.config.tools import ToolParser

FIGURES = Path("docs") / "figures"
BLOCK = re.compile(r"(<!-- bench: (?P<name>[^>]+) -->\n).*?(<!-- end of bench: (?P<end>[^>]+) -->)", re.DOTALL)
NEARLY = 0.02  # of a point, between two drawings


def pages(root: Path) -> list[Path]:
    return [root / "README.md", root / "bench" / "README.md", *sorted((root / "docs").glob("*.md"))]


def with_tables(text: str, results: Results, name: str) -> str:
    """A page with its blocks made anew."""

    def made(found: re.Match[str]) -> str:
        block = found["name"]
        if block != found["end"] or block not in BLOCKS:
            raise BadRecord(f"{name}: <!-- bench: {block} --> ends as {found['end']!r}; known are {', '.join(BLOCKS)}")
        return f"{found[1]}{BLOCKS[block](results)}\n{found[3]}"

    opened = text.count("<!-- bench: ")
    new, count = BLOCK.subn(made, text)
    if opened != count:
        raise BadRecord(
            f"{name}: {opened} blocks begin and {count} end: expected <!-- end of bench: NAME --> behind each"
        )
    return new


def wanted(root: Path) -> dict[Path, str]:
    """{file: what it should hold} of every page with a block, and every figure."""
    from prefuse.bench.plots import FIGURES_OF

    results = Results(load_results([root / "bench" / "results"]))
    texts = {path: path.read_text(encoding="utf-8") for path in pages(root)}
    files = {path: with_tables(text, results, path.name) for path, text in texts.items() if "<!-- bench: " in text}
    return files | {root / FIGURES / f"{name}.svg": draw(results) for name, draw in FIGURES_OF.items()}


def same(a: str, b: str) -> bool:
    """Equal text, or drawings whose numbers are nearly equal; names of clip paths are counted, not compared."""
    if a == b:
        return True
    if "<svg" not in a[:1000] or "<svg" not in b[:1000]:
        return False
    number = r"-?\d+\.?\d*(?:e-?\d+)?"
    plain = [re.sub(r"\b[a-z][0-9a-f]{10}\b", "#", x) for x in (a, b)]
    words = [re.sub(number, "0", x) for x in plain]
    numbers = [list(map(float, re.findall(number, x))) for x in plain]
    return words[0] == words[1] and all(abs(x - y) <= NEARLY for x, y in zip(*numbers, strict=True))


def stale(root: Path) -> list[str]:
    """Files that differ from what the results say."""
    return [
        str(path.relative_to(root))
        for path, text in wanted(root).items()
        if not path.is_file() or not same(path.read_text(encoding="utf-8"), text)
    ]


def main() -> int:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    if not RESULTS.is_dir() or not (ROOT / "docs").is_dir():
        parser.error("it needs a checkout: bench/results and docs")
    if arguments.check:
        names = stale(ROOT)
        print("\n".join(f"differs: {name}" for name in names) or "every table and figure is what the results say")
        return int(bool(names))
    for path, text in wanted(ROOT).items():
        if not path.is_file() or not same(path.read_text(encoding="utf-8"), text):
            write_text(path, text)
            print(f"wrote {path.relative_to(ROOT)}")
    return 0
