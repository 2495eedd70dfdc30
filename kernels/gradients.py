"""Which gradients of a head are wanted, and where they are written.

N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Needs(NamedTuple):
    """Which inputs want a gradient."""

    hidden: bool
    weight: bool
    bias: bool

    @staticmethod
    def of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Needs:
        return Needs(hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)


class Gradients(NamedTuple):
    """The gradients of a head's inputs; None where none is wanted."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None  # (V, D)
    bias: Tensor | None  # (V,)


class Sums(NamedTuple):
    """The gradients that are sums over rows."""

    dweight: Tensor | None  # (V, D)
    dbias: Tensor | None  # (V,)

    @staticmethod
    def empty(weight: Tensor, bias: Tensor | None, needs: Needs, dtype: torch.dtype | None = None) -> Sums:
        """For a backward that writes every element, in their own dtypes or in `dtype`."""
        contiguous = torch.contiguous_format
        dweight = torch.empty_like(weight, dtype=dtype, memory_format=contiguous) if needs.weight else None
        return Sums(dweight, torch.empty_like(bias, dtype=dtype) if needs.bias else None)

    @staticmethod
    def zeros(weight: Tensor, bias: Tensor | None, needs: Needs, dtype: torch.dtype) -> Sums:
        """For several backward passes that add to it."""
        dweight = weight.new_zeros(weight.shape, dtype=dtype) if needs.weight else None
        return Sums(dweight, bias.new_zeros(bias.shape, dtype=dtype) if needs.bias else None)


def empty_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> tuple[Tensor, ...]:
    """Three tensors as an operator returns them: one without elements where no gradient is wanted."""
    like = (hidden, weight, bias)
    return tuple(x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in zip(like, needs, strict=True))


def zero_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Needs) -> Gradients:
    """The gradients where no row is kept."""
    like = (hidden, weight, bias)
    return Gradients(*(x.new_zeros(x.shape) if need else None for x, need in zip(like, needs, strict=True)))
