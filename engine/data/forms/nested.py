"""Values inside objects, under a path: `--columns prompt=info.post,score=rating.0.value`.

An object that a path reaches into stands as its parts, each a column of its own ("info.post", "info.title"), so that
what it holds beside the value must be known as metadata or be named like any other column.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prefuse.engine.data.forms.form import ReadOptions
from prefuse.engine.data.forms.look import columns_by_role


def opened_columns(options: ReadOptions, rows: Iterable[tuple[str, Any]]) -> list[str]:
    """The objects that the options reach into, outer ones first: "rating", "rating.0" of "rating.0.value"."""
    known = {column for _, row in rows if isinstance(row, dict) for column in row}
    given = [column for columns in columns_by_role(options.columns).values() for column in columns]
    given += [options.verdict_column, (options.score_column or "").removeprefix("-")]
    opened = set()
    for path in given:
        if not isinstance(path, str) or path in known:
            continue
        parts = path.split(".")
        prefixes = [".".join(parts[:end]) for end in range(1, len(parts))]
        if prefixes and prefixes[0] in known:
            opened.update(prefixes)
    return sorted(opened, key=len)


def with_opened(rows: Iterable[tuple[str, Any]], opened: list[str]) -> Iterator[tuple[str, Any]]:
    for name, row in rows:
        if isinstance(row, dict):
            row = dict(row)
            for column in opened:
                value = row.get(column)
                if isinstance(value, dict | list):
                    parts = value.items() if isinstance(value, dict) else enumerate(value)
                    del row[column]
                    row.update({f"{column}.{key}": part for key, part in parts})
        yield name, row


def paths_into(column: str, values: Iterable[Any]) -> list[str]:
    """The paths that a column of objects (or of lists of objects) offers, for messages."""
    for value in values:
        if isinstance(value, dict):
            return [f"{column}.{key}" for key in value]
    return []
