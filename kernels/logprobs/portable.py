"""`linear_logprobs` in plain PyTorch, on any device: tiled over rows and vocabulary. Only a stash has N * V numbers.

    N tokens, D hidden, V vocabulary; R rows and C columns of one tile; y a row's target.

Forward folds each tile of logits `z (R, C)`, the target's own column left out, against a shift:

    total_i = sum over v != y of exp(z_iv - shift_i)            shift_i = z_iy
    gap_i   = (shift_i - z_iy) + log total_i                logp_i = -softplus(gap_i)    q_i = sigmoid(gap_i) = 1 - p_iy

Rows whose target lies too far under another logit are folded again, shifted by their maximum.
Backward recomputes each tile, turns it into dlogits in place and feeds two matrix products.

Every matrix product of the forward has the same shape whatever N is: a BLAS may give a row other bits when the number
of rows changes, and a token's log-probability must not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefuse.kernels.gemm import accumulator_dtype, addmm_, mm, narrow, operand
from prefuse.kernels.gradients import Gradients, Needs, Sums, zero_gradients
from prefuse.kernels.logprobs.fold import HeadForward, RowTile
from prefuse.kernels.options import HeadOptions
from prefuse.kernels.slices import SlicedHead, Targets, backward_slices, kept_rows, row_blocks, row_tile, row_tiles
from prefuse.kernels.vocab import Whole

if TYPE_CHECKING:
    from prefuse.kernels.logprobs.sparse import ColumnStatistic

# A larger total is folded again: its square (for log_sum_sq_probs) must stay finite in float32.
MAX_TOTAL = math.exp(40.0)
# What a forward keeps for its backward, and what both cost (units of N * D * V multiply-adds):
#   "lean"    nothing: the backward recomputes the tiles: 1 + 3
#   "stash"   the weights of its tiles, N * V numbers: 1 + 2
#   "frozen"  the direction d logp / d hidden, where only `hidden` needs a gradient: 2 + 0
MODES = ("lean", "stash", "frozen")


def forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,) in [0, V), or ignore_index
    options: HeadOptions,
    outputs: tuple[str, ...] = (),
    mode: str = "lean",
    shard: Whole | None = None,
    statistic: ColumnStatistic | None = None,
) -> HeadForward:
    """One pass over the vocabulary, which keeps what `mode` says. Ignored rows are 0 everywhere.

    Adds each tile's exponentials to `statistic`, if one is given (mode "lean", every row kept).
    """
    head = SlicedHead(weight, bias, options, hidden.dtype, shard)
    rows = kept_rows(targets != options.ignore_index)
    targets = head.shard.local(targets)
    empty = empty_forward(hidden, weight, outputs, mode, hidden.dtype if hidden.is_cuda else head.acc)
    if rows is None:
        return _forward_kept(head, hidden, targets, outputs, mode, empty.stash, statistic)
    if len(rows) == 0:
        return empty
    return _replace(empty, rows, _forward_kept(head, hidden[rows], targets[rows], outputs, mode, empty.stash))


def empty_forward(
    hidden: Tensor, weight: Tensor, outputs: tuple[str, ...], mode: str, stash_dtype: torch.dtype
) -> HeadForward:
    """A `HeadForward` of zeros, of the right shapes. The stash is large and stays uninitialized."""
    n, d = hidden.shape
    dtype = accumulator_dtype(hidden.dtype)
    numbers = stash_size(n, len(weight), hidden) if mode == "stash" else 0
    stash = hidden.new_empty(numbers, dtype=stash_dtype)

    def zeros(*shape: int) -> Tensor:
        return hidden.new_zeros(shape, dtype=dtype)

    direction, scale = zeros(n if mode == "frozen" else 0, d), zeros(n if mode == "stash" else 0)
    return HeadForward(zeros(n), zeros(n), zeros(n), zeros(len(outputs), n), direction, stash, scale)


def stash_size(n: int, vocab: int, hidden: Tensor) -> int:
    """Numbers in the stash of `n` rows: rows in whole tiles, columns a multiple of 8 (16 bytes, for descriptors)."""
    rows = row_tile(hidden)
    return -(-n // rows) * rows * -(-vocab // 8) * 8


def _forward_kept(
    head: SlicedHead, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...], mode: str, stash: Tensor,
    statistic: ColumnStatistic | None = None,
) -> HeadForward:  # fmt: skip
    tiles = row_tiles(hidden, head.rows)
    ids = pad(targets, (0, -len(targets) % head.rows)).split(head.rows)
    places = [Targets(y, head) for y in ids]
    z_target = _target_logits(head, tiles, ids)

    folded = _fold(head, tiles, places, z_target, outputs, mode, stash, statistic)
    far = (~(torch.cat([t.total[:, 0] for t in folded])[: len(hidden)] < MAX_TOTAL)).nonzero()[:, 0]
    result = _finish(head, folded, z_target, outputs, len(hidden))._replace(stash=stash)
    if mode == "stash":
        _stash_targets(head, result, targets, torch.cat(z_target)[: len(hidden)])
    if len(far) == 0:
        return result
    # A stash cannot hold these rows: their weights in it are 0, and the backward recomputes them.
    z_far = torch.cat(z_target)[far]
    again = _forward_far(head, hidden[far], targets[far], z_far, outputs, "lean" if mode == "stash" else mode)
    if mode == "stash":
        again = again._replace(scale=torch.zeros_like(again.q))
        for _, _, block in stashed_slices(head, stash, len(hidden)):
            block[far] = 0
    return _replace(result, far, again)


def _stash_targets(head: SlicedHead, result: HeadForward, targets: Tensor, z_target: Tensor) -> None:
    """Writes the target's own weight, of the opposite sign, into the stash: scale P_y = -q slope_y."""
    slope = head.slope_(torch.ones_like(z_target), z_target)
    own = torch.where(result.scale > 0, -result.q * slope / result.scale, 0.0)
    places = Targets(targets, head)
    for first, _, weights in stashed_slices(head, result.stash, len(targets)):
        at = places.inside(first)
        weights[at] = own[at[0]].to(weights.dtype)


