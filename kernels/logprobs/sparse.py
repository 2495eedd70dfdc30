"""A backward that leaves out columns of the vocabulary that hardly matter, and measures exactly what it left out.

    N tokens, D hidden, V vocabulary; R rows of a block, K columns that it keeps; y a row's target, g = dL/dlogp
    mass of a row's gradient: |g_i| q_i = sum over v != y of |g_i| p_iv

Forward: the exact one, and for each block of rows a number for each column, s_v = sum of w_i exp(z_iv - z_iy), where
w_i guesses p_iy. Backward, block by block:

1. Scale s_v, slice by slice, to the mass that is known by now. Drop the columns of the smallest s_v, up to some 0.9 of
   the tolerance; targets always stay.
2. Gather W[kept] (K, D) and run the dense backward on this smaller head: 3 K / V units of products.
3. It recomputes each row's kept mass, so the skipped mass m_i = q_i - kept is known exactly. A block with
   sum |g_i| m_i > tolerance * sum |g_i| q_i goes through the exact backward instead.
4. The dropped columns of row i add -g_i m_i mean(W) to dhidden, with their mean weighted by s_v.

A bad guess costs time, since more blocks take the exact backward. It never breaks the tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefuse.kernels.cost import counting, report_cost, size
from prefuse.kernels.gemm import accumulator_dtype, addmm_, operand
from prefuse.kernels.gradients import Gradients, Needs, Sums, zero_gradients
from prefuse.kernels.logprobs.portable import RowGrads
from prefuse.kernels.options import HeadOptions
from prefuse.kernels.slices import SlicedHead, row_blocks, row_tile

# The columns are chosen for this part of the tolerance, so that few blocks miss it.
MARGIN = 0.92
# Rows of a block, rounded to whole row tiles. Smaller blocks keep fewer columns; larger ones gather W less often.
BLOCK_ROWS = 256
# A block that keeps more of the vocabulary, or whose weights take more memory, goes through the exact backward.
MOST_COLUMNS = 0.9
MOST_BYTES = 256 << 20


class ColumnStatistic:
    """s (blocks, V): what each column weighs in each block of rows."""

    def __init__(self, hidden: Tensor, vocab: int, guess: Tensor | None):  # (N, D), (N,) log p_y
        n, tile, dtype = len(hidden), row_tile(hidden), accumulator_dtype(hidden.dtype)
        self.tokens, self.rows = n, max(1, BLOCK_ROWS // tile) * tile
        self.sums = hidden.new_zeros(-(-n // self.rows), vocab, dtype=dtype)
        self.totals: dict[int, Tensor] = {}  # by a slice's first column: (N,) each row's sum of e to the slice's end
        self.guess = None if guess is None else guess.to(dtype).exp()

    def add(self, rows: slice, first: int, e: Tensor, total: Tensor) -> None:
        """The columns from `first` on of these rows of one block: e = exp(z - z_y) (R, C), and its sum so far (R,)."""
        # p_y = 1 / (1 + total) once the total is whole: until then an upper bound.
        if first not in self.totals:
            self.totals[first] = total.new_zeros(self.tokens)
        self.totals[first][rows] = total
        w = 1.0 / (1.0 + total)
        if self.guess is not None:
            w = torch.minimum(self.guess[rows], w)
        if counting():
            report_cost("statistic", 2 * e.numel(), size(e), size(e[0]))
        self.sums[rows.start // self.rows, first : first + e.shape[1]].addmv_(e.T.to(w.dtype), w)

    def of_block(self, i: int, logps: Tensor) -> Tensor:  # (N,) of every row -> (V,)
        """s, each slice of it scaled to the mass that the block's rows turned out to have there."""
        s, rows = self.sums[i], slice(i * self.rows, (i + 1) * self.rows)
        p = logps[rows].exp()
        ends = torch.stack([total[rows] for total in self.totals.values()])  # (slices, R)
        # (Totals that were added up in another order may fall by a rounding.)
        mass = ends.diff(dim=0, prepend=torch.zeros_like(ends[:1])).clamp_min(0.0) @ p
        width = min([first for first in self.totals if first] or [len(s)])
        scale = mass / pad(s, (0, -len(s) % width)).view(-1, width).sum(1)
        # A total that is infinite says nothing; nor does a slice without any mass.
        scale = torch.where(scale.isfinite(), scale, 1.0)
        return s * scale.repeat_interleave(width)[: len(s)]


