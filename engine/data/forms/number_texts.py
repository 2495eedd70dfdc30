"""Answers that a file keeps as numbers: {"question": "2 + 2?", "chosen": 4, "rejected": 5} -> "4" and "5".

Readers of JSON and CSV make numbers of answers that are nothing else. They are read as text again where every value of
a column of answers is one; a line says so, with an example.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from prefuse.engine.data.forms.form import Form
from prefuse.engine.data.forms.look import Look

ANSWER_ROLES = ("chosen", "rejected", "completion", "first answer", "second answer")


def numeric_answers(look: Look, form: Form) -> dict[str, bool]:
    """{column: whether all of its numbers are whole} of the answers that are numbers in every one of the first rows."""
    columns = [column for column, role in form.became if role in ANSWER_ROLES]
    return {
        column: all(value == int(value) for value in look.values[column])
        for column in columns
        if look.values.get(column) and all(map(_is_number, look.values[column]))
    }


def with_texts(
    rows: Iterable[tuple[str, Any]], columns: dict[str, bool], notes: Counter[str]
) -> Iterator[tuple[str, Any]]:
    """The rows with these columns as texts."""
    shown: dict[str, str] = {}  # of each column its first text
    for name, row in rows:
        for column, whole in columns.items() if isinstance(row, dict) else ():
            if _is_number(row.get(column)):
                text = _text_of(row[column], whole)
                note = f'rows whose "{column}" is a number, and is read as its text, such as "{{}}"'
                notes[note.format(shown.setdefault(column, text))] += 1
                row = row | {column: text}
        yield name, row


def _is_number(value: Any) -> bool:
    """A finite one, of any size: the answer to 2^2000 is a number too."""
    finite = isinstance(value, int | float) and value == value and abs(value) != float("inf")
    return finite and not isinstance(value, bool)


def _text_of(number: Any, whole: bool) -> str:
    """As JSON writes it; 4.0 is "4" in a column of whole numbers, which a gap makes floats of in pandas."""
    return str(int(number)) if whole and number == int(number) else json.dumps(number)
