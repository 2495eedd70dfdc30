"""The numbers of rows that a loss takes beside their tokens: margins, scores, weights.

A margin is, in this order: what the objectives of --objective_weights say; the row's "margin"; the difference of the
scores of its two sides. Of one answer it is what the objectives say, or its "margin".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from prefuse.engine.data.forms import BadRow, DataError, Record, Skipped
from prefuse.engine.data.order import generator
from prefuse.engine.data.outcomes import each
from prefuse.engine.data.table import Examples

LACKS = {
    ("pair", "margins"): 'a "margin", scores of both sides (score_chosen and score_rejected, or scored answers), or '
    "--objective_weights",
    ("labelled", "margins"): 'a "margin" of each answer, or --objective_weights',
    ("scored", "scores"): 'a "score" of each answer',
}


def check_numbers(
    records: Sequence[Record | Skipped], kind: str, needs: Sequence[str], source: str | None
) -> list[Record | Skipped]:
    """Rows that lack what the loss needs are skipped by name. `source`, of the first rows: where all of them lack it,
    the run stops."""
    if not needs:
        return list(records)
    read = [record for record in records if isinstance(record, Record)]
    for need in needs:
        if source and read and not any(_has(record, kind, need) for record in read):
            raise DataError(
                f"{source}: the loss needs {need} of its rows, and they have none. Fix: {_wanted(kind, need)}"
            )

    def check(record: Record) -> Record:
        for need in needs:
            if not _has(record, kind, need):
                raise BadRow(f"it has no {need.removesuffix('s')}; the loss needs {_wanted(kind, need)}")
        return record

    return each(list(records), check)


def row_numbers(record: Record, kind: str, needs: Sequence[str]) -> dict[str, Any]:
    """Keywords of `ExamplesBuilder.append`."""
    found = {}
    if "margins" in needs:
        found["margins"] = _margins(record, kind)
    if "scores" in needs:
        found["scores"] = list((record.scores or {}).values())
    return found


def _has(record: Record, kind: str, need: str) -> bool:
    if need == "scores":
        return record.scores is not None
    return None not in _margins(record, kind)


def _margins(record: Record, kind: str) -> list[float | None]:
    """One for a pair, else one for each side."""
    if kind != "pair":
        if record.objectives is not None:
            return list(record.objectives.values())
        return [record.margin if len(record.sides) == 1 else None] * len(record.sides)
    if record.margin is not None and record.objectives is None:
        return [record.margin]
    of_sides = record.objectives or record.scores
    return [None if of_sides is None else of_sides["chosen"] - of_sides["rejected"]]


def _wanted(kind: str, need: str) -> str:
    return LACKS.get((kind, need), f"a column of {need}")


# ---------------------------------------------------------------------------------------------------------
# Of all rows together


def span_of(scores: np.ndarray, low: float | None, high: float | None) -> tuple[float, float]:
    """The scores that count as 0 and as 1: as given, else the least and the greatest."""
    low, high = (float(scores.min()) if low is None else low), (float(scores.max()) if high is None else high)
    if not low < high:
        raise DataError(f"the scores go from {low:g} to {high:g}: give score_low and score_high, one below the other")
    return low, high


def scaled(examples: Examples, span: tuple[float, float]) -> tuple[Examples, int]:
    """With scores in [0, 1], and how many lay beyond `span` and count as its nearer end."""
    low, high = span
    beyond = int(((examples.scores < low) | (examples.scores > high)).sum())
    return replace(examples, scores=((examples.scores - low) / (high - low)).clip(0.0, 1.0)), beyond


def one_of_each_prompt(examples: Examples, seed: int) -> list[int]:
    """Indices, in order: of the examples of each prompt one, drawn by `seed`."""
    same = examples.prompts.same
    draw = torch.rand(len(examples), dtype=torch.float64, generator=generator("one per prompt", seed)).numpy()
    order = np.lexsort((draw, same))  # by prompt, and there by what was drawn
    first = np.ones(len(order), bool)
    first[1:] = same[order][1:] != same[order][:-1]
    return sorted(order[first].tolist())
