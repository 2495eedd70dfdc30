"""Three units of products instead of four where the weights of all rows do not fit the workspace at once.

    N tokens, D hidden, V vocabulary

A few whole sequences at a time: their forward keeps its weights, the caller says what each log-probability is worth,
and the gradients follow at once, before the next group takes the same memory. So the caller must know `dL/dlogp` of a
group from that group alone, as it does for every loss that is a sum over sequences or pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefuse.kernels.gemm import accumulator_dtype
from prefuse.kernels.logprobs.linear_logprobs import _check_targets, _module, _stash_dtype
from prefuse.kernels.logprobs.portable import RowGrads, Sums, stash_size
from prefuse.kernels.options import HeadOptions
from prefuse.kernels.slices import row_tile
from prefuse.kernels.vocab import Whole


def group_rows(workspace: int, hidden: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> int:
    """Rows of the largest group whose weights fit `workspace` bytes beside a float32 dweight; 0: groups do not pay."""
    if not torch.is_grad_enabled() or hidden.dtype == torch.float16 or impl == "reference":
        return 0
    if not weight.requires_grad and not (bias is not None and bias.requires_grad):
        return 0
    if torch.compiler.is_compiling():  # gradients made in the forward would break the graph
        return 0
    accumulator = accumulator_dtype(hidden.dtype)
    needs = _needs(hidden, weight, bias)
    # A float32 weight's gradient is its own accumulator.
    sums = weight.numel() * accumulator.itemsize if needs[1] and weight.dtype != accumulator else 0
    # Every group reads and writes the whole float32 gradient of the weight, which with few rows would cost more than
    # the product it saves: on a GPU a tile is 2048 rows, some 14% of the head's time on an H100 against the 25% saved.
    tile = row_tile(hidden)
    bytes_per_tile = stash_size(tile, len(weight), hidden) * _stash_dtype(impl, hidden).itemsize
    return max(workspace - sums, 0) // bytes_per_tile * tile


class GroupedHead:
    """`linear_logprobs` group by group; afterwards `gradients` are those of hidden, weight and bias."""

    def __init__(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        options: HeadOptions,
        impl: str,
    ):
        _check_targets(targets, Whole(), len(weight), options.ignore_index)
        self.needs = _needs(hidden, weight, bias)
        self.hidden, self.weight, self.targets = hidden.detach(), weight.detach(), targets
        self.bias = None if bias is None else bias.detach()
        self.options, self.module = options, _module(impl)
        self.dhidden = torch.zeros_like(self.hidden) if self.needs[0] else None
        self.sums = Sums.zeros(self.weight, self.bias, self.needs, accumulator_dtype(hidden.dtype))

    def forward(self, rows: slice) -> Tensor:
        """(rows,) log-probabilities, and keeps what `backward` of the same rows needs."""
        self.rows = rows
        hidden, targets = self.hidden[rows], self.targets[rows]
        self.kept = self.module.forward(hidden, self.weight, self.bias, targets, self.options, (), "stash")
        return self.kept.logps

    def backward(self, grad: Tensor) -> None:
        """Adds the gradients of these rows, given dL/dlogp (rows,), and lets their weights go."""
        kept, self.kept = self.kept, None
        row = RowGrads(grad, kept.lse, kept.q, None, None)
        dhidden, _, _ = self.module.backward_stashed(
            self.hidden[self.rows], self.weight, self.bias, self.targets[self.rows], row, kept.stash, kept.share,
            self.options, self.needs, self.sums,
        )  # fmt: skip
        if dhidden is not None:
            self.dhidden[self.rows] = dhidden

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dhidden (N, D) in hidden's dtype, dweight (V, D) and dbias (V,) in the accumulator's."""
        return self.dhidden, *self.sums


def _needs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[bool, bool, bool]:
    return hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad
