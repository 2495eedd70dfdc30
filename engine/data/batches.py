"""Examples -> batch: token ids for the trunk, and where the completion tokens are for the head.

A batch is flat (`prefuse.packing`: no padding, and a prompt that neighbours share runs once) or, for a model that takes
no flat batches, padded. Losses see no difference: sequences and completion tokens stand in the same order.

E examples (pairs, labelled completions or demonstrations), B sequences, T padded length, N completion tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby

import torch
from torch import Tensor

from prefuse.engine.data.examples import Demonstration, Labelled, Pair
from prefuse.engine.data.fit import cut_prompt
from prefuse.models.padding import Padded, padded
from prefuse.packing import Packed, fill, pack

Example = Pair | Labelled | Demonstration
Tokens = tuple[list[int], list[int]]  # a prompt and a completion


@dataclass(frozen=True)
class Batch:
    rows: list[str]  # the examples by name
    tokens: Packed | Padded
    labels: Tensor | None  # (B,) bool, for labelled completions
    ref_logps: Tensor | None  # (N,) float32
    shapes: list[tuple[int, int]]  # of each example: its sequences, the length of the longest

    @property
    def num_items(self) -> int:
        """What a preference loss averages over: pairs, or labelled completions."""
        return len(self.rows)

    @property
    def targets(self) -> Tensor:  # (N,)
        return self.tokens.targets

    @property
    def cu_seqlens(self) -> Tensor:  # (B + 1,) int32
        return self.tokens.cu_seqlens

    @property
    def num_tokens(self) -> int:
        """Tokens of the sequences: no padding, and a shared prompt in each; so speeds of all batches compare."""
        return self.tokens.unshared_tokens

    def to(self, device: torch.device) -> Batch:
        return replace(_moved(self, device), tokens=self.tokens.to(device))


def _moved(batch, device: torch.device):
    tensors = {f.name: v.to(device) for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    return replace(batch, **tensors)


@dataclass(frozen=True)
class Examples:
    """The tokens of a data set as the engine walks over them: for each example its sequences."""

    rows: list[str]  # (E,) names, for messages
    sequences: list[list[Tokens]]  # (E,) two for a pair (chosen, rejected), else one
    labels: list[bool] | None  # (E,)
    padding_free: bool = False  # their batches are flat
    bos: int | None = None  # the token that a prompt keeps where it loses its start

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> list[list[int]]:
        return [sequences[0][0] for sequences in self.sequences]

    @property
    def lengths(self) -> list[int]:
        """The longest sequence of each example: what it costs in a padded batch."""
        return [max(len(prompt) + len(completion) for prompt, completion in s) for s in self.sequences]

    def bins(self, budget: int) -> Callable[[Sequence[int]], list[list[int]]]:
        """A function that cuts indices into flat batches of at most `budget` tokens, by first-fit-decreasing.

        Examples with the same prompt stay side by side as far as they fit, so that their prompt runs once.
        """

        def cut(indices: Sequence[int]) -> list[list[int]]:
            blocks = self._sharing(indices, budget)
            lengths = [self._flat_length(block) for block in blocks]
            return [[i for block in chosen for i in blocks[block]] for chosen in fill(lengths, budget)]

        return cut

    def _sharing(self, indices: Sequence[int], budget: int) -> list[list[int]]:
        """Indices with the same prompt together, in blocks that fit the budget if their examples do."""
        by_prompt: dict[tuple[int, ...], list[list[int]]] = {}
        for index in indices:
            blocks = by_prompt.setdefault(tuple(self._prompt(index)), [[]])
            if blocks[-1] and self._flat_length([*blocks[-1], index]) > budget:
                blocks.append([])
            blocks[-1].append(index)
        return [block for blocks in by_prompt.values() for block in blocks]

    def _flat_length(self, block: Sequence[int]) -> int:
        completions = sum(len(completion) for i in block for _, completion in self.sequences[i])
        return len(self._prompt(block[0])) + completions

    def _prompt(self, index: int) -> list[int]:
        return self.sequences[index][0][0]

    def select(self, indices: Sequence[int]) -> Examples:
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        rows, sequences = [self.rows[i] for i in indices], [self.sequences[i] for i in indices]
        return replace(self, rows=rows, sequences=sequences, labels=labels)

    def fingerprint(self) -> str:
        """Changes with any token, and with nothing else."""
        digest = hashlib.sha256()
        for ids in (ids for group in self.sequences for tokens in group for ids in tokens):
            digest.update(array("q", [len(ids), *ids]).tobytes())
        return digest.hexdigest()


def examples_of(dataset: Sequence[Example], bos: int | None = None) -> Examples:
    labels = [example.label for example in dataset] if isinstance(dataset[0], Labelled) else None
    rows, sequences = [example.row for example in dataset], [_sequences(example) for example in dataset]
    return Examples(rows, sequences, labels, bos=bos)


def _sequences(example: Example) -> list[Tokens]:
    if isinstance(example, Pair):
        return [(example.prompt, example.chosen), (example.prompt, example.rejected)]
    return [(example.prompt, example.completion)]


def mismatched(examples: Examples, others: Sequence[int], max_length: int) -> Examples:
    """Each prompt with the completion of another example; a prompt that leaves it no room loses its start."""
    sequences = []
    for (own,), other in zip(examples.sequences, others, strict=True):
        prompt, completion = own[0], examples.sequences[other][0][1]
        sequences.append([(cut_prompt(prompt, max_length - len(completion), examples.bos), completion)])
    return replace(examples, sequences=sequences, labels=None)


def collate(examples: Examples, indices: Sequence[int], ref_logps: Sequence[Tensor] | None = None) -> Batch:
    """One batch of the examples at `indices`; a pair's sequences stand side by side, chosen first."""
    chosen = examples.select(indices)
    sequences = [tokens for group in chosen.sequences for tokens in group]
    counts = [len(group) for group in chosen.sequences]
    return Batch(
        rows=chosen.rows,
        tokens=_packed(sequences) if examples.padding_free else padded(sequences),
        labels=None if chosen.labels is None else torch.tensor(chosen.labels),
        ref_logps=None if ref_logps is None else torch.cat([ref_logps[i] for i in indices]),
        shapes=list(zip(counts, chosen.lengths, strict=True)),
    )


def _packed(sequences: Sequence[Tokens]) -> Packed:
    """Neighbours with the same prompt share it."""
    groups = groupby(sequences, key=lambda tokens: tokens[0])
    return pack([(prompt, [completion for _, completion in group]) for prompt, group in groups])


def padded_tokens(batches: Sequence[Batch], microbatch: int) -> int:
    """What the examples of `batches` would run as padded batches of `microbatch` examples, longest first."""
    shapes = sorted((shape for batch in batches for shape in batch.shapes), key=lambda shape: -shape[1])
    cuts = [shapes[start : start + microbatch] for start in range(0, len(shapes), microbatch)]
    return sum(sum(count for count, _ in cut) * cut[0][1] for cut in cuts)