@dataclass
class SkippedMass:
    """What sparse backward passes left out: filled as they run."""

    skipped: float = 0.0  # sum of |g_i| m_i
    whole: float = 0.0  # sum of |g_i| q_i
    blocks: int = 0
    exact_blocks: int = 0  # those that took the exact path
    kept_columns: int = 0  # K, summed over the other blocks
    bounds: bool = False
    # |error of dhidden_i|_2 at most, for the kept rows of each call; |error of dweight|_F at most, all calls added up
    dhidden_bounds: list[Tensor] = field(default_factory=list)
    dweight_bound: float = 0.0

    @property
    def share(self) -> float:
        """The skipped share of the gradient's mass."""
        return self.skipped / self.whole if self.whole else 0.0


_watchers: list[SkippedMass] = []


@contextmanager
def record_skipped_mass(bounds: bool = False) -> Iterator[SkippedMass]:
    """Collects what sparse backward passes inside leave out; with `bounds`, how far off their gradients may be."""
    record = SkippedMass(bounds=bounds)
    _watchers.append(record)
    try:
        yield record
    finally:
        _watchers.remove(record)


def choose_columns(
    statistic: Tensor,  # (V,)
    targets: Tensor,  # (R,)
    q: Tensor,  # (R,)
    share: float,
) -> Tensor:  # (V,) bool
    """The columns to keep: all but those of the smallest statistic that together have `share` of the mass."""
    # A row whose target lies far under another logit may make s_v infinite: keep such columns, and sum the others.
    s = statistic.nan_to_num(nan=math.inf, posinf=math.inf)
    # Floats of one sign stand in the order of their bits, and torch sorts integers ten times as fast on a CPU.
    ordered = s.view({4: torch.int32, 8: torch.int64}[s.itemsize]).sort().values.view(s.dtype)
    cumulative = ordered.double().cumsum(0)
    # Rows without a gradient have their part in s, too; and where s could not be scaled, it may be too small.
    mass = torch.minimum(torch.where(s.isfinite(), s, 0.0).double().sum(), q.double().sum())
    budget = share * mass
    # From the first column on that the budget does not reach: equal ones are all kept or all dropped.
    kept = s >= pad(ordered, (0, 1), value=math.inf)[(cumulative <= budget).sum()]
    kept[targets] = True
    return kept


class Block(NamedTuple):
    """Some rows of a call, each with a gradient, and the columns that they keep."""

    rows: Tensor  # (R,)
    columns: Tensor  # (K,)
    mean: Tensor  # (D,) of the dropped rows of the weight


def backward(
    module,  # the implementation: `portable` or `launch`
    hidden: Tensor,  # (N, D) every row kept
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    row: RowGrads,
    logps: Tensor,  # (N,)
    options: HeadOptions,
    needs: Needs,
    statistic: ColumnStatistic,
    tolerance: float,
    meter: Tensor | None = None,  # (2,) to be filled with the skipped and the whole mass
) -> Gradients:
    """`module.backward`, except for `tolerance` of the gradient's mass, and without the rows whose gradient is 0; the
    same bits where every row has one and no block is sparse."""
    blocks, exact = _blocks(hidden, weight, targets, row, options, logps, statistic, tolerance)
    acc = accumulator_dtype(hidden.dtype)
    dhidden = torch.zeros_like(hidden) if needs.hidden else None
    sums, kept, skipped = None, [], torch.zeros_like(row.q)
    # One buffer for every block: fresh memory costs a page fault wherever it is written.
    gathered = weight.new_empty(max((len(block.columns) for block in blocks), default=0), hidden.shape[1])
    for block in blocks:
        w = torch.index_select(weight, 0, block.columns, out=gathered[: len(block.columns)])
        m, grads = _sparse_block(module, hidden, w, bias, targets, row, logps, options, needs, block, tolerance)
        if grads is None:
            exact.append(block.rows)
            continue
        kept.append(block)
        skipped[block.rows] = m
        if needs.hidden:
            dhidden[block.rows] = grads.hidden
        # Allocated at the first block that is sparse: without one the exact gradients are returned as they are.
        sums = sums or Sums.zeros(weight, bias, needs, acc)
        for total, part in ((sums.dweight, grads.weight), (sums.dbias, grads.bias)):
            if total is not None:
                total.index_add_(0, block.columns, part)  # each column once: the same bits every time
    _record(hidden, row, skipped, kept, len(exact), weight, options, needs, meter)
    if not blocks and not exact:
        return zero_gradients(hidden, weight, bias, needs)
    dweight, dbias = sums or (None, None)
    if exact:
        at = torch.cat(exact).sort().values
        grads = module.backward(hidden[at], weight, bias, targets[at], row[at], options, needs)
        if needs.hidden:
            dhidden[at] = grads.hidden
        dweight, dbias = (
            new if old is None else old.add_(new) for old, new in ((dweight, grads.weight), (dbias, grads.bias))
        )
    dweight = None if dweight is None else dweight.to(weight.dtype)
    return Gradients(dhidden, dweight, None if dbias is None else dbias.to(bias.dtype))


