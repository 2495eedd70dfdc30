"""What the portable implementations share: a head in vocabulary slices, rows in tiles, and the loop of a backward.

N tokens, D hidden, V vocabulary; R rows and C columns of one tile; y a row's target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefuse.kernels.gemm import accumulator_dtype, addmm_, mm, narrow, operand
from prefuse.kernels.gradients import Gradients, Needs, Sums
from prefuse.kernels.options import HeadOptions
from prefuse.kernels.vocab import Whole

# Rows and columns of a tile. On a CPU: as fast as one large product, and small enough to stay in its cache.
TILE = {"cpu": (256, 2048), "cuda": (2048, 8192)}
# The backward's dlogits buffer: as many rows as fit, so that the two gradient products are large.
BUFFER_BYTES = 64 << 20


class SlicedHead:
    """The weight in vocabulary slices, and the transform from matrix products to logits.

    Column 0 is this rank's first. With a `shard`, columns below 0, or from len(weight) on, are on other ranks.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, options: HeadOptions, dtype: torch.dtype, shard: Whole | None = None
    ):
        self.weight, self.bias, self.options = weight, bias, options
        self.shard = shard or Whole()
        self.dtype = dtype  # the op computes in hidden's dtype
        self.acc = accumulator_dtype(dtype)
        self.rows, self.columns = TILE.get(weight.device.type, TILE["cuda"])

    def slices(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yields (first column, weight (C, D), bias (C,)) in the type this device multiplies."""
        for first in range(0, len(self.weight), self.columns):
            part = slice(first, first + self.columns)
            yield first, operand(self.weight[part], self.dtype), self._bias(part)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """(R, D), (C, D), (C,) -> z (R, C), written into `out`."""
        return self._transform_(mm(hidden, weight.T, out=out), bias)

    def target_logits(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(R, D), (R,) -> z_y (R,): a dot product a row, in the accumulator's dtype; undefined if `holds` is False."""
        rows = torch.where(self.holds(targets), targets, 0)
        w = operand(self.weight[rows], self.dtype).to(self.acc)
        return self._transform_((hidden.to(self.acc) * w).sum(-1), self._bias(rows))

    def holds(self, targets: Tensor) -> Tensor:
        """(R,) bool: whether this rank's weight has the target's row."""
        return (targets >= 0) & (targets < len(self.weight))

    def slope_(self, dz: Tensor, z: Tensor | None) -> Tensor:
        """dL/dz -> dL/dx in place, x the matrix product; `z` is overwritten, and needed under a softcap only."""
        o = self.options
        if o.softcap is not None:
            # dz/dx = slope * (1 - tanh^2),  tanh = z * temperature / softcap
            dz.mul_(z.mul_(o.temperature / o.softcap).square_().neg_().add_(1.0))
        return dz if o.slope == 1.0 else dz.mul_(o.slope)

    def _bias(self, index: slice | Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias[index].to(self.acc)

    def _transform_(self, x: Tensor, bias: Tensor | None) -> Tensor:
        o = self.options
        if bias is not None:
            x.add_(bias)
        if o.softcap is not None:
            # z = softcap * tanh(logit_scale * x / softcap) / temperature
            return x.mul_(o.logit_scale / o.softcap).tanh_().mul_(o.softcap / o.temperature)
        return x if o.slope == 1.0 else x.mul_(o.slope)


class Targets:
    """The slice and column of each row's target, made ready once for all slices of the vocabulary."""

    def __init__(self, ids: Tensor, head: SlicedHead):  # (R,)
        self.ids, self.columns = ids, head.columns
        ordered, rows = ids.sort(stable=True)
        firsts = torch.arange(0, len(head.weight) + head.columns, head.columns, device=ids.device)
        bounds = torch.searchsorted(ordered, firsts.clamp_max_(len(head.weight))).tolist()
        # Before the first and behind the last slice are other ranks' columns.
        counts = [end - start for start, end in pairwise([0, *bounds, len(ids)])]
        self.parts = list(zip(rows.split(counts), (ordered % head.columns).split(counts), strict=True))[1:-1]

    def inside(self, first: int) -> tuple[Tensor, Tensor]:
        """The rows whose target stands in the slice that begins at `first`, and its column there."""
        return self.parts[first // self.columns]

    def fill_(self, z: Tensor, first: int, value: Tensor | float) -> None:
        """Writes a number, or each row's own of `value (R,)`, into the targets' places in `z (R, C)`, the slice that
        begins at `first`."""
        rows, columns = self.inside(first)
        if len(rows):  # most slices have none, and an empty index takes as long as another
            z[rows, columns] = value[rows] if isinstance(value, Tensor) else value


def row_tile(hidden: Tensor) -> int:
    """Rows of a tile on hidden's device."""
    return TILE.get(hidden.device.type, TILE["cuda"])[0]


def row_tiles(hidden: Tensor, rows: int) -> list[Tensor]:
    """(N, D) -> tiles (rows, D) in the type this device multiplies, the last one padded with zero rows."""
    # The bits of a product may depend on alignment and layout: a view that differs in them is copied once.
    tiles = [operand(x, hidden.dtype) for x in aligned(hidden).split(rows)]
    tiles[-1] = pad(tiles[-1], (0, 0, 0, rows - len(tiles[-1])))
    return tiles


def aligned(x: Tensor) -> Tensor:
    """`x`, copied unless contiguous and aligned: a BLAS may give equal operands other bits where these differ."""
    return x if x.is_contiguous() and x.data_ptr() % 64 == 0 else x.clone(memory_format=torch.contiguous_format)


def kept_rows(kept: Tensor | None) -> Tensor | None:
    """(N,) bool -> the indices of the kept rows, or None when all are kept."""
    return None if kept is None or bool(kept.all()) else kept.nonzero()[:, 0]


def row_blocks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def row_blocks_of(rows: slice, size: int) -> Iterator[slice]:
    """`rows`, cut at the multiples of `size`."""
    for block in row_blocks(rows.stop, size):
        if block.stop > rows.start:
            yield slice(max(block.start, rows.start), block.stop)


def backward_slices(
    head: SlicedHead,
    hidden: Tensor,  # (N, D) every row kept
    needs: Needs,
    slices: Iterable[tuple],  # (first column, weight (C, D), ...) of each slice
    dlogits: Callable[[Tensor, int, tuple], object],
    dtype: torch.dtype | None = None,  # of dweight and dbias; None: their own
    overwrite: bool = False,  # dweight may take the weight's place
) -> Gradients:
    """dhidden (N, D) in the accumulator's dtype, dweight (V, D), dbias (V,): each row of dweight is written once.

    `dlogits(dz, i, part)` writes dL/d(products) of row tile i and the slice `part` into the first rows of `dz (R, C)`.
    """
    (n, d), weight, bias = hidden.shape, head.weight, head.bias
    hidden = operand(hidden, head.dtype)
    dhidden = hidden.new_zeros(n, d, dtype=head.acc) if needs.hidden else None
    tiles = -(-n // head.rows)
    # One buffer for every slice: fresh memory costs a page fault where the product writes it.
    together = max(1, min(tiles, BUFFER_BYTES // (head.rows * head.columns * head.acc.itemsize)))
    # With all rows in the buffer, a slice of the weight is not needed any more when its gradient is made.
    overwrite = overwrite and needs.weight and weight.dtype == head.acc and together == tiles
    dweight, dbias = Sums.empty(weight, bias, needs._replace(weight=needs.weight and not overwrite), dtype)
    dweight = weight if overwrite else dweight
    buffer = hidden.new_empty(together * head.rows * head.columns, dtype=head.acc)
    for part in slices:
        first, w = part[:2]
        columns = slice(first, first + len(w))
        in_place = needs.weight and dweight.dtype == head.acc
        dw = dweight[columns] if in_place else w.new_empty(w.shape, dtype=head.acc) if needs.weight else None
        db = hidden.new_zeros(len(w), dtype=head.acc)
        for rows in row_blocks(n, together * head.rows):
            block = buffer[: together * head.rows * len(w)].view(-1, len(w))
            for at in range(rows.start, rows.stop, head.rows):
                # Recomputed and turned into dlogits while the tile is in cache.
                dlogits(block[at - rows.start : at - rows.start + head.rows], at // head.rows, part)
            dz = block[: rows.stop - rows.start]
            if needs.bias:
                db += dz.sum(0)
            dz = narrow(dz, head.dtype)
            if needs.hidden:
                addmm_(dhidden[rows], dz, w)
            if needs.weight:
                mm(dz.T, hidden[rows], out=dw) if rows.start == 0 else addmm_(dw, dz.T, hidden[rows])
        if needs.weight and not in_place:
            dweight[columns] = dw
        if needs.bias:
            dbias[columns] = db
    return Gradients(dhidden, dweight, dbias)
