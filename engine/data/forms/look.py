"""The first look at a source: the columns of its first rows, and the kinds of values in them."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from prefuse.engine.data.forms.names import plain_name
from prefuse.engine.data.records import BadRow, DataError

FIRST_ROWS = 1000
NO_TEXT = (int, float, bool, Decimal, datetime.date, datetime.time)
WORDS = re.compile(r"[^\W\d_]|[^\x00-\x7f]")  # a letter, or any sign beyond ASCII


@dataclass
class Look:
    """`values`: {column: what its rows hold, nulls left out}; `first`: those rows. A form's columns are in `used`."""

    source: str
    rows: int
    values: dict[str, list[Any]]
    first: list[dict[str, Any]]
    used: set[str] = field(default_factory=set)

    def find(self, *names: str) -> str | None:
        """The first of these names that is an unused column, as the source spells it."""
        free = {plain_name(column): column for column in reversed(self.values) if column not in self.used}
        return next((free[name] for name in names if name in free), None)

    def find_all(self, *names: str) -> list[str]:
        free = {plain_name(column): column for column in reversed(self.values) if column not in self.used}
        return [free[name] for name in names if name in free]

    def all_are(self, column: str | None, *kinds: type) -> bool:
        """Whether the column has values and (nearly) all are of these types: a broken row or two do not decide."""
        values = self.values.get(column or "", [])
        fitting = sum(
            isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds) for value in values
        )
        return bool(values) and fitting >= 0.5 * len(values)

    def is_text(self, column: str | None) -> bool:
        """Strings, or turns, or something that is meant to be one of them."""
        return self.all_are(column, str, list, dict)

    def is_numbers(self, column: str | None) -> bool:
        return self.all_are(column, int, float)


def first_look(source: str, rows: list[tuple[str, Any]]) -> Look:
    values: dict[str, list[Any]] = {}
    usable = [row for _, row in rows if isinstance(row, dict) and bad_name(row) is None]
    for row in usable:
        for column, value in row.items():
            known = values.setdefault(column, [])
            if value is not None:
                known.append(value)
    return Look(source, len(rows), values, usable)


def bad_name(row: dict[str, Any]) -> BadRow | None:
    try:
        "".join(row).encode()
    except UnicodeEncodeError:
        return BadRow("the name of a column holds half a surrogate pair, not a Unicode text")
    return None


def holds_text(value: Any, depth: int = 6) -> bool:
    """Whether there are words in it; numbers (also as text, as in CSV), dates, empty lists and the like are none."""
    if isinstance(value, str):
        return WORDS.search(value) is not None
    if depth and isinstance(value, dict):
        return any(holds_text(part, depth - 1) for part in value.values())
    if depth and isinstance(value, list):
        return any(holds_text(part, depth - 1) for part in value)
    return bool(value) and not isinstance(value, NO_TEXT)  # bytes of an image, and what else there may be


ROLES = (
    "prompt", "input", "system", "history", "messages", "completion", "chosen", "rejected", "first", "second",
    "verdict", "answers", "scores", "label", "score", "weight", "margin", "text", "tools", "chat_template_kwargs",
    "unused",
)  # fmt: skip
SCORER = "scorer"  # the role of columns that a scorer reads, which no user writes: unused, and they must be there


def columns_by_role(columns: str | dict[str, Any] | None) -> dict[str, list[Any]]:
    """{role: columns} of "prompt=question,unused=notes" or of {"prompt": "question", "unused": ["notes"]}, as given."""
    if isinstance(columns, dict):
        return {role: value if isinstance(value, list) else [value] for role, value in columns.items()}
    roles: dict[str, list[Any]] = {}
    for part in (columns or "").split(","):
        role, _, column = part.partition("=")
        if part.strip():
            roles.setdefault(role.strip(), []).append(column.strip())
    return roles


def passed_over(roles: dict[str, list[Any]]) -> set[Any]:
    """The columns that no form may take."""
    return {*roles.get("unused", ()), *roles.get(SCORER, ())}


def parse_columns(columns: str | dict[str, Any] | None, look: Look) -> dict[str, list[str]]:
    """{role: columns} of "prompt=question,unused=notes" or of {"prompt": "question"}; checked."""
    pairs = [(role, column) for role, given in columns_by_role(columns).items() for column in given]
    named: dict[str, list[str]] = {}
    for role, column in pairs:
        if role not in (*ROLES, SCORER) or not column or not isinstance(column, str):
            raise DataError(f'--columns has "{role}={column}"; expected ROLE=COLUMN with a role of {", ".join(ROLES)}')
        if column not in look.values and role != "unused":  # it may first stand in a later row
            raise DataError(
                f'{look.source} has no column "{column}", which --columns or a scorer names: its columns are '
                f"{', '.join(look.values)}"
            )
        if role in named and role not in ("unused", SCORER):
            raise DataError(f"--columns names {role} twice")
        named.setdefault(role, []).append(column)
    return named