def _target_logits(head: SlicedHead, tiles: list[Tensor], ids: tuple[Tensor, ...]) -> list[Tensor]:
    """z_y (R,) of every row tile, from the ranks that have them; NaN where the target is not in the vocabulary."""
    z = torch.cat([head.target_logits(x, y) for x, y in zip(tiles, ids, strict=True)])
    every = torch.cat(ids)
    z = head.shard.own(z, head.holds(every))
    return list(torch.where(head.shard.valid(every, len(head.weight)), z, math.nan).split(head.rows))


def _forward_far(
    head: SlicedHead,
    hidden: Tensor,  # (F, D)
    targets: Tensor,  # (F,)
    z_target: Tensor,  # (F,)
    outputs: tuple[str, ...],
    mode: str,
) -> HeadForward:
    """Far rows again, shifted by their largest logit other than the target's."""
    tiles = row_tiles(hidden, head.rows)
    ids, z_target = (pad(x, (0, -len(x) % head.rows)).split(head.rows) for x in (targets, z_target))
    places = [Targets(y, head) for y in ids]
    largest = [torch.full_like(z, -math.inf) for z in z_target]
    for first, w, b in head.slices():
        z = w.new_empty(head.rows, len(w), dtype=head.acc)
        for i, (x, y) in enumerate(zip(tiles, places, strict=True)):
            y.fill_(head.logits(x, w, b, out=z), first, -math.inf)
            largest[i] = torch.maximum(largest[i], z.amax(-1))
    largest = head.shard.gather(torch.cat(largest)).amax(0).split(head.rows)
    folded = _fold(head, tiles, places, largest, outputs, mode, None)
    return _finish(head, folded, z_target, outputs, len(targets))


def _fold(
    head: SlicedHead,
    tiles: list[Tensor],
    places: list[Targets],
    shifts: list[Tensor],
    outputs: tuple[str, ...],
    mode: str,
    stash: Tensor | None,
    statistic: ColumnStatistic | None = None,
) -> list[RowTile]:
    folded = [RowTile(x, y, s, outputs, mode) for x, y, s in zip(tiles, places, shifts, strict=True)]
    buffer = shifts[0].new_empty(head.rows * head.columns)
    # The outer loop is over the vocabulary, so that a slice of a bf16 weight is converted to float32 once.
    for first, weight, bias in head.slices():
        z = buffer[: head.rows * len(weight)].view(head.rows, len(weight))
        for i, tile in enumerate(folded):
            stored = None
            if mode == "stash":
                start = (first * len(tiles) + i * len(weight)) * head.rows
                stored = stash[start : start + head.rows * len(weight)].view(head.rows, len(weight))
                z = stored if stored.dtype == head.acc else z  # the fold writes straight into the stash
            tile.fold(head.logits(tile.hidden, weight, bias, out=z), first, head, weight, stored)
            if statistic is not None:  # the fold left exp(z - z_y) in z
                rows = slice(i * head.rows, min((i + 1) * head.rows, statistic.tokens))
                size = rows.stop - rows.start
                statistic.add(rows, first, z[:size], tile.total[:size, 0])
    if head.shard.sharded:
        _combine(head.shard, folded)
    return folded


