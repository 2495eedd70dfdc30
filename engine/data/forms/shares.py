"""A verdict of one number for each answer, in one column: one-hot, probabilities, scores.

[1, 0]   [0.8, 0.2]   [true, false]   {"a": 1, "b": 0}   {"answer_a": 0.1, "answer_b": 0.9}      also as text
[1, 0, 0]                           the first, the second, a tie
{"chosen": 0, "rejected": 1}        or {"winner": "a"}: a verdict inside an object
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from prefuse.engine.data.forms.form import ReadOptions, Row
from prefuse.engine.data.forms.listed import place_of
from prefuse.engine.data.forms.look import Look, holds_text
from prefuse.engine.data.forms.marks import MOST_STRANGE
from prefuse.engine.data.forms.names import BEST_INDEX, SCORE_LISTS, VERDICTS, VOTES, is_metadata, plain_name
from prefuse.engine.data.forms.ratings import direction_of, is_rank, number_of
from prefuse.engine.data.forms.verdict_values import (
    TIES,
    Answers,
    RowVerdict,
    model_columns,
    table_of_words,
    verdict_of_column,
)
from prefuse.engine.data.records import BadRow, DataError, SetAside
from prefuse.engine.data.sources.tables import json_or_python

ARRAY = re.compile(r"\s*(?:[\w.]*\(\s*)?[\[(]([^\[\](){}]*)[\])]\s*(?:,\s*dtype=[\w.']+\s*)?\)?\s*")
ROUNDING = 0.011  # by which shares that were rounded may miss a sum of 1
BETTER_KEYS = (*VERDICTS, "best", "value", "index")  # of a verdict inside an object
WORSE_KEYS = ("rejected", "loser", "worse", "worst", "other")


def numbers_of_answers(value: Any, place_of: Callable[[str], int | None], count: int) -> list[float] | None:
    """A number for each of `count` answers, and behind them one for a tie if there is one; None of anything else.

    `place_of`: the place of the answer that a key of an object names.
    """
    if isinstance(value, str):
        value = _array_in(value)
    if isinstance(value, dict):
        places = {key: count if plain_name(key) in TIES else place_of(key) for key in value}
        by_place = {place: value[key] for key, place in places.items()}
        if None in by_place or len(by_place) < len(value) or not by_place.keys() >= set(range(count)):
            return None
        value = [by_place[place] for place in range(len(by_place))]
        if any(part is not None for part in value):
            value = [0 if part is None else part for part in value]
    elif not isinstance(value, list) or len(value) not in ({count, 3} if count == 2 else {count}):
        return None
    numbers = [float(part) if isinstance(part, bool) else number_of(part) for part in value]
    return None if None in numbers else numbers  # type: ignore[return-value]


def _array_in(text: str) -> Any:
    """The list or object that a text is, as JSON, Python, numpy ("[1. 0.]") and torch ("tensor([1, 0])") write it."""
    if text.lstrip().startswith("{"):
        return json_or_python(text)
    if not (found := ARRAY.fullmatch(text)):
        return None
    words = re.split(r"\s*,\s*|\s+", found[1].strip(" ,"))
    flags = {"true": True, "false": False}
    return [flags.get(word.lower(), word) for word in words]


def are_shares(numbers: list[float]) -> bool:
    """0 to 1, and 1 in all."""
    return all(0 <= number <= 1 for number in numbers) and abs(sum(numbers) - 1) <= ROUNDING


# ---------------------------------------------------------------------------------------------------------
# Of two answers


def verdict_in_column(
    look: Look, column: str, answers: Answers, options: ReadOptions, notes: Counter[str]
) -> tuple[RowVerdict, str]:
    """How the column's values are read, and what they are, in words."""
    if found := verdict_of_numbers(look, column, answers, options):
        return found
    if options.score_column in (column, f"-{column}"):
        raise DataError(f"{look.source}: --score_column {column} must hold one number for each of its two answers")
    if (inside := _inside(look, column)) is None:
        return verdict_of_column(look, column, answers, options, notes), "verdict"
    words = {0: answers.columns[0], 1: answers.columns[1]}

    def opened(row: Row) -> Row:
        return row if row.get(column) is None else row | {column: inside(row[column], words)}

    first = [opened(row) for row in look.first]
    values = look.values | {column: [row[column] for row in first if row.get(column) is not None]}
    read = verdict_of_column(replace(look, values=values, first=first), column, answers, options, notes)
    return lambda row: read(opened(row)), "verdict"


def verdict_of_numbers(
    look: Look, column: str, answers: Answers, options: ReadOptions
) -> tuple[RowVerdict, str] | None:
    """Shares, or numbers of which the higher one is better; None where they may be votes of several annotators."""
    told = options.score_column in (column, f"-{column}")
    if options.verdict_first is not None and not told:
        return None
    numbers_in = _numbers_in(look, column, answers)
    rows = [row for row in look.first if row.get(column) is not None]
    found = [numbers for row in rows if (numbers := numbers_in(row))]
    widths = Counter(map(len, found))
    width = widths.most_common(1)[0][0] if widths else 0
    most = (1 - MOST_STRANGE) * len(rows)
    listed = sum(not isinstance(row[column], dict) for row in rows)
    if widths[width] < most or not found or (width == 3 and listed and plain_name(column) in VOTES):
        return None
    name = plain_name(column)
    if is_rank(column) or told or name in SCORE_LISTS:
        return _higher(numbers_in, column, direction_of(column, options))
    if sum(map(are_shares, found)) >= most:
        return _share(numbers_in, column, width), "verdict, a share of each answer"
    if width == 3:
        return None
    if listed or {number for numbers in found for number in numbers} <= {1, 2}:
        raise DataError(_ask_for_numbers(look.source, column, bool(listed), answers))
    return _higher(numbers_in, column, 1)


