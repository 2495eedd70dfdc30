"""What the values of a verdict mean: which of two answers they prefer, or neither.

They are understood where the names of the two answers, the values themselves, or other columns of the row leave one
reading; else the run stops and asks for --verdict_first (and --verdict_second).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prefuse.engine.data.forms.form import ReadOptions, Row
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.marks import MOST_STRANGE
from prefuse.engine.data.forms.names import plain_name
from prefuse.engine.data.records import BadRow, DataError, SetAside, json_kind

TIES = {"tie", "both", "both_good", "bothgood", "neither", "both_bad", "bothbad", "tie_bothbad", "tie_both_bad", "none",
        "equal", "draw", "same", "no_preference", "unclear", "unsure", "tied", "similar", "about_the_same", "both_same",
        "equally_good", "equally_bad", "both_equal", "both_are_good", "both_are_bad", "no_winner", "tie_both_good",
        "tie_bothgood", "undecided", "equivalent", "tie_inconsistent"}  # fmt: skip
COMPARED = re.compile(r"\W*(\w[\w ]*?) *([<>]+|=+|~|≈) *(\w[\w ]*?)\W*")  # "A>>B", "[[A = B]]"
IN_WORDS = re.compile(  # "A is much better", as a plain name
    r"(.+?)_(?:is_)?(?:(?:much|slightly|significantly|clearly|marginally|somewhat|far|strongly|a_bit|a_little)_)*"
    r"(?:better|preferred|wins|won)(?:_than_.+)?"
)
BOUND = re.compile(r"\s*([<>])\s*(-?[\d.]+)\s*")  # of --verdict_first: ">0.5"
Verdict = Callable[[Any], float]  # value -> 1 if the first is better, 0 if the second is, 0.5 for a tie; may be between
RowVerdict = Callable[[Row], float]


@dataclass(frozen=True)
class Answers:
    """Two answers beside each other."""

    columns: tuple[str, str]
    suffixes: tuple[str, str]


def verdict_of_column(
    look: Look, column: str, answers: Answers, options: ReadOptions, notes: Counter[str]
) -> RowVerdict:
    """Lists hold one verdict of each annotator: the majority counts, and where there is none it is a tie."""
    values = [part for value in look.values[column] for part in (value if isinstance(value, list) else [value])]
    seen = Counter(_key(value) for value in values if value is not None)
    if options.verdict_first is not None:
        one = _as_told(options, seen, column, answers, look.source, notes)
    else:
        one = _known_values(seen, column, answers)
    by_name = None if one else _named_in_the_row(look, column, answers)
    if one is None and by_name is None:
        raise DataError(_ask(look.source, column, seen, answers))

    def read(row: Row) -> float:
        value = row.get(column)
        votes = [part for part in (value if isinstance(value, list) else [value]) if part is not None]
        if not votes:
            raise SetAside(f'no verdict in "{column}"')
        votes = [one(vote) if one else by_name(row, vote) for vote in votes]  # type: ignore[misc]
        if not isinstance(value, list):
            return votes[0]
        first, second = sum(vote > 0.5 for vote in votes), sum(vote < 0.5 for vote in votes)
        return 0.5 if first == second else float(first > second)

    return read


def _ask(source: str, column: str, seen: Counter[Any], answers: Answers) -> str:
    shown = ", ".join(sorted(f"{value:g}" if isinstance(value, float) else value for value in seen)[:8])
    first, second = answers.columns
    values = [value for value in seen if isinstance(value, float)]
    bound = 0 if min(values, default=0) < 0 else 0.5
    is_scale = len(values) == len(seen) > 0 and (bound == 0 or all(0 <= value <= 1 for value in values))
    scale = (
        f'; of numbers on a scale, --verdict_first ">{bound}" if a high one prefers {first}, "<{bound}" if a low one'
    )
    return (
        f'{source}: "{column}" has the values {shown or "null"}, which may say in more than one way whether {first} or '
        f"{second} is better. Fix: --verdict_first with the value (or values, separated by commas) that prefer {first}"
        f"{scale if is_scale else ''}."
    )


# ---------------------------------------------------------------------------------------------------------
# Values that are known


def _known_values(seen: Counter[Any], column: str, answers: Answers) -> Verdict | None:
    words = {value for value in seen if isinstance(value, str)}
    numbers = {value for value in seen if not isinstance(value, str)}
    if words - TIES and not numbers:
        words -= {word for word in words if "=" in word}
        table = table_of_words(answers)
        if sum(seen[word] for word in words - set(table)) <= MOST_STRANGE * seen.total():
            return _looked_up(table, column)
    elif numbers and not words - TIES:
        if any(value not in (0, 1, 2) for value in numbers) and all(1 <= value <= 2 for value in numbers):
            return lambda value: _preference(value, column)
        if (table := _table_of_numbers(numbers, answers)) is not None:
            return _looked_up(table | dict.fromkeys(TIES, 0.5), column)
    elif words and not numbers:  # ties alone
        return _looked_up(table_of_words(answers), column)
    return None


def _key(value: Any) -> Any:
    """Words as names are compared, numbers as numbers, whether or not they stand in quotes."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return _plain_verdict(value)
    if isinstance(value, bool):
        return str(value).lower()
    return float(value) if isinstance(value, int | float) else json_kind(value)


