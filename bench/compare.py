"""Two results of one verb, row by row: what became slower, larger or less exact. Exit status 1 if anything did.

    prefuse bench compare before.json after.json
    prefuse bench compare before.json after.json --threshold 1.05 --measures ratio_to_gemms,peak_mib

A row's number is compared where both files have the row. `worse` is how many times worse the second file is, in the
direction in which the measure is better (2.0: twice the time, or half the speed). Times of two machines say little:
without `--measures`, times are compared only where both files name the same device, and ratios always.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prefuse.bench.record import BadRecord, Record, read_result
from prefuse.bench.show import number
from prefuse.bench.summaries import OF_THE_MACHINE
from prefuse.engine.config.tools import ToolParser

THRESHOLD = 1.1


@dataclass(frozen=True)
class Change:
    key: tuple[Any, ...]
    measure: str
    before: float
    after: float
    worse: float  # 1: equal; below 1: better


def measured(before: Record, after: Record) -> list[str]:
    """Measures that have a better direction and stand in both, without times where the devices differ."""
    common = [
        name for name in before.measures if name in after.measures and before.measures[name]["better"] != "neither"
    ]
    if before.device == after.device:
        return common
    return [name for name in common if before.measures[name]["unit"] not in OF_THE_MACHINE]


def worsening(before: float, after: float, better: str) -> float:
    """How many times worse: a number that was 0 and is not any more is infinitely so."""
    low, high = (before, after) if better == "lower" else (after, before)
    if low == high:
        return 1.0
    return high / low if low > 0 else math.inf if high > low else 0.0


def changes(before: Record, after: Record, measures: list[str]) -> list[Change]:
    rows = {after.key(row): row for row in after.rows}
    found = []
    for row in before.rows:
        key = before.key(row)
        for name in measures:
            a, b = row.get(name), rows.get(key, {}).get(name)
            if key not in rows or not isinstance(a, int | float):
                continue
            lost = not isinstance(b, int | float)  # measured before, and not any more: refused, or an error
            worse = math.inf if lost else worsening(float(a), float(b), before.measures[name]["better"])
            found.append(Change(key, name, float(a), math.nan if lost else float(b), worse))
    return found


def missing(before: Record, after: Record) -> list[tuple[Any, ...]]:
    """Rows that the second file lacks."""
    there = {after.key(row) for row in after.rows}
    return [before.key(row) for row in before.rows if before.key(row) not in there]


def differences(before: Record, after: Record) -> list[str]:
    """Why the two may not be comparable, in words."""
    said = []
    if before.device != after.device:
        said.append(f"devices differ ({before.device['name']}, {after.device['name']}): times are left out")
    names = sorted(before.settings.keys() | after.settings.keys())
    unlike = [name for name in names if before.settings.get(name) != after.settings.get(name)]
    said += [f"{name}: {before.settings.get(name)} before, {after.settings.get(name)} after" for name in unlike]
    packages = before.environment["packages"].keys() & after.environment["packages"].keys()
    for name in sorted(packages):
        a, b = (record.environment["packages"][name] for record in (before, after))
        said += [f"{name} {a} before, {b} after"] if a != b else []
    return said


def main() -> int:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument(
        "--threshold", type=float, default=THRESHOLD, help=f"times worse that is too much (default {THRESHOLD})"
    )
    parser.add_argument("--measures", help="names, separated by commas (default: all that have a better direction)")
    arguments = parser.parse_args()
    before, after = read_result(arguments.before), read_result(arguments.after)
    if before.verb != after.verb:
        raise BadRecord(f"{arguments.before} is of `bench {before.verb}`, {arguments.after} of `bench {after.verb}`")
    measures = arguments.measures.split(",") if arguments.measures else measured(before, after)
    if unknown := [name for name in measures if name not in before.measures]:
        parser.error(f"{arguments.before} has no measure {unknown[0]}; it has {', '.join(before.measures)}")
    if neither := [name for name in measures if before.measures[name]["better"] == "neither"]:
        parser.error(f"{neither[0]} is better neither when lower nor when higher")
    found, gone = changes(before, after, measures), missing(before, after)
    if not found:
        parser.error("no row and measure stand in both files")
    worse = [change for change in found if change.worse > arguments.threshold]
    report(found, worse, gone, differences(before, after), arguments.threshold)
    return int(bool(worse or gone))


def report(found: list[Change], worse: list[Change], gone: list[tuple], said: list[str], threshold: float) -> None:
    console = Console()
    for line in said:
        console.print(escape(f"note: {line}"))
    made = Table("row", "measure", "before", "after", "times worse")
    for change in sorted(found, key=lambda change: -change.worse):
        row = (", ".join(map(number, change.key)), change.measure, number(change.before), number(change.after))
        made.add_row(*map(escape, row), f"{change.worse:.3f}", style="red" if change in worse else None)
    console.print(made)
    for key in gone:
        console.print(escape(f"gone: {', '.join(map(number, key))}"), style="red")
    console.print(
        f"{len(worse)} of {len(found)} numbers are more than {threshold:g} times worse, {len(gone)} rows are gone"
    )
