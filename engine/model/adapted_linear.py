"""A frozen linear layer with one adapter beside it, whose sums are made by the products themselves.

    y = adapted_linear(x, weight, bias, first, second, scaling)

T tokens, D and E the layer's inputs and outputs, r the adapter's rank.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear


def adapted_linear(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (E, D) frozen
    bias: Tensor | None,  # (E,) frozen
    first: Tensor,  # (r, D)
    second: Tensor,  # (E, r)
    scaling: float,
) -> Tensor:  # (..., E)
    """`linear(x, weight, bias) + linear(scaling * linear(x, first), second)`, all in one dtype, without autocast.

    What the adapter adds to y, and to the gradient of x, is never a tensor of its own.
    """
    y = _AdaptedLinear.apply(x.flatten(0, -2), weight, bias, first, second, scaling)
    return y.view(*x.shape[:-1], -1)


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, first, second, scaling):
        y = linear(x, weight, bias)
        narrow = linear(x, first) * scaling  # (T, r)
        ctx.save_for_backward(x, weight, first, second, narrow)
        ctx.scaling = scaling
        return y.addmm_(narrow, second.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):  # (T, E)
        x, weight, first, second, narrow = ctx.saved_tensors
        dnarrow = (dy @ second) * ctx.scaling
        dx = (dy @ weight).addmm_(dnarrow, first) if ctx.needs_input_grad[0] else None
        return dx, None, None, dnarrow.T @ x, dy.T @ narrow, None
