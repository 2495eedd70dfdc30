"""Flat batches: sequences end to end in one row, no padding, and a prompt that several completions share only once.

    packed = pack([([5, 6, 7], [[8, 9], [10]])])        # one group: [prompt | chosen | rejected]
    hidden = prefuse.attention.packed_hidden(model, packed)               # (N, D)
    prefuse.linear_preference_loss(hidden, weight, packed.targets, packed.cu_seqlens, ...)

A group is a prompt with its completions: one for a demonstration or a labelled row, two for a pair, K for K answers.
`padded` makes the same of batches padded on the right, for models that take no flat ones.
T tokens of a flat batch, N completion tokens of S completions in G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from prefuse.kernels.attention.segments import Segments

AnyBatch = TypeVar("AnyBatch")
Group = tuple[Sequence[int], Sequence[Sequence[int]]]  # a prompt, its completions


@dataclass(frozen=True)
class Packed:
    """A flat batch: what a trunk needs to run it, and what `linear_preference_loss` needs beside the hidden states."""

    input_ids: Tensor  # (1, T)
    position_ids: Tensor  # (1, T) from 0 in every prompt; each completion goes on where its prompt ends
    predictors: Tensor  # (N,) in the T: the position before each completion token
    targets: Tensor  # (N,) the completion tokens, end to end
    cu_seqlens: Tensor  # (S + 1,) int32, where each completion starts in the N
    segments: Segments
    unshared_tokens: int = field(default=0)  # tokens of the same sequences, each with its own prompt
    padded_tokens: int = field(default=0)  # the same, with every sequence padded to the longest

    @property
    def num_tokens(self) -> int:
        """T: the tokens that run."""
        return self.segments.num_tokens

    def to(self, device: torch.device | str) -> Packed:
        return on_device(self, device)


def on_device(batch: AnyBatch, device: torch.device | str) -> AnyBatch:
    """A dataclass with its tensors on `device`."""
    tensors = {f.name: v.to(device) for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}
    return replace(batch, **tensors)


def pack(groups: Sequence[Group]) -> Packed:
    """One flat batch of `groups`, in their order: `[prompt | completion | completion ...]` for each.

    Raises ValueError for an empty prompt (nothing would predict the first token), and for an empty completion.
    """
    _check(groups)
    ids, positions, targets, lengths = [], [], [], []
    for prompt, completions in groups:
        ids += prompt
        positions += range(len(prompt))
        for completion in completions:
            positions += range(len(prompt), len(prompt) + len(completion))
            ids += completion
            targets += completion
        lengths.append([len(prompt), *map(len, completions)])
    segments = Segments(lengths)
    sequences = [prompt + completion for prompt, *completions in lengths for completion in completions]
    counts = [0] + [completion for _, *completions in lengths for completion in completions]
    return Packed(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        predictors=torch.tensor(segments.predictors),
        targets=torch.tensor(targets),
        cu_seqlens=torch.tensor(counts).cumsum(0).int(),
        segments=segments,
        unshared_tokens=sum(sequences),
        padded_tokens=len(sequences) * max(sequences),
    )


def _check(groups: Sequence[Group]) -> None:
    if not groups:
        raise ValueError("pack() got no groups: expected at least one (prompt ids, [completion ids, ...])")
    for number, (prompt, completions) in enumerate(groups):
        if len(prompt) == 0:
            raise ValueError(
                f"the prompt of group {number} is empty: expected at least one token, since the last one predicts the "
                "first of every completion; put the tokenizer's BOS there"
            )
        if len(completions) == 0 or not all(len(completion) for completion in completions):
            raise ValueError(
                f"group {number} has completions of {[len(completion) for completion in completions]} tokens: expected "
                "one completion or more, none of them empty; leave such rows out"
            )


def fill(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Items of these lengths in bins of at most `budget`, by first-fit-decreasing: lists of indices into `lengths`.

    The longest item first (of equals, the earlier one), each into the first bin with room for it. An item is never
    split; one longer than the budget has a bin of its own. Makes at most one bin more than 11/9 of the least number
    (Dosa 2007, "The Tight Bound of First Fit Decreasing Bin-Packing Algorithm"). O(n log n).
    """
    if budget < 1:
        raise ValueError(f"budget is {budget}: expected the tokens of a bin, at least 1")
    bins: list[list[int]] = []
    width = 1 << max(0, len(lengths) - 1).bit_length()  # leaves of a tree: the free room of each possible bin
    room = [budget] * (2 * width)  # a node has the most room of its leaves
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        size = min(lengths[item], budget)
        node = 1
        while node < width:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        if node - width == len(bins):
            bins.append([])
        bins[node - width].append(item)
        room[node] -= size
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return bins


@dataclass(frozen=True)
class Padded:
    """What `Packed` is without padding."""

    input_ids: Tensor  # (S, T)
    attention_mask: Tensor  # (S, T)
    predictors: Tensor  # (N,) in the flattened (S * T): the position before each completion token
    targets: Tensor  # (N,) the completion tokens, packed
    cu_seqlens: Tensor  # (S + 1,) int32, where each sequence starts in the N
    unshared_tokens: int  # without padding

    @property
    def num_tokens(self) -> int:
        """The tokens that run."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> Padded:
        return on_device(self, device)


def padded(sequences: Sequence[tuple[list[int], list[int]]]) -> Padded:
    """Prompts with their completions, each in a row of its own."""
    input_ids, attention_mask = pad([prompt + completion for prompt, completion in sequences])
    width = input_ids.shape[1]
    predictors = [
        torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1) + i * width
        for i, (prompt, completion) in enumerate(sequences)
    ]
    counts = torch.tensor([0] + [len(completion) for _, completion in sequences])
    return Padded(
        input_ids=input_ids,
        attention_mask=attention_mask,
        predictors=torch.cat(predictors),
        targets=torch.tensor([token for _, completion in sequences for token in completion]),
        cu_seqlens=counts.cumsum(0).int(),
        unshared_tokens=int(attention_mask.sum()),
    )


def pad(sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:  # (B, T) ids, (B, T) mask
    """Pad on the right. The mask comes from the lengths: a pad id may also be a real token (pad is often eos)."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    attention_mask = torch.arange(int(lengths.max())) < lengths[:, None]
    input_ids = torch.zeros(attention_mask.shape, dtype=torch.long)
    input_ids[attention_mask] = torch.tensor([token for ids in sequences for token in ids])
    return input_ids, attention_mask.long()