def _plain_verdict(value: str) -> str:
    """ "A is much better" is "a", "A >> B" is "a>b" and "A == B" is "a=b"; the degree is left out."""
    if compared := COMPARED.fullmatch(value):
        left, sign, right = compared.groups()
        return f"{plain_name(left)}{sign[0] if sign[0] in '<>' else '='}{plain_name(right)}"
    name = plain_name(value)
    in_words = IN_WORDS.fullmatch(name)
    return in_words[1] if in_words else name


def table_of_words(answers: Answers) -> dict[Any, float]:
    table: dict[Any, float] = dict.fromkeys(TIES, 0.5)
    for column, suffix, verdict in zip(answers.columns, answers.suffixes, (1.0, 0.0), strict=True):
        number = "1" if verdict else "2"
        order = ["first", "1st", "left"] if verdict else ["second", "2nd", "right"]
        ways = [suffix, column, *order] + [
            f"{noun}_{suffix}" for noun in ("model", "response", "answer", "assistant", "output")
        ]
        table |= dict.fromkeys(map(plain_name, ways), verdict)
        if suffix in ("a", "b", "left", "right"):
            table |= {f"{noun}_{number}": verdict for noun in ("response", "answer", "model")}
    if answers.suffixes == ("a", "b"):
        table["c"] = 0.5  # what judges of A and B are told to answer for a tie
    words = {name: verdict for name, verdict in table.items() if verdict != 0.5}
    for left, verdict in words.items():
        for right, other in words.items():
            if verdict != other:
                table |= {f"{left}>{right}": verdict, f"{left}<{right}": other, f"{left}={right}": 0.5}
    return table


def _table_of_numbers(numbers: set[float], answers: Answers) -> dict[Any, float] | None:
    """None where the values leave two readings: 0 and 1 may be places, or no and yes to "is the first one better?"."""
    if answers.suffixes == ("0", "1") and numbers <= {0, 1}:
        return {0.0: 1.0, 1.0: 0.0}  # the names of the columns
    if answers.suffixes == ("1", "2") and numbers <= {1, 2}:
        return {1.0: 1.0, 2.0: 0.0}
    if 2 in numbers and numbers <= {1, 2}:
        return {1.0: 1.0, 2.0: 0.0}  # places counted from 1
    return None


def _looked_up(table: dict[Any, float], column: str) -> Verdict:
    def read(value: Any) -> float:
        verdict = table.get(_key(value))
        if verdict is None:
            raise BadRow(f'"{column}" is {value!r:.40}, which is not one of its other rows\' values')
        return verdict

    return read


def _preference(value: Any, column: str) -> float:
    """A real preference p from 1 (the first) to 2 (the second); 1.5 is a tie, and its distance from it the weight."""
    number = _key(value)
    if number in TIES:
        return 0.5
    if not isinstance(number, float) or not 1 <= number <= 2:
        raise BadRow(f'"{column}" is {value!r:.40}, expected a number from 1 (the first answer) to 2 (the second)')
    return 2 - number


# ---------------------------------------------------------------------------------------------------------
# Values that other columns of the row explain


def _named_in_the_row(look: Look, column: str, answers: Answers) -> Callable[[Row, Any], float] | None:
    """The verdict is the name of the better answer's model (model_a, model_b), or the text of the better answer."""
    ways = [answers.columns, *filter(None, (model_columns(look, answers),))]
    rows = [row for row in look.first if row.get(column) is not None and not isinstance(row[column], list)]
    for columns in ways:
        found = sum(_which(row, row[column], columns) is not None for row in rows)
        if rows and found >= (1 - MOST_STRANGE) * len(rows):

            def read(row: Row, value: Any, columns: tuple[str, str] = columns) -> float:
                verdict = _which(row, value, columns)
                if verdict is None:
                    both = " and ".join(columns)
                    raise BadRow(f'"{column}" is {value!r:.40}, which does not say one of its {both}')
                return verdict

            return read
    return None


