"""The device code of `linear_kl`: both models' logits live in registers side by side. `portable` has the math.

    N tokens, D hidden (its own for each model), V vocabulary. p, r: probabilities of policy and reference;
    d = ref_z - z. Logits and d are in base 2 in here, the KL and the mean of d in nats.

Prefixes: i_ program index, o_ offsets, m_ mask, p_ pointers, b_ a block in registers.
"""

import triton
import triton.language as tl

from prefuse.kernels.device import LN2, LOG2E, NEG_INF, logits_of, products, program_tile, store_tile

LOWEST = tl.constexpr(-1e30)  # stands for -inf where a difference of two of them must not be NaN

# What a fold leaves for each row and segment: planes (PLANES, segments, N), those of `portable.ColumnSums`.
TOP = tl.constexpr(0)
TOTAL = tl.constexpr(1)
REF_TOP = tl.constexpr(2)
REF_TOTAL = tl.constexpr(3)
KL = tl.constexpr(4)
ANCHOR = tl.constexpr(5)
MEAN = tl.constexpr(6)
PLANES = 7


# ------------------------------------------------------------------------------------------- device helpers


@triton.jit
def _near(p, x):
    """p (e^x - 1 - x) for |x| < 1, to the last bit of a float32: never negative."""
    # x^2 / 2 (1 + 2/3! x + 2/4! x^2 + ...)
    series = tl.fma(x, 2.0 / 39916800, 2.0 / 3628800)
    series = tl.fma(x, series, 2.0 / 362880)
    series = tl.fma(x, series, 2.0 / 40320)
    series = tl.fma(x, series, 2.0 / 5040)
    series = tl.fma(x, series, 2.0 / 720)
    series = tl.fma(x, series, 2.0 / 120)
    series = tl.fma(x, series, 2.0 / 24)
    series = tl.fma(x, series, 2.0 / 6)
    series = tl.fma(x, series, 1.0)
    return p * (0.5 * x * x) * series


@triton.jit
def _terms(p, r, x):
    """p (e^x - 1 - x), where r = p e^x. Where p is 0, x may be anything, and the term is r."""
    x = tl.where(p == 0, 2.0, x)
    return tl.where(tl.abs(x) < 1.0, _near(p, x), tl.fma(-p, x, r - p))


@triton.jit
def _or_one(total):
    """A divisor: 1 where every exponential was 0. (A NaN stays.)"""
    return tl.where(total == 0, 1.0, total)


