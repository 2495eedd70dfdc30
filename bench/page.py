"""Results as one self-contained HTML page, of the parts that the page of a run has (engine/report/page)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

from prefuse.bench.record import Record, slug
from prefuse.bench.show import absent, columns, heading, number
from prefuse.engine.report.page.render import write_rendered

MOST_BARS = 40


def write_page(records: Sequence[Record], path: Path) -> None:
    titles = ["Results of prefuse bench"]
    write_rendered(path, "bench.html.j2", titles, records=[_shown(record) for record in records])


def _shown(record: Record) -> dict:
    names = columns(record)
    packages = record.environment.get("packages", {})
    return {
        "title": record.title,
        "short": _short(record),
        "about": [
            ("command", record.command or "not recorded"),
            ("device", record.device["name"] + _threads(record.device["threads"])),
            ("commit", record.commit or "not recorded"),
            ("time", record.environment.get("time", "")),
            ("versions", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ],
        "notes": [*record.notes, *absent(record)],
        "headings": [heading(record, name).replace("\n", " ") for name in names],
        "numbers": [not any(isinstance(row.get(name), str) for row in record.rows) for name in names],
        "rows": [[number(row.get(name)) for name in names] for row in record.rows],
        "bars": [bars for name in record.measures if (bars := _bars(record, name))][:2],
    }


def _threads(count: int | None) -> str:
    return "" if count is None else f", {count} thread{'s' * (count > 1)}"


def _short(record: Record) -> str:
    """The file's name without the machine's and the version of torch."""
    if record.path is None:
        return record.verb
    name = re.sub(rf"-{re.escape(slug(record.device['name']))}|-torch[\d.]+\d", "", record.path.stem)
    return re.sub(r"(\d)(threads|rows)\b", r"\1 \2", re.sub(r"\b1threads\b", "1 thread", name)).replace("-", " ")


def _bars(record: Record, name: str) -> dict | None:
    """A measure of which less or more is better, as bars from 0; None where it is not one for bars."""
    measure = record.measures[name]
    if measure["better"] == "neither":
        return None
    values = [(row, row.get(name)) for row in record.rows]
    known = [(row, float(x)) for row, x in values if isinstance(x, int | float) and not isinstance(x, bool)]
    known = [(row, x) for row, x in known if math.isfinite(x) and x >= 0]
    if len(known) < 2 or not (most := max(x for _, x in known)):
        return None
    # A key that is the same for all rows tells nothing apart.
    keys = [key for key in record.keys if len({str(row.get(key)) for row, _ in known}) > 1]
    lines = [
        {"label": " ".join(number(row.get(key)) for key in keys), "value": number(x), "share": x / most}
        for row, x in known[:MOST_BARS]
    ]
    left = len(known) - len(lines)
    title = f"{heading(record, name)}, {measure['better']} is better".replace("\n", " ")
    return {"title": title, "lines": lines, "left": left}
