"""Helpers for token ids: labels to packed targets, rows that share a prompt, hashing, control tokens.

S sequences in rows of T positions, N tokens that a loss reads.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from torch import Tensor, nn

from prefuse.packing import Group

# ---- labels of padded rows -----------------------------------------------------------------------

IGNORE_INDEX = -100  # transformers' label of a token that is not learned


class KeptTokens(NamedTuple):
    """The tokens of padded rows that a loss reads, packed end to end: N of them, in S sequences."""

    places: Tensor  # (N,) where they stand in the flattened (S * T)
    targets: Tensor  # (N,)
    lengths: Tensor  # (S,) how many each sequence has
    cu_seqlens: Tensor  # (S + 1,) int32

    @property
    def predictors(self) -> Tensor:  # (N,) in the flattened (S * T)
        """The position before each, where its hidden state stands unless labels were shifted."""
        return self.places - 1


def keep_tokens(
    labels: Tensor,  # (S, T)
    kept: Tensor | None = None,  # (S, T) bool
    lengths: Tensor | None = None,  # (S',)
) -> KeptTokens:
    """`labels[kept]` with where it came from; `kept` is `labels != -100` unless given.

    `lengths` says how many kept tokens each sequence has where several stand in one row.
    """
    kept = labels != IGNORE_INDEX if kept is None else kept
    lengths = kept.sum(-1) if lengths is None else lengths
    places = kept.flatten().nonzero()[:, 0]
    cu_seqlens = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    return KeptTokens(places, labels.flatten()[places], lengths, cu_seqlens)


def learned(labels: Tensor) -> Tensor:  # (B, T) -> (B, T) bool
    """Which labels are learned when `labels[:, t]` is the token at t: not the first, for nothing predicts it."""
    return nn.functional.pad(labels[:, 1:] != IGNORE_INDEX, (1, 0))


# ---- prompts that several rows share -------------------------------------------------------------


def group_prompts(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of the rows of each prompt, prompts in the order in which they first come."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(tuple(prompt), []).append(index)
    return list(groups.values())


def share_prompts(groups: Iterable[Group]) -> list[Group]:
    """Neighbours with the same prompt as one group: the prompt once, then all of their completions."""
    shared = []
    for prompt, neighbours in groupby(groups, key=lambda group: tuple(group[0])):
        shared.append((list(prompt), [completion for _, completions in neighbours for completion in completions]))
    return shared


def hash_tokens(digest: Any, sequences: Iterable[Sequence[int]]) -> None:
    """Feeds token ids to a digest of hashlib: the length of each sequence, then its ids.

    With the lengths, no two lists of sequences feed it the same bytes.
    """
    for ids in sequences:
        digest.update(array("q", [len(ids), *ids]).tobytes())


def with_control(prompt: Sequence[int], label: bool, good: Sequence[int], bad: Sequence[int]) -> list[int]:
    """A prompt behind the control tokens of its row's label, for `ConditionalSFT`.

    Where answers are generated, the label is True.
    """
    return [*(good if label else bad), *prompt]
