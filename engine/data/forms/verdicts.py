"""Two answers and a verdict: which column says which is better, and what its values mean.

The values are understood where the names of the two answers, or the values themselves, leave one reading; else the run
stops and asks (--verdict_column, --verdict_first).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from prefuse.engine.data.forms.form import Form, ReadOptions, Row, Tally, make_record
from prefuse.engine.data.forms.implicit import split_strings, split_turns
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import VERDICTS, VOTES, answer_names, plain_name
from prefuse.engine.data.forms.pairs import pair
from prefuse.engine.data.forms.prompts import PromptColumns, find_prompt, with_turns_before
from prefuse.engine.data.forms.turns import read_text, turn_of
from prefuse.engine.data.records import BadRow, DataError, Message, Record, SetAside, json_kind

TIES = {"tie", "both", "both_good", "bothgood", "neither", "both_bad", "bothbad", "tie_bothbad", "tie_both_bad", "none",
        "equal", "draw", "same", "no_preference", "unclear", "unsure", "tied", "similar", "about_the_same", "both_same",
        "equally_good", "equally_bad", "both_equal", "both_are_good", "both_are_bad", "no_winner"}  # fmt: skip
COMPARED = re.compile(r"\W*(\w[\w ]*?) *([<>]+|=+|~|≈) *(\w[\w ]*?)\W*")  # "A>>B", "[[A = B]]"
IN_WORDS = re.compile(  # "A is much better", as a plain name
    r"(.+?)_(?:is_)?(?:(?:much|slightly|significantly|clearly|marginally|somewhat|far|strongly|a_bit|a_little)_)*"
    r"(?:better|preferred|wins|won)(?:_than_.+)?"
)
Verdict = Callable[[Any], float]  # value -> 1 if the first is better, 0 if the second is, 0.5 for a tie; may be between


@dataclass(frozen=True)
class Answers:
    columns: tuple[str, str]
    suffixes: tuple[str, str]


def find_verdict(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    answers = _answers(look, named)
    if answers is None:
        return None
    look.used |= set(answers.columns)
    verdicts, read_verdict = _verdict(look, named, answers, options)
    scored = verdicts == _two_scores(look, answers)
    look.used |= set(verdicts)
    prompt = find_prompt(look, named)
    woven = bool(prompt) and all(
        all(_list_of_texts(value) is not None for value in look.values[column] or [None])
        for column in (prompt.text, *answers.columns)
    )
    notes: Counter[str] = Counter()

    def read(name: str, row: Row) -> Iterable[Record]:
        first = read_verdict(row)
        if first == 0.5:
            raise SetAside("a tie: neither answer is preferred")
        columns = answers.columns
        texts = [_woven(row, prompt, side) if woven else read_text(row[side], side) for side in columns]
        if first < 0.5:
            texts.reverse()
        notes["rows whose first answer is the chosen one"] += first > 0.5
        notes["rows whose second answer is the chosen one"] += first < 0.5
        more = {} if first in (0, 1) else {"weight": abs(2 * first - 1)}
        if scored:
            better, worse = sorted((float(row[column]) for column in verdicts), reverse=True)
            more["scores"] = {"chosen": better, "rejected": worse}
        if prompt and not woven:
            yield pair(name, prompt.read(row), *texts, notes, **more)
        else:
            yield _without_prompt(name, texts, notes, more)

    became = [
        *(prompt.became if prompt else ()),
        (answers.columns[0], "first answer"),
        (answers.columns[1], "second answer"),
    ]
    became += [(verdict, "verdict") for verdict in verdicts]
    columns = (*((prompt.text,) if prompt else ()), *answers.columns)
    return Form(
        "pair", "/".join([*columns, *verdicts]), columns, tuple(became), read, prompt.read if prompt else None,
        as_turns=bool(prompt and prompt.as_turns), optional=(*(prompt.optional if prompt else ()), *verdicts),
        tally=Tally(notes),
    )  # fmt: skip


def _without_prompt(name: str, texts: list[Any], notes: Counter[str], more: dict[str, Any]) -> Record:
    """Whole conversations beside each other, as chatbot arenas keep them."""
    if all(isinstance(text, list) for text in texts):
        prompt, chosen, rejected = split_turns(*texts)
    elif all(isinstance(text, str) for text in texts):
        prompt, chosen, rejected = split_strings(*texts, notes)
    else:
        raise BadRow("the two answers must both be strings or both be messages")
    return make_record(name, prompt, {"chosen": chosen, "rejected": rejected}, **more)


def _list_of_texts(value: Any) -> list[str] | None:
    """A list of strings, or the JSON text of one; nulls in it are empty."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, list) or not value or not all(isinstance(text, str | None) for text in value):
        return None
    return [text or "" for text in value]


