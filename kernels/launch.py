"""What launchers of every operation share: a head's tensors as kernels want them, and the loop of a backward.

N tokens, D hidden, V vocabulary, C columns of a slice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from copy import copy
from typing import ParamSpec, TypeVar

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from prefuse.kernels import device
from prefuse.kernels.gemm import addmm_
from prefuse.kernels.gradients import Gradients, Needs, Sums
from prefuse.kernels.options import HeadOptions
from prefuse.kernels.tiles.table import Tile, allow_descriptors, capability, choose
from prefuse.kernels.vocab import Whole

# As the device sees them, but plain numbers.
LOG2E, LN2, IGNORED, OUTSIDE = (getattr(device, name).value for name in ("LOG2E", "LN2", "IGNORED", "OUTSIDE"))

# dlogits buffer and vocabulary slice of the backward (rows that fit the buffer go at once).
BUFFER_BYTES = 64 << 20
SLICE = 4096
# A weight of another dtype is cast this many bytes at a time.
CAST_BYTES = 128 << 20

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Runs the launcher on its tensors' device, as PyTorch's operators do; Triton launches on the current CUDA device.

    The first argument is a tensor, or has one that is called `hidden`.
    """

    @functools.wraps(launcher)
    def run(first: object, *args: P.args, **kwargs: P.kwargs) -> R:
        tensor = first if isinstance(first, Tensor) else first.hidden
        with torch.cuda.device_of(tensor):  # does nothing for a CPU tensor
            return launcher(first, *args, **kwargs)

    return run


class Operands:
    """One call's tensors and constants as the kernels want them."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: HeadOptions,
        shard: Whole | None = None,
    ):  # fmt: skip
        self.hidden, self.weight, self.options = hidden, weight, options
        self.shard = shard or Whole()
        self.bias = None if bias is None else bias.contiguous()
        self.chip = capability(hidden.device)
        self.dtype = hidden.dtype
        local = self.shard.local(targets)
        # Shift negative targets past IGNORED and OUTSIDE, so that another rank's columns cannot equal them.
        y = torch.where(local < 0, local + OUTSIDE, local)
        y = y.masked_fill(~self.shard.valid(local, len(weight)), OUTSIDE)
        self.y = y.masked_fill(targets == options.ignore_index, IGNORED).to(torch.int32)
        self.softcap = options.softcap is not None
        if self.softcap:
            # z2 = k_out tanh(x),  tanh wants 2 log2(e) x = k_in * product
            self.k_in = 2 * LOG2E * options.logit_scale / options.softcap
            self.k_out = LOG2E * options.softcap / options.temperature
        else:
            self.k_in, self.k_out = 1.0, LOG2E * options.slope

    def __getitem__(self, rows: Tensor) -> Operands:
        """The same head for some of the rows."""
        some = copy(self)
        some.hidden, some.y = self.hidden[rows], self.y[rows]
        return some

    @property
    def here(self) -> Tensor:
        """(N,) bool: whether this rank's weight has the target's row."""
        return (self.y >= 0) & (self.y < len(self.weight))

    def part(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Weight rows and bias of the columns `first ... last - 1`, cast to the compute dtype where they differ."""
        w = self.weight[first:last]
        if w.dtype != self.dtype:
            w = w.to(self.dtype, memory_format=torch.contiguous_format)
        return w, self.hidden if self.bias is None else self.bias[first:last]

    def config(self, kernel: str, w: Tensor, h: Tensor | None = None) -> Tile:
        """The tile of `kernel` for these rows of the weight and of hidden (default: all of it)."""
        return self.config_for(kernel, self.hidden if h is None else h, w)

    def config_for(self, kernel: str, *operands: Tensor) -> Tile:
        d, v = self.hidden.shape[1], len(self.weight)
        return choose(kernel, self.chip, self.dtype, allow_descriptors(*operands), d, v)

    def flags(self) -> dict[str, bool]:
        return {"HAS_BIAS": self.bias is not None, "SOFTCAP": self.softcap}

    @property
    def kept(self) -> Tensor:
        """(N,) bool: False where the target is ignore_index."""
        return self.y != IGNORED


def tile_args(config: Tile) -> dict:
    """The constants and options that a tile stands for in a launch."""
    blocks = {"BLOCK_N": config.block_n, "BLOCK_V": config.block_v, "BLOCK_D": config.block_d}
    return {**blocks, "DESC": config.descriptors, "GROUP": 8, **config.launch}


def loadable(x: Tensor, rows: int, columns: int, config: Tile) -> Tensor | TensorDescriptor:
    """`x` as a kernel takes it: a descriptor of (rows, columns) blocks, or the pointer."""
    return TensorDescriptor.from_tensor(x, [rows, columns]) if config.descriptors else x


def stored_width(width: int) -> int:
    """Numbers in a stored row of `width`: a multiple of 16 bytes, for descriptors."""
    return triton.cdiv(width, 8) * 8


def backward_slices(
    hidden: Tensor,  # (N, D) 0 in rows that are not kept
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    needs: Needs,
    dhidden: Tensor | None,  # (N, D) float32, to add to
    slice_of: Callable[[int, int], tuple],  # first and last column -> what `dlogits` takes, the weight (C, D) first
    dlogits: Callable[[tuple, int, slice, Tensor], object],
    seed: Callable[[Tensor | None, Tensor | None, int], object] | None = None,
) -> Gradients:
    """dhidden (N, D) float32, dweight (V, D), dbias (V,): accumulated in float32, each row of dweight written once.

    `dlogits(part, first, rows, dz)` writes dL/d(products) of the slice that begins at column `first` for these rows
    into `dz (rows, C)`. `seed(dw, db, first)` adds other terms to the slice's float32 gradients before.
    """
    (n, d), v = hidden.shape, len(weight)
    dweight, dbias = Sums.empty(weight, bias, needs)
    width = min(SLICE, v)
    together = max(1, min(n, BUFFER_BYTES // (width * hidden.element_size())))
    buffer = hidden.new_empty(together, stored_width(width))
    for first in range(0, v, width):
        part = slice_of(first, min(first + width, v))
        w = part[0]
        dw = hidden.new_zeros(len(w), d, dtype=torch.float32) if needs.weight else None
        db = hidden.new_zeros(len(w), dtype=torch.float32) if needs.bias else None
        if seed is not None:
            seed(dw, db, first)
        for start in range(0, n, together):
            rows = slice(start, min(start + together, n))
            dz = buffer[: rows.stop - start, : len(w)]
            dlogits(part, first, rows, dz)
            if needs.hidden:
                addmm_(dhidden[rows], dz, w)
            if needs.weight:
                addmm_(dw, dz.T, hidden[rows])
            if needs.bias:
                db += dz.sum(0, dtype=torch.float32)
        if needs.weight:
            dweight[first : first + len(w)] = dw
        if needs.bias:
            dbias[first : first + len(w)] = db
    return Gradients(dhidden, dweight, dbias)
