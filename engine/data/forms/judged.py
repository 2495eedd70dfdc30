"""What says how good each of several answers is: numbers beside them or in them, the best one's name, an order.

    {"responses": ["A", "B"], "scores": [8, 3]}         or [true, false], or ranks
    {"responses": {"gpt": "A", "llama": "B"}, "winner": "gpt"}
    {"response_a": "A", "response_b": "B", "response_c": "C", "ranking": "A>C>B"}
    {"responses": ["A", "B", "C"], "label": [0, 1, 0]}

Goodness is a number for each answer, more is better; None of an answer that an order leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefuse.engine.data.forms.form import ReadOptions, Row
from prefuse.engine.data.forms.listed import Listed, place_of
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.marks import MOST_STRANGE
from prefuse.engine.data.forms.names import BEST_INDEX, BEST_NAMES, ORDERS, SCORE_LISTS, plain_name
from prefuse.engine.data.forms.ratings import direction_of, is_rank, number_of, rating_reader
from prefuse.engine.data.forms.shares import share_column, shares_of_each
from prefuse.engine.data.forms.verdict_values import TIES
from prefuse.engine.data.records import BadRow, DataError, SetAside

SCORE_KEYS = (
    "overall_score", "score", "rating", "reward", "rank", "ranking", "pm_score", "votes", "upvotes", "selected",
    "chosen", "preferred", "is_chosen", "correct", "is_correct",
)  # fmt: skip
Goodness = Callable[[Row, list[str], list[Any]], list[float | None]]  # (row, names of its answers, they themselves)


@dataclass(frozen=True)
class Judged:
    """What says how good the answers are: its columns (none: a key inside the answers), its words, how it is read."""

    columns: tuple[str, ...]
    words: str
    read: Goodness


def find_judged(look: Look, listed: Listed, named: dict[str, list[str]], options: ReadOptions) -> Judged | None:
    """Numbers beside the answers, an order of their names, the best one's index, name or text, or numbers in them."""
    asked = named["scores"][0] if "scores" in named else None
    if order := _order(look, listed, asked):
        return order
    if scores := _score_list(look, listed, asked, options):
        return _by_scores(look, scores, direction_of(scores, options))
    if asked:
        raise DataError(f'{look.source}: "{asked}" holds no numbers and no order, one for each answer of a row')
    if listed.suffixes and (columns := _score_columns(look, listed)):
        return columns
    if share := share_column(look, lambda column, fits: _nearly_all(look, column, fits, listed)):
        return _by_shares(share)
    if best := _best(look, listed):
        return best
    return _score_key(look, listed, options)


def _score_list(look: Look, listed: Listed, asked: str | None, options: ReadOptions) -> str | None:
    if asked or options.score_column:
        column = asked or (options.score_column or "").removeprefix("-")
        return column if look.all_are(column, list, dict) else None
    found = [column for column in look.find_all(*SCORE_LISTS) if look.all_are(column, list)]
    found += [column for column in look.find_all(*SCORE_LISTS) if _nearly_all(look, column, _has_its_names, listed)]
    if len(found) > 1:
        raise DataError(
            f"{look.source}: {' and '.join(found)} may each say how good the answers are. "
            f"Fix: --columns scores={found[0]}"
        )
    return found[0] if found else None


def _nearly_all(look: Look, column: str, fits: Callable[..., bool], listed: Listed) -> bool:
    """Whether `fits(value, names, answers)` in (nearly) all first rows that have a value in the column, ties aside."""
    rows = [row for row in look.first if row.get(column) is not None and not _is_tie(row[column])]
    found = 0
    for row in rows:
        try:
            found += fits(row[column], *listed.read(row))
        except BadRow:
            continue  # the row is bad, and is named where it is read
    return bool(rows) and found >= (1 - MOST_STRANGE) * len(rows)


def _is_tie(value: Any) -> bool:
    return isinstance(value, str) and plain_name(value) in TIES


def _has_its_names(value: Any, names: list[str], answers: list[Any]) -> bool:
    """An object with the name of every answer among its keys."""
    return isinstance(value, dict) and {place_of(name, names) for name in value} >= set(range(len(names)))


def _by_scores(look: Look, column: str, sign: int) -> Judged:
    parts = [part for value in look.values[column] for part in _parts(value)]
    number = rating_reader(parts)

    def read(row: Row, names: list[str], answers: list[Any]) -> list[float | None]:
        found = row[column]
        if isinstance(found, dict):
            by_place = {place_of(name, names): value for name, value in found.items()}
            found = [by_place.get(place) for place in range(len(names))]
        if not isinstance(found, list) or len(found) != len(names):
            raise BadRow(f'"{column}" must be a list of {len(names)} numbers, one for each answer')
        return [sign * _number(value, column, number) for value in found]

    return Judged((column,), "ranks, the lowest is the best" if sign < 0 and is_rank(column) else _scores(sign), read)


