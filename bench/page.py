"""Results as one self-contained HTML page: a table and the settings of each, and the figures they make.

Jinja escapes every text of a file; drawings are matplotlib's, with their words as outlines. Nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefuse.bench.blocks import Results
from prefuse.bench.record import Record, write_text
from prefuse.bench.show import absent, columns, heading, number

TEMPLATE = "page.html.j2"


def write_page(records: Sequence[Record], path: Path) -> None:
    import jinja2

    import prefuse.engine.report.page as report

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"number": number}
    style = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    text = environment.get_template(TEMPLATE).render(
        records=records, columns=columns, heading=heading, absent=absent, style=style, drawings=drawings(records)
    )
    write_text(path, text)


def drawings(records: Sequence[Record]) -> dict[str, str]:
    """{verb: SVG} of the figures whose results are among the records."""
    from prefuse.bench.plots import FIGURES_OF

    results, verbs = Results(list(records)), {record.verb for record in records}
    made = {name: draw(results) for name, draw in FIGURES_OF.items() if name in verbs}
    return {name: svg[svg.index("<svg") :] for name, svg in made.items()}  # without the XML's own head
