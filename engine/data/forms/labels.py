"""Answers with a label or a score: labelled completions.

What a label's values mean is decided for the whole source, from the vocabulary that its first rows show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prefuse.engine.data.forms.demonstrations import Answers, find_answers
from prefuse.engine.data.forms.form import Form, ReadOptions, Row, Tally
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import BAD_FLAGS, FLAGS, LABELS, SCORES
from prefuse.engine.data.forms.rankings import _number as number_of
from prefuse.engine.data.records import BadRow, DataError, Record, SetAside, json_kind

WORDS = (  # good, bad
    ("true", "false"), ("up", "down"), ("thumbs_up", "thumbs_down"), ("thumb_up", "thumb_down"),
    ("thumbsup", "thumbsdown"), ("good", "bad"), ("yes", "no"), ("positive", "negative"), ("like", "dislike"),
    ("liked", "disliked"), ("desirable", "undesirable"),
    ("chosen", "rejected"), ("accepted", "rejected"), ("accept", "reject"),
    ("correct", "incorrect"), ("+1", "-1"), ("1", "0"), ("👍", "👎"),
)  # fmt: skip


def find_labelled(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    column = named["label"][0] if "label" in named else look.find(*LABELS) or _flag(look, FLAGS)
    says_bad = column is None
    column = column or _flag(look, BAD_FLAGS)
    if column is None:
        return None
    look.used.add(column)
    answers = find_answers(look, named)
    if answers is None:
        return None
    meaning = _vocabulary(look, column)

    def read(name: str, row: Row) -> Iterable[Record]:
        if row.get(column) is None:
            raise SetAside(f'no value in "{column}"')
        yield answers.read(name, row, label=meaning(row[column]) != says_bad)

    return _form("labelled", answers, (column, "label, where true is bad" if says_bad else "label"), read)


def _flag(look: Look, names: tuple[str, ...]) -> str | None:
    return next((column for column in look.find_all(*names) if look.all_are(column, bool)), None)


def find_scored(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    """Ratings become labels by thresholds; the rows between them are set aside."""
    column = score_column(look, named, options)
    if column is None:
        return None
    look.used.add(column)
    answers = find_answers(look, named)
    if answers is None:
        return None
    good, bad = options.good_from, options.bad_to
    if good is not None and bad is not None and not bad < good:
        raise DataError(f"bad_to {bad:g} must be below good_from {good:g}")

    def read(name: str, row: Row) -> Iterable[Record]:
        value = number_of(row.get(column))
        if row.get(column) is None:
            raise SetAside(f'no value in "{column}"')
        if value is None:
            raise BadRow(f'"{column}" is {row[column]!r:.40}, {json_kind(row[column])}; expected a number')
        if options.keep_scores:
            yield answers.read(name, row, scores={"completion": value})
            return
        if good is None and bad is None:
            raise DataError(_ask_for_thresholds(look, column))
        if not ((good is not None and value >= good) or (bad is not None and value <= bad)):
            raise SetAside(f'its "{column}" is between good and bad ({_thresholds(options)})')
        yield answers.read(name, row, label=good is not None and value >= good, scores={"completion": value})

    return _form(
        "scored",
        answers,
        (column, "score" if options.keep_scores else f"label, {_thresholds(options)}"),
        read,
    )


def score_column(look: Look, named: dict[str, list[str]], options: ReadOptions) -> str | None:
    """The column of numbers that say how good an answer is."""
    asked = options.score_column or named.get("score", [None])[0]
    if asked:
        if asked not in look.values:
            raise DataError(f'{look.source}: no column "{asked}" for --score_column; it has {", ".join(look.values)}')
        return asked
    found = [
        column for column in look.find_all(*SCORES) if look.is_numbers(column) or _are_numbers(look.values[column])
    ]
    if len(found) > 1:
        raise DataError(
            f"{look.source}: {' and '.join(found)} may each say how good an answer is. Fix: --score_column {found[0]}"
        )
    return found[0] if found else None


def _are_numbers(values: list[Any]) -> bool:
    return bool(values) and all(number_of(value) is not None for value in values)


def _thresholds(options: ReadOptions) -> str:
    good = "" if options.good_from is None else f"good from {options.good_from:g}"
    bad = "" if options.bad_to is None else f"bad to {options.bad_to:g}"
    return ", ".join(filter(None, (good, bad))) or "good and bad by --good_from, --bad_to"


def _ask_for_thresholds(look: Look, column: str) -> str:
    numbers = [number for number in map(number_of, look.values[column]) if number is not None]
    span = f"from {min(numbers):g} to {max(numbers):g}" if numbers else "no number yet"
    return (
        f'{look.source}: "{column}" says how good an answer is ({span}), and not from where on it is a good one. '
        f"Fix: --good_from and --bad_to, as in --good_from 4 --bad_to 2 for stars; or --columns unused={column}"
    )


def _form(kind: str, answers: Answers, role: tuple[str, str], read: Any) -> Form:
    return Form(
        kind, "/".join([*answers.columns, role[0]]), tuple(answers.columns), (*answers.became, role), read,
        answers.prompt, as_turns=answers.as_turns, optional=(*answers.optional, role[0]), tally=Tally(answers.notes),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# What a label means


def _vocabulary(look: Look, column: str) -> Callable[[Any], bool]:
    values = look.values[column]
    numbers = {value for value in values if isinstance(value, int | float) and not isinstance(value, bool)}
    words = {_word(value) for value in values if isinstance(value, str)}
    table: dict[Any, bool] = {}
    if numbers <= {0, 1} or numbers <= {1, -1}:
        table = {1: True, -1 if -1 in numbers else 0: False}
    elif len(numbers) > 1 or not any(isinstance(value, bool | str) for value in values):
        raise DataError(_other_values(look, column, numbers))
    known = [dict(zip(pair, (True, False), strict=True)) for pair in WORDS]
    fitting = max(known, key=lambda pair: sum(word in pair for word in words))
    strange = words - set(fitting)
    if len(strange) > 1 or (strange and all(isinstance(value, str) and _word(value) in strange for value in values)):
        raise DataError(_other_values(look, column, words))
    table |= fitting if words else {}

    def read(value: Any) -> bool:
        if isinstance(value, bool):
            return value
        key = _word(value) if isinstance(value, str) else value
        meant = table.get(key) if isinstance(key, str | int | float) else None
        if meant is None:
            raise BadRow(f'"{column}" is {value!r:.40}, {json_kind(value)}; expected true or false')
        return meant

    return read


def _word(value: str) -> str:
    return (
        value.strip().lower().replace(" ", "_").replace("-", "_")
        if value.strip() not in ("+1", "-1")
        else value.strip()
    )


def _other_values(look: Look, column: str, values: set[Any]) -> str:
    shown = ", ".join(sorted(map(str, values))[:8])
    return (
        f'{look.source}: "{column}" has the values {shown}; expected true and false, 1 and 0, 1 and -1, up and down, '
        f"good and bad, or the like. Fix: for a score, --score_column {column} --good_from ... --bad_to ...; else "
        f"--columns unused={column}"
    )
