"""Who attends to whom in a flat batch.

A group is a prompt with its completions. T tokens of a flat batch, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Tokens that attend alike, as ranges of the flat batch: causally to themselves, and to all of their prompt."""

    prompt: range  # empty for a prompt itself
    own: range


class Segments:
    """Who attends to whom in a flat batch, and what attention kernels want to know of it.

    `lengths` has for each group its prompt's length, then that of each completion. Whatever is derived from them is
    made once per batch, not once per layer.
    """

    def __init__(self, lengths: Sequence[Sequence[int]]):  # (G,) of (1 + completions of the group,)
        self.lengths = [list(group) for group in lengths]
        self.all = list(_segments(self.lengths))
        self.num_tokens = sum(map(sum, self.lengths))
        # The position before each completion token, in the order of the completions.
        self.predictors = [place for s in self.all if s.prompt for place in (s.prompt[-1], *s.own[:-1])]
        self._made: dict[tuple, object] = {}

    def once(self, make, *key):
        """`make(self, *key)`, computed at the first call with this key."""
        if (make, *key) not in self._made:
            self._made[make, *key] = make(self, *key)
        return self._made[make, *key]


def _segments(lengths: list[list[int]]) -> Iterator[Segment]:
    start = 0
    for prompt, *completions in lengths:
        yield Segment(range(start, start), range(start, start + prompt))
        ends = accumulate(completions, initial=start + prompt)
        yield from (Segment(range(start, start + prompt), range(*own)) for own in pairwise(ends))
        start += prompt + sum(completions)


def token_places(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:  # 3 x (T,)
    """Of each token its group, its side (0: the prompt, then 1, 2, ... for the completions) and its position."""
    places = [
        (group, side, position + (lengths[0] if side else 0))
        for group, lengths in enumerate(segments.lengths)
        for side, length in enumerate(lengths)
        for position in range(length)
    ]
    return torch.tensor(places, device=device).unbind(1)
