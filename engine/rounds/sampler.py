"""Prompts -> samples -> scores: what a round, an evaluation and labelling have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from prefuse.engine.data.examples import Prompt
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.limits import check_prompts
from prefuse.engine.model.sampling import Answer, AnswerStore, Shape, sample
from prefuse.engine.score.contract import Scorer, Scores, say_reasons


class AnswerSource(Protocol):
    """Where answers come from: the model in this process, or a server (served.py)."""

    tokenizer: Any

    def answers(self, prompts: Sequence[Prompt], count: int, seed: int, what: str) -> list[list[Answer]]:
        """(P, count)"""

    def check(self, prompts: Sequence[Prompt]) -> None:
        """UserError if one of them is too long, where that is known beforehand."""


@dataclass(frozen=True)
class OwnModel:
    lm: LanguageModel
    tokenizer: Any
    shape: Shape
    batch_size: int
    synced: bool = False
    continuous: bool = False
    store: AnswerStore | None = None

    def answers(self, prompts: Sequence[Prompt], count: int, seed: int, what: str) -> list[list[Answer]]:
        ids = [prompt.ids for prompt in prompts for _ in range(count)]
        answers = sample(
            self.lm, self.tokenizer, ids, self.shape, self.batch_size, partial(seed_of, seed), synced=self.synced,
            continuous=self.continuous, store=self.store, what=what,
        )  # fmt: skip
        return [answers[start : start + count] for start in range(0, len(answers), count)]

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_prompts(self.lm, [p.ids for p in prompts], [p.row for p in prompts], self.shape.max_new_tokens)


@dataclass(frozen=True)
class Sampler:
    """Answers from a source, and what something that knows nothing of it says they are worth."""

    source: AnswerSource
    scorer: Scorer
    columns: dict[str, list[Any]]  # of all prompts, for the scorer

    def sample(self, prompts: Sequence[Prompt], count: int, seed: int, what: str) -> list[list[Answer]]:  # (P, K)
        return self.source.answers(prompts, count, seed, what)

    def score(self, chosen: Sequence[int], prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]) -> Tensor:
        """(P, K)"""
        return self.scores(chosen, prompts, texts).values

    def scores(self, chosen: Sequence[int], prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]) -> Scores:
        """Of (P, K) texts; `chosen` are the prompts' places in the columns. Those without a score are named, with the
        reason."""
        columns = {name: [values[i] for i in chosen] for name, values in self.columns.items()}
        scores = self.scorer.score([prompt.raw for prompt in prompts], texts, columns)
        reasons = [reason for row in scores.reasons for reason in row]
        names = [
            f"{prompt.row}#{k}" for prompt, row in zip(prompts, scores.reasons, strict=True) for k in range(len(row))
        ]
        say_reasons(self.scorer.name, reasons, names)
        return scores


def texts_of(answers: Sequence[Sequence[Answer]]) -> list[list[str]]:
    return [[one.text for one in own] for own in answers]


def seed_of(*parts: object) -> int:
    """A seed for every purpose: what is drawn for one never shifts another."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8]) >> 1
