"""The device code of `linear_logprobs`: what one program does. The docstring of `launch` explains the kernels.

N tokens, D hidden, V vocabulary; a row's target is y. Logits in here are in base 2: z2 = z log2(e).
Prefixes: i_ program index, o_ offsets, m_ mask, p_ pointers, b_ a block in registers.
"""

import triton
import triton.language as tl

from prefuse.kernels.device import (
    IGNORED,
    LN2,
    LOG2E,
    NEG_INF,
    OUTSIDE,
    log1p,
    logits_of,
    products,
    program_tile,
    store_tile,
    tanh_of,
)
from prefuse.kernels.logprobs.portable import MAX_TOTAL

FAR = tl.constexpr(MAX_TOTAL)

# What a fold leaves for each row and segment: planes of one array (planes, segments, N).
TOTAL = tl.constexpr(0)  # sum of e = exp(z - shift) over v != y
SHIFT = tl.constexpr(1)  # rescue: what the exponents were taken against, in base 2
ROUNDED = tl.constexpr(1)  # pull: sum of the weights of W as they were stored
EXACT = tl.constexpr(2)  # pull under a softcap: sum of the same weights before rounding
WEIGHTED = tl.constexpr(3)  # sum of (z2 - shift) e
SQUARED = tl.constexpr(4)  # sum of e^2
PLAIN = tl.constexpr(5)  # sum of z2, target included
BEFORE = tl.constexpr(6)  # largest logit before the target, the target's from the same product, and after it
OWN = tl.constexpr(7)
AFTER = tl.constexpr(8)


# ------------------------------------------------------- the sums of a fold: one place for each of them in every helper


@triton.jit
def _no_columns(BLOCK: tl.constexpr):
    """total, weighted, squared, plain, before, own, after: the sums of no column, (BLOCK,) each."""
    zero = tl.zeros([BLOCK], tl.float32)
    lowest = tl.full([BLOCK], NEG_INF, tl.float32)
    return zero, zero, zero, zero, lowest, lowest, lowest


@triton.jit
def _add_logits(sums, b_z, b_local, o_v, columns, MEAN: tl.constexpr, TOP1: tl.constexpr):
    """Adds a tile's logits to the sums that include the target's column."""
    total, weighted, squared, plain, before, own, after = sums
    if MEAN:
        plain += tl.sum(tl.where((o_v < columns)[None, :], b_z, 0.0), 1)
    if TOP1:
        m_v = (o_v < columns)[None, :]
        m_before = m_v & (o_v[None, :] < b_local[:, None])
        m_after = m_v & (o_v[None, :] > b_local[:, None])
        before = tl.maximum(before, tl.max(tl.where(m_before, b_z, NEG_INF), 1))
        own = tl.maximum(own, tl.max(tl.where(o_v[None, :] == b_local[:, None], b_z, NEG_INF), 1))
        after = tl.maximum(after, tl.max(tl.where(m_after, b_z, NEG_INF), 1))
    return total, weighted, squared, plain, before, own, after


@triton.jit
def _move_shift(sums, b_from, b_to):
    """The sums of exponentials, taken against another shift."""
    total, weighted, squared, plain, before, own, after = sums
    b_scale = tl.exp2(b_from - b_to)
    # The moment moves with its shift: sum e (z - to) = scale * (sum e (z - from) + (from - to) sum e).
    weighted = b_scale * (weighted + (b_from - b_to) * total)
    squared *= b_scale * b_scale
    total *= b_scale
    return total, weighted, squared, plain, before, own, after


@triton.jit
def _add_exponentials(sums, b_e, b_gap, ENTROPY: tl.constexpr, SQUARES: tl.constexpr):
    """Adds a tile's e = exp2(gap) to the sums that leave the target's column out."""
    total, weighted, squared, plain, before, own, after = sums
    total += tl.sum(b_e, 1)
    if ENTROPY:
        weighted += tl.sum(b_e * tl.maximum(b_gap, -1e4), 1)  # 0 * -inf = 0
    if SQUARES:
        squared += tl.sum(b_e * b_e, 1)
    return total, weighted, squared, plain, before, own, after


