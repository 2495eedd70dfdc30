"""Numbers that rate an answer, as people write them: 4, "4.5", "4/5", "4 out of 5", "4 stars", "80%", "★★★★☆".

A rating is the number that stands there, not its share of the most: one column has one scale, and a row of another
scale ("8/10" among "4/5") is bad.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

from prefuse.engine.data.forms.form import ReadOptions
from prefuse.engine.data.forms.names import plain_name
from prefuse.engine.data.records import BadRow, json_kind

NUMBER = r"[-+]?\d+(?:\.\d+)?"
OUT_OF = re.compile(rf"\s*({NUMBER})\s*(?:/|out of)\s*(\d+(?:\.\d+)?)\s*(?:stars?|points?)?\s*", re.IGNORECASE)
WITH_UNIT = re.compile(rf"\s*({NUMBER})\s*(%|stars?|points?|★|⭐)\ufe0f?\s*", re.IGNORECASE)
STARS = re.compile(r"\s*((?:[★⭐]\ufe0f?)*)((?:☆\ufe0f?)*)\s*")


def number_of(value: Any) -> float | None:
    """The number that a value says; None of anything else."""
    found = _rating(value)
    return None if found is None else found[0]


def are_ratings(values: Iterable[Any]) -> bool:
    values = list(values)
    return bool(values) and all(_rating(value) is not None for value in values)


def is_rank(name: str) -> bool:
    """Of ranks the lowest is the best."""
    parts = set(plain_name(name).split("_"))
    return bool(parts & {"rank", "ranks", "ranking", "rankings"}) and not parts & {"score", "scores", "reward"}


def direction_of(name: str, options: ReadOptions) -> int:
    """1 where more is better, -1 where less is: ranks, and what --score_column names with a minus sign."""
    return -1 if is_rank(name) or options.score_column == f"-{name}" else 1


def rating_reader(values: Iterable[Any]) -> Callable[[Any, str], float]:
    """(value, column) -> its number. Most of these values say on which scale the column is."""
    scales = Counter(found[1] for found in map(_rating, values) if found and found[1])
    scale = scales.most_common(1)[0][0] if scales else 0.0

    def read(value: Any, column: str) -> float:
        found = _rating(value)
        if found is None:
            raise BadRow(f'"{column}" is {value!r:.40}, {json_kind(value)}; expected a number')
        number, own = found
        if own not in (None, scale) or (own is None and scale and not is_stars(value)):
            written = f"out of {own:g}" if own else "a number alone"
            usual = f"out of {scale:g}" if scale else "numbers alone"
            raise BadRow(f'"{column}" is {value!r:.40}, {written}; other rows are {usual}')
        return number

    return read


def is_stars(value: Any) -> bool:
    """Of five full stars nobody sees how many were possible."""
    return isinstance(value, str) and STARS.fullmatch(value) is not None


def _rating(value: Any) -> tuple[float, float | None] | None:
    """(the number, the most that is possible, where it is written)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _written(value) if isinstance(value, str) else None
    return (number, None) if number == number and abs(number) != float("inf") else None


def _written(text: str) -> tuple[float, float | None] | None:
    if found := OUT_OF.fullmatch(text):
        return float(found[1]), float(found[2])
    if found := WITH_UNIT.fullmatch(text):
        return float(found[1]), 100.0 if found[2] == "%" else None
    if not (found := STARS.fullmatch(text)):
        return None
    full, empty = (sum(map(found[part].count, "★⭐☆")) for part in (1, 2))
    return (float(full), float(full + empty) if empty else None) if full + empty else None
