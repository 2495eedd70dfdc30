"""Answers with a label or a score: labelled completions.

What a label's values mean is decided for the whole source, from the vocabulary that its first rows show.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from prefuse.engine.data.forms.demonstrations import Answers, find_answers
from prefuse.engine.data.forms.form import Form, ReadOptions, Row, Tally
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.marks import BAD_WORDS, GOOD_WORDS, MOST_STRANGE, is_flag, is_labels, label_key
from prefuse.engine.data.forms.names import BAD_FLAGS, FLAGS, LABELS, SCORES, STATUSES, plain_name
from prefuse.engine.data.forms.ratings import are_ratings, direction_of, number_of, rating_reader
from prefuse.engine.data.records import BadRow, DataError, Record, SetAside, json_kind


def find_labelled(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    column = named["label"][0] if "label" in named else _label_column(look, options)
    if column is None:
        return None
    says_bad = plain_name(column.rpartition(".")[2]) in BAD_FLAGS and is_flag(look, column)
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


def _label_column(look: Look, options: ReadOptions) -> str | None:
    """A column that is named a label, a flag of true and false, or a status that is a good or a bad word."""
    if column := next((name for name in look.find_all(*LABELS) if name != options.score_column), None):
        return column
    flags = [name for name in look.find_all(*FLAGS, *BAD_FLAGS) if is_flag(look, name)]
    return (flags or [name for name in look.find_all(*STATUSES) if is_labels(look.values[name])] or [None])[0]


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

    number, sign = rating_reader(look.values[column]), direction_of(column, options)

    def read(name: str, row: Row) -> Iterable[Record]:
        if row.get(column) is None:
            raise SetAside(f'no value in "{column}"')
        value = sign * number(row[column], column)
        if options.keep_scores:
            yield answers.read(name, row, scores={"completion": value})
            return
        if good is None and bad is None:
            raise DataError(_ask_for_thresholds(look, column, sign))
        if not ((good is not None and value >= good) or (bad is not None and value <= bad)):
            raise SetAside(f'its "{column}" is between good and bad ({_thresholds(options)})')
        yield answers.read(name, row, label=good is not None and value >= good, scores={"completion": value})

    negative = "" if sign > 0 else "negative "
    label = f"label, {negative and 'of the negative score '}{_thresholds(options)}"
    return _form("scored", answers, (column, f"{negative}score" if options.keep_scores else label), read)


def score_column(look: Look, named: dict[str, list[str]], options: ReadOptions) -> str | None:
    """The column of numbers that say how good an answer is."""
    asked = options.score_column or named.get("score", [None])[0]
    if asked:
        column = asked if asked in look.values else asked.removeprefix("-")
        if column not in look.values:
            raise DataError(f'{look.source}: no column "{asked}" for --score_column; it has {", ".join(look.values)}')
        return column
    found = [column for column in look.find_all(*SCORES) if look.is_numbers(column) or are_ratings(look.values[column])]
    if len(found) > 1:
        raise DataError(
            f"{look.source}: {' and '.join(found)} may each say how good an answer is. Fix: --score_column {found[0]}"
        )
    return found[0] if found else None


def _thresholds(options: ReadOptions) -> str:
    good = "" if options.good_from is None else f"good from {options.good_from:g}"
    bad = "" if options.bad_to is None else f"bad to {options.bad_to:g}"
    return ", ".join(filter(None, (good, bad))) or "good and bad by --good_from, --bad_to"


def _ask_for_thresholds(look: Look, column: str, sign: int) -> str:
    numbers = [sign * number for number in map(number_of, look.values[column]) if number is not None]
    span = f"from {min(numbers):g} to {max(numbers):g}" if numbers else "no number yet"
    turned = ", its sign turned, for the lowest is the best" if sign < 0 else ""
    example = "--good_from -1 --bad_to -3" if sign < 0 else "--good_from 4 --bad_to 2 for stars"
    lower = "" if sign < 0 else f"; or --score_column=-{column} if the lowest is the best"
    return (
        f'{look.source}: "{column}" says how good an answer is ({span}{turned}), and not from where on it is a good '
        f"one. Fix: --good_from and --bad_to, as in {example}; or --columns unused={column}{lower}"
    )


def _form(kind: str, answers: Answers, role: tuple[str, str], read: Any) -> Form:
    return Form(
        kind, "/".join([*answers.columns, role[0]]), tuple(answers.columns), (*answers.became, role), read,
        answers.prompt, as_turns=answers.as_turns, optional=(*answers.optional, role[0]), tally=Tally(answers.notes),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# What a label means


def _vocabulary(look: Look, column: str) -> Callable[[Any], bool]:
    """Numbers (also in quotes) are 1 and 0 or 1 and -1; words are known ones, but for a few rows of a source."""
    seen = Counter(map(label_key, look.values[column]))
    numbers = {key for key in seen if isinstance(key, float)}
    words = {key for key in seen if isinstance(key, str)}
    strange = words - GOOD_WORDS - BAD_WORDS
    if not (numbers <= {0, 1} or numbers <= {1, -1}) and (len(numbers) > 1 or not words):
        raise DataError(_other_values(look, column, seen))
    unknown = sum(seen[word] for word in strange)
    if unknown > max(1, MOST_STRANGE * seen.total()) or unknown == seen.total() > 0:
        raise DataError(_other_values(look, column, seen))
    good, bad = GOOD_WORDS | {1.0}, BAD_WORDS | {-1.0 if -1.0 in numbers else 0.0}

    def read(value: Any) -> bool:
        key = label_key(value)
        if key not in good and key not in bad:
            raise BadRow(f'"{column}" is {value!r:.40}, {json_kind(value)}; expected true or false')
        return key in good

    return read


def _other_values(look: Look, column: str, seen: Counter[Any]) -> str:
    shown = ", ".join(sorted(f"{value:g}" if isinstance(value, float) else str(value) for value in seen)[:8])
    return (
        f'{look.source}: "{column}" has the values {shown}; expected true and false, 1 and 0, 1 and -1, up and down, '
        f"good and bad, or the like. Fix: for a score, --score_column {column} --good_from ... --bad_to ...; else "
        f"--columns unused={column}"
    )