def model_columns(look: Look, answers: Answers) -> tuple[str, str] | None:
    """The names of the two answers' models."""
    for noun in ("model", "model_name", "generator", "policy", "system", "name"):
        both = tuple(
            look.find(f"{noun}_{suffix}", f"{noun}{suffix}", f"{suffix}_{noun}", f"{plain_name(column)}_{noun}")
            for column, suffix in zip(answers.columns, answers.suffixes, strict=True)
        )
        if all(both):
            return both  # type: ignore[return-value]
    return None


def _which(row: Row, value: Any, columns: tuple[str, str]) -> float | None:
    """1 if the value is what the first column holds, 0 if it is what the second holds; None if neither or both do."""
    if _key(value) in TIES:
        return 0.5
    same = [row.get(column) == value for column in columns]
    return None if same[0] == same[1] else float(same[0])


# ---------------------------------------------------------------------------------------------------------
# Values that the user explains


def _as_told(
    options: ReadOptions, seen: Counter[Any], column: str, answers: Answers, source: str, notes: Counter[str]
) -> Verdict:
    """--verdict_first lists the values of the first answer, or says from where on numbers are ("<0.5").

    The others prefer the second one, but for the known words for a tie, and 0 among signed numbers. Where others of
    several meanings are left, --verdict_second must say which of them prefer the second answer; the rest are ties.
    """
    told = str(options.verdict_first)
    if bound := BOUND.fullmatch(told):
        return _beyond(bound[1] == ">", float(bound[2]), seen, column)
    first = {_key(part) for part in told.split(",")}
    second = {_key(part) for part in str(options.verdict_second).split(",")} if options.verdict_second else None
    signed = any(isinstance(value, float) and value < 0 for value in (*first, *seen))

    def is_tie(key: Any) -> bool:
        return key in TIES or (signed and key == 0) or (isinstance(key, str) and "=" in key)

    others = {key for key in seen if key not in first and not is_tie(key)}
    if second is None and len(others) > 1 and not _mean_one_thing(first, others, answers):
        shown = ", ".join(sorted(f"{key:g}" if isinstance(key, float) else key for key in others)[:8])
        raise DataError(
            f'{source}: beside {told}, "{column}" has the values {shown}. Fix: --verdict_second with those that prefer '
            f"{answers.columns[1]}; the rest are ties"
        )

    def read(value: Any) -> float:
        key = _key(value)
        if key in first or is_tie(key):
            return 1.0 if key in first else 0.5
        shown = f"{key:g}" if isinstance(key, float) else key
        prefers = second is None or key in second
        taken = f"prefers {answers.columns[1]}" if prefers else "is a tie"
        notes[f'rows whose "{column}" is {shown:.40}, which {taken}'] += 1
        return 0.0 if prefers else 0.5

    return read


def _mean_one_thing(first: set[Any], others: set[Any], answers: Answers) -> bool:
    """Degrees of one verdict: all numbers on the other side of 0, or all words that are known to be of one answer."""
    numbers = [key for key in (*first, *others) if isinstance(key, float)]
    if len(numbers) == len(first) + len(others):
        sides = [{key > 0 for key in keys} for keys in (first, others)]
        return all(len(side) == 1 for side in sides) and sides[0] != sides[1]
    table = table_of_words(answers)
    return {table.get(key) for key in others} == {0.0}


def _beyond(high: bool, bound: float, seen: Counter[Any], column: str) -> Verdict:
    """Numbers on a scale; between 0 and 1 with a middle of 0.5 they say how sure the preference is."""
    numbers = [key for key in seen if isinstance(key, float)]
    is_probability = bound == 0.5 and all(0 <= key <= 1 for key in numbers)

    def read(value: Any) -> float:
        key = _key(value)
        if key in TIES or key == bound:
            return 0.5
        if not isinstance(key, float) or key != key or (is_probability and not 0 <= key <= 1):
            raise BadRow(f'"{column}" is {value!r:.40}, expected a number{" from 0 to 1" if is_probability else ""}')
        if is_probability:
            return key if high else 1 - key
        return float((key > bound) == high)

    return read
