"""Rows in a file, read as records, and records as plain text."""

import json

from prefuse.engine.data.forms import ReadOptions, Skipped, read_records


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def read(tmp_path, rows, kind, **options):
    """(what each record says as text, the reading, the skipped rows)."""
    reading = read_records(write_lines(tmp_path / "rows.jsonl", rows), kind, "train", ReadOptions(**options))
    outcomes = list(reading.outcomes)
    skipped = [outcome for outcome in outcomes if isinstance(outcome, Skipped)]
    return [said(outcome) for outcome in outcomes if not isinstance(outcome, Skipped)], reading, skipped


def said(record):
    """(prompt, each side, the label if there is one): a string as it is, turns as "role: text|role: text"."""
    texts = [text(part) for part in (record.prompt, *record.sides.values())]
    return (*texts, *(() if record.label is None else (record.label,)))


def text(part):
    if isinstance(part, str):
        return part
    return "|".join(f"{turn['role']}: {turn.get('content', turn.get('tool_calls'))}" for turn in part)
