"""The head in groups of rows, for a workspace too small for the weights of all rows: 3 units of products, not 4.

    N tokens, D hidden, V vocabulary

A group is a few whole sequences. Its forward keeps its weights, the caller gives dL/dlogp of its tokens, and its
gradients are computed at once, before the next group takes the same memory. So the caller must know dL/dlogp of a
group from that group alone. It does for every loss that is a sum over sequences or pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefuse.kernels import checks
from prefuse.kernels.gemm import accumulator_dtype
from prefuse.kernels.gradients import Gradients, Sums
from prefuse.kernels.logprobs.call import HeadCall, implementation, stash_dtype
from prefuse.kernels.logprobs.portable import RowGrads, stash_size
from prefuse.kernels.slices import row_tile
from prefuse.kernels.vocab import Whole


def group_rows(call: HeadCall, workspace: int) -> int:
    """Rows of the largest group whose weights fit `workspace` bytes beside a float32 dweight; 0: groups do not pay."""
    hidden, weight, needs = call.hidden, call.weight, call.needs
    if not torch.is_grad_enabled() or hidden.dtype == torch.float16 or call.impl == "reference":
        return 0
    if not needs.weight and not needs.bias:
        return 0
    if torch.compiler.is_compiling():  # gradients computed in the forward would break the graph
        return 0
    accumulator = accumulator_dtype(hidden.dtype)
    # A float32 weight's gradient is its own accumulator.
    sums = weight.numel() * accumulator.itemsize if needs.weight and weight.dtype != accumulator else 0
    # Every group reads and writes the whole float32 gradient of the weight, which with few rows would cost more than
    # the product it saves: on a GPU a tile is 2048 rows, some 14% of the head's time on an H100 against the 25% saved.
    tile = row_tile(hidden)
    bytes_per_tile = stash_size(tile, len(weight), hidden) * stash_dtype(call.impl, hidden).itemsize
    return max(workspace - sums, 0) // bytes_per_tile * tile


class GroupedHead:
    """`linear_logprobs` group by group; afterwards `gradients` are those of hidden, weight and bias."""

    def __init__(self, call: HeadCall, outputs: tuple[str, ...] = ()):
        checks.check_targets(call.targets, Whole(), len(call.weight), call.options.ignore_index)
        self.needs, self.options, self.targets = call.needs, call.options, call.targets
        self.hidden, self.weight = call.hidden.detach(), call.weight.detach()
        self.bias = None if call.bias is None else call.bias.detach()
        self.module, self.outputs = implementation(call.impl), outputs
        self.dhidden = torch.zeros_like(self.hidden) if self.needs.hidden else None
        self.sums = Sums.zeros(self.weight, self.bias, self.needs, accumulator_dtype(self.hidden.dtype))

    def forward(self, rows: slice) -> Tensor:
        """(rows,) log-probabilities; keeps what `backward` of the same rows needs."""
        self.rows = rows
        hidden, targets = self.hidden[rows], self.targets[rows]
        self.saved = self.module.forward(hidden, self.weight, self.bias, targets, self.options, self.outputs, "stash")
        return self.saved.logps

    def backward(self, grad: Tensor) -> None:
        """Adds the gradients of these rows, given dL/dlogp (rows,), and frees their weights."""
        saved, self.saved = self.saved, None
        row = RowGrads(grad, saved.lse, saved.q, None, None)
        grads = self.module.backward_stashed(
            self.hidden[self.rows], self.weight, self.bias, self.targets[self.rows], row, saved.stash, saved.scale,
            self.options, self.needs, self.sums,
        )  # fmt: skip
        if grads.hidden is not None:
            self.dhidden[self.rows] = grads.hidden

    @property
    def gradients(self) -> Gradients:
        """dhidden (N, D) in hidden's dtype, dweight (V, D) and dbias (V,) in the accumulator's."""
        return Gradients(self.dhidden, *self.sums)