def _numbers_in(look: Look, column: str, answers: Answers) -> Callable[[Row], list[float] | None]:
    words = {name: int(verdict == 0) for name, verdict in table_of_words(answers).items() if verdict in (0, 1)}
    models = model_columns(look, answers)

    def numbers_in(row: Row) -> list[float] | None:
        own = {row.get(model): place for place, model in enumerate(models or ())}
        return numbers_of_answers(row.get(column), lambda key: words.get(plain_name(key), own.get(key)), 2)

    return numbers_in


def _share(numbers_in: Callable[[Row], list[float] | None], column: str, width: int) -> RowVerdict:
    def read(row: Row) -> float:
        numbers = _checked(numbers_in, row, column)
        if len(numbers) != width or not are_shares(numbers):
            raise BadRow(f'"{column}" is {row[column]!r:.40}, expected {width} numbers from 0 to 1 that add up to 1')
        first, second, tie = (*numbers, 0.0)[:3]
        return 0.5 if first == second else (first + tie / 2) / (first + second + tie)

    return read


def _higher(numbers_in: Callable[[Row], list[float] | None], column: str, sign: int) -> tuple[RowVerdict, str]:
    def read(row: Row) -> float:
        first, second = (sign * number for number in _checked(numbers_in, row, column)[:2])
        return 0.5 if first == second else float(first > second)

    return read, f"verdict, a number of each answer, the {'highest' if sign > 0 else 'lowest'} is the best"


def _checked(numbers_in: Callable[[Row], list[float] | None], row: Row, column: str) -> list[float]:
    if row.get(column) is None:
        raise SetAside(f'no verdict in "{column}"')
    if (numbers := numbers_in(row)) is None:
        raise BadRow(f'"{column}" is {row[column]!r:.40}, expected a number for each answer')
    return numbers


def _ask_for_numbers(source: str, column: str, listed: bool, answers: Answers) -> str:
    first, second = answers.columns
    votes = f"; --verdict_first VALUE if each is one annotator's verdict, VALUE for {first}" if listed else ""
    return (
        f'{source}: "{column}" has two numbers a row, which may mean several things. Fix, if they are for {first} and '
        f"{second}: --score_column {column} if the higher one is better, --score_column=-{column} if the lower "
        f"one{votes}."
    )


def _inside(look: Look, column: str) -> Callable[[Any, dict[int, str]], Any] | None:
    """How the verdict is taken out of objects such as {"chosen": 0, "rejected": 1} and {"winner": "a"}; else None."""
    values = look.values[column]
    objects = [value for value in values if isinstance(value, dict)]
    if not objects or len(objects) < (1 - MOST_STRANGE) * len(values):
        return None
    keys = {plain_name(key): key for value in reversed(objects) for key in value}
    better = [key for name, key in keys.items() if name in BETTER_KEYS]
    worse = next((key for name, key in keys.items() if name in WORSE_KEYS), None)
    others = [key for key in keys.values() if key not in (*better, worse) and not is_metadata(key)]
    if len(better) != 1 or any(holds_text(value.get(key)) for value in objects for key in others):
        return None
    places = {frozenset((value.get(better[0]), value.get(worse))) for value in objects} if worse else set()
    are_places = places in ({frozenset((0, 1))}, {frozenset((1, 2))})

    def inside(value: Any, words: dict[int, str]) -> Any:
        if not isinstance(value, dict):
            return value
        if are_places:
            both = number_of(value.get(better[0])), number_of(value.get(worse))
            if None in both or both[0] == both[1]:
                raise BadRow(f'"{column}" is {value!r:.60}, which does not say two places')
            return words[int(both[0] > both[1])]  # type: ignore[operator]
        return value.get(better[0])

    return inside


# ---------------------------------------------------------------------------------------------------------
# Of several answers


def share_column(look: Look, fits: Callable[[str, Callable[..., bool]], bool]) -> str | None:
    """The column that names the best of a list's answers by a share of each: [0, 1, 0].

    A column `labels` is none: beside a list of `completions` it is TRL's form of steps that are right or wrong.
    """
    return next((column for column in look.find_all(*BEST_INDEX, *VERDICTS) if fits(column, is_share_of_each)), None)


def is_share_of_each(value: Any, names: list[str], answers: list[Any]) -> bool:
    return shares_of_each(value, names) is not None


def shares_of_each(value: Any, names: list[str]) -> list[float] | None:
    numbers = numbers_of_answers(value, lambda key: place_of(key, names), len(names))
    return numbers if numbers and len(numbers) == len(names) and are_shares(numbers) else None
