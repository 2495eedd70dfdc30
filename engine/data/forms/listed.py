"""Several answers of one row, and their names: a list, an object with one key for each model, or a column for each.

{"responses": ["A", "B"]}                       names "#0", "#1"; or those of a list `models` beside it
{"responses": {"gpt": "A", "llama": "B"}}       names "gpt", "llama"
{"response_a": "A", "response_b": "B", "response_c": "C"}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from prefuse.engine.data.forms.form import Row
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import (
    ANSWER_LISTS,
    NAME_LISTS,
    STEMS,
    plain_name,
)
from prefuse.engine.data.forms.turns import ANSWER_KEYS, ROLE_KEYS, TEXT_KEYS
from prefuse.engine.data.records import BadRow

FAMILIES = ("abcdefgh", "012345678", "12345678")  # the suffixes of answers beside each other
OF_ONE_ANSWER = {*ANSWER_KEYS, *ROLE_KEYS, *TEXT_KEYS, "messages", "conversations", "contents", "chosen", "rejected"}


@dataclass(frozen=True)
class Listed:
    """The columns of the answers: one list, one object, or a column for each."""

    columns: tuple[str, ...]
    suffixes: tuple[str, ...] = ()  # of a column for each
    names: str | None = None  # a list beside the answers' list that says whose they are

    def read(self, row: Row) -> tuple[list[str], list[Any]]:
        """The names of the answers and the answers; in an object and in columns of their own, nulls are none."""
        value = row.get(self.columns[0])
        if self.suffixes or isinstance(value, dict):
            both = zip(self.suffixes, map(row.get, self.columns), strict=True) if self.suffixes else value.items()
            found = {name: answer for name, answer in both if answer is not None}
            names = list(map(plain_name, found))
            if len(set(names)) < len(names):
                raise BadRow(f'two answers of "{self.columns[0]}" have one name')
            return names, list(found.values())
        if not isinstance(value, list):
            raise BadRow(f'"{self.columns[0]}" must be a list of answers')
        names = row.get(self.names) if self.names else None
        if isinstance(names, list) and len(names) == len(value):
            return [plain_name(str(name)) for name in names], value
        return [f"#{place}" for place in range(len(value))], value


def find_listed(look: Look, named: dict[str, list[str]]) -> Listed | None:
    if "answers" in named:
        return Listed((named["answers"][0],), names=_names_beside(look, named["answers"][0]))
    for column in look.find_all(*ANSWER_LISTS):
        lists = [value for value in look.values[column] if isinstance(value, list)]
        if look.all_are(column, list) and any(
            part is not None and _is_answer(part) for value in lists for part in value
        ):
            return Listed((column,), names=_names_beside(look, column))
        if look.all_are(column, dict) and all(map(_is_keyed, look.values[column])):
            return Listed((column,))
    return _columns_beside(look)


def _names_beside(look: Look, column: str) -> str | None:
    return next((name for name in look.find_all(*NAME_LISTS) if name != column and look.all_are(name, list)), None)


def _is_keyed(value: Any) -> bool:
    """An object with one answer under each key, rather than an answer or a table of columns."""
    if not isinstance(value, dict) or OF_ONE_ANSWER & set(map(plain_name, value)):
        return False
    return any(part is not None for part in value.values()) and all(map(_is_answer, value.values()))


def _is_answer(value: Any) -> bool:
    if isinstance(value, dict):
        return bool(OF_ONE_ANSWER & set(map(plain_name, value)))
    if isinstance(value, list):
        return bool(value) and all(isinstance(turn, dict) and set(ROLE_KEYS) & set(turn) for turn in value)
    return value is None or isinstance(value, str)


def _columns_beside(look: Look) -> Listed | None:
    """Three or more: two answers are `verdicts.py`'s."""
    for stem in STEMS:
        for family in FAMILIES:
            found = [look.find(f"{stem}_{suffix}", f"{stem}{suffix}", f"{suffix}_{stem}") for suffix in family]
            count = next((i for i, column in enumerate(found) if not column or not look.is_text(column)), len(found))
            if count > 2:
                return Listed(tuple(found[:count]), tuple(family[:count]))  # type: ignore[arg-type]
    return None


def place_of(name: Any, names: list[str]) -> int | None:
    """ "B", "response_b", "Model B" or 2 of a, b, c; "gpt-4" of gpt_4, llama; "b" of a list's second answer (#1)."""
    if isinstance(name, int | float) and not isinstance(name, bool):
        name = f"{name:g}"
    if not isinstance(name, str):
        return None
    plain = plain_name(name)
    short = re.sub(rf"^(?:{'|'.join(STEMS)}|system)_", "", plain)
    for spelled in (plain, short):
        if spelled in names:
            return names.index(spelled)
    place = ord(short) - ord("a") if len(short) == 1 and short.isalpha() else -1
    return place if names[:1] == ["#0"] and 0 <= place < len(names) else None