def _combine(shard: Whole, folded: list[RowTile]) -> None:
    """Adds every rank's sums in the order of the ranks, and takes the largest of its maxima."""
    names = [name for name in RowTile.SUMS if getattr(folded[0], name) is not None]
    packed = [torch.cat([getattr(t, name) for name in names] + ([] if t.tops is None else [t.tops]), 1) for t in folded]
    parts = shard.gather(torch.cat(packed))  # (ranks, N, sums + maxima)
    sums, maxima = sum(parts[1:, :, : len(names)], parts[0, :, : len(names)]), parts[:, :, len(names) :].amax(0)
    rows = len(folded[0].hidden)
    for tile, s, m in zip(folded, sums.split(rows), maxima.split(rows), strict=True):
        for name, column in zip(names, s.split(1, dim=1), strict=True):
            setattr(tile, name, column)
        tile.tops = None if tile.tops is None else m


def _finish(
    head: SlicedHead, folded: list[RowTile], z_target: list[Tensor], outputs: tuple[str, ...], n: int
) -> HeadForward:
    # A tile at a time here too: an elementwise kernel may treat the end of a long vector differently.
    parts = [t.finish(head, z, outputs) for t, z in zip(folded, z_target, strict=True)]
    logps, lse, q, extra, direction, stash, scale = zip(*parts, strict=True)
    logps, lse, q, direction, scale = (torch.cat(column)[:n] for column in (logps, lse, q, direction, scale))
    if len(direction):
        head.shard.add_(direction)
    return HeadForward(logps, lse, q, torch.cat(extra, 1)[:, :n].contiguous(), direction, stash[0], scale)


class RowGrads(NamedTuple):
    """What the backward needs of each row."""

    grad: Tensor  # (N,) dL/dlogp
    lse: Tensor  # (N,)
    q: Tensor  # (N,)
    grad_entropy: Tensor | None  # (N,) dL/dentropy
    entropy: Tensor | None  # (N,)

    def __getitem__(self, rows: slice | Tensor) -> RowGrads:
        return RowGrads(*(None if x is None else x[rows] for x in tuple(self)))


def backward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    row: RowGrads,
    options: HeadOptions,
    needs: Needs,
    shard: Whole | None = None,
) -> Gradients:
    """dhidden (N, D), dweight (V, D), dbias (V,): accumulated in float32, each row of dweight written once."""
    head = SlicedHead(weight, bias, options, hidden.dtype, shard)
    kept = kept_rows(targets != options.ignore_index)
    targets = head.shard.local(targets)
    if kept is None:
        grads = _backward_kept(head, hidden, targets, row, needs)
    elif len(kept) == 0:
        return zero_gradients(hidden, weight, bias, needs)
    else:
        grads = _backward_kept(head, hidden[kept], targets[kept], row[kept], needs)
    return grads._replace(hidden=_whole_rows(head, hidden, kept, grads.hidden))


def _whole_rows(head: SlicedHead, hidden: Tensor, kept: Tensor | None, dkept: Tensor | None) -> Tensor | None:
    """The gradient of the kept rows, summed over the ranks -> dhidden (N, D)."""
    if dkept is None:
        return None
    dkept = head.shard.add_(dkept).to(hidden.dtype)
    return dkept if kept is None else hidden.new_zeros(hidden.shape).index_copy_(0, kept, dkept)


def _backward_kept(head: SlicedHead, hidden: Tensor, targets: Tensor, row: RowGrads, needs: Needs) -> Gradients:
    """`backward` with every row kept; dhidden is this rank's part, in the accumulator's dtype."""
    x = operand(hidden, head.dtype)
    # Of each row tile, made ready for all slices.
    tiles = [(x[at], Targets(targets[at], head), row[at]) for at in row_blocks(len(hidden), head.rows)]

    def dlogits(dz: Tensor, i: int, part: tuple) -> None:
        first, w, b = part
        x, places, row = tiles[i]
        z = head.logits(x, w, b, out=dz[: len(x)])
        _dlogits_(z, head, places, first, row)

    return backward_slices(head, hidden, needs, head.slices(), dlogits)


def backward_measured(
    hidden: Tensor,  # (N, D) every row kept
    weight: Tensor,  # (K, D), which its gradient may overwrite
    bias: Tensor | None,  # (K,)
    targets: Tensor,  # (N,)
    row: RowGrads,
    logps: Tensor,  # (N,)
    options: HeadOptions,
    needs: Needs,
) -> tuple[Tensor, Gradients]:
    """`backward` over K columns of a head whose `row` and `logps` are known, all gradients in the accumulator's dtype;
    and (N,) what these columns weigh in each row's softmax, the target left out."""
    head = SlicedHead(weight, bias, options, hidden.dtype)
    rows = list(row_blocks(len(hidden), head.rows))
    places = [Targets(targets[at], head) for at in rows]
    x = operand(hidden, head.dtype)
    lse, grad, own = row.lse[:, None], -row.grad[:, None], row.grad * row.q
    kept = torch.zeros_like(row.q)

    def dlogits(dz: Tensor, i: int, part: tuple) -> None:
        first, w, b = part
        at = rows[i]
        z = head.logits(x[at], w, b, out=dz[: at.stop - at.start])
        logits = z.clone() if options.softcap is not None else None
        p = z.sub_(lse[at]).exp_()
        places[i].fill_(p, first, 0.0)
        kept[at] += p.sum(-1)
        # dz_v = -g p_v,  dz_y = g q
        dz = p.mul_(grad[at])
        places[i].fill_(dz, first, own[at])
        head.slope_(dz, logits)

    return kept, backward_slices(head, hidden, needs, head.slices(), dlogits, head.acc, overwrite=True)


