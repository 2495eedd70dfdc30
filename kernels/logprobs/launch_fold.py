"""The launches of one forward of `linear_logprobs` in Triton. The docstring of `launch` explains the kernels.

N tokens, D hidden, V vocabulary; a row's target is y.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import triton
from torch import Tensor

from prefuse.kernels import cost, launch
from prefuse.kernels.gemm import addmm_
from prefuse.kernels.launch import (
    OUTSIDE,
    Operands,
    loadable,
    stored_width,
    tile_args,
)
from prefuse.kernels.logprobs import device
from prefuse.kernels.slices import row_blocks_of
from prefuse.kernels.tiles.table import INTERPRETER, Tile, fold_row_name, segments

if TYPE_CHECKING:
    from prefuse.kernels.logprobs.sparse import ColumnStatistic

BEFORE = device.BEFORE.value
PLANES = (3, 9)  # of a fold's sums, without and with optional outputs


def target_logits(op: Operands) -> Tensor:
    """(N,) base-2 logits of the targets that are here."""
    n, d = op.hidden.shape
    z2_y = op.hidden.new_empty(n, dtype=torch.float32)
    block_n, block_d = (16, 32) if op.chip == INTERPRETER else (16, 256)
    device.target_kernel[(triton.cdiv(n, block_n),)](
        op.hidden, op.weight, op.hidden if op.bias is None else op.bias, op.y, z2_y, n, len(op.weight), d,
        *op.hidden.stride(), *op.weight.stride(), op.k_in, op.k_out, **op.flags(), BLOCK_N=block_n, BLOCK_D=block_d,
    )  # fmt: skip
    return z2_y


# Optional output -> the flag of the sums it needs.
FOLDED = {"ENTROPY": "entropy", "MEAN": "mean_logits", "SQUARES": "log_sum_sq_probs", "TOP1": "is_top1"}


class FoldLaunches:
    """The buffers of one forward, and the launches that fill them."""

    def __init__(self, op: Operands, outputs: tuple[str, ...], pull: bool):
        self.op, n = op, len(op.hidden)
        self.z2_y = op.shard.own(target_logits(op), op.here)
        if op.shard.sharded:
            self.z2_y.masked_fill_(op.y == OUTSIDE, math.nan)
        self.config = op.config(fold_row_name(bool(outputs), pull, op.softcap), op.part(0, 1)[0])
        self.tiles = triton.cdiv(len(op.weight), self.config.block_v)
        self.segments = segments(op.hidden.device, self.tiles)
        self.wanted = {flag: name in outputs for flag, name in FOLDED.items()}
        self.planes = PLANES[bool(outputs)]
        self.parts = self._new(self.planes, self.segments, n)
        self.logps, self.lse, self.q, self.scale = self._new(n), self._new(n), self._new(n), self._new(n)
        self.extra = self._new(4 if outputs else 0, n)
        self.far = torch.empty(n, dtype=torch.int32, device=op.hidden.device)

    def _new(self, *shape: int) -> Tensor:
        return self.op.hidden.new_empty(shape, dtype=torch.float32)

    def run(self, rescue: bool = False) -> None:
        """Folds every segment; with `rescue`, those of row blocks with a far row."""
        for first, last, s0, s1 in _segment_groups(self.op, self.config, self.segments, self.tiles):
            w, b = self.op.part(first, last)
            self._launch(w, b, first, self.parts[:, s0:], self.segments, s0, s1 - s0, RESCUE=rescue)

    def pull(self, stash: Tensor | None, statistic: ColumnStatistic | None = None) -> Tensor | None:
        """Folds tile by tile, and keeps e in `stash` or adds it to `statistic`; without either, returns
        U (N, D) = sum of e_v W[v], float32."""
        (n, d), v = self.op.hidden.shape, len(self.op.weight)
        pulled = self._new(n, d).zero_() if stash is None and statistic is None else None
        width = slice_width(v, self.config)
        rows = min(n, launch.BUFFER_BYTES // (width * self.op.hidden.element_size())) if stash is None else n
        buffer = self.op.hidden.new_empty(rows, stored_width(width)) if stash is None else None
        self.parts.zero_()
        self.parts[BEFORE:] = -math.inf
        for first in range(0, v, width):
            w, b = self.op.part(first, min(first + width, v))
            tile, count = first // self.config.block_v, triton.cdiv(len(w), self.config.block_v)
            tile_parts = self._new(self.planes, count, n)
            for start in range(0, n, rows):
                part = slice(start, min(start + rows, n))
                stored = (
                    stashed(stash, first, len(w), n) if stash is not None else buffer[: part.stop - start, : len(w)]
                )
                self._launch(w, b, first, tile_parts, self.tiles, tile, count, rows=part, pulls=stored, PULL=True)
                if statistic is not None:
                    total = self.parts[0, :, part].sum(0) + tile_parts[0, :, part].sum(0)
                    for at in row_blocks_of(part, statistic.rows):
                        here = slice(at.start - part.start, at.stop - part.start)
                        statistic.add(at, first, stored[here], total[here])
                elif stash is None:
                    addmm_(pulled[part], stored, w)
            self._merge(tile_parts, tile, count)
        return pulled

    def finish(self, rescue: bool = False, pull: bool = False) -> None:
        n = len(self.logps)
        flags = {"SOFTCAP": self.op.softcap, "RESCUE": rescue, "PULL": pull, **self.wanted}
        parts, segments = self._gathered(flags) if self.op.shard.sharded else (self.parts, self.segments)
        device.finish_kernel[(triton.cdiv(n, 128),)](
            parts, self.op.y, self.z2_y, self.far, self.logps, self.lse, self.q, self.scale, self.extra,
            n, **flags, SEGMENTS=segments, BLOCK=128,
        )  # fmt: skip

    def _gathered(self, flags: dict[str, bool]) -> tuple[Tensor, int]:
        """(planes, ranks, N): every rank's sums, as if its shard were a segment; and how many there are."""
        n = len(self.logps)
        mine = self._new(self.planes, n)
        device.shard_kernel[(triton.cdiv(n, 128),)](
            self.parts, self.far, mine, n, **flags, SEGMENTS=self.segments, BLOCK=128
        )
        parts = self.op.shard.gather(mine).transpose(0, 1).contiguous()
        return parts, parts.shape[1]

    def _launch(
        self, w: Tensor, b: Tensor, first: int, parts: Tensor, total_segments: int, s0: int, count: int, *,
        rows: slice = slice(None), pulls: Tensor | None = None, RESCUE: bool = False, PULL: bool = False,
    ) -> None:  # fmt: skip
        """Segments s0 ... s0 + count - 1 of `total_segments`, for a part of the rows -> `parts (planes, count, N)`."""
        op, config = self.op, self.config
        h, parts = op.hidden[rows], parts[..., rows]
        if not RESCUE:  # whose programs mostly return at once
            cost.report_cost("fold", 2 * h.numel() * len(w), cost.size(h, w), cost.size(parts, pulls))
        stride_pn = 0 if pulls is None else pulls.stride(0)
        pulls = self.parts if pulls is None else loadable(pulls, config.block_n, config.block_v, config)
        device.fold_kernel[(triton.cdiv(len(h), config.block_n) * count,)](
            loadable(h, config.block_n, config.block_d, config), loadable(w, config.block_v, config.block_d, config),
            b, op.y[rows], self.z2_y[rows], self.far[rows], parts, pulls, len(h), len(op.weight), h.shape[1],
            first, s0, count, *parts.stride()[:2], *h.stride(), *w.stride(), stride_pn, op.k_in, op.k_out,
            **op.flags(), RESCUE=RESCUE, PULL=PULL, **self.wanted, SEGMENTS=total_segments, **tile_args(config),
        )  # fmt: skip

    def _merge(self, tile_parts: Tensor, first_tile: int, count: int) -> None:
        n = len(self.logps)
        sums, maxima = (BEFORE, 3) if self.planes > BEFORE else (self.planes, 0)
        device.merge_kernel[(triton.cdiv(n, 128),)](
            tile_parts, self.parts, n, first_tile, count, self.tiles, SEGMENTS=self.segments, SUMS=sums, MAXIMA=maxima,
            BLOCK=128,
        )  # fmt: skip


def slice_width(v: int, config: Tile) -> int:
    """Columns of one vocabulary slice: whole tiles."""
    return min(triton.cdiv(launch.SLICE, config.block_v) * config.block_v, v)


def stashed(stash: Tensor, first: int, width: int, n: int) -> Tensor:
    """The stash's (N, C) block of the slice that begins at `first`: slices lie one after the other."""
    return stash[first * n : first * n + n * stored_width(width)].view(n, stored_width(width))[:, :width]


def _segment_groups(op: Operands, config: Tile, count: int, tiles: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (first column, last column, first segment, last segment): all at once, or as many as one cast may hold."""
    step = count
    if op.weight.dtype != op.dtype:
        width = triton.cdiv(tiles, count) * config.block_v * op.hidden.shape[1] * op.hidden.element_size()
        step = max(1, launch.CAST_BYTES // width)
    for s0 in range(0, count, step):
        s1 = min(s0 + step, count)
        last = min(s1 * tiles // count * config.block_v, len(op.weight))
        yield s0 * tiles // count * config.block_v, last, s0, s1
