"""`linear_logprobs` in plain PyTorch: tiled over rows and vocabulary, no `(N, V)` tensor, any device.

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
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from prefuse.kernels.gemm import accumulator_dtype, addmm_, mm, narrow, operand
from prefuse.kernels.options import HeadOptions
from prefuse.kernels.slices import Forward, Head, RowTile, Targets, row_tile
from prefuse.kernels.vocab import Whole

# A larger total is folded again: its square (for log_sum_sq_probs) must stay finite in float32.
MAX_TOTAL = math.exp(40.0)
# The backward's dlogits buffer: as many rows as fit, so that the two gradient products are large.
BUFFER_BYTES = 64 << 20

# What a forward makes besides log-probabilities, and what a backward then costs (units of N * D * V multiply-adds):
#   "lean"    nothing; recomputes its tiles: 1 + 3
#   "stash"   keeps the weights of its tiles, N * V numbers, for the backward: 1 + 2
#   "frozen"  the direction, where only `hidden` wants a gradient: 2 + 0
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
) -> Forward:
    """One pass over the vocabulary; what it makes besides is `mode`'s. Ignored rows are 0 everywhere."""
    head = Head(weight, bias, options, hidden.dtype, shard)
    rows = _kept_rows(targets, options.ignore_index)
    targets = head.shard.local(targets)
    empty = empty_forward(hidden, weight, outputs, mode, hidden.dtype if hidden.is_cuda else head.acc)
    if rows is None:
        return _forward_kept(head, hidden, targets, outputs, mode, empty.stash)
    if len(rows) == 0:
        return empty
    return _replace(empty, rows, _forward_kept(head, hidden[rows], targets[rows], outputs, mode, empty.stash))


def empty_forward(
    hidden: Tensor, weight: Tensor, outputs: tuple[str, ...], mode: str, stash_dtype: torch.dtype
) -> Forward:
    """A `Forward` of zeros, of the right shapes; the stash, which is large, is not even zeroed."""
    n, d = hidden.shape
    dtype = accumulator_dtype(hidden.dtype)
    numbers = stash_size(n, len(weight), hidden) if mode == "stash" else 0
    stash = hidden.new_empty(numbers, dtype=stash_dtype)

    def zeros(*shape: int) -> Tensor:
        return hidden.new_zeros(shape, dtype=dtype)

    direction, share = zeros(n if mode == "frozen" else 0, d), zeros(n if mode == "stash" else 0)
    return Forward(zeros(n), zeros(n), zeros(n), zeros(len(outputs), n), direction, stash, share)