def _blocks(
    hidden: Tensor, weight: Tensor, targets: Tensor, row: RowGrads, options: HeadOptions, logps: Tensor,
    statistic: ColumnStatistic, tolerance: float,
) -> tuple[list[Block], list[Tensor]]:  # fmt: skip
    """The blocks that may be sparse, and the rows of those that cannot."""
    chosen, exact, masks = [], [], []
    for i, at in enumerate(row_blocks(len(hidden), statistic.rows)):
        rows = row.grad[at].nonzero()[:, 0] + at.start
        if len(rows) == 0:
            continue
        s = statistic.of_block(i, logps)
        kept = choose_columns(s, targets[rows], row.q[rows], MARGIN * tolerance)
        columns = kept.nonzero()[:, 0]
        stored = len(columns) * len(rows) * hidden.element_size()
        if len(columns) > MOST_COLUMNS * len(weight) or stored > MOST_BYTES:
            exact.append(rows)
            continue
        chosen.append((rows, columns))
        masks.append(torch.where(kept, 0.0, s))
    if not chosen:
        return [], exact
    dropped = torch.stack(masks)  # (blocks, V)
    dropped /= dropped.sum(1, keepdim=True).clamp_min(torch.finfo(dropped.dtype).tiny)
    means = dropped.new_zeros(len(chosen), hidden.shape[1])
    for first, w, _ in SlicedHead(weight, None, options, hidden.dtype).slices():
        addmm_(means, dropped[:, first : first + len(w)].to(w.dtype), w)
    return [Block(*parts) for parts in zip(*zip(*chosen, strict=True), means, strict=True)], exact


def _sparse_block(
    module, hidden: Tensor, w: Tensor, bias: Tensor | None, targets: Tensor, row: RowGrads, logps: Tensor,
    options: HeadOptions, needs: Needs, block: Block, tolerance: float,
) -> tuple[Tensor, Gradients | None]:  # fmt: skip
    """(R,) each row's skipped mass; and the gradients of hidden, W[kept], bias[kept], or None above `tolerance`."""
    rows, columns, mean = block
    h, row = hidden[rows], row[rows]
    place = torch.searchsorted(columns, targets[rows])  # targets are always kept
    b = None if bias is None else bias[columns]
    kept, (dhidden, dweight, dbias) = module.backward_measured(h, w, b, place, row, logps[rows], options, needs)
    skipped = (row.q - kept).clamp_min(0.0)
    mass = row.grad.abs()
    if not (mass * skipped).double().sum() <= tolerance * (mass * row.q).double().sum():
        return skipped, None
    if needs.hidden:
        correction = (row.grad * skipped * options.slope)[:, None] * mean
        dhidden = (dhidden.to(mean.dtype) - correction).to(hidden.dtype)
    return skipped, Gradients(dhidden, dweight, dbias)


def _record(
    hidden: Tensor, row: RowGrads, skipped: Tensor, sparse: list[Block], exact: int, weight: Tensor,
    options: HeadOptions, needs: Needs, meter: Tensor | None,
) -> None:  # fmt: skip
    """Writes the masses into `meter` and into every open `record_skipped_mass`."""
    mass = row.grad.abs().double()
    whole = torch.stack([(mass * skipped).sum(), (mass * row.q).sum()])
    if meter is not None:
        meter.copy_(whole)
    for record in _watchers:
        record.skipped += float(whole[0])
        record.whole += float(whole[1])
        record.blocks += len(sparse) + exact
        record.exact_blocks += exact
        record.kept_columns += sum(len(block.columns) for block in sparse)
        if record.bounds:
            lost = mass * skipped * abs(options.slope)
            record.dweight_bound += float((lost * hidden.double().norm(dim=1)).sum()) if needs.weight else 0.0
            record.dhidden_bounds.append(_dhidden_bounds(lost, weight, sparse, options, hidden.dtype))


def _dhidden_bounds(
    lost: Tensor, weight: Tensor, sparse: list[Block], options: HeadOptions, dtype: torch.dtype
) -> Tensor:  # (N,)
    """|g_i| m_i max over dropped v of |W_v - mean|; under a softcap, whose slope is between 0 and 1, also |mean|."""
    bounds = torch.zeros_like(lost)
    w = operand(weight, dtype)
    for block in sparse:
        dropped = torch.ones(len(weight), dtype=torch.bool, device=weight.device)
        dropped[block.columns] = False
        distance = (w[dropped] - block.mean.to(w.dtype)).double().norm(dim=1)
        farthest = float(distance.max()) if len(distance) else 0.0
        if options.softcap is not None:
            farthest = max(farthest, float(block.mean.double().norm()))
        bounds[block.rows] = lost[block.rows] * farthest
    return bounds
