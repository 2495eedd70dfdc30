"""Two answers and a verdict: which columns are the answers, and which say the better one (or ask: --verdict_column)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from prefuse.engine.data.forms.form import Form, ReadOptions, Row, Tally, make_record
from prefuse.engine.data.forms.implicit import split_strings, split_turns
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.marks import is_flag, label_key
from prefuse.engine.data.forms.names import SCORE_LISTS, VERDICTS, VOTES, answer_names, plain_name
from prefuse.engine.data.forms.pairs import pair
from prefuse.engine.data.forms.prompts import PromptColumns, find_prompt, with_turns_before
from prefuse.engine.data.forms.ratings import are_ratings, is_rank, rating_reader
from prefuse.engine.data.forms.shares import verdict_in_column, verdict_of_numbers
from prefuse.engine.data.forms.turns import read_text, turn_of
from prefuse.engine.data.forms.verdict_values import Answers, RowVerdict
from prefuse.engine.data.records import BadRow, DataError, Message, Record, SetAside

SIDE_FLAGS = (
    "chosen",
    "preferred",
    "selected",
    "winner",
    "better",
    "best",
    "win",
    "wins",
    "picked",
    "accepted",
    "label",
)
NUMBERED_ANSWERS = ("answer", "response", "output", "completion")  # of these, numbers are the answers' text
SIDE_NUMBERS = ("score", "rating", "reward", "votes", "upvotes", "likes", "probability", "prob", "rank")


def find_verdict(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    answers = _answers(look, named)
    if answers is None:
        return None
    look.used |= set(answers.columns)
    notes: Counter[str] = Counter()
    verdicts, read_verdict, words = _verdict(look, named, answers, options, notes)
    scored = verdicts == _two_scores(look, answers) and not is_rank(verdicts[0])
    score = rating_reader([value for column in verdicts for value in look.values[column]]) if scored else None
    look.used |= set(verdicts)
    prompt = find_prompt(look, named)
    woven = bool(prompt) and all(
        all(_list_of_texts(value) is not None for value in look.values[column] or [None])
        for column in (prompt.text, *answers.columns)
    )

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
            numbers = [score(row[column], column) for column in verdicts]
            more["scores"] = dict(zip(("chosen", "rejected"), numbers if first > 0.5 else numbers[::-1], strict=True))
        if prompt and not woven:
            yield pair(name, prompt.read(row), *texts, notes, **more)
        else:
            yield _without_prompt(name, texts, notes, more)

    became = [
        *(prompt.became if prompt else ()),
        (answers.columns[0], "first answer"),
        (answers.columns[1], "second answer"),
    ]
    became += [(verdict, words) for verdict in verdicts]
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
        if look.is_text(look.find(_third(second, suffixes[1]))):
            continue  # three answers are a list
        may_be_numbers = first.removesuffix(suffixes[0]).strip("_") in NUMBERED_ANSWERS
        if all(found) and all(look.is_text(side) or (may_be_numbers and look.is_numbers(side)) for side in found):
            return Answers(found, tuple(suffixes))  # type: ignore[arg-type]
    return None


def _third(second: str, suffix: str) -> str:
    """ "response_c" of "response_b"; "" where there is no third suffix."""
    third = {"b": "c", "1": "2", "2": "3"}.get(suffix, "")
    return re.sub(rf"^{suffix}(?=_)|{suffix}$", third, second) if third else ""


def _verdict(
    look: Look, named: Any, answers: Answers, options: ReadOptions, notes: Counter[str]
) -> tuple[tuple[str, ...], RowVerdict, str]:
    """The columns that say which answer is better, how they are read, and what they are, in words."""
    if not (options.verdict_column or "verdict" in named):
        if one_hot := _one_hot(look):
            return tuple(one_hot.values()), _of_one_hot(one_hot), "verdict"
        if not look.find(*VERDICTS):
            if scores := _two_scores(look, answers):
                return scores, _of_two_scores(look, scores), "verdict"
            if flags := _flags(look, answers):
                return tuple(flags.values()), _of_one_hot(flags), "verdict"
            for column in look.find_all(*SCORE_LISTS):
                if found := verdict_of_numbers(look, column, answers, options):
                    return (column,), *found
    column = _verdict_column(look, named, answers, options)
    return (column,), *verdict_in_column(look, column, answers, options, notes)


def _two_scores(look: Look, answers: Answers) -> tuple[str, str] | None:
    """score_a and score_b (votes, ...) beside response_a and response_b: the higher one is better, but of ranks."""
    for noun in SIDE_NUMBERS:
        found = tuple(
            look.find(f"{noun}_{suffix}", f"{noun}{suffix}", f"{plain_name(column)}_{noun}")
            for column, suffix in zip(answers.columns, answers.suffixes, strict=True)
        )
        if all(found) and all(are_ratings(look.values[column]) for column in found):
            return found  # type: ignore[return-value]
    return None


def _of_two_scores(look: Look, columns: tuple[str, str]) -> RowVerdict:
    number = rating_reader([value for column in columns for value in look.values[column]])
    better = -1 if is_rank(columns[0]) else 1

    def read(row: Row) -> float:
        first, second = (better * number(row.get(column), column) for column in columns)
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


def _flags(look: Look, answers: Answers) -> dict[str, str] | None:
    """chosen_a and chosen_b, answer_a_preferred and answer_b_preferred, ...: 0 and 1, or true and false."""
    for word in SIDE_FLAGS:
        found = []
        for column, suffix in zip(answers.columns, answers.suffixes, strict=True):
            name = plain_name(column)
            ways = [f"{word}_{suffix}", f"{name}_{word}", f"{word}_{name}", f"{suffix}_{word}"]
            found.append(look.find(*ways, *(f"is_{way}" for way in ways), f"{name}_is_{word}", f"{suffix}_is_{word}"))
        if all(found) and all(is_flag(look, column) for column in found):
            return dict(zip(("a", "b"), found, strict=True))  # type: ignore[arg-type]
    return None


def _of_one_hot(columns: dict[str, str]) -> RowVerdict:
    def read(row: Row) -> float:
        values = {part: label_key(row.get(column)) in ("true", "yes", 1.0) for part, column in columns.items()}
        if not any(values.values()) and "tie" not in columns:
            return 0.5
        if sum(values.values()) != 1:
            raise BadRow(f"one of {', '.join(columns.values())} must be 1, the others 0")
        return {"a": 1.0, "b": 0.0, "tie": 0.5}[next(part for part, is_true in values.items() if is_true)]

    return read