@triton.jit
def _store_sums(
    p_part, plane, m_n, sums, b_shift,
    RESCUE: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    """Writes the sums into their planes, those that are asked for."""
    total, weighted, squared, plain, before, own, after = sums
    tl.store(p_part + TOTAL * plane, total, mask=m_n)
    if RESCUE:
        tl.store(p_part + SHIFT * plane, b_shift, mask=m_n)
    if ENTROPY:
        tl.store(p_part + WEIGHTED * plane, weighted, mask=m_n)
    if SQUARES:
        tl.store(p_part + SQUARED * plane, squared, mask=m_n)
    if MEAN:
        tl.store(p_part + PLAIN * plane, plain, mask=m_n)
    if TOP1:
        tl.store(p_part + BEFORE * plane, before, mask=m_n)
        tl.store(p_part + OWN * plane, own, mask=m_n)
        tl.store(p_part + AFTER * plane, after, mask=m_n)


@triton.jit
def _add_segment(
    sums, p_part, plane, m_n, b_moved,
    RESCUE: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr,
):  # fmt: skip
    """Adds one segment's planes; `b_moved` is its shift - the common one."""
    total, weighted, squared, plain, before, own, after = sums
    b_part = tl.load(p_part + TOTAL * plane, mask=m_n, other=0.0)
    b_scale = tl.full(b_part.shape, 1.0, tl.float32)
    if RESCUE:
        b_scale = tl.exp2(b_moved)
    total += b_part * b_scale
    if ENTROPY:
        weighted += b_scale * (tl.load(p_part + WEIGHTED * plane, mask=m_n, other=0.0) + b_moved * b_part)
    if SQUARES:
        squared += b_scale * b_scale * tl.load(p_part + SQUARED * plane, mask=m_n, other=0.0)
    if MEAN:
        plain += tl.load(p_part + PLAIN * plane, mask=m_n, other=0.0)
    if TOP1:
        before = tl.maximum(before, tl.load(p_part + BEFORE * plane, mask=m_n, other=NEG_INF))
        own = tl.maximum(own, tl.load(p_part + OWN * plane, mask=m_n, other=NEG_INF))
        after = tl.maximum(after, tl.load(p_part + AFTER * plane, mask=m_n, other=NEG_INF))
    return total, weighted, squared, plain, before, own, after


# ------------------------------------------------------------------------------------------------- forward


@triton.jit
def target_kernel(
    h, w, bias, y, z2_y,  # (N, D), (V, D), (V,), (N,) -> (N,)
    N, V, D, stride_hn, stride_hd, stride_wv, stride_wd, k_in, k_out,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z2_y = base-2 logit of each row's target, a float32 dot product; undefined if another rank holds the target."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    b_y = tl.load(y + o_n, mask=o_n < N, other=IGNORED)
    m_n = (b_y >= 0) & (b_y < V)
    p_h = h + o_n[:, None].to(tl.int64) * stride_hn
    p_w = w + tl.where(m_n, b_y, 0)[:, None].to(tl.int64) * stride_wv
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for d in range(0, D, BLOCK_D):
        m = m_n[:, None] & (o_d[None, :] < D - d)
        b_h = tl.load(p_h + (d + o_d)[None, :].to(tl.int64) * stride_hd, mask=m, other=0.0).to(tl.float32)
        b_w = tl.load(p_w + (d + o_d)[None, :].to(tl.int64) * stride_wd, mask=m, other=0.0)
        acc += b_h * b_w.to(h.dtype.element_ty).to(tl.float32)  # rounded to hidden's dtype, as in the products
    b_x = tl.sum(acc, 1)
    if HAS_BIAS:
        b_x += tl.load(bias + b_y, mask=m_n, other=0.0).to(tl.float32)
    if SOFTCAP:
        b_z = tanh_of(b_x * k_in) * k_out
    else:
        b_z = b_x * k_out
    tl.store(z2_y + o_n, tl.where(b_y == OUTSIDE, float("nan"), b_z), mask=o_n < N)


@triton.jit
def fold_kernel(
    h, w, bias, y, z2_y, far, parts, pulls,
    # h (N, D), w (C, D) the weight's rows from `first` on, bias (C,), (N,) three times -> (planes, segments, N), (N, C)
    N, V, D, first, first_segment, segments, plane, row, stride_hn, stride_hd, stride_wv, stride_wd, stride_pn,
    k_in, k_out,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, RESCUE: tl.constexpr, PULL: tl.constexpr, ENTROPY: tl.constexpr,
    SQUARES: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr, SEGMENTS: tl.constexpr, DESC: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row block x one vocabulary segment -> its part of every sum, the target's column left out.

    RESCUE: skips row blocks without a far row, and shifts by the running maximum instead of the target's logit. PULL:
    also stores e times the softcap's slope, each row's weight of W[v] in d logp / d hidden; a segment is one tile.
    """
    i_n, i_s = program_tile(tl.cdiv(N, BLOCK_N), segments, GROUP)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    if RESCUE:
        if tl.max(tl.load(far + o_n, mask=m_n, other=0), 0) == 0:
            return
    b_y = tl.load(y + o_n, mask=m_n, other=IGNORED)
    b_local = b_y - first
    b_shift = tl.load(z2_y + o_n, mask=m_n, other=0.0)
    if RESCUE:
        b_shift = tl.full([BLOCK_N], -1e30, tl.float32)  # finite: -inf - -inf is NaN
    sums = _no_columns(BLOCK_N)
    p_part = parts + i_s.to(tl.int64) * row + o_n  # (planes, segments, N): their product may pass 2^31
    plane = tl.cast(plane, tl.int64)

    tiles = tl.cdiv(V, BLOCK_V)
    i_s += first_segment
    tile = i_s * tiles // SEGMENTS
    count = 1 if PULL else (i_s + 1) * tiles // SEGMENTS - tile
    for i in range(count):
        column = (tile + i) * BLOCK_V - first
        acc = products(
            h, w, i_n * BLOCK_N, column, N, V - first, D, stride_hn, stride_hd, stride_wv, stride_wd,
            DESC, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        o_v = column + tl.arange(0, BLOCK_V)
        b_z, b_tanh = logits_of(acc, bias, o_v, V - first, k_in, k_out, HAS_BIAS, SOFTCAP)
        sums = _add_logits(sums, b_z, b_local, o_v, V - first, MEAN, TOP1)
        b_z = _without_targets(b_z, b_y, b_local, o_v, column, V - first, PULL, SOFTCAP, BLOCK_V)
        if RESCUE:
            b_new = tl.maximum(b_shift, tl.max(b_z, 1))
            sums = _move_shift(sums, b_shift, b_new)
            b_shift = b_new
        b_gap = b_z - b_shift[:, None]
        if PULL:  # an inf in a far row would spoil the matrix products that it shares with other rows
            b_gap = tl.minimum(b_gap, 60.0)
        b_e = tl.exp2(b_gap)
        sums = _add_exponentials(sums, b_e, b_gap, ENTROPY, SQUARES)
        if PULL:
            if SOFTCAP:
                b_e *= 1.0 - b_tanh * b_tanh
                tl.store(p_part + EXACT * plane, tl.sum(b_e, 1), mask=m_n)
            b_pull = b_e.to(pulls.dtype if DESC else pulls.dtype.element_ty)
            store_tile(pulls, b_pull, i_n * BLOCK_N, column, o_n, o_v, N, V - first, stride_pn, DESC)
            tl.store(p_part + ROUNDED * plane, tl.sum(b_pull.to(tl.float32), 1), mask=m_n)
    _store_sums(p_part, plane, m_n, sums, b_shift, RESCUE, ENTROPY, SQUARES, MEAN, TOP1)


@triton.jit
def _without_targets(
    b_z, b_y, b_local, o_v, column, columns, PULL: tl.constexpr, SOFTCAP: tl.constexpr, BLOCK_V: tl.constexpr
):
    """-inf in each row's own target, past the last column, and, where weights are stored, in ignored rows."""
    # Most tiles hold no target and lie inside the vocabulary: a branch spares them the mask.
    special = (b_local >= column) & (b_local < column + BLOCK_V)
    if PULL:
        special |= b_y == IGNORED
    # (With SOFTCAP and PULL always mask: the branch would spill.)
    if (tl.max(special.to(tl.int32), 0) > 0) | (column + BLOCK_V > columns) | (PULL and SOFTCAP):
        drop = (o_v[None, :] == b_local[:, None]) | (o_v >= columns)[None, :]
        if PULL:
            drop |= (b_y == IGNORED)[:, None]
        b_z = tl.where(drop, NEG_INF, b_z)
    return b_z


@triton.jit
def merge_kernel(
    tile_parts, parts,  # (planes, count, N) of one vocabulary slice -> adds to (planes, SEGMENTS, N)
    N, first_tile, count, tiles, SEGMENTS: tl.constexpr, SUMS: tl.constexpr, MAXIMA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds tiles to their segments one after the other, in the order of a fold without PULL: its bits are the same."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    from_plane = tl.cast(count, tl.int64) * N
    to_plane = tl.cast(SEGMENTS, tl.int64) * N
    for i in range(count):
        # the segment s with s * tiles // SEGMENTS <= tile < (s + 1) * tiles // SEGMENTS
        s = ((first_tile + i + 1) * SEGMENTS - 1) // tiles
        p_from = tile_parts + tl.cast(i, tl.int64) * N + o_n
        p_to = parts + tl.cast(s, tl.int64) * N + o_n
        for k in tl.static_range(SUMS):
            b = tl.load(p_to + k * to_plane, mask=m_n, other=0.0)
            tl.store(p_to + k * to_plane, b + tl.load(p_from + k * from_plane, mask=m_n, other=0.0), mask=m_n)
        for k in tl.static_range(SUMS, SUMS + MAXIMA):
            b = tl.load(p_to + k * to_plane, mask=m_n, other=0.0)
            b = tl.maximum(b, tl.load(p_from + k * from_plane, mask=m_n, other=0.0))
            tl.store(p_to + k * to_plane, b, mask=m_n)


@triton.jit
def _all_segments(
    parts, o_n, m_n, N, b_shift,  # (planes, SEGMENTS, N)
    RESCUE: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr, MEAN: tl.constexpr, TOP1: tl.constexpr,
    SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the segments in their order -> the sums over this rank's part of the vocabulary, and their shift."""
    plane = tl.cast(SEGMENTS, tl.int64) * N
    if RESCUE:
        b_shift = tl.full([BLOCK], NEG_INF, tl.float32)
        for s in range(SEGMENTS):
            p_part = parts + tl.cast(s, tl.int64) * N + o_n
            b_shift = tl.maximum(b_shift, tl.load(p_part + SHIFT * plane, mask=m_n, other=0.0))
    sums = _no_columns(BLOCK)
    for s in range(SEGMENTS):
        p_part = parts + tl.cast(s, tl.int64) * N + o_n
        b_moved = tl.zeros([BLOCK], tl.float32)
        if RESCUE:
            b_moved = tl.load(p_part + SHIFT * plane, mask=m_n, other=0.0) - b_shift
        sums = _add_segment(sums, p_part, plane, m_n, b_moved, RESCUE, ENTROPY, SQUARES, MEAN, TOP1)
    return sums, b_shift


@triton.jit
def _all_pulls(parts, o_n, m_n, N, SOFTCAP: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sums of the stored weights over the segments: after rounding, and before (under a softcap)."""
    plane = tl.cast(SEGMENTS, tl.int64) * N
    b_rounded = tl.zeros([BLOCK], tl.float32)
    b_exact = tl.zeros([BLOCK], tl.float32)
    for s in range(SEGMENTS):
        p_part = parts + tl.cast(s, tl.int64) * N + o_n
        b_rounded += tl.load(p_part + ROUNDED * plane, mask=m_n, other=0.0)
        if SOFTCAP:
            b_exact += tl.load(p_part + EXACT * plane, mask=m_n, other=0.0)
    return b_rounded, b_exact


@triton.jit
def shard_kernel(
    parts, far, mine,  # (planes, SEGMENTS, N), (N,) -> (planes, N)
    N, SOFTCAP: tl.constexpr, RESCUE: tl.constexpr, PULL: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr,
    MEAN: tl.constexpr, TOP1: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds this rank's segments into `mine`, which the ranks exchange: each rank counts as one segment from here on."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    if RESCUE:
        m_n = m_n & (tl.load(far + o_n, mask=m_n, other=0) > 0)
        if tl.max(m_n.to(tl.int32), 0) == 0:
            return
    b_none = tl.zeros([BLOCK], tl.float32)
    sums, b_shift = _all_segments(parts, o_n, m_n, N, b_none, RESCUE, ENTROPY, SQUARES, MEAN, TOP1, SEGMENTS, BLOCK)
    p_mine = mine + o_n
    plane = tl.cast(N, tl.int64)
    _store_sums(p_mine, plane, m_n, sums, b_shift, RESCUE, ENTROPY, SQUARES, MEAN, TOP1)
    if PULL:
        b_rounded, b_exact = _all_pulls(parts, o_n, m_n, N, SOFTCAP, SEGMENTS, BLOCK)
        tl.store(p_mine + ROUNDED * plane, b_rounded, mask=m_n)
        if SOFTCAP:
            tl.store(p_mine + EXACT * plane, b_exact, mask=m_n)


@triton.jit
def finish_kernel(
    parts, y, z2_y, far, logps, lse, q, scale, extra,  # (planes, SEGMENTS, N), (N,), (N,) -> (N,) five times, (4, N)
    N, SOFTCAP: tl.constexpr, RESCUE: tl.constexpr, PULL: tl.constexpr, ENTROPY: tl.constexpr, SQUARES: tl.constexpr,
    MEAN: tl.constexpr, TOP1: tl.constexpr, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds the segments in their order; total -> logp, lse, q and the optional outputs, a sum in place of the mean."""
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    if RESCUE:
        m_n = m_n & (tl.load(far + o_n, mask=m_n, other=0) > 0)
        if tl.max(m_n.to(tl.int32), 0) == 0:
            return
    b_y = tl.load(y + o_n, mask=m_n, other=IGNORED)
    b_zy = tl.load(z2_y + o_n, mask=m_n, other=0.0)
    sums, b_shift = _all_segments(parts, o_n, m_n, N, b_zy, RESCUE, ENTROPY, SQUARES, MEAN, TOP1, SEGMENTS, BLOCK)
    b_total, b_weighted, b_squared, b_plain, b_before, b_own, b_after = sums

    kept = b_y != IGNORED
    b_log = tl.log(b_total)
    b_gap = (b_shift - b_zy) * LN2 + b_log
    b_tail = log1p(tl.exp(-tl.abs(b_gap)))
    b_logp = -(tl.maximum(b_gap, 0.0) + b_tail)
    b_lse = tl.maximum(b_shift * LN2 + b_log, b_zy * LN2) + b_tail
    b_q = 1.0 / (1.0 + tl.exp(-b_gap))
    tl.store(logps + o_n, tl.where(kept, b_logp, 0.0), mask=m_n)
    tl.store(lse + o_n, tl.where(kept, b_lse, float("inf")), mask=m_n)  # exp(z - inf) = 0: no gradient
    tl.store(q + o_n, tl.where(kept, b_q, 0.0), mask=m_n)
    if not RESCUE:
        tl.store(far + o_n, (kept & ~(b_total < FAR)).to(tl.int32), mask=m_n)
    if PULL:
        b_rounded, b_exact = _all_pulls(parts, o_n, m_n, N, SOFTCAP, SEGMENTS, BLOCK)
        # The stored weights are divided by `rounded`, their own sum, so that rounding them does not bias the mean.
        b_sum = b_total
        if SOFTCAP:
            b_sum = b_total * (b_rounded / b_exact)
        else:
            b_sum = b_rounded
        tl.store(scale + o_n, tl.where(kept & (b_rounded > 0) & (b_total < FAR), b_q / b_sum, 0.0), mask=m_n)
    if ENTROPY:
        # H = -p log p - q log q + q (log total - weighted / total)
        b_logq = -(tl.maximum(-b_gap, 0.0) + b_tail)
        b_others = tl.where(b_total > 0, b_log - LN2 * b_weighted / b_total, 0.0)
        b_h = _xlogx(b_logp) + _xlogx(b_logq) + tl.where(b_q > 0, b_q * b_others, 0.0)
        tl.store(extra + o_n, tl.where(kept, b_h, 0.0), mask=m_n)
    if MEAN:
        tl.store(extra + tl.cast(N, tl.int64) + o_n, tl.where(kept, b_plain * LN2, 0.0), mask=m_n)
    if SQUARES:
        b_pown = tl.exp2(b_zy - b_shift)
        b_lss = tl.log(b_squared + b_pown * b_pown) - 2.0 * tl.log(b_total + b_pown)
        tl.store(extra + 2 * tl.cast(N, tl.int64) + o_n, tl.where(kept, b_lss, 0.0), mask=m_n)
    if TOP1:
        b_top = (b_own > b_before) & (b_own >= b_after) & kept  # argmax: the first of equals
        tl.store(extra + 3 * tl.cast(N, tl.int64) + o_n, b_top.to(tl.float32), mask=m_n)


@triton.jit
def _xlogx(b_log):
    """-x log x from log x, with 0 log 0 = 0."""
    return tl.where(b_log > NEG_INF, -tl.exp(b_log) * b_log, 0.0)


# ------------------------------------------------------------------------------------------------ backward


@triton.jit
def dlogits_kernel(
    h, w, bias, y, lse, grad, grad_entropy, entropy, dz,
    # h (N, D), w (C, D) the weight's rows from `first` on, bias (C,), (N,) five times -> (N, C)
    N, C, D, first, stride_hn, stride_hd, stride_wv, stride_wd, stride_dz, k_in, k_out,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, DESC: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dz = dL/d(products), the target's column exactly 0. `grad` comes with the options' slope already in it."""
    i_n, i_v = program_tile(tl.cdiv(N, BLOCK_N), tl.cdiv(C, BLOCK_V), GROUP)
    acc = products(
        h, w, i_n * BLOCK_N, i_v * BLOCK_V, N, C, D, stride_hn, stride_hd, stride_wv, stride_wd,
        DESC, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_n = o_n < N
    b_y = tl.load(y + o_n, mask=m_n, other=IGNORED)
    b_local = b_y - first
    b_lse = tl.load(lse + o_n, mask=m_n, other=float("inf"))
    b_g = tl.load(grad + o_n, mask=m_n, other=0.0)
    b_z, b_tanh = logits_of(acc, bias, o_v, C, k_in, k_out, HAS_BIAS, SOFTCAP)
    b_logp2 = b_z - (b_lse * LOG2E)[:, None]
    if ENTROPY:
        # dz_v = -(g + g_H (log p_v + H)) p_v
        b_gh = tl.load(grad_entropy + o_n, mask=m_n, other=0.0)
        b_h = tl.load(entropy + o_n, mask=m_n, other=0.0)
        b_up = b_g[:, None] + b_gh[:, None] * (tl.maximum(b_logp2, -1e4) * LN2 + b_h[:, None])
        b_dz = -b_up * tl.exp2(b_logp2)
    else:
        # dz_v = -g p_v
        b_dz = -b_g[:, None] * tl.exp2(b_logp2)
    if SOFTCAP:
        b_dz *= 1.0 - b_tanh * b_tanh
    # A row that is not kept is exactly 0 whatever its hidden state holds; so are the target's column and those past C.
    special = ((b_local >= i_v * BLOCK_V) & (b_local < (i_v + 1) * BLOCK_V)) | (b_y == IGNORED)
    # (With SOFTCAP always mask: the branch would spill.)
    if (tl.max(special.to(tl.int32), 0) > 0) | ((i_v + 1) * BLOCK_V > C) | SOFTCAP:
        drop = (o_v[None, :] == b_local[:, None]) | (b_y == IGNORED)[:, None] | (o_v >= C)[None, :]
        b_dz = tl.where(drop, 0.0, b_dz)
    store_tile(dz, b_dz, i_n * BLOCK_N, i_v * BLOCK_V, o_n, o_v, N, C, stride_dz, DESC)


@triton.jit
def target_hidden_kernel(
    w, y, c, scale, dh,  # (V, D), (N,), (N,), (N,) -> (N, D) float32, written whole
    N, V, D, stride_wv, stride_wd,
    PULL: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dh_i = c_i W[y_i], the target's term of dhidden; with PULL, minus scale_i dh_i."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_n = o_n < N
    b_y = tl.load(y + o_n, mask=m_n, other=IGNORED)
    b_c = tl.load(c + o_n, mask=m_n, other=0.0)
    m_w = (b_y >= 0) & (b_y < V)
    m = m_w[:, None] & (o_d < D)[None, :]
    p_w = w + tl.where(m_w, b_y, 0)[:, None].to(tl.int64) * stride_wv + o_d[None, :].to(tl.int64) * stride_wd
    b_w = tl.load(p_w, mask=m, other=0.0).to(DTYPE).to(tl.float32)
    p_dh = dh + o_n[:, None].to(tl.int64) * D + o_d[None, :]
    m = m_n[:, None] & (o_d < D)[None, :]
    b_dh = b_c[:, None] * b_w
    if PULL:
        b_dh -= tl.load(scale + o_n, mask=m_n, other=0.0)[:, None] * tl.load(p_dh, mask=m, other=0.0)
    tl.store(p_dh, b_dh, mask=m)


@triton.jit
def target_weight_kernel(
    h, order, y_sorted, c, dw,  # (N, D), (N,), (N,), (N,) -> adds to (C, D) float32
    N, C, D, first, stride_hn, stride_hd, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dW[v] += sum of c_i h_i over the rows whose target is v, in order, by the program of the first of these rows."""
    i = tl.program_id(0)
    v = tl.load(y_sorted + i)
    if (v < first) | (v >= first + C):
        return
    if i > 0:
        if tl.load(y_sorted + i - 1) == v:
            return
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    acc = tl.zeros([BLOCK_D], tl.float32)
    j = i
    same = True
    while same:
        row = tl.load(order + j)
        b_h = tl.load(h + row * stride_hn + o_d.to(tl.int64) * stride_hd, mask=m_d, other=0.0).to(tl.float32)
        acc += tl.load(c + row) * b_h
        j += 1
        same = tl.load(y_sorted + j, mask=j < N, other=OUTSIDE) == v
    p_dw = dw + (v - first).to(tl.int64) * D + o_d
    tl.store(p_dw, tl.load(p_dw, mask=m_d, other=0.0) + acc, mask=m_d)
