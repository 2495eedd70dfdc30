"""A prompt and a list of answers with scores or ranks: pairs by a stated rule (`--pairs`).

best_worst: the best answer against the worst; best_vs_random: against one of the others; all: each answer against each
that is worse. Of answers that tie at the top the first is the best one, of those at the bottom the last is the worst;
two answers with one score are never a pair.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

from prefuse.engine.data.forms.form import Form, ReadOptions, Row, Tally, make_record
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import ANSWER_LISTS, BEST_INDEX, SCORE_LISTS, plain_name
from prefuse.engine.data.forms.pairs import pair
from prefuse.engine.data.forms.prompts import find_prompt
from prefuse.engine.data.forms.turns import ANSWER_KEYS, read_text, turn_of
from prefuse.engine.data.records import BadRow, DataError, Record, SetAside, Text

SCORE_KEYS = (
    "overall_score", "score", "rating", "reward", "rank", "ranking", "pm_score", "votes", "upvotes", "selected",
    "chosen", "preferred", "is_chosen", "correct", "is_correct",
)  # fmt: skip
Scored = tuple[Any, float]  # an answer as it stands, and how good it is: more is better


def find_ranking(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    column = named["answers"][0] if "answers" in named else _answer_list(look)
    if column is None:
        return None
    look.used.add(column)
    scores = named["scores"][0] if "scores" in named else _score_list(look, column, options)
    best = None if scores else look.find(*BEST_INDEX)
    if best and not look.is_numbers(best):
        best = None
    look.used |= {name for name in (scores, best) if name}
    key = None if scores or best else _score_key(look, column, options)
    lowest = _lowest_index(look, column, best) if best else 0
    prompt = find_prompt(look, named)
    if prompt is None:
        return None
    if not (scores or best or key):
        raise DataError(
            f'{look.source}: "{column}" is a list of answers, and nothing says which is better: no list of numbers '
            f"beside it ({', '.join(SCORE_LISTS)}), no key of numbers in it ({', '.join(SCORE_KEYS)}). "
            "Fix: --columns scores=NAME, or --score_column KEY"
        )
    notes: Counter[str] = Counter()

    def read(name: str, row: Row) -> Iterable[Record]:
        answers = row[column]
        if not isinstance(answers, list):
            raise BadRow(f'"{column}" must be a list of answers')
        goodness = _goodness(answers, row, column, scores, best, key, lowest)
        scored = [(_text_of(answer, column), good) for answer, good in zip(answers, goodness, strict=True)]
        if options.keep_scores:
            yield from scored_answers(name, prompt.read(row), scored)
            return
        yield from ranked_pairs(name, prompt.read(row), scored, options, notes)

    became = [*prompt.became, (column, "answers")]
    index = f"index of the best answer{', counted from 1' if lowest else ''}"
    if scores or best:
        became.append((scores or best or "", "scores" if scores else index))
    elif key:
        became[-1] = (column, f"answers, by their {key}")
    return Form(
        "scored" if options.keep_scores else "pair", "/".join([prompt.text, column, *filter(None, (scores, best))]),
        (prompt.text, column, *filter(None, (scores, best))), tuple(became), read, prompt.read,
        as_turns=prompt.as_turns, optional=tuple(prompt.optional), tally=Tally(notes),
    )  # fmt: skip


def ranked_pairs(
    name: str, prompt: Text, scored: list[Scored], options: ReadOptions, notes: Counter[str], lower: bool = False
) -> Iterable[Record]:
    """The pairs that a list of answers gives. Their names say which answers they are: "rows.json:3 (0 over 2)"."""
    if len(scored) < 2:
        raise SetAside("one answer: nothing to compare it with")
    values = [value for _, value in scored]
    if max(values) == min(values):
        raise SetAside("a tie: all its answers have one score")
    for better, worse in _chosen_pairs(values, options, name):
        (chosen, high), (rejected, low) = scored[better], scored[worse]
        numbers = {"chosen": float(high), "rejected": float(low)}
        place = f"{name} ({better} over {worse})" if options.pairs == "all" else name
        notes["pairs from lists of answers"] += 1
        yield pair(place, prompt, chosen, rejected, notes, scores=numbers)
    notes[f"answers in no pair (--pairs {options.pairs})"] += len(scored) - 2 if options.pairs != "all" else 0


def scored_answers(name: str, prompt: Text, scored: list[Scored]) -> Iterable[Record]:
    """Each answer by itself, with its score."""
    for place, (answer, value) in enumerate(scored):
        both = (prompt, answer)
        if isinstance(prompt, list) != isinstance(answer, list):
            both = tuple(
                [turn_of(role, text, "answer")] if isinstance(text, str) else text
                for role, text in zip(("user", "assistant"), both, strict=True)
            )
        yield make_record(f"{name} ({place})", both[0], {"completion": both[1]}, scores={"completion": float(value)})


def _chosen_pairs(values: list[float], options: ReadOptions, name: str) -> list[tuple[int, int]]:
    if options.pairs == "all":
        indices = range(len(values))
        return [(i, j) for i in indices for j in indices if values[i] > values[j]]
    best = values.index(max(values))
    if options.pairs == "best_vs_random":
        worse = [i for i, value in enumerate(values) if value < values[best]]
        return [(best, random.Random(f"{options.seed} {name}").choice(worse))]
    return [(best, len(values) - 1 - values[::-1].index(min(values)))]


# ---------------------------------------------------------------------------------------------------------
# Which columns, and what their numbers mean


def _answer_list(look: Look) -> str | None:
    for column in look.find_all(*ANSWER_LISTS):
        lists = [value for value in look.values[column] if isinstance(value, list)]
        if look.all_are(column, list) and any(isinstance(part, str | dict) for value in lists for part in value):
            return column
    return None


def _score_list(look: Look, answers: str, options: ReadOptions) -> str | None:
    found = look.find_all(*SCORE_LISTS)
    found = [column for column in found if look.all_are(column, list)]
    if options.score_column:
        return options.score_column if options.score_column in look.values else None
    if len(found) > 1:
        raise DataError(
            f"{look.source}: {' and '.join(found)} may each say how good the answers are. "
            f"Fix: --columns scores={found[0]}"
        )
    return found[0] if found else None


def _score_key(look: Look, column: str, options: ReadOptions) -> str | None:
    """The key of the answers' own numbers."""
    objects = [
        part for value in look.values[column] if isinstance(value, list) for part in value if isinstance(part, dict)
    ]
    keys = {plain_name(key): key for answer in reversed(objects) for key in answer}
    for key in [options.score_column] if options.score_column else SCORE_KEYS:
        spelled = keys.get(plain_name(key))
        if spelled is not None and any(_good(answer.get(spelled)) is not None for answer in objects):
            return spelled
    return None