def _by_shares(column: str) -> Judged:
    def read(row: Row, names: list[str], answers: list[Any]) -> list[float | None]:
        shares = shares_of_each(row[column], names)
        if shares is None:
            raise BadRow(f'"{column}" is {row[column]!r:.40}, expected {len(names)} numbers that add up to 1')
        return [*shares]

    return Judged((column,), "a share of each answer", read)


def _scores(sign: int) -> str:
    return "scores" if sign > 0 else "scores, the lowest is the best"


def _number(value: Any, column: str, number: Callable[[Any, str], float]) -> float:
    """A number, or true (1) and false (0)."""
    if value is None:
        raise BadRow(f'an answer has no number in "{column}"')
    return float(value) if isinstance(value, bool) else number(value, column)


def _parts(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []


def _score_columns(look: Look, listed: Listed) -> Judged | None:
    """score_a, score_b, score_c beside the answers of these suffixes."""
    for noun in ("score", "rating", "reward", "votes", "rank", "ranking"):
        columns = [look.find(f"{noun}_{suffix}", f"{noun}{suffix}") for suffix in listed.suffixes]
        if all(columns):
            return _by_columns(look, dict(zip(listed.suffixes, columns, strict=True)))  # type: ignore[arg-type]
    return None


def _by_columns(look: Look, column_of: dict[str, str]) -> Judged:
    number = rating_reader([value for column in column_of.values() for value in look.values[column]])
    sign = -1 if any(map(is_rank, column_of.values())) else 1

    def read(row: Row, names: list[str], answers: list[Any]) -> list[float | None]:
        return [sign * _number(row.get(column_of[name]), column_of[name], number) for name in names]

    return Judged(tuple(column_of.values()), _scores(sign), read)


def _score_key(look: Look, listed: Listed, options: ReadOptions) -> Judged | None:
    """Numbers inside the answers."""
    answers = [part for column in listed.columns for value in look.values[column] for part in _parts(value)]
    objects = [part for part in answers if isinstance(part, dict)]
    keys = {plain_name(key): key for answer in reversed(objects) for key in answer}
    asked = (options.score_column or "").removeprefix("-")
    for wanted in [asked] if asked else SCORE_KEYS:
        key = keys.get(plain_name(wanted))
        values = [answer[key] for answer in objects if answer.get(key) is not None] if key else []
        if key and any(isinstance(value, bool) or number_of(value) is not None for value in values):
            return _by_key(key, values, direction_of(key, options))
    return None


def _by_key(key: str, values: list[Any], sign: int) -> Judged:
    number = rating_reader(values)

    def read(row: Row, names: list[str], answers: list[Any]) -> list[float | None]:
        found = [part.get(key) if isinstance(part, dict) else None for part in answers]
        return [sign * _number(value, key, number) for value in found]

    return Judged((), f"their {key}{', the lowest is the best' if sign < 0 and not is_rank(key) else ''}", read)


# ---------------------------------------------------------------------------------------------------------
# The best one, by its place, name or text


def _best(look: Look, listed: Listed) -> Judged | None:
    if not listed.suffixes and (both := _two_places(look, listed)):
        return both
    index = look.find(*BEST_INDEX)
    if index and look.is_numbers(index) and not listed.suffixes:
        return _by_index(look, listed, index)
    column = next((name for name in look.find_all(*BEST_NAMES) if _nearly_all(look, name, _names_one, listed)), None)
    return _by_name(column) if column else None


def _by_name(column: str) -> Judged:
    def read(row: Row, names: list[str], answers: list[Any]) -> list[float | None]:
        if _is_tie(row[column]):
            raise SetAside("a tie: no answer is preferred")
        if not _names_one(row[column], names, answers):
            raise BadRow(f'"{column}" is {row[column]!r:.40}, which names none of its {len(names)} answers')
        return list(map(float, _is_best(row[column], names, answers)))

    return Judged((column,), "name of the best answer", read)


def _two_places(look: Look, listed: Listed) -> Judged | None:
    """The places of the better and of the worse answer."""
    columns = look.find("chosen", "chosen_index", "chosen_idx"), look.find("rejected", "rejected_index", "rejected_idx")
    if not all(columns) or not all(look.is_numbers(column) for column in columns):
        return None
    chosen, rejected = columns
    lowest = _lowest_index(look, listed.columns[0], chosen or "", rejected or "")

    def read(row: Row, names: list[str], answers: list[Any]) -> list[float | None]:
        places = [number_of(row.get(column)) for column in columns]
        places = [None if place is None else place - lowest for place in places]
        if places[0] == places[1] or not all(place in range(len(names)) for place in places):
            raise BadRow(f'"{chosen}" and "{rejected}" are no two places of its {len(names)} answers')
        return [{places[0]: 1.0, places[1]: 0.0}.get(place) for place in range(len(names))]

    return Judged((chosen, rejected), f"place among the answers{', from 1' if lowest else ''}", read)  # type: ignore


def _names_one(value: Any, names: list[str], answers: list[Any]) -> bool:
    return sum(_is_best(value, names, answers)) == 1


def _is_best(value: Any, names: list[str], answers: list[Any]) -> list[bool]:
    """None is, where its text is one answer's and its name another's."""
    place = place_of(value, names)
    by_text = [isinstance(value, str) and answer == value for answer in answers]
    by_name = [i == place for i in range(len(names))]
    return by_name if not any(by_text) else by_text if place is None or by_text == by_name else [False] * len(names)


def _by_index(look: Look, listed: Listed, best: str) -> Judged:
    lowest = _lowest_index(look, listed.columns[0], best)

    def read(row: Row, names: list[str], answers: list[Any]) -> list[float | None]:
        index = number_of(row[best])
        if index is None or index != int(index) or not lowest <= index < lowest + len(names):
            raise BadRow(f'"{best}" is {row[best]!r:.40}, no index of {len(names)} answers counted from {lowest}')
        return [float(i + lowest == index) for i in range(len(names))]

    return Judged((best,), f"index of the best answer{', counted from 1' if lowest else ''}", read)


def _lowest_index(look: Look, column: str, best: str, *others: str) -> int:
    """Whether the index of the best answer (and of others) counts from 0 or from 1, by the first rows."""
    rows = [row for row in look.first if isinstance(row.get(column), list)]
    places = [(number_of(row.get(index)), len(row[column])) for row in rows for index in (best, *others)]
    if any(place == 0 for place, _ in places):
        return 0
    if any(place == count for place, count in places):
        return 1
    if plain_name(best).endswith(("index", "idx")):
        return 0
    raise DataError(
        f'{look.source}: "{best}" says which answer of "{column}" is the best, and its values may count from 0 or from '
        f"1. Fix: --columns scores=NAME with a column of numbers, one for each answer; or name the column {best}_index "
        "if it counts from 0"
    )


# ---------------------------------------------------------------------------------------------------------
# An order of names: "A>C>B", ["gpt", "llama"]


def _order(look: Look, listed: Listed, asked: str | None) -> Judged | None:
    columns = [asked] if asked else look.find_all(*ORDERS)
    column = next((name for name in columns if _nearly_all(look, name, _is_order, listed)), None)
    return _by_order(column) if column else None


def _is_order(value: Any, names: list[str], answers: list[Any]) -> bool:
    return ranks_in_order(value, names) is not None


def _by_order(column: str) -> Judged:
    def read(row: Row, names: list[str], answers: list[Any]) -> list[float | None]:
        goodness = ranks_in_order(row[column], names)
        if goodness is None:
            raise BadRow(f'"{column}" is {str(row[column])!r:.40}, no order of its {len(names)} answers')
        return goodness

    return Judged((column,), "order, the best first", read)


def ranks_in_order(value: Any, names: list[str]) -> list[float | None] | None:
    """ "A > C = B" or ["A", "C", "B"]: the goodness of each name, None of those left out; None if it is no order."""
    if isinstance(value, str) and re.search(r"[<>≻≺]", value):
        groups = [re.split(r"[=~≈]+", group) for group in re.split(r"[<>≻≺]+", value.strip("[] "))]
        if re.search(r"[<≺]", value):
            if re.search(r"[>≻]", value):
                return None
            groups.reverse()
    elif isinstance(value, list) and value and all(isinstance(part, str | list) for part in value):
        groups = [part if isinstance(part, list) else [part] for part in value]
    else:
        return None
    lowest = _lowest_place([name for group in groups for name in group], names)
    places = [[place_of(name, names) if lowest is None else int(name) - lowest for name in group] for group in groups]
    flat = [place for group in places for place in group]
    if len(set(flat)) < len(flat) or len(flat) < 2 or not all(place in range(len(names)) for place in flat):
        return None
    goodness: list[float | None] = [None] * len(names)
    for worse, group in enumerate(reversed(places)):
        for place in group:
            goodness[place] = float(worse)  # type: ignore[index]
    return goodness


def _lowest_place(order: list[Any], names: list[str]) -> int | None:
    """Whether the numbers of a list's answers count from 0 or from 1, by the order itself; None if they may do both."""
    numbers = [int(name) for name in order if isinstance(name, str) and name.strip().isdecimal()]
    if names[:1] != ["#0"] or len(numbers) < len(order):
        return None
    return 0 if 0 in numbers else 1 if len(names) in numbers else None