def stash_size(n: int, vocab: int, hidden: Tensor) -> int:
    """Numbers in the stash of `n` rows: whole row tiles here, rows of 16 bytes' multiple for Triton's descriptors."""
    rows = row_tile(hidden)
    return -(-n // rows) * rows * -(-vocab // 8) * 8


def _forward_kept(
    head: Head, hidden: Tensor, targets: Tensor, outputs: tuple[str, ...], mode: str, stash: Tensor
) -> Forward:
    tiles = _row_tiles(hidden, head.rows)
    ids = pad(targets, (0, -len(targets) % head.rows)).split(head.rows)
    places = [Targets(y, head) for y in ids]
    z_target = _target_logits(head, tiles, ids)

    folded = _fold(head, tiles, places, z_target, outputs, mode, stash)
    far = (~(torch.cat([t.total[:, 0] for t in folded])[: len(hidden)] < MAX_TOTAL)).nonzero()[:, 0]
    result = _finish(head, folded, z_target, outputs, len(hidden))._replace(stash=stash)
    if mode == "stash":
        _stash_targets(head, result, targets, torch.cat(z_target)[: len(hidden)])
    if len(far) == 0:
        return result
    # A stash cannot hold these rows: they weigh nothing in it, and the backward recomputes them.
    z_far = torch.cat(z_target)[far]
    again = _forward_far(head, hidden[far], targets[far], z_far, outputs, "lean" if mode == "stash" else mode)
    if mode == "stash":
        again = again._replace(share=torch.zeros_like(again.q))
        for _, _, block in stashed_slices(head, stash, len(hidden)):
            block[far] = 0
    return _replace(result, far, again)


def _stash_targets(head: Head, result: Forward, targets: Tensor, z_target: Tensor) -> None:
    """The target's own weight, of the other sign: share P_y = -q slope_y."""
    slope = head.slope_(torch.ones_like(z_target), z_target)
    own = torch.where(result.share > 0, -result.q * slope / result.share, 0.0)
    places = Targets(targets, head)
    for first, _, weighs in stashed_slices(head, result.stash, len(targets)):
        at = places.inside(first)
        weighs[at] = own[at[0]].to(weighs.dtype)


def _target_logits(head: Head, tiles: list[Tensor], ids: tuple[Tensor, ...]) -> list[Tensor]:
    """z_y (R,) of every row tile, from the ranks that have them; NaN where the target is not in the vocabulary."""
    z = torch.cat([head.target_logits(x, y) for x, y in zip(tiles, ids, strict=True)])
    every = torch.cat(ids)
    z = head.shard.own(z, head.holds(every))
    return list(torch.where(head.shard.valid(every, len(head.weight)), z, math.nan).split(head.rows))


def _forward_far(
    head: Head,
    hidden: Tensor,  # (F, D)
    targets: Tensor,  # (F,)
    z_target: Tensor,  # (F,)
    outputs: tuple[str, ...],
    mode: str,
) -> Forward:
    """Far rows again, shifted by their largest logit other than the target's."""
    tiles = _row_tiles(hidden, head.rows)
    ids, z_target = (pad(x, (0, -len(x) % head.rows)).split(head.rows) for x in (targets, z_target))
    places = [Targets(y, head) for y in ids]
    largest = [torch.full_like(z, -math.inf) for z in z_target]
    for first, w, b in head.slices():
        z = w.new_empty(head.rows, len(w), dtype=head.acc)
        for i, (x, y) in enumerate(zip(tiles, places, strict=True)):
            head.logits(x, w, b, out=z)[y.inside(first)] = -math.inf
            largest[i] = torch.maximum(largest[i], z.amax(-1))
    largest = head.shard.gather(torch.cat(largest)).amax(0).split(head.rows)
    folded = _fold(head, tiles, places, largest, outputs, mode, None)
    return _finish(head, folded, z_target, outputs, len(targets))


def _fold(
    head: Head,
    tiles: list[Tensor],
    places: list[Targets],
    shifts: list[Tensor],
    outputs: tuple[str, ...],
    mode: str,
    stash: Tensor | None,
) -> list[RowTile]:
    folded = [RowTile(x, y, s, outputs, mode) for x, y, s in zip(tiles, places, shifts, strict=True)]
    buffer = shifts[0].new_empty(head.rows * head.columns)
    # Vocabulary outside, rows inside: a slice of a bf16 weight is raised to float32 once.
    for first, weight, bias in head.slices():
        z = buffer[: head.rows * len(weight)].view(head.rows, len(weight))
        for i, tile in enumerate(folded):
            kept = None
            if mode == "stash":
                start = (first * len(tiles) + i * len(weight)) * head.rows
                kept = stash[start : start + head.rows * len(weight)].view(head.rows, len(weight))
                z = kept if kept.dtype == head.acc else z  # folded where it stays
            tile.fold(head.logits(tile.hidden, weight, bias, out=z), first, head, weight, kept)
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


def _finish(head: Head, folded: list[RowTile], z_target: list[Tensor], outputs: tuple[str, ...], n: int) -> Forward:
    # A tile at a time here too: an elementwise kernel may treat the end of a long vector differently.
    parts = [t.finish(head, z, outputs) for t, z in zip(folded, z_target, strict=True)]
    logps, lse, q, extra, direction, stash, share = zip(*parts, strict=True)
    logps, lse, q, direction, share = (torch.cat(column)[:n] for column in (logps, lse, q, direction, share))
    if len(direction):
        head.shard.add_(direction)
    return Forward(logps, lse, q, torch.cat(extra, 1)[:, :n].contiguous(), direction, stash[0], share)


class RowGrads(NamedTuple):
    """What the backward needs of each row."""

    grad: Tensor  # (N,) dL/dlogp
    lse: Tensor  # (N,)
    q: Tensor  # (N,)
    grad_entropy: Tensor | None  # (N,) dL/dentropy
    entropy: Tensor | None  # (N,)

    def __getitem__(self, rows: slice | Tensor) -> RowGrads:
        return RowGrads(*(None if x is None else x[rows] for x in tuple(self)))


class Sums(NamedTuple):
    """The gradients that are sums over rows."""

    dweight: Tensor | None  # (V, D)
    dbias: Tensor | None  # (V,)

    @staticmethod
    def empty(weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]) -> Sums:
        """Where a backward writes every element."""
        dweight = torch.empty_like(weight, memory_format=torch.contiguous_format) if needs[1] else None
        return Sums(dweight, torch.empty_like(bias) if needs[2] else None)

    @staticmethod
    def zeros(weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool], dtype: torch.dtype) -> Sums:
        """Where several backwards add up."""
        dweight = weight.new_zeros(weight.shape, dtype=dtype) if needs[1] else None
        return Sums(dweight, bias.new_zeros(bias.shape, dtype=dtype) if needs[2] else None)