def _woven(row: Row, prompt: PromptColumns, answers: str) -> list[Message]:
    """[question, question] and [answer, answer] as one conversation."""
    asked, said = _list_of_texts(row[prompt.text]), _list_of_texts(row[answers])
    if asked is None or said is None or len(asked) != len(said) or (prompt.input and row.get(prompt.input)):
        raise BadRow(f'"{prompt.text}" and "{answers}" must be lists of strings of one length, as in other rows')
    if not all(text.strip() for text in (*asked, *said)):
        raise BadRow(f'"{prompt.text}" or "{answers}" has an empty turn')
    turns = [
        turn_of(role, text, column)
        for both in zip(asked, said, strict=True)
        for role, text, column in zip(("user", "assistant"), both, (prompt.text, answers), strict=True)
    ]
    return with_turns_before(row, prompt.system, prompt.history, turns)


# ---------------------------------------------------------------------------------------------------------
# Which columns


def _answers(look: Look, named: dict[str, list[str]]) -> Answers | None:
    if "first" in named and "second" in named:
        columns = named["first"][0], named["second"][0]
        same = 0
        while columns[0][:same] == columns[1][:same] and same < min(map(len, columns)):
            same += 1
        suffixes = tuple(plain_name(column[max(0, same - 1) :]) for column in columns)
        return Answers(columns, suffixes)  # type: ignore[arg-type]
    for first, second, *suffixes in answer_names():
        found = look.find(first), look.find(second)
        if all(found) and all(look.is_text(column) for column in found):
            return Answers(found, tuple(suffixes))  # type: ignore[arg-type]
    return None


def _verdict(look: Look, named: Any, answers: Answers, options: ReadOptions) -> tuple[tuple[str, ...], Any]:
    """The columns that say which answer is better, and how they are read."""
    if not (options.verdict_column or "verdict" in named):
        if one_hot := _one_hot(look):
            return tuple(one_hot.values()), _of_one_hot(one_hot)
        if (scores := _two_scores(look, answers)) and not look.find(*VERDICTS):
            return scores, _of_two_scores(scores)
    column = _verdict_column(look, named, answers, options)
    return (column,), _of_column(look, column, answers, options)


def _two_scores(look: Look, answers: Answers) -> tuple[str, str] | None:
    """score_a and score_b (votes, ...) beside response_a and response_b: the higher one is better."""
    for noun in ("score", "rating", "reward", "votes", "upvotes", "likes"):
        found = tuple(look.find(f"{noun}_{suffix}", f"{noun}{suffix}") for suffix in answers.suffixes)
        if all(found) and all(look.is_numbers(column) for column in found):
            return found  # type: ignore[return-value]
    return None


def _of_two_scores(columns: tuple[str, str]) -> Callable[[Row], float]:
    def read(row: Row) -> float:
        first, second = (row.get(column) for column in columns)
        for column, value in zip(columns, (first, second), strict=True):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise BadRow(f'"{column}" is {value!r:.40}, expected a number')
        return 0.5 if first == second else float(first > second)

    return read


def _verdict_column(look: Look, named: Any, answers: Answers, options: ReadOptions) -> str:
    asked = options.verdict_column or named.get("verdict", [None])[0]
    if asked:
        if asked not in look.values:
            raise DataError(f'{look.source}: no column "{asked}" for --verdict_column; it has {", ".join(look.values)}')
        return asked
    found = look.find_all(*VERDICTS) or look.find_all(*VOTES)
    stem = plain_name(answers.columns[0]).removesuffix(answers.suffixes[0]).strip("_")
    found += [
        column for column in look.find_all(f"preferred_{stem}", f"better_{stem}", f"best_{stem}") if column not in found
    ]
    if len(found) > 1:
        raise DataError(
            f"{look.source}: {' and '.join(found)} may each say which of {' and '.join(answers.columns)} is better. "
            f"Fix: --verdict_column {found[0]}"
        )
    if not found:
        others = [column for column in look.values if column not in look.used]
        raise DataError(
            f"{look.source}: no column says which of {' and '.join(answers.columns)} is better; left are "
            f"{', '.join(others)}. Fix: --verdict_column NAME, or, if one is always better, --columns "
            f"chosen={answers.columns[0]},rejected={answers.columns[1]}"
        )
    return found[0]


def _one_hot(look: Look) -> dict[str, str] | None:
    """winner_model_a, winner_model_b, winner_tie: columns of 0 and 1, with or without the last."""
    columns = {part: look.find(f"winner_model_{part}", f"winner_{part}") for part in ("a", "b", "tie")}
    return {part: column for part, column in columns.items() if column} if columns["a"] and columns["b"] else None


