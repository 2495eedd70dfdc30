"""Gated layers, `down(act(gate(x)) * up(x))`, on a CPU: what stands between the products takes one pass over memory.

Rows go through a few at a time, so that they stay in the cache, and `act(gate(x))` is not kept for the backward. The
bits are those of the layer's own forward.

T tokens, E the width between the products.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

CACHE_BYTES = 256 << 10  # of each tensor's rows that go through together
VECTOR = 64  # a multiple of the numbers that a processor takes at once


def silu_backward(dy: Tensor, gate: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward(dy, gate)


def gelu_tanh(gate: Tensor) -> Tensor:
    return gelu(gate, approximate="tanh")


def gelu_tanh_backward(dy: Tensor, gate: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(dy, gate, approximate="tanh")


# By the name of transformers' class: the function, and its gradient from dy and its input.
ACTIVATIONS = {
    "SiLU": (silu, silu_backward), "SiLUActivation": (silu, silu_backward), "GELUTanh": (gelu_tanh, gelu_tanh_backward),
}  # fmt: skip


def gate_in_cache(model: nn.Module) -> None:
    """Gives the gated layers of a model the forward below, where it is what their own computes."""
    known: dict[type, bool] = {}
    for layer in model.modules():
        act = ACTIVATIONS.get(type(getattr(layer, "act_fn", None)).__name__)
        if act is None or not all(hasattr(layer, f"{name}_proj") for name in ("gate", "up", "down")):
            continue
        forward = functools.partial(_forward, layer, act)
        if type(layer) not in known:
            known[type(layer)] = _is_the_same(layer, forward)
        if known[type(layer)]:
            layer.forward = forward


@torch.no_grad()
def _is_the_same(layer: nn.Module, forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether the layer's own forward, tried on a few rows, gives these bits."""
    like = next(layer.parameters())
    size = getattr(layer.gate_proj, "in_features", 0)
    if not like.is_floating_point():  # of four bits
        return False
    x = torch.linspace(-1, 1, 5 * size, dtype=like.dtype, device=like.device).view(1, 5, size)
    try:
        own, ours = layer(x), forward(x)
    except Exception:  # of layers that take more than x, or x of another shape
        return False
    return isinstance(own, Tensor) and torch.equal(own, ours)


def _forward(layer: nn.Module, act: tuple[Callable, Callable], x: Tensor) -> Tensor:  # (..., D) -> (..., D)
    return layer.down_proj(_Gated.apply(layer.gate_proj(x), layer.up_proj(x), act))


class _Gated(torch.autograd.Function):
    """`act(gate) * up`."""

    @staticmethod
    def forward(ctx, gate, up, act):  # (..., E)
        ctx.save_for_backward(gate, up)
        ctx.act = act
        y = _to_fill(gate)
        for g, u, out in _rows(gate, up, y):
            torch.mul(act[0](g), u, out=out)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # (..., E)
        gate, up = ctx.saved_tensors
        function, gradient = ctx.act
        dgate, dup = _to_fill(gate), _to_fill(up)
        for d, g, u, dg, du in _rows(dy, gate, up, dgate, dup):
            torch.mul(d, function(g), out=du)
            dg.copy_(gradient(d * u, g))
        return dgate, dup, None


def _to_fill(like: Tensor) -> Tensor:
    """Contiguous, whatever `like` is: `_rows` of it are views, so that what is written stays."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _rows(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(..., E) -> a few rows of each at a time: whole vectors, since what is left over may be computed otherwise."""
    width = tensors[0].shape[-1]
    whole = VECTOR // math.gcd(width, VECTOR)
    size = max(1, CACHE_BYTES // (width * tensors[0].element_size() * whole)) * whole
    return zip(*(x.flatten(0, -2).split(size) for x in tensors), strict=True)
