"""Tokenized examples, as the door hands them out one by one and as the engine walks over them: all in flat arrays.

E examples (pairs, labelled completions or demonstrations).
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import Any, Literal

import numpy as np

from prefuse.engine.data.fit import CharacterParts
from prefuse.engine.data.ragged import Ragged, RaggedBuilder, Texts, as_numpy, encode, framed, framed_rows
from prefuse.packing import fill

Kind = Literal["pair", "labelled", "scored", "sft"]
Tokens = tuple[list[int], list[int]]  # a prompt and a completion


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    row: str  # "pairs.json:17", for messages
    weight: float | None = None  # what its loss is multiplied by; None: 1
    margin: float | None = None  # by how much the chosen side should win; None: it was not asked for


@dataclass(frozen=True)
class Labelled:
    prompt: list[int]
    completion: list[int]
    label: bool
    row: str
    weight: float | None = None
    margin: float | None = None  # what other objectives say


@dataclass(frozen=True)
class ScoredCompletion:
    prompt: list[int]
    completion: list[int]
    score: float
    row: str
    weight: float | None = None


@dataclass(frozen=True)
class Demonstration:
    prompt: list[int]
    completion: list[int]
    row: str
    learned: list[bool] | None = None  # which ids of the completion are learned; None: all
    weight: float | None = None


Example = Pair | Labelled | ScoredCompletion | Demonstration
NUMBERS = ("labels", "weights", "margins", "scores")  # of a row, beside its tokens


@dataclass(frozen=True, eq=False)
class Examples(Sequence):
    """A sequence of `Pair`, `Labelled`, `ScoredCompletion` or `Demonstration`, each made when it is asked for."""

    prompts: Ragged  # (E,)
    completions: Ragged  # (E * sides,) a pair's stand side by side, chosen first
    rows: Texts  # (E,) names, for messages
    sides: int = 1  # 2 for pairs
    labels: np.ndarray | None = None  # (E,) bool
    learned: np.ndarray | None = None  # of each value of `completions`: bool; None: all are learned
    weights: np.ndarray | None = None  # (E,) float64; None: all are 1
    margins: np.ndarray | None = None  # (E,) float64, for a loss that needs them
    scores: np.ndarray | None = None  # (E,) float64, for a loss that needs them
    threads: np.ndarray | None = None  # (E,) int64, equal for parts of one conversation; None: each is its own
    policy_weights: bool = False  # pairs count as much as the policy itself would write them (WPO)
    padding_free: bool = False  # their batches are flat
    bos: int | None = None  # the token that a prompt keeps where it loses its start
    parts: CharacterParts | None = None  # the bytes of each token, so that a cut prompt keeps no half of a character

    @classmethod
    def of(cls, examples: Iterable[Example], bos: int | None = None) -> Examples:
        """All of one type."""
        builder = ExamplesBuilder()
        for example in examples:
            match example:
                case Pair(prompt, chosen, rejected, row, weight, margin):
                    builder.append(row, prompt, [chosen, rejected], weight=weight, margins=[margin])
                case Labelled(prompt, completion, label, row, weight, margin):
                    builder.append(row, prompt, [completion], label=label, weight=weight, margins=[margin])
                case ScoredCompletion(prompt, completion, score, row, weight):
                    builder.append(row, prompt, [completion], weight=weight, scores=[score])
                case Demonstration(prompt, completion, row, learned, weight):
                    builder.append(row, prompt, [completion], learned=learned, weight=weight)
        return replace(builder.finish(), bos=bos)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:  # int -> Example, slice -> Examples
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        index = range(len(self))[index]  # from the end where it is negative; IndexError
        prompt, row = self.prompts[index], self.rows[index]
        weight, margin, score = (
            None if of_rows is None else float(of_rows[index]) for of_rows in (self.weights, self.margins, self.scores)
        )
        if self.sides == 2:
            return Pair(prompt, self.completions[2 * index], self.completions[2 * index + 1], row, weight, margin)
        if self.labels is not None:
            return Labelled(prompt, self.completions[index], bool(self.labels[index]), row, weight, margin)
        if score is not None:
            return ScoredCompletion(prompt, self.completions[index], score, row, weight)
        learned = None if self.learned is None else self.learned_of(index).tolist()
        return Demonstration(prompt, self.completions[index], row, learned, weight)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None

    def learned_of(self, index: int) -> np.ndarray:  # (ids of the completions of the example,) bool
        return np.concatenate([self._mask().array(side) for side in self._sides_of(index)])

    def _mask(self) -> Ragged:
        return replace(self.completions, values=self.learned)

    def _sides_of(self, index: int) -> range:
        return range(self.sides * index, self.sides * (index + 1))

    @property
    def sequences(self) -> Sequence[list[Tokens]]:
        """For each example its prompt with each completion: two for a pair (chosen, rejected), else one."""
        return _Sequences(self)

    def sequences_of(self, index: int) -> list[Tokens]:
        prompt = self.prompts[index]
        return [(prompt, self.completions[side]) for side in self._sides_of(index)]

    @cached_property
    def lengths(self) -> np.ndarray:  # (E,) int64
        """The longest sequence of each example: what it costs in a padded batch."""
        return self.prompts.lengths + self.completions.lengths.reshape(-1, self.sides).max(1, initial=0)

    @cached_property
    def counts(self) -> np.ndarray:  # (E,) int64
        """Completion tokens of each example: what it has log-probabilities of."""
        return self.completions.lengths.reshape(-1, self.sides).sum(1)

    def largest_token(self) -> int:
        return max(int(ids.joined().max()) for ids in (self.prompts, self.completions))

    def longest_sequence(self) -> list[int]:
        """A prompt with its completion; the first of the longest."""
        lengths = np.repeat(self.prompts.lengths, self.sides) + self.completions.lengths
        longest = int(lengths.argmax())
        return self.prompts[longest // self.sides] + self.completions[longest]

    def select(self, indices: Sequence[int]) -> Examples:
        chosen = np.asarray(indices, np.int64)
        sides = (chosen[:, None] * self.sides + np.arange(self.sides)).ravel()
        return replace(
            self,
            prompts=self.prompts.take(chosen),
            completions=self.completions.take(sides),
            rows=Texts(self.rows.data.take(chosen)),
            **{name: array[chosen] for name, array in self._of_rows().items()},
        )

    def _of_rows(self) -> dict[str, np.ndarray]:
        """The arrays with one number for each example, those that there are."""
        found = {name: getattr(self, name) for name in (*NUMBERS, "threads")}
        return {name: array for name, array in found.items() if array is not None}

    def finish(self, batch: Any, indices: Sequence[int]) -> Any:
        """The batch of the examples at `indices`, with what rows of another kind add to it (ranked.py)."""
        return batch

    def unpaired(self, labelled: bool = True) -> Examples:
        """Each pair as two completions, chosen (true), then rejected (false); margins and scores are of sides."""
        twice = np.repeat(np.arange(len(self)), 2)
        of_pairs = {name: array[twice] for name, array in self._of_rows().items() if name in ("weights", "threads")}
        labels, rows = np.tile([True, False], len(self)) if labelled else None, Texts(self.rows.data.take(twice))
        return replace(self, prompts=self.prompts.take(twice), rows=rows, sides=1, labels=labels, **of_pairs)

    def bins(self, budget: int) -> Callable[[Sequence[int]], list[list[int]]]:
        """A function that cuts indices into flat batches of at most `budget` tokens, by first-fit-decreasing.

        Examples with the same prompt stay side by side as far as they fit, so that their prompt runs once.
        """
        prompt, completions, lengths = self.prompts.same, self.counts, self.prompts.lengths

        def cut(indices: Sequence[int]) -> list[list[int]]:
            chosen = np.asarray(indices, np.int64)
            blocks: dict[int, list[list[int]]] = {}  # of each prompt, in the order in which they first appear
            tokens: dict[int, list[int]] = {}  # of each block as a flat batch
            columns = (prompt[chosen], lengths[chosen], completions[chosen])
            for index, same, start, own in zip(indices, *(column.tolist() for column in columns), strict=True):
                if same not in blocks or tokens[same][-1] + own > budget:
                    blocks.setdefault(same, []).append([])
                    tokens.setdefault(same, []).append(start)
                blocks[same][-1].append(index)
                tokens[same][-1] += own
            flat = [block for group in blocks.values() for block in group]
            sizes = [size for group in tokens.values() for size in group]
            return [[i for block in chosen for i in flat[block]] for chosen in fill(sizes, budget)]

        return cut

    def fingerprint(self) -> str:
        """A hash of the token ids and of which of them are learned, but not of labels or of the rows' names."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self._digest(self._sequence_parts())

    def rows_as_bytes(self) -> Iterator[bytes]:
        """Each example's sequences: the length and the ids of every prompt and completion."""
        return framed_rows(self._sequence_parts())

    def _sequence_parts(self) -> list[Ragged]:
        return [part for side in range(self.sides) for part in (self.prompts, self._side(side))]

    def content_fingerprint(self) -> str:
        """sha256 over the token ids, lengths and labels of all examples, in order."""
        parts = [self.prompts, *(self._side(side) for side in range(self.sides))]
        if self.labels is not None:
            parts.append(Ragged.end_to_end(self.labels.astype(np.int32), np.ones(len(self), np.int64)))
        for name in ("weights", "margins", "scores"):
            if (array := getattr(self, name)) is not None:
                parts.append(Ragged.end_to_end(array.view(np.int32), np.full(len(self), 2)))
        return self._digest(parts)

    def _side(self, side: int) -> Ragged:  # (E,)
        return self.completions[side :: self.sides]

    def _digest(self, parts: list[Ragged]) -> str:
        digest = hashlib.sha256()
        for block in framed(parts):
            digest.update(block)
        if self.learned is not None:
            for block in framed([self._mask()]):
                digest.update(block)
        return digest.hexdigest()