def _of_one_hot(columns: dict[str, str]) -> Callable[[Row], float]:
    def read(row: Row) -> float:
        values = {part: str(row.get(column)) in ("1", "1.0", "True") for part, column in columns.items()}
        if not any(values.values()) and "tie" not in columns:
            return 0.5
        if sum(values.values()) != 1:
            raise BadRow(f"one of {', '.join(columns.values())} must be 1, the others 0")
        return {"a": 1.0, "b": 0.0, "tie": 0.5}[next(part for part, is_true in values.items() if is_true)]

    return read


# ---------------------------------------------------------------------------------------------------------
# What its values mean


def _of_column(look: Look, column: str, answers: Answers, options: ReadOptions) -> Callable[[Row], float]:
    """Lists hold one verdict of each annotator: the majority counts, and where there is none it is a tie."""
    values = [part for value in look.values[column] for part in (value if isinstance(value, list) else [value])]
    seen = Counter(_key(value) for value in values if value is not None)
    one = _meaning(seen, column, answers, options, look.source)

    def read(row: Row) -> float:
        value = row.get(column)
        if value is None:
            raise SetAside(f'no verdict in "{column}"')
        if not isinstance(value, list):
            return one(value)
        votes = [one(part) for part in value if part is not None]
        if not votes:
            raise SetAside(f'no verdict in "{column}"')
        first, second = sum(vote > 0.5 for vote in votes), sum(vote < 0.5 for vote in votes)
        return 0.5 if first == second else float(first > second)

    return read


def _meaning(seen: Counter[Any], column: str, answers: Answers, options: ReadOptions, source: str) -> Verdict:
    if options.verdict_first is not None:
        return _as_told(options.verdict_first, column)
    words = {value for value in seen if isinstance(value, str)}
    numbers = {value for value in seen if not isinstance(value, str)}
    if words - TIES and not numbers:
        words -= {word for word in words if "=" in word}
        table = _table_of_words(answers)
        if sum(seen[word] for word in words - set(table)) <= 0.1 * seen.total():
            return _looked_up(table, column)
    elif numbers and not words - TIES:
        if any(value not in (0, 1, 2) for value in numbers) and all(1 <= value <= 2 for value in numbers):
            return lambda value: _preference(value, column)
        if (table := _table_of_numbers(numbers, answers)) is not None:
            return _looked_up(table | dict.fromkeys(TIES, 0.5), column)
    elif words and not numbers:  # ties alone
        return _looked_up(_table_of_words(answers), column)
    shown = ", ".join(sorted(f"{value:g}" if isinstance(value, float) else value for value in seen)[:8])
    raise DataError(
        f'{source}: "{column}" has the values {shown or "null"}, which may say in more than one way whether '
        f"{answers.columns[0]} or {answers.columns[1]} is better. Fix: --verdict_first with the value (or values, "
        f"separated by commas) that prefer {answers.columns[0]}"
    )


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


def _table_of_words(answers: Answers) -> dict[Any, float]:
    table: dict[Any, float] = dict.fromkeys(TIES, 0.5)
    for column, suffix, verdict in zip(answers.columns, answers.suffixes, (1.0, 0.0), strict=True):
        number = "1" if verdict else "2"
        order = "first" if verdict else "second"
        ways = [suffix, column, order] + [
            f"{noun}_{suffix}" for noun in ("model", "response", "answer", "assistant", "output")
        ]
        table |= dict.fromkeys(map(plain_name, ways), verdict)
        if suffix in ("a", "b", "left", "right"):
            table |= {f"{noun}_{number}": verdict for noun in ("response", "answer", "model")}
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


def _as_told(first: str, column: str) -> Verdict:
    """`first` lists the values of the first answer; a known word for a tie, or 0 among signed numbers, is a tie."""
    values = {_key(part) for part in str(first).split(",")}
    signed = any(isinstance(value, float) and value < 0 for value in values)

    def read(value: Any) -> float:
        key = _key(value)
        if key in values:
            return 1.0
        is_tie = key in TIES or (signed and key == 0) or (isinstance(key, str) and "=" in key)
        return 0.5 if is_tie else 0.0

    return read


def _preference(value: Any, column: str) -> float:
    """A real preference p from 1 (the first) to 2 (the second); 1.5 is a tie, and its distance from it the weight."""
    number = _key(value)
    if number in TIES:
        return 0.5
    if not isinstance(number, float) or not 1 <= number <= 2:
        raise BadRow(f'"{column}" is {value!r:.40}, expected a number from 1 (the first answer) to 2 (the second)')
    return 2 - number
