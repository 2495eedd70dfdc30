"""Examples -> padded batch: token ids for the trunk, and where the completion tokens are for the head.

E examples (pairs, labelled completions or demonstrations), B sequences, T padded length, N completion tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from prefuse.engine.data import Demonstration, Labelled, Pair

Example = Pair | Labelled | Demonstration
Tokens = tuple[list[int], list[int]]  # a prompt and a completion


@dataclass(frozen=True)
class Batch:
    rows: list[str]  # the examples by name
    input_ids: Tensor  # (B, T)
    attention_mask: Tensor  # (B, T)
    predictors: Tensor  # (N,) in the flattened (B * T): the position before each completion token
    targets: Tensor  # (N,) the completion tokens, packed
    cu_seqlens: Tensor  # (B + 1,) int32, where each sequence starts in the N
    labels: Tensor | None  # (B,) bool, for labelled completions
    ref_logps: Tensor | None = None  # (N,) float32
    num_tokens: int = 0  # without padding

    @property
    def num_items(self) -> int:
        """What a preference loss averages over: pairs, or labelled completions."""
        return len(self.rows)

    def to(self, device: torch.device) -> Batch:
        tensors = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Examples:
    """The tokens of a data set as the engine walks over them: for each example its sequences."""

    rows: list[str]  # (E,) names, for messages
    sequences: list[list[Tokens]]  # (E,) two for a pair (chosen, rejected), else one
    labels: list[bool] | None  # (E,)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> list[list[int]]:
        return [sequences[0][0] for sequences in self.sequences]

    @property
    def lengths(self) -> list[int]:
        """The longest sequence of each example: what it costs in a padded batch."""
        return [max(len(prompt) + len(completion) for prompt, completion in s) for s in self.sequences]

    def select(self, indices: Sequence[int]) -> Examples:
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return Examples([self.rows[i] for i in indices], [self.sequences[i] for i in indices], labels)

    def fingerprint(self) -> str:
        """Changes with any token, and with nothing else."""
        digest = hashlib.sha256()
        for ids in (ids for group in self.sequences for tokens in group for ids in tokens):
            digest.update(array("q", [len(ids), *ids]).tobytes())
        return digest.hexdigest()


def examples_of(dataset: Sequence[Example]) -> Examples:
    labels = [example.label for example in dataset] if isinstance(dataset[0], Labelled) else None
    return Examples([example.row for example in dataset], [_sequences(example) for example in dataset], labels)


def _sequences(example: Example) -> list[Tokens]:
    if isinstance(example, Pair):
        return [(example.prompt, example.chosen), (example.prompt, example.rejected)]
    return [(example.prompt, example.completion)]


def mismatched(examples: Examples, others: Sequence[int], max_length: int) -> Examples:
    """Each prompt with the completion of another example; a prompt that leaves it no room loses its start."""
    sequences = []
    for (own,), other in zip(examples.sequences, others, strict=True):
        prompt, completion = own[0], examples.sequences[other][0][1]
        sequences.append([(prompt[-(max_length - len(completion)) :], completion)])
    return Examples(examples.rows, sequences, None)


def collate(examples: Examples, indices: Sequence[int], ref_logps: Sequence[Tensor] | None = None) -> Batch:
    """One batch of the examples at `indices`; a pair's sequences stand side by side, chosen first."""
    chosen = examples.select(indices)
    sequences = [tokens for group in chosen.sequences for tokens in group]
    input_ids, attention_mask = pad([prompt + completion for prompt, completion in sequences])
    width = input_ids.shape[1]
    predictors = [
        torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1) + i * width
        for i, (prompt, completion) in enumerate(sequences)
    ]
    counts = torch.tensor([0] + [len(completion) for _, completion in sequences])
    return Batch(
        rows=chosen.rows,
        input_ids=input_ids,
        attention_mask=attention_mask,
        predictors=torch.cat(predictors),
        targets=torch.tensor([token for _, completion in sequences for token in completion]),
        cu_seqlens=counts.cumsum(0).int(),
        labels=None if chosen.labels is None else torch.tensor(chosen.labels),
        ref_logps=None if ref_logps is None else torch.cat([ref_logps[i] for i in indices]),
        num_tokens=sum(len(prompt) + len(completion) for prompt, completion in sequences),
    )


def pad(sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:  # (B, T) ids, (B, T) mask
    """Pad on the right. The mask comes from the lengths: a pad id may also be a real token (pad is often eos)."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    attention_mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.zeros(attention_mask.shape, dtype=torch.long)
    input_ids[attention_mask] = torch.tensor([token for ids in sequences for token in ids])
    return input_ids, attention_mask.long()
