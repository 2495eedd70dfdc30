"""Results in the terminal, one table each; or as one HTML page.

prefuse bench show                                   # every result of bench/results
prefuse bench show bench/results/accuracy.json
prefuse bench show --html results.html --verb head
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefuse.bench.record import RESULTS, Record, load_results
from prefuse.engine.config.tools import ToolParser


def number(value: Any) -> str:
    """Four digits, as short as they go: 0.9364, 723.6, 3.37e-06, yes."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def columns(record: Record) -> list[str]:
    """Those that some row has: keys first, then measures in the order in which rows have them."""
    named = dict.fromkeys(name for row in record.rows for name in row)
    return [*record.keys, *(name for name in named if name not in record.keys)]


def heading(record: Record, name: str) -> str:
    unit = record.measures.get(name, {}).get("unit", "")
    return f"{name}\n({unit})" if unit and unit not in name else name


def table(record: Record) -> Table:
    names = columns(record)
    caption = [record.command or "", *record.notes, *absent(record)]
    made = Table(title=escape(record.title), caption=escape("\n".join(filter(None, caption))), caption_justify="left")
    for name in names:
        made.add_column(escape(heading(record, name)), justify="left" if name in record.keys else "right")
    for row in record.rows:
        made.add_row(*(escape(number(row.get(name))) for name in names))
    return made


def absent(record: Record) -> list[str]:
    return [f"{name} was not measured: {peer['absent']}" for name, peer in record.peers.items() if peer["absent"]]


def main() -> int:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "paths", nargs="*", type=Path, default=[RESULTS], help="files or folders (default: all results)"
    )
    parser.add_argument("--verb", help="of this verb alone")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one self-contained page instead")
    arguments = parser.parse_args()
    records = [record for record in load_results(arguments.paths) if arguments.verb in (None, record.verb)]
    if not records:
        parser.error("no results there" + (f" of the verb {arguments.verb}" if arguments.verb else ""))
    if arguments.html is not None:
        from prefuse.bench.page import write_page

        write_page(records, arguments.html)
        print(f"wrote {arguments.html}")
        return 0
    console = Console()
    for record in records:
        console.print(table(record))
    return 0