class _Sequences(Sequence):
    def __init__(self, examples: Examples):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> list[Tokens]:
        return self.examples.sequences_of(range(len(self))[index])

    def __eq__(self, other: object) -> bool:
        return list(self) == other

    __hash__ = None


class ExamplesBuilder:
    """Examples that come one by one, their ids straight into flat arrays."""

    def __init__(self) -> None:
        self.prompts, self.completions, self.rows = RaggedBuilder("i"), RaggedBuilder("i"), RaggedBuilder("B")
        self.sides = 1
        self.labels, self.learned = array("b"), array("b")
        self.weights, self.margins, self.scores = array("d"), array("d"), array("d")
        self.threads, self.names, self.last = array("q"), {}, ""  # of conversations that are more than a row

    def __len__(self) -> int:
        return len(self.rows.lengths)

    def append(
        self, row: str, prompt: list[int], sides: list[list[int]], label: bool | None = None,
        learned: list[bool] | None = None, *, weight: float | None = None, margins: Sequence[float | None] = (),
        scores: Sequence[float] = (), thread: str | None = None,
    ) -> None:  # fmt: skip
        """`learned`: which ids of the only side are; None: all. `margins`, `scores`: of the pair, or of its sides."""
        if weight is not None and not self.weights:  # the first that says so: all before it count 1
            self.weights = array("d", [1.0]) * len(self)
        if weight is not None or self.weights:
            self.weights.append(1.0 if weight is None else weight)
        self.margins.extend(margin for margin in margins if margin is not None)
        self.scores.extend(scores)
        self._join(thread or source_row(row), thread is not None)
        self.rows.append(encode(row))
        self.prompts.append(prompt)
        for ids in sides:
            self.completions.append(ids)
        self.sides = len(sides)
        if label is not None:
            self.labels.append(label)
        tokens = sum(map(len, sides))
        if learned is not None and not self.learned:  # the first that says so: all before it were learned
            self.learned = array("b", bytes([1])) * (len(self.completions.values) - tokens)
        if learned is not None or self.learned:
            self.learned.extend(learned if learned is not None else repeat(1, tokens))

    def _join(self, thread: str, may_come_again: bool) -> None:
        """The number of the example's conversation: that of the last one, or (in a tree) of an earlier one, or new."""
        if thread != self.last or not self.threads:
            number = self.names.get(thread, len(self.threads))
            if may_come_again:
                self.names[thread] = number
        else:
            number = self.threads[-1]
        self.last = thread
        self.threads.append(number)

    def finish(self) -> Examples:
        labels = as_numpy(self.labels).astype(bool) if self.labels else None
        learned = as_numpy(self.learned).astype(bool) if self.learned else None
        numbers = {"weights": self.weights, "margins": self.margins, "scores": self.scores}
        of_rows = {name: as_numpy(values) for name, values in numbers.items() if values}
        threads = as_numpy(self.threads)
        of_rows |= {"threads": threads} if (threads != np.arange(len(threads))).any() else {}
        rows = Texts(self.rows.finish())
        return Examples(self.prompts.finish(), self.completions.finish(), rows, self.sides, labels, learned, **of_rows)


def source_row(row: str) -> str:
    """The row that an example comes from: "rows.json:3 (0 over 2)" is of rows.json:3."""
    return row[: row.rindex(" (")] if row.endswith(")") and " (" in row else row
