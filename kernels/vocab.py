"""A head whose rows are spread over ranks: which part of the vocabulary a rank holds, and how parts are combined.

    N tokens; V vocabulary in all, rank r holding V_r rows of the weight, in the order of the ranks

Every rank has the same hidden states and targets. Forward: the ranks that hold the targets share
their logits, then every rank's sums over its own columns are gathered; nothing else is sent. Backward: one
all-reduce of dhidden. Sums are gathered and added in the order of the ranks. (The rounding of an all-reduce may depend
on a number's place in the buffer, and a token's log-probability must not depend on its neighbours.)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Whole:
    """This rank holds the whole head."""

    sharded = False

    def local(self, targets: Tensor) -> Tensor:
        """(N,) columns of the vocabulary -> rows of this rank's weight; below 0 or above, another rank's."""
        return targets

    def valid(self, local: Tensor, rows: int) -> Tensor:
        """(N,) bool: whether a `local` column is in the vocabulary, `rows` of which are here."""
        return (local >= 0) & (local < rows)

    def own(self, x: Tensor, mine: Tensor) -> Tensor:
        """(N,) each number from the rank that has it; `mine` says where that is this one."""
        return x

    def gather(self, parts: Tensor) -> Tensor:
        """What every rank has, (ranks, ...)."""
        return parts[None]

    def add_(self, x: Tensor) -> Tensor:
        """The sum over the ranks, in place."""
        return x

    def size(self, rows: int) -> int | Tensor:
        """Columns of the whole vocabulary, `rows` of which are here."""
        return rows


class Shard(Whole):
    """This rank holds a part of the head: `place` has its first column, and the size of the vocabulary."""

    sharded = True

    def __init__(self, place: Tensor, group: dist.ProcessGroup):  # (2,) int64
        self.first, self.vocab = place.unbind()
        self.group = group

    def local(self, targets: Tensor) -> Tensor:
        return targets - self.first

    def valid(self, local: Tensor, rows: int) -> Tensor:
        return (local >= -self.first) & (local < self.vocab - self.first)

    def own(self, x: Tensor, mine: Tensor) -> Tensor:
        return self.add_(torch.where(mine, x, 0.0))  # one term is not 0: exact in any order

    def gather(self, parts: Tensor) -> Tensor:
        gathered = [torch.empty_like(parts) for _ in range(self.group.size())]
        dist.all_gather(gathered, parts.contiguous(), group=self.group)
        return torch.stack(gathered)

    def add_(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def size(self, rows: int) -> int | Tensor:
        return self.vocab


_groups: dict[str, dist.ProcessGroup] = {}


def remember(group: dist.ProcessGroup | None) -> str:
    """A name for `group` that an operator takes as an argument; "" for none."""
    if group is None:
        return ""
    _groups[group.group_name] = group
    return group.group_name


def shard_of(place: Tensor | None, group: str) -> Whole:
    return Shard(place, _groups[group]) if group else Whole()


@torch.library.custom_op("prefuse::vocabulary_place", mutates_args=())
def shard_place(weight: Tensor, group: str) -> Tensor:
    """(2,) int64: the first column of this rank's `weight (V_r, D)`, and the size of the vocabulary."""
    rows = torch.tensor([len(weight)], device=weight.device)
    sizes = [torch.empty_like(rows) for _ in range(_groups[group].size())]
    dist.all_gather(sizes, rows, group=_groups[group])
    sizes = torch.cat(sizes)
    return torch.stack([sizes[: _groups[group].rank()].sum(), sizes.sum()])


@shard_place.register_fake
def _(weight, group):
    return weight.new_empty(2, dtype=torch.int64)