def stashed_slices(head: SlicedHead, stash: Tensor, n: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (first column, weight (C, D), stashed weights P (N, C)) of each slice."""
    padded = -(-n // head.rows) * head.rows
    for first, w, _ in head.slices():
        yield first, w, stash[first * padded : (first + len(w)) * padded].view(padded, len(w))[:n]


def backward_stashed(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    row: RowGrads,
    stash: Tensor,
    scale: Tensor,  # (N,)
    options: HeadOptions,
    needs: Needs,
    into: Sums | None = None,
    shard: Whole | None = None,
) -> Gradients:
    """`backward` from a forward's stash P (N, V): dhidden = c (P @ W), dweight = P.T @ (c hidden), c = -g scale.

    Rows that the stash could not hold go through `backward`. With `into`, dweight and dbias are added to it.
    """
    head = SlicedHead(weight, bias, options, hidden.dtype, shard)
    kept = kept_rows(targets != options.ignore_index)
    targets = head.shard.local(targets)
    rows = slice(None) if kept is None else kept
    x, targets, row, scale = hidden[rows], targets[rows], row[rows], scale[rows]
    c = -row.grad * scale
    scaled = narrow(c[:, None] * x.to(head.acc), head.dtype)

    pulled = x.new_zeros(x.shape, dtype=head.acc) if needs.hidden else None
    dweight, dbias = into or Sums.empty(weight, bias, needs)
    for first, w, weights in stashed_slices(head, stash, len(x)):
        columns = slice(first, first + len(w))
        if needs.hidden:
            addmm_(pulled, weights, w)
        if needs.weight and into:
            addmm_(dweight[columns], weights.T, scaled)
        elif needs.weight:
            dweight[columns] = mm(weights.T, scaled, out=w.new_empty(w.shape, dtype=head.acc))
        if needs.bias:
            db = (weights.to(head.acc) * c[:, None]).sum(0)
            dbias[columns] = dbias[columns] + db if into else db
    if needs.hidden:
        pulled *= c[:, None]

    grads = Gradients(pulled, dweight, dbias)
    far = ((scale == 0) & (row.q > 0)).nonzero()[:, 0]
    if len(far):
        add_far_rows(far, _backward_kept(head, x[far], targets[far], row[far], needs), grads)
    return grads._replace(hidden=_whole_rows(head, hidden, kept, pulled))


def add_far_rows(far: Tensor, again: Gradients, total: Gradients) -> None:
    """Puts the recomputed gradients of the rows `far` into `total`, where a stash left nothing."""
    if total.hidden is not None:
        total.hidden[far] = again.hidden
    for x, extra in ((total.weight, again.weight), (total.bias, again.bias)):
        if x is not None:
            x += extra


def _dlogits_(z: Tensor, head: SlicedHead, places: Targets, first: int, row: RowGrads) -> Tensor:
    """Logits `z (R, C)` of the slice that begins at `first` -> dL/dx in place."""
    logits = z.clone() if head.options.softcap is not None else None
    grad, lse, _, grad_entropy, entropy = (None if x is None else x[:, None] for x in tuple(row))
    log_p = z.sub_(lse)
    if grad_entropy is None:
        # dz_v = -g p_v,  dz_y = g q
        dz = log_p.exp_().mul_(-grad)
        places.fill_(dz, first, row.grad * row.q)
    else:
        # dz_v = -(g + g_H (log p_v + H)) p_v,  dz_y = g q - g_H p_y (log p_y + H)
        p, target = log_p.exp(), places.inside(first)
        dz = log_p.clamp_min_(-1e4).add_(entropy).mul_(-grad_entropy)
        own = dz[target] * p[target] + (row.grad * row.q)[target[0]]
        dz.sub_(grad).mul_(p)
        dz[target] = own
    return head.slope_(dz, logits)


def _replace(result: HeadForward, rows: Tensor, new: HeadForward) -> HeadForward:
    """`result` with `new` in the given rows; the stash stays."""
    for name in ("logps", "lse", "q", "direction", "scale"):
        if len(getattr(new, name)):
            getattr(result, name)[rows] = getattr(new, name)
    result.extra[:, rows] = new.extra
    return result
