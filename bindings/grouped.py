"""A preference loss whose gradients are computed in its forward, a few whole pairs at a time.

`prefuse.kernels.logprobs.grouped` does the head's part.

N completion tokens, end to end; S sequences, cut by cu_seqlens (S + 1,).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from prefuse.kernels.gradients import Gradients
from prefuse.kernels.logprobs.call import HeadCall, fits, refuse_double_backward
from prefuse.kernels.logprobs.grouped import GroupedHead, group_rows


class ItemGroup(NamedTuple):
    """Whole pairs (or, for unpaired losses, sequences) that stand next to each other."""

    sequences: slice
    tokens: slice


def split_in_groups(call: HeadCall, workspace: int, cu_seqlens: Tensor, per_item: int) -> list[ItemGroup]:
    """Groups whose weights fit `workspace` one at a time; none where all fit at once, or another mode is cheaper.

    Reads `cu_seqlens` on the host, which on a GPU waits for it.
    """
    rows = group_rows(call, workspace)
    if rows == 0 or fits(call, workspace):
        return []
    return whole_items(cu_seqlens.tolist(), per_item, rows)


def whole_items(cu_seqlens: list[int], per_item: int, rows: int) -> list[ItemGroup]:
    """Items of `per_item` sequences, as many to a group as `rows` tokens hold; none where one alone has more."""
    ends = cu_seqlens[::per_item]
    if any(last - first > rows for first, last in pairwise(ends)):
        return []
    groups, first = [], 0
    for i in range(1, len(ends)):
        if i + 1 == len(ends) or ends[i + 1] - ends[first] > rows:
            groups.append(ItemGroup(slice(first * per_item, i * per_item), slice(ends[first], ends[i])))
            first = i
    return groups


def gradients_in_forward(
    groups: list[ItemGroup],
    call: HeadCall,
    loss_of: Callable[[Tensor, slice, slice], Tensor],  # logps, sequences, tokens of a group -> ()
    outputs: tuple[str, ...] = (),
) -> tuple[Tensor, Gradients, dict[str, Tensor]]:
    """(N,) log-probabilities, d(sum of `loss_of` over the groups) by hidden, weight and bias, and the outputs (N,)."""
    head = GroupedHead(call, outputs)
    logps, extra = [], []
    for group in groups:
        logps.append(head.forward(group.tokens))
        extra.append(head.saved.extra)
        leaf = logps[-1].detach().requires_grad_()
        head.backward(torch.autograd.grad(loss_of(leaf, group.sequences, group.tokens), leaf)[0])
    named = dict(zip(outputs, torch.cat(extra, -1), strict=True)) if outputs else {}
    return torch.cat(logps), head.gradients, named


class WithGradients(torch.autograd.Function):
    """A loss whose gradients exist already: the backward multiplies them by the incoming gradient."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: tuple[Tensor | None, ...], *inputs: Tensor | None) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [None if x is None else x.dtype for x in inputs]
        return loss.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled():
            refuse_double_backward()
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, None, *(None if g is None else (g * grad).to(dtype) for g, dtype in pairs)
