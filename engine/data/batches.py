"""Examples -> batch: token ids for the trunk, and where the completion tokens are for the head.

A batch is flat (`prefuse.packing`: no padding, and a prompt that neighbours share runs once) or, for a model that takes
no flat batches, padded. Losses see no difference: sequences and completion tokens stand in the same order.

E examples (pairs, labelled completions or demonstrations), B sequences, T padded length, N completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefuse.engine.data.fit import CharacterParts, cut_prompt
from prefuse.engine.data.ragged import Ragged
from prefuse.engine.data.table import NUMBERS, Example, Examples, Tokens
from prefuse.packing import Packed, Padded, on_device, pack, padded
from prefuse.tokens import IGNORE_INDEX


@dataclass(frozen=True)
class Batch:
    rows: list[str]  # the examples by name
    tokens: Packed | Padded
    numbers: dict[str, Tensor]  # what the loss takes of the rows: labels (B,) bool, weights, margins, scores
    ref_logps: Tensor | None  # (N,) float32
    shapes: list[tuple[int, int]]  # of each example: its sequences, the length of the longest
    num_learned: int  # completion tokens that are learned: what a loss per token averages over
    policy_weights: bool = False  # see Examples
    sampled: Any = None  # of answers that the policy sampled: their advantages (engine/model/policy.py)

    @property
    def num_items(self) -> int:
        """What a preference loss averages over: pairs, or labelled completions."""
        return len(self.rows)

    @property
    def targets(self) -> Tensor:  # (N,) IGNORE_INDEX where a demonstration's token is not learned
        return self.tokens.targets

    @property
    def cu_seqlens(self) -> Tensor:  # (B + 1,) int32
        return self.tokens.cu_seqlens

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences: no padding, and a shared prompt counts in each, so that speeds can be compared."""
        return self.tokens.unshared_tokens

    def to(self, device: torch.device) -> Batch:
        numbers = {name: x.to(device) for name, x in self.numbers.items()}
        sampled = None if self.sampled is None else self.sampled.to(device)
        return replace(on_device(self, device), tokens=self.tokens.to(device), numbers=numbers, sampled=sampled)


def examples_of(dataset: Sequence[Example], bos: int | None = None, parts: CharacterParts | None = None) -> Examples:
    """`Examples` of what `load_examples` gave, or of a list made by hand, with BOS and the tokens' bytes for cuts."""
    examples = dataset if isinstance(dataset, Examples) else Examples.of(dataset)
    return replace(examples, bos=bos, parts=parts)


def mismatched(
    examples: Examples, others: Sequence[int], max_length: int, completions: Ragged | None = None
) -> Examples:
    """Each prompt with the completion of another example; a prompt that leaves it no room loses its start.

    `completions`: those that `others` are places of; None: the examples' own.
    """
    completions = (examples.completions if completions is None else completions).take(np.asarray(others, np.int64))
    rooms = max_length - completions.lengths
    prompts = examples.prompts
    too_long = np.flatnonzero(prompts.lengths > rooms)
    if len(too_long):
        kept = zip(too_long, rooms[too_long], strict=True)
        cut = [cut_prompt(prompts[i], room, examples.bos, examples.parts) for i, room in kept]
        prompts = prompts.replaced(too_long, Ragged.of(cut))
    own = dict.fromkeys(NUMBERS)
    return replace(examples, prompts=prompts, completions=completions, policy_weights=False, **own)


def collate(examples: Examples, indices: Sequence[int], ref_logps: Sequence[Tensor] | None = None) -> Batch:
    """One batch of the examples at `indices`; a pair's sequences stand side by side, chosen first."""
    sequences = [tokens for i in indices for tokens in examples.sequences_of(i)]
    tokens = _packed(sequences) if examples.padding_free else padded(sequences)
    num_learned = len(tokens.targets)
    if examples.learned is not None:
        learned = np.concatenate([examples.learned_of(i) for i in indices])
        num_learned = int(learned.sum())
        tokens = replace(tokens, targets=tokens.targets.masked_fill(torch.from_numpy(~learned), IGNORE_INDEX))
    chosen = np.asarray(indices, np.int64)
    batch = Batch(
        rows=[examples.rows[i] for i in indices],
        tokens=tokens,
        numbers={
            name: torch.from_numpy(of_rows[chosen])
            for name in NUMBERS
            if (of_rows := getattr(examples, name)) is not None
        },
        ref_logps=None if ref_logps is None else torch.cat([ref_logps[i] for i in indices]),
        shapes=[(examples.sides, length) for length in examples.lengths[chosen].tolist()],
        num_learned=num_learned,
        policy_weights=examples.policy_weights,
    )
    return examples.finish(batch, indices)


def _packed(sequences: Sequence[Tokens]) -> Packed:
    """Neighbours with the same prompt share it."""
    groups = groupby(sequences, key=lambda tokens: tokens[0])
    return pack([(prompt, [completion for _, completion in group]) for prompt, group in groups])


def padded_tokens(batches: Sequence[Batch], microbatch: int) -> int:
    """What the examples of `batches` would run as padded batches of `microbatch` examples, longest first."""
    shapes = sorted((shape for batch in batches for shape in batch.shapes), key=lambda shape: -shape[1])
    cuts = [shapes[start : start + microbatch] for start in range(0, len(shapes), microbatch)]
    return sum(sum(count for count, _ in cut) * cut[0][1] for cut in cuts)
