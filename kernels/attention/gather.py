"""Rows of a tensor that are taken more than once, with a gradient that is the same bits every time.

T rows of the tensor, M rows that are taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gather:
    """Rows to take, some of them several times, and how to add up their gradients in a fixed order."""

    index: Tensor  # (M,)
    rounds: list[tuple[Tensor, Tensor]]  # (rows, places in the M): the first copy of each row, the second, ...

    @classmethod
    def of(cls, index: Tensor, device: torch.device) -> Gather:  # (M,)
        order = torch.argsort(index, stable=True)
        rows, copies = torch.unique_consecutive(index[order], return_counts=True)
        starts = copies.cumsum(0) - copies
        rounds = []
        for copy in range(int(copies.max())):
            more = copies > copy
            rounds.append((rows[more].to(device), order[starts[more] + copy].to(device)))
        return cls(index.to(device), rounds)


def gather(x: Tensor, rows: Gather) -> Tensor:  # (T, ...) -> (M, ...)
    """`x[rows.index]`, whose gradient has the same bits every time. (That of torch's indexing has not, on a GPU.)"""
    return _Gather.apply(x, rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Gather) -> Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        return x.index_select(0, rows.index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        total = grad.new_zeros(ctx.shape)
        for rows, places in ctx.rows.rounds:  # within a round each row comes once
            total[rows] = total[rows] + grad[places]
        return total, None