@triton.jit
def _halves(x, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """(BLOCK_N, BLOCK_V) -> its left and its right half."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_N, 2, BLOCK_V // 2]), [0, 2, 1]))


@triton.jit
def _sums(b_z, b_ref, b_lse, b_ref_lse, b_shift, b_own):
    """Base-2 logits of a few columns -> what they add to the KL and to the mean of their tile, in nats."""
    # Four tiles of numbers fill the registers: the lines are ordered so that each value is last used early.
    b_x = ((b_ref - b_z) - b_shift[:, None]) * LN2
    b_p = tl.exp2(b_z - b_lse[:, None])
    b_x = tl.where(b_p == 0, 2.0, b_x)  # it may be a NaN there
    b_mean = tl.sum(b_p * (b_x - b_own[:, None]), 1)
    b_near = _near(b_p, b_x)
    b_r = tl.exp2(b_ref - b_ref_lse[:, None])
    return tl.sum(tl.where(tl.abs(b_x) < 1.0, b_near, tl.fma(-b_p, b_x, b_r - b_p)), 1), b_mean


@triton.jit
def _fold_tile(b_z, b_ref, HALVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Base-2 logits of one tile -> its (top, total, ref top, ref total, KL, anchor, mean), a number a row each."""
    b_top = tl.maximum(tl.max(b_z, 1), LOWEST)
    b_ref_top = tl.maximum(tl.max(b_ref, 1), LOWEST)
    b_total = tl.sum(tl.exp2(b_z - b_top[:, None]), 1)
    b_ref_total = tl.sum(tl.exp2(b_ref - b_ref_top[:, None]), 1)
    b_anchor = tl.max(tl.where(b_z == b_top[:, None], b_ref, NEG_INF), 1) - b_top
    b_anchor = tl.where(b_total == 0, 0.0, b_anchor)
    # log(r / p) = d - (log-sum-exp of the reference - that of the policy), the difference taken before it is rounded
    b_shift = (b_ref_top - b_top) + tl.log2(tl.div_rn(_or_one(b_ref_total), _or_one(b_total)))
    b_own = (b_anchor - b_shift) * LN2
    b_lse = b_top + tl.log2(_or_one(b_total))
    b_ref_lse = b_ref_top + tl.log2(_or_one(b_ref_total))
    if HALVES:
        z_left, z_right = _halves(b_z, BLOCK_N, BLOCK_V)
        ref_left, ref_right = _halves(b_ref, BLOCK_N, BLOCK_V)
        b_kl, b_mean = _sums(z_left, ref_left, b_lse, b_ref_lse, b_shift, b_own)
        kl_right, mean_right = _sums(z_right, ref_right, b_lse, b_ref_lse, b_shift, b_own)
        b_kl += kl_right
        b_mean += mean_right
    else:
        b_kl, b_mean = _sums(b_z, b_ref, b_lse, b_ref_lse, b_shift, b_own)
    return b_top, b_total, b_ref_top, b_ref_total, b_kl, b_anchor, b_mean


@triton.jit
def _part(total, ref_total, top, ref_top, kl, anchor, mean, all_total, all_ref, all_top, all_ref_top, all_anchor):
    """What one of two sets of columns adds to the KL and the mean of their union."""
    b_p = total * tl.exp2(top - all_top) / _or_one(all_total)
    b_r = ref_total * tl.exp2(ref_top - all_ref_top) / _or_one(all_ref)
    # log(r / p), in which neither r nor p may underflow. (An ordinary division on a GPU need not make 1 of x / x.)
    b_log = tl.log2(tl.div_rn(ref_total * all_total, _or_one(all_ref * total)))
    b_x = ((ref_top - all_ref_top) - (top - all_top) + b_log) * LN2
    b_kl = _terms(b_p, b_r, b_x) + tl.where(b_p == 0, 0.0, b_p * kl)
    b_mean = tl.where(b_p == 0, 0.0, b_p * (mean + (anchor - all_anchor) * LN2))
    return b_kl, b_mean


@triton.jit
def _merge(
    top, total, ref_top, ref_total, kl, anchor, mean,
    top_b, total_b, ref_top_b, ref_total_b, kl_b, anchor_b, mean_b,
):  # fmt: skip
    """Two sets of columns -> their union."""
    all_top = tl.maximum(top, top_b)
    all_ref_top = tl.maximum(ref_top, ref_top_b)
    all_total = total * tl.exp2(top - all_top) + total_b * tl.exp2(top_b - all_top)
    all_ref = ref_total * tl.exp2(ref_top - all_ref_top) + ref_total_b * tl.exp2(ref_top_b - all_ref_top)
    all_anchor = tl.where(top >= top_b, anchor, anchor_b)
    kl, mean = _part(
        total, ref_total, top, ref_top, kl, anchor, mean, all_total, all_ref, all_top, all_ref_top, all_anchor
    )
    kl_b, mean_b = _part(
        total_b, ref_total_b, top_b, ref_top_b, kl_b, anchor_b, mean_b, all_total, all_ref, all_top, all_ref_top,
        all_anchor,
    )  # fmt: skip
    return all_top, all_total, all_ref_top, all_ref, kl + kl_b, all_anchor, mean + mean_b


# ------------------------------------------------------------------------------------------------- kernels


@triton.jit
def kl_fold_kernel(
    h, w, bias, ref_h, ref_w, ref_bias, parts,
    # h (N, D), w (C, D) the weight's rows from `first` on, bias (C,); the reference's -> (PLANES, segments, N)
    N, V, D, REF_D, first, first_segment, segments, plane, row, stride_hn, stride_hd, stride_wv, stride_wd,
    stride_ref_hn, stride_ref_hd, stride_ref_wv, stride_ref_wd, k_in, k_out, ref_k_in, ref_k_out,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, REF_HAS_BIAS: tl.constexpr, REF_SOFTCAP: tl.constexpr,
    SEGMENTS: tl.constexpr, HALVES: tl.constexpr, DESC: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row block x one vocabulary segment -> the seven numbers that its columns alone make of each row."""
    i_n, i_s = program_tile(tl.cdiv(N, BLOCK_N), segments, GROUP)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    b_top = tl.full([BLOCK_N], LOWEST, tl.float32)
    b_total = tl.zeros([BLOCK_N], tl.float32)
    b_ref_top = tl.full([BLOCK_N], LOWEST, tl.float32)
    b_ref_total = tl.zeros([BLOCK_N], tl.float32)
    b_kl = tl.zeros([BLOCK_N], tl.float32)
    b_anchor = tl.zeros([BLOCK_N], tl.float32)
    b_mean = tl.zeros([BLOCK_N], tl.float32)

    tiles = tl.cdiv(V, BLOCK_V)
    tile = (i_s + first_segment) * tiles // SEGMENTS
    count = (i_s + first_segment + 1) * tiles // SEGMENTS - tile
    for i in range(count):
        column = (tile + i) * BLOCK_V - first
        acc = products(
            h, w, i_n * BLOCK_N, column, N, V - first, D, stride_hn, stride_hd, stride_wv, stride_wd,
            DESC, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        ref_acc = products(
            ref_h, ref_w, i_n * BLOCK_N, column, N, V - first, REF_D, stride_ref_hn, stride_ref_hd, stride_ref_wv,
            stride_ref_wd, DESC, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        o_v = column + tl.arange(0, BLOCK_V)
        b_z, _ = logits_of(acc, bias, o_v, V - first, k_in, k_out, HAS_BIAS, SOFTCAP)
        b_ref, _ = logits_of(ref_acc, ref_bias, o_v, V - first, ref_k_in, ref_k_out, REF_HAS_BIAS, REF_SOFTCAP)
        # Most tiles lie inside the vocabulary: a branch spares them the mask.
        if column + BLOCK_V > V - first:
            b_z = tl.where((o_v < V - first)[None, :], b_z, NEG_INF)
            b_ref = tl.where((o_v < V - first)[None, :], b_ref, NEG_INF)
        t_top, t_total, t_ref_top, t_ref_total, t_kl, t_anchor, t_mean = _fold_tile(
            b_z, b_ref, HALVES, BLOCK_N, BLOCK_V
        )
        b_top, b_total, b_ref_top, b_ref_total, b_kl, b_anchor, b_mean = _merge(
            b_top, b_total, b_ref_top, b_ref_total, b_kl, b_anchor, b_mean,
            t_top, t_total, t_ref_top, t_ref_total, t_kl, t_anchor, t_mean,
        )  # fmt: skip

    m_n = o_n < N
    plane = tl.cast(plane, tl.int64)  # (PLANES, segments, N): their product may pass 2^31
    p_part = parts + i_s.to(tl.int64) * row + o_n
    tl.store(p_part + TOP * plane, b_top, mask=m_n)
    tl.store(p_part + TOTAL * plane, b_total, mask=m_n)
    tl.store(p_part + REF_TOP * plane, b_ref_top, mask=m_n)
    tl.store(p_part + REF_TOTAL * plane, b_ref_total, mask=m_n)
    tl.store(p_part + KL * plane, b_kl, mask=m_n)
    tl.store(p_part + ANCHOR * plane, b_anchor, mask=m_n)
    tl.store(p_part + MEAN * plane, b_mean, mask=m_n)


@triton.jit
def kl_finish_kernel(
    parts, y, kl, lse, anchor, mean,  # (PLANES, SEGMENTS, N), (N,) -> (N,) four times
    N, SEGMENTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges the segments in their order. A row that is not kept (y < 0) is 0, with lse = inf: every p is then 0.

    The anchor stays in base 2: converted to nats and back it would be rounded, and no longer equal its d.
    """
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    plane = tl.cast(SEGMENTS, tl.int64) * N
    b_top = tl.full([BLOCK], LOWEST, tl.float32)
    b_total = tl.zeros([BLOCK], tl.float32)
    b_ref_top = tl.full([BLOCK], LOWEST, tl.float32)
    b_ref_total = tl.zeros([BLOCK], tl.float32)
    b_kl = tl.zeros([BLOCK], tl.float32)
    b_anchor = tl.zeros([BLOCK], tl.float32)
    b_mean = tl.zeros([BLOCK], tl.float32)
    for s in range(SEGMENTS):
        p_part = parts + tl.cast(s, tl.int64) * N + o_n
        b_top, b_total, b_ref_top, b_ref_total, b_kl, b_anchor, b_mean = _merge(
            b_top, b_total, b_ref_top, b_ref_total, b_kl, b_anchor, b_mean,
            tl.load(p_part + TOP * plane, mask=m_n, other=0.0),
            tl.load(p_part + TOTAL * plane, mask=m_n, other=0.0),
            tl.load(p_part + REF_TOP * plane, mask=m_n, other=0.0),
            tl.load(p_part + REF_TOTAL * plane, mask=m_n, other=0.0),
            tl.load(p_part + KL * plane, mask=m_n, other=0.0),
            tl.load(p_part + ANCHOR * plane, mask=m_n, other=0.0),
            tl.load(p_part + MEAN * plane, mask=m_n, other=0.0),
        )  # fmt: skip
    kept = tl.load(y + o_n, mask=m_n, other=-1) >= 0
    # A policy all of whose logits are -inf is no distribution.
    b_kl = tl.where(b_total == 0, float("nan"), b_kl)
    tl.store(kl + o_n, tl.where(kept, b_kl, 0.0), mask=m_n)
    tl.store(lse + o_n, tl.where(kept, (b_top + tl.log2(b_total)) * LN2, float("inf")), mask=m_n)
    tl.store(anchor + o_n, tl.where(kept, b_anchor, 0.0), mask=m_n)
    tl.store(mean + o_n, tl.where(kept, b_mean, 0.0), mask=m_n)


@triton.jit
def kl_dlogits_kernel(
    h, w, bias, ref_h, ref_w, ref_bias, y, lse, anchor, mean, grad, dz,
    # h (N, D), w (C, D) the weight's rows from `first` on, bias (C,); the reference's; (N,) five times -> (N, C)
    N, C, D, REF_D, stride_hn, stride_hd, stride_wv, stride_wd, stride_ref_hn, stride_ref_hd, stride_ref_wv,
    stride_ref_wd, stride_dz, k_in, k_out, ref_k_in, ref_k_out,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, REF_HAS_BIAS: tl.constexpr, REF_SOFTCAP: tl.constexpr,
    DESC: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dz = dL/d(products of the policy). `grad` comes with the options' slope already in it."""
    i_n, i_v = program_tile(tl.cdiv(N, BLOCK_N), tl.cdiv(C, BLOCK_V), GROUP)
    acc = products(
        h, w, i_n * BLOCK_N, i_v * BLOCK_V, N, C, D, stride_hn, stride_hd, stride_wv, stride_wd,
        DESC, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    ref_acc = products(
        ref_h, ref_w, i_n * BLOCK_N, i_v * BLOCK_V, N, C, REF_D, stride_ref_hn, stride_ref_hd, stride_ref_wv,
        stride_ref_wd, DESC, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_n = o_n < N
    b_lse = tl.load(lse + o_n, mask=m_n, other=float("inf")) * LOG2E
    b_anchor = tl.load(anchor + o_n, mask=m_n, other=0.0)
    b_mean = tl.load(mean + o_n, mask=m_n, other=0.0)
    b_g = tl.load(grad + o_n, mask=m_n, other=0.0)
    kept = tl.load(y + o_n, mask=m_n, other=-1) >= 0
    b_z, b_tanh = logits_of(acc, bias, o_v, C, k_in, k_out, HAS_BIAS, SOFTCAP)
    b_ref, _ = logits_of(ref_acc, ref_bias, o_v, C, ref_k_in, ref_k_out, REF_HAS_BIAS, REF_SOFTCAP)
    # dz_v = g p_v (mean - (d_v - anchor)),  d = ref_z - z
    b_p = tl.exp2(b_z - b_lse[:, None])
    b_dz = b_g[:, None] * b_p * (b_mean[:, None] - ((b_ref - b_z) - b_anchor[:, None]) * LN2)
    if SOFTCAP:
        b_dz *= 1.0 - b_tanh * b_tanh
    # A row that is not kept is exactly 0 whatever its hidden states hold; so is a column with probability 0.
    b_dz = tl.where((b_p == 0) | (kept == 0)[:, None], 0.0, b_dz)
    store_tile(dz, b_dz, i_n * BLOCK_N, i_v * BLOCK_V, o_n, o_v, N, C, stride_dz, DESC)
