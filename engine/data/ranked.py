"""Rankings: rows of several answers to one prompt, with what is known of which is better.

    rankings_of(examples)       # of pairs, as --pairs all reads a list of scored answers

The readers take a list of scored answers apart into pairs, each better one with each worse. Here the pairs of one row
come together again, each answer once, the best first. An answer's rank is the number of answers that are better, so
answers of equal score have one rank.

E rows, A answers of all of them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefuse.engine.data.batches import Batch
from prefuse.engine.data.ragged import Ragged, Texts
from prefuse.engine.data.table import Examples, ExamplesBuilder

PAIR = re.compile(r" \(\d+ over \d+\)$")  # what the reader writes behind the name of a row


@dataclass(frozen=True)
class Ranking:
    prompt: list[int]
    answers: list[list[int]]  # best first
    ranks: list[int]  # how many are better
    row: str


@dataclass(frozen=True)
class RankedBatch(Batch):
    cu_groups: Tensor | None = None  # (E + 1,) where the answers of each row stand among the batch's sequences
    ranks: Tensor | None = None  # (A,) float64


@dataclass(frozen=True, eq=False)
class Rankings(Examples):
    """`sides` is the most answers that a row has."""

    offsets: np.ndarray | None = None  # (E + 1,) int64, where the answers of each row stand
    ranks: np.ndarray | None = None  # (A,) int64

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        index = range(len(self))[index]
        answers = [self.completions[side] for side in self._sides_of(index)]
        return Ranking(self.prompts[index], answers, self.ranks[self._sides_of(index)].tolist(), self.rows[index])

    def _sides_of(self, index: int) -> range:
        return range(int(self.offsets[index]), int(self.offsets[index + 1]))

    @property
    def sizes(self) -> np.ndarray:  # (E,) int64
        return np.diff(self.offsets)

    @cached_property
    def lengths(self) -> np.ndarray:  # (E,) int64
        return self.prompts.lengths + np.maximum.reduceat(self.completions.lengths, self.offsets[:-1])

    @cached_property
    def counts(self) -> np.ndarray:  # (E,) int64
        return np.add.reduceat(self.completions.lengths, self.offsets[:-1])

    def longest_sequence(self) -> list[int]:
        row = int(self.lengths.argmax())
        return max((prompt + answer for prompt, answer in self.sequences_of(row)), key=len)

    def select(self, indices: Sequence[int]) -> Rankings:
        chosen = np.asarray(indices, np.int64)
        sides = np.concatenate([np.arange(*self.offsets[i : i + 2]) for i in chosen] or [np.empty(0, np.int64)])
        return dataclasses.replace(
            self,
            prompts=self.prompts.take(chosen),
            completions=self.completions.take(sides),
            rows=Texts(self.rows.data.take(chosen)),
            weights=None if self.weights is None else self.weights[chosen],
            offsets=np.concatenate([[0], self.sizes[chosen].cumsum()]),
            ranks=self.ranks[sides],
        )

    def _sequence_parts(self) -> list[Ragged]:
        of_rows = lambda values, sizes: Ragged.end_to_end(np.asarray(values, np.int32), sizes)  # noqa: E731
        answers = of_rows(self.completions.joined(), self.counts)
        return [
            self.prompts,
            answers,
            of_rows(self.completions.lengths, self.sizes),
            of_rows(self.ranks, self.sizes),
        ]

    def finish(self, batch: Batch, indices: Sequence[int]) -> RankedBatch:
        chosen = np.asarray(indices, np.int64)
        sizes = self.sizes[chosen]
        ranks = np.concatenate([self.ranks[self._sides_of(i)] for i in indices])
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        fields["shapes"] = list(zip(sizes.tolist(), self.lengths[chosen].tolist(), strict=True))
        cu_groups = torch.from_numpy(np.concatenate([[0], sizes.cumsum()]))
        return RankedBatch(**fields, cu_groups=cu_groups, ranks=torch.from_numpy(ranks.astype(np.float64)))


def rankings_of(pairs: Examples) -> Rankings:
    """The pairs of each row together. A row that was a pair is a ranking of two."""
    builder = ExamplesBuilder()
    sizes, ranks = [], []
    by_row = groupby(range(len(pairs)), key=lambda i: (PAIR.sub("", pairs.rows[i]), pairs.prompts[i]))
    for (name, prompt), indices in by_row:
        better: dict[tuple[int, ...], set[tuple[int, ...]]] = {}  # of each answer those that are better
        weight = None
        for index in indices:
            weight = None if pairs.weights is None else float(pairs.weights[index])  # the same for all pairs of a row
            (_, chosen), (_, rejected) = pairs.sequences_of(index)
            better.setdefault(tuple(chosen), set())
            better.setdefault(tuple(rejected), set()).add(tuple(chosen))
        order = sorted(better, key=lambda answer: len(better[answer]))
        builder.append(name, prompt, [list(answer) for answer in order], weight=weight)
        sizes.append(len(order))
        ranks += [len(better[answer]) for answer in order]
    table = builder.finish()
    fields = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    kept = {name: getattr(pairs, name) for name in ("padding_free", "bos", "parts")}
    offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    fields |= kept | {"sides": max(sizes, default=2)}
    return Rankings(**fields, offsets=offsets, ranks=np.asarray(ranks, np.int64))
