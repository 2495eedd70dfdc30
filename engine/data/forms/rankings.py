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
from prefuse.engine.data.forms.judged import SCORE_KEYS, find_judged
from prefuse.engine.data.forms.listed import Listed, find_listed
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import CONVERSATIONS, SCORE_LISTS
from prefuse.engine.data.forms.pairs import pair
from prefuse.engine.data.forms.prompts import find_prompt
from prefuse.engine.data.forms.turns import ANSWER_KEYS, read_text, turn_of
from prefuse.engine.data.records import BadRow, DataError, Record, SetAside, Text

Scored = tuple[Any, float]  # an answer as it stands, and how good it is: more is better


def find_ranking(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    listed = find_listed(look, named)
    if listed is None:
        return None
    look.used |= set(listed.columns)
    judged = find_judged(look, listed, named, options)
    if judged is None and look.find(*CONVERSATIONS):
        return None  # a conversation with other answers beside it
    look.used |= set(judged.columns) if judged else set()
    prompt = find_prompt(look, named)
    if prompt is None:
        return None
    if judged is None:
        raise DataError(_ask_for_scores(look, listed))
    notes: Counter[str] = Counter()

    def read(name: str, row: Row) -> Iterable[Record]:
        names, answers = listed.read(row)
        goodness = judged.read(row, names, answers)
        scored = [
            (_text_of(a, listed.columns[0]), g) for a, g in zip(answers, goodness, strict=True) if None not in (a, g)
        ]
        notes["answers without a rank, in no pair"] += len(answers) - len(scored)
        if options.keep_scores:
            yield from scored_answers(name, prompt.read(row), scored)
            return
        yield from ranked_pairs(name, prompt.read(row), scored, options, notes)

    inside = "" if judged.columns else f", by {judged.words}"
    became = [*prompt.became, *((column, f"answers{inside}") for column in listed.columns)]
    became += [(column, judged.words) for column in judged.columns]
    required = (prompt.text, *listed.columns[:1], *judged.columns[:1])
    return Form(
        "scored" if options.keep_scores else "pair", "/".join([prompt.text, *listed.columns, *judged.columns]),
        required, tuple(became), read, prompt.read, as_turns=prompt.as_turns,
        optional=(*prompt.optional, *listed.columns[1:], *judged.columns[1:]), tally=Tally(notes),
    )  # fmt: skip


def _ask_for_scores(look: Look, listed: Listed) -> str:
    return (
        f'{look.source}: "{listed.columns[0]}" is a list of answers, and nothing says which is better: no list of '
        f"numbers beside it ({', '.join(SCORE_LISTS)}), no key of numbers in it ({', '.join(SCORE_KEYS)}). "
        "Fix: --columns scores=NAME, or --score_column KEY"
    )


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


def _text_of(answer: Any, column: str) -> Text:
    """An answer as text or turns."""
    if isinstance(answer, dict) and "role" not in answer and "from" not in answer:
        key = next((key for key in ANSWER_KEYS if answer.get(key) is not None), None)
        if key is None:
            raise BadRow(f'an answer of "{column}" has no text ({", ".join(ANSWER_KEYS)})')
        answer = answer[key]
    return read_text(answer, column)