def _lowest_index(look: Look, column: str, best: str) -> int:
    """Whether the index of the best answer counts from 0 or from 1, by the first rows."""
    rows = [row for row in look.first if isinstance(row.get(column), list)]
    if any(_number(row.get(best)) == 0 for row in rows):
        return 0
    if any(_number(row.get(best)) == len(row[column]) for row in rows):
        return 1
    if plain_name(best).endswith(("index", "idx")):
        return 0
    raise DataError(
        f'{look.source}: "{best}" says which answer of "{column}" is the best, and its values may count from 0 or from '
        f"1. Fix: --columns scores=NAME with a column of numbers, one for each answer; or name the column {best}_index "
        "if it counts from 0"
    )


def _goodness(
    answers: list[Any], row: Row, column: str, scores: str | None, best: str | None, key: str | None, lowest: int
) -> list[float]:
    """One number for each answer, more is better."""
    if best:
        index = _number(row[best])
        if index is None or index != int(index) or not lowest <= index < lowest + len(answers):
            raise BadRow(f'"{best}" is {row[best]!r:.40}, no index of {len(answers)} answers counted from {lowest}')
        return [float(i + lowest == index) for i in range(len(answers))]
    name = scores or key or ""
    found = row[scores] if scores else [part.get(key) if isinstance(part, dict) else None for part in answers]
    if not isinstance(found, list) or len(found) != len(answers):
        raise BadRow(f'"{name}" must be a list of {len(answers)} numbers, one for each answer')
    numbers = [_good(value) for value in found]
    if None in numbers:
        raise BadRow(f'an answer of "{column}" has no number for "{name}"')
    return [-number if "rank" in plain_name(name) else number for number in numbers]  # type: ignore[operator, misc]


def _good(value: Any) -> float | None:
    """A number, or true (1) and false (0)."""
    return float(value) if isinstance(value, bool) else _number(value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if number == number and abs(number) != float("inf") else None


def _text_of(answer: Any, column: str) -> Text:
    """An answer as text or turns."""
    if isinstance(answer, dict) and "role" not in answer and "from" not in answer:
        key = next((key for key in ANSWER_KEYS if answer.get(key) is not None), None)
        if key is None:
            raise BadRow(f'an answer of "{column}" has no text ({", ".join(ANSWER_KEYS)})')
        answer = answer[key]
    return read_text(answer, column)
