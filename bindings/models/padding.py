"""Batches padded on the right, for models that take no flat ones: what `packing` is without padding.

    tokens = padded([([5, 6], [7, 8]), ([5, 6], [9])])       # (prompt, completion), each in a row of its own
    hidden = completion_hidden(model, tokens)                # (N, D)

S sequences, T the longest, N completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prefuse.models.flat import packed_hidden
from prefuse.models.logps import trunk_hidden
from prefuse.packing import Packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        tensors = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **{name: x.to(device) for name, x in tensors.items()})


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


def completion_hidden(model: PreTrainedModel, tokens: Packed | Padded) -> Tensor:  # (N, D)
    """The hidden states that predict the completion tokens; no prompt and no padding reaches the head."""
    if isinstance(tokens, Packed):
        return packed_hidden(model, tokens)
    hidden = trunk_hidden(model, tokens.input_ids, tokens.attention_mask)  # (S, T, D)
    return hidden.flatten(0, 1).index_select(0, tokens.predictors)
