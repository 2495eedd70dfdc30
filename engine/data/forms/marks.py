"""Words and flags that say whether a row is any good, and the rows that they set aside.

    {"prompt": ..., "completion": ..., "status": "rejected"}        whatever its form
    {"prompt": ..., "chosen": ..., "rejected": ..., "flagged": true}

A row that a status or a flag marks as bad is set aside, unless it is there as a bad answer (its label is false).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from prefuse.engine.data.forms.form import Form, Row
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import (
    BAD_FLAGS,
    BAD_REVIEWS,
    BROKEN_OFF,
    COUNTED,
    FLAGS,
    LABELS,
    REVIEWS,
    is_status,
    plain_name,
)

GOOD_WORDS = {
    "true", "up", "thumbs_up", "thumb_up", "thumbsup", "good", "yes", "positive", "like", "liked", "desirable",
    "chosen", "accepted", "accept", "correct", "👍", "approved", "approve", "pass", "passed", "valid", "safe",
    "helpful", "upvote", "upvoted", "ok", "okay", "acceptable",
}  # fmt: skip
BAD_WORDS = {
    "false", "down", "thumbs_down", "thumb_down", "thumbsdown", "bad", "no", "negative", "dislike", "disliked",
    "undesirable", "rejected", "reject", "incorrect", "👎", "disapproved", "declined", "fail", "failed", "invalid",
    "unsafe", "unhelpful", "not_helpful", "downvote", "downvoted", "flagged", "discarded", "deleted", "removed", "spam",
    "toxic", "harmful", "wrong", "blocked", "unacceptable", "low_quality", "error",
}  # fmt: skip
PLAIN = {"true", "false", "yes", "no", "positive", "negative", "up", "down"}  # of a status they may say anything
MOST_STRANGE = 0.1  # share of a source's first rows whose label may be no known word: those rows are bad
Marks = Callable[[Row], str | None]  # why a row is set aside


def label_key(value: Any) -> str | float | None:
    """Words in one spelling, numbers as numbers (also in quotes), booleans as their words; None of anything else."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, str):
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    word = value.strip().lower().replace(" ", "_").replace("-", "_")
    return word.rstrip("\ufe0f🏻🏼🏽🏾🏿") if number != number else number


def is_flag(look: Look, column: str) -> bool:
    """True and false alone, also as words or, where it is no count of thumbs or votes, as 1 and 0."""
    keys = set(map(label_key, look.values[column]))
    numbers = set() if plain_name(column) in COUNTED else {0.0, 1.0}
    return bool(keys) and keys <= {"true", "false", "yes", "no"} | numbers


def is_labels(values: list[Any]) -> bool:
    """(Nearly) all are the good and bad words of a status, and one at least is bad."""
    keys = [label_key(value) for value in values]
    known = sum(key in (GOOD_WORDS | BAD_WORDS) - PLAIN for key in keys)
    return known >= (1 - MOST_STRANGE) * len(keys) and any(key in BAD_WORDS for key in keys)


def find_marks(look: Look, form: Form, kind: str) -> tuple[list[str], Marks | None]:
    """The columns that mark some of the first rows as bad, and how every row is looked at."""
    free = [column for column in look.values if column not in form.used | look.used]
    is_answer = form.kind != "pair" and kind in ("labelled", "sft")
    # Whether an answer is good is nothing that a pair is asked.
    flags = REVIEWS | ({*FLAGS, *LABELS} if is_answer else set())
    bad_flags = BAD_REVIEWS | ({*BAD_FLAGS, *BROKEN_OFF} if is_answer else set())
    bad: dict[str, Callable[[Any], bool]] = {}
    words = (BAD_WORDS - PLAIN) | ({"tie"} if form.kind == "pair" else set())
    for column in free:
        name = plain_name(column)
        if (name in flags or name in bad_flags) and is_flag(look, column):
            bad[column] = _is_true if name in bad_flags else _is_false
        elif is_status(column):
            bad[column] = lambda value: isinstance(value, str) and label_key(value) in words
    if not bad:
        return [], None

    def marks(row: Row) -> str | None:
        found = next((column for column, is_bad in bad.items() if is_bad(row.get(column))), None)
        return None if found is None else f'its "{found}" is {str(row[found]).lower():.40}'

    return [column for column, is_bad in bad.items() if any(map(is_bad, look.values[column]))], marks


def _is_true(value: Any) -> bool:
    return label_key(value) in ("true", "yes", 1.0)


def _is_false(value: Any) -> bool:
    return label_key(value) in ("false", "no", 0.0)