def backward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    row: RowGrads,
    options: HeadOptions,
    needs: tuple[bool, bool, bool],  # hidden, weight, bias
    shard: Whole | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dhidden (N, D), dweight (V, D), dbias (V,): accumulated in float32, each row of dweight written once."""
    head = Head(weight, bias, options, hidden.dtype, shard)
    kept = _kept_rows(targets, options.ignore_index)
    targets = head.shard.local(targets)
    if kept is None:
        dkept, dweight, dbias = _backward_kept(head, hidden, targets, row, needs)
    elif len(kept) == 0:
        return tuple(
            x.new_zeros(x.shape) if need else None for x, need in zip((hidden, weight, bias), needs, strict=True)
        )
    else:
        dkept, dweight, dbias = _backward_kept(head, hidden[kept], targets[kept], row[kept], needs)
    return _whole_rows(head, hidden, kept, dkept), dweight, dbias


def _whole_rows(head: Head, hidden: Tensor, kept: Tensor | None, dkept: Tensor | None) -> Tensor | None:
    """The gradient of the rows that count, from every rank -> dhidden (N, D)."""
    if dkept is None:
        return None
    dkept = head.shard.add_(dkept).to(hidden.dtype)
    return dkept if kept is None else hidden.new_zeros(hidden.shape).index_copy_(0, kept, dkept)


def _backward_kept(head: Head, hidden: Tensor, targets: Tensor, row: RowGrads, needs: tuple[bool, bool, bool]):
    """`backward` of rows that all count; dhidden is this rank's part, in the accumulator's dtype."""
    dtype, weight, bias = hidden.dtype, head.weight, head.bias
    hidden = operand(hidden, dtype)
    dhidden = hidden.new_zeros(hidden.shape, dtype=head.acc) if needs[0] else None
    dweight, dbias = Sums.empty(weight, bias, needs)
    tiles = [(rows, Targets(targets[rows], head)) for rows in _blocks(len(hidden), head.rows)]
    # One buffer for every slice: fresh memory costs a page fault where the product writes it.
    block = max(1, min(len(tiles), BUFFER_BYTES // (head.rows * head.columns * head.acc.itemsize)))
    buffer = hidden.new_empty(block * head.rows * head.columns, dtype=head.acc)
    for first, w, b in head.slices():
        part = slice(first, first + len(w))
        dw = dweight[part] if needs[1] and dweight.dtype == head.acc else w.new_empty(w.shape, dtype=head.acc)
        db = hidden.new_zeros(len(w), dtype=head.acc)
        for i in range(0, len(tiles), block):
            group = tiles[i : i + block]
            rows = slice(group[0][0].start, group[-1][0].stop)
            dz = buffer[: (rows.stop - rows.start) * len(w)].view(-1, len(w))
            for at, places in group:
                # Recomputed and turned into dlogits while the tile is in cache.
                z = head.logits(hidden[at], w, b, out=dz[at.start - rows.start : at.stop - rows.start])
                _dlogits_(z, head, places.inside(first), row[at])
            if needs[2]:
                db += dz.sum(0)
            dz = narrow(dz, head.dtype)
            if needs[0]:
                addmm_(dhidden[rows], dz, w)
            if needs[1]:
                mm(dz.T, hidden[rows], out=dw) if i == 0 else addmm_(dw, dz.T, hidden[rows])
        if needs[1] and dweight.dtype != head.acc:
            dweight[part] = dw
        if needs[2]:
            dbias[part] = db
    return dhidden, dweight, dbias


def stashed_slices(head: Head, stash: Tensor, n: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields (first column, weight (C, D), what it weighs (N, C)) of each slice."""
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
    share: Tensor,  # (N,)
    options: HeadOptions,
    needs: tuple[bool, bool, bool],  # hidden, weight, bias
    into: Sums | None = None,
    shard: Whole | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`backward` from a forward's stash P (N, V): dhidden = c (P @ W), dweight = P.T @ (c hidden), c = -g share.

    Rows that the stash could not hold go through `backward`. With `into`, dweight and dbias are added to it.
    """
    head = Head(weight, bias, options, hidden.dtype, shard)
    kept = _kept_rows(targets, options.ignore_index)
    targets = head.shard.local(targets)
    rows = slice(None) if kept is None else kept
    x, targets, row, share = hidden[rows], targets[rows], row[rows], share[rows]
    c = -row.grad * share
    scaled = narrow(c[:, None] * x.to(head.acc), head.dtype)

    pulled = x.new_zeros(x.shape, dtype=head.acc) if needs[0] else None
    dweight, dbias = into or Sums.empty(weight, bias, needs)
    for first, w, weighs in stashed_slices(head, stash, len(x)):
        columns = slice(first, first + len(w))
        if needs[0]:
            addmm_(pulled, weighs, w)
        if needs[1] and into:
            addmm_(dweight[columns], weighs.T, scaled)
        elif needs[1]:
            dweight[columns] = mm(weighs.T, scaled, out=w.new_empty(w.shape, dtype=head.acc))
        if needs[2]:
            db = (weighs.to(head.acc) * c[:, None]).sum(0)
            dbias[columns] = dbias[columns] + db if into else db
    if needs[0]:
        pulled *= c[:, None]

    far = ((share == 0) & (row.q > 0)).nonzero()[:, 0]
    if len(far):
        again = _backward_kept(head, x[far], targets[far], row[far], needs)
        add_far_rows(far, again, pulled, dweight, dbias)
    return _whole_rows(head, hidden, kept, pulled), dweight, dbias


def add_far_rows(
    far: Tensor, again: tuple, dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
) -> None:
    """Puts the gradients of the rows `far`, recomputed, where a stash left nothing."""
    if dhidden is not None:
        dhidden[far] = again[0]
    for total, extra in ((dweight, again[1]), (dbias, again[2])):
        if total is not None:
            total += extra


def _dlogits_(z: Tensor, head: Head, target: tuple[Tensor, Tensor], row: RowGrads) -> Tensor:
    """Logits `z (R, C)` -> dL/dx in place; `target` is rows and columns of the targets that stand in this tile."""
    logits = z.clone() if head.options.softcap is not None else None
    grad, lse, _, grad_entropy, entropy = (None if x is None else x[:, None] for x in tuple(row))
    log_p = z.sub_(lse)
    if grad_entropy is None:
        # dz_v = -g p_v,  dz_y = g q
        dz = log_p.exp_().mul_(-grad)
        dz[target] = (row.grad * row.q)[target[0]]
    else:
        # dz_v = -(g + g_H (log p_v + H)) p_v,  dz_y = g q - g_H p_y (log p_y + H)
        p = log_p.exp()
        dz = log_p.clamp_min_(-1e4).add_(entropy).mul_(-grad_entropy)
        own = dz[target] * p[target] + (row.grad * row.q)[target[0]]
        dz.sub_(grad).mul_(p)
        dz[target] = own
    return head.slope_(dz, logits)


def _row_tiles(hidden: Tensor, rows: int) -> list[Tensor]:
    """(N, D) -> tiles (rows, D) in the type this device multiplies, the last one padded with zero rows."""
    # The bits of a product may depend on alignment and layout: a view that differs in them is copied once.
    if not hidden.is_contiguous() or hidden.data_ptr() % 64:
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    tiles = [operand(x, hidden.dtype) for x in hidden.split(rows)]
    tiles[-1] = pad(tiles[-1], (0, 0, 0, rows - len(tiles[-1])))
    return tiles


def _kept_rows(targets: Tensor, ignore_index: int) -> Tensor | None:
    """The rows that count, or None when all do."""
    keep = targets != ignore_index
    return None if bool(keep.all()) else keep.nonzero()[:, 0]


def _replace(result: Forward, rows: Tensor, new: Forward) -> Forward:
    """`result` with `new` in the given rows; the stash stays."""
    for name in ("logps", "lse", "q", "direction", "share"):
        if len(getattr(new, name)):
            getattr(result, name)[rows] = getattr(new, name)
    result.extra[:, rows] = new.extra
    return result


def _blocks(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))
