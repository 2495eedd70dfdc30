"""What a scorer is: `score(prompts, answers) -> (P, K) numbers`, with NaN and a reason where there is none.

Reward models, ensembles, rules, Python functions and judges are all of this type; evaluation, labelling and online
training take any of them. A scorer knows no run and no model that trains.

P prompts, K answers of each (a prompt may have fewer: those places are NaN, and no fault).
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from prefuse.engine.report.log import say

Text = str | list[dict]  # a prompt: a string, or messages
Columns = Mapping[str, Sequence[Any]]  # other columns of the rows, one value a prompt
NO_ANSWER = "no answer"


@dataclass(frozen=True)
class NoScore:
    """Why an answer has none: a kind, by which outcomes are counted, and what was seen."""

    kind: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass(frozen=True)
class Scores:
    values: Tensor  # (P, K) float64, NaN where there is a reason
    reasons: list[list[NoScore | None]]
    parts: Mapping[str, Tensor] = field(default_factory=dict)  # (P, K) of each member, by its name

    def parted(self, size: int) -> tuple["Scores", "Scores"]:
        """Those of each prompt's first `size` answers, and those of the others."""
        parts = (slice(size), slice(size, None))
        return tuple(Scores(self.values[:, part], [row[part] for row in self.reasons]) for part in parts)

    def counts(self) -> Counter[str]:
        """How often each kind of reason stands there; an answer that a prompt lacks is none."""
        kinds = Counter(reason.kind for row in self.reasons for reason in row if reason is not None)
        kinds.pop(NO_ANSWER, None)
        return kinds


class Scorer(Protocol):
    name: str  # for people
    key: str  # what its numbers depend on: equal keys, equal scores
    columns: tuple[str, ...]  # of the rows, that it reads

    def score(
        self, prompts: Sequence[Text], answers: Sequence[Sequence[str]], columns: Columns | None = None
    ) -> Scores: ...


@dataclass(frozen=True)
class Preferences:
    """Which of two answers is better, for each of P prompts."""

    values: Tensor  # (P,) float64: 1 the first, 0 the second, 0.5 a tie, NaN no verdict
    soft: Tensor  # (P,) float64: the probability of the first, where the scorer has one; else `values`
    reasons: list[NoScore | None]
    outcomes: Counter[str]
    first_shown: float | None = None  # a judge: the share of verdicts for the answer it read first; 0.5: no bias


def preferences(
    scorer: Scorer, prompts: Sequence[Text], first: Sequence[str], second: Sequence[str],
    columns: Columns | None = None,
) -> Preferences:  # fmt: skip
    """By the scorer's own comparison if it has one (a judge), else by the difference of its scores."""
    if hasattr(scorer, "compare"):
        return scorer.compare(prompts, first, second)
    scores = scorer.score(prompts, list(zip(first, second, strict=True)), columns)
    return preferences_of(*scores.parted(1))


def preferences_of(first: Scores, second: Scores) -> Preferences:  # (P, N), (P, N) -> (P * N,)
    """By the signs of the differences."""
    difference = (first.values - second.values).flatten()
    values = torch.where(difference.isnan(), difference, (difference.sign() + 1) / 2)
    both = (zip(*rows, strict=True) for rows in zip(first.reasons, second.reasons, strict=True))
    reasons = [left or right for row in both for left, right in row]
    return Preferences(values, values, reasons, outcomes_of(values, reasons))


def outcomes_of(values: Tensor, reasons: Sequence[NoScore | None]) -> Counter[str]:
    names = {1.0: "first", 0.0: "second", 0.5: "tie"}
    return Counter(
        names[value] if reason is None else reason.kind for value, reason in zip(values.tolist(), reasons, strict=True)
    )


Flat = Callable[[list[Text], list[str], dict[str, list]], Sequence[float | NoScore]]


def by_answer(
    score: Flat, prompts: Sequence[Text], answers: Sequence[Sequence[str]], columns: Columns | None = None
) -> Scores:
    """The scores of all answers by a function over single ones: (prompts (N,), answers (N,), columns) -> (N,)."""
    check_lengths(prompts, answers, columns)
    flat = [(p, answer) for p, own in enumerate(answers) for answer in own]
    given = {name: [values[p] for p, _ in flat] for name, values in (columns or {}).items()}
    found = list(score([prompts[p] for p, _ in flat], [answer for _, answer in flat], given)) if flat else []
    assert len(found) == len(flat), "a scorer gives one outcome for each answer"
    return shaped(found, answers)


def shaped(found: Sequence[float | NoScore], answers: Sequence[Sequence[str]]) -> Scores:
    """(N,) outcomes as (P, K)."""
    width = max(map(len, answers), default=0)
    values = torch.full((len(answers), width), math.nan, dtype=torch.float64)
    reasons: list[list[NoScore | None]] = []
    outcomes = iter(found)
    for p, own in enumerate(answers):
        row: list[NoScore | None] = []
        for k in range(len(own)):
            outcome = next(outcomes)
            if not isinstance(outcome, NoScore) and not math.isfinite(outcome):
                kind = "NaN" if math.isnan(outcome) else "infinite"  # means and differences of which are NaN
                outcome = NoScore(kind, "the scorer gave no number" if kind == "NaN" else str(float(outcome)))
            row.append(outcome if isinstance(outcome, NoScore) else None)
            values[p, k] = math.nan if isinstance(outcome, NoScore) else float(outcome)
        reasons.append(row + [NoScore(NO_ANSWER)] * (width - len(own)))
    return Scores(values, reasons)


def check_lengths(prompts: Sequence[Text], answers: Sequence[Sequence[str]], columns: Columns | None = None) -> None:
    if len(prompts) != len(answers):
        raise ValueError(f"expected a list of answers for each of the {len(prompts)} prompts, got {len(answers)}")
    for name, values in (columns or {}).items():
        if len(values) != len(prompts):
            raise ValueError(f"expected a value of column {name} for each of {len(prompts)} prompts, not {len(values)}")


def say_reasons(name: str, reasons: Sequence[NoScore | None], rows: Sequence[str], limit: int = 5) -> None:
    """Who got no score and why, by kind."""
    kinds: dict[str, list[str]] = {}
    for row, reason in zip(rows, reasons, strict=True):
        if reason is not None and reason.kind != NO_ANSWER:
            kinds.setdefault(reason.kind, []).append(f"{row} ({reason.detail})" if reason.detail else row)
    for kind, found in kinds.items():
        more = f" and {len(found) - limit} more" if len(found) > limit else ""
        say(f"  {name}: no score for {len(found)}, {kind}: {', '.join(found[:limit])}{more}")
