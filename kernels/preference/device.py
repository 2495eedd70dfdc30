"""The device code of the preference losses: packed tokens -> loss, derivative, rewards and metrics in one launch.

    N completion tokens, end to end; S sequences, divided by cu_seqlens (S + 1,); K mismatched ones, for KTO's z0.
    r_s = sum of the token log-ratios of sequence s.

Forward. One program per sequence, mismatched ones last, adds its tokens; the last program to arrive does the rest: z0,
losses, their derivatives, rewards, and every sum. Which one is the last depends on timing, what it computes does not:
it reads all r_s and adds them in their order. The counter of arrivals is the only atomic, and an integer.

Backward. Each token finds its sequence by bisection and takes that sequence's derivative times the upstream gradient.

All numbers are float64: a sum has thousands of terms, and so few numbers cost little time.
Prefixes: i_ program index, o_ offsets, m_ mask, b_ a block in registers.
"""

import triton
import triton.language as tl

from prefuse.kernels.device import log1p

# ------------------------------------------------------------------------------------------- the losses


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)) from the side where nothing overflows or cancels."""
    b_e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, b_e) / (1.0 + b_e)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) = -log sigmoid(-x)."""
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _dpo(chosen, rejected, beta, smoothing, SMOOTHED: tl.constexpr):
    """Equals `prefuse.DPO.losses`: two log-ratios -> loss, its derivative by each."""
    x = beta * (chosen - rejected)
    # loss = -(1 - e) log sigmoid(x) - e log sigmoid(-x)
    loss = _softplus(-x)
    slope = -_sigmoid(-x)
    if SMOOTHED:
        loss = (1.0 - smoothing) * loss + smoothing * _softplus(x)
        slope = (1.0 - smoothing) * slope + smoothing * _sigmoid(x)
    return loss, beta * slope, -beta * slope


@triton.jit
def _ipo(chosen, rejected, n_chosen, n_rejected, beta):
    """Equals `prefuse.IPO.losses`: two log-ratios and what they are divided by -> loss, its derivative by each."""
    # loss = (h_chosen - h_rejected - 1 / (2 beta))^2,  h = r / n
    gap = chosen / n_chosen - rejected / n_rejected - 1.0 / (2.0 * beta)
    return gap * gap, 2.0 * gap / n_chosen, -2.0 * gap / n_rejected


@triton.jit
def _kto(ratio, desirable, z0, beta, weight_d, weight_u):
    """Equals `prefuse.KTO.losses`: a log-ratio and its label -> loss, its derivative."""
    x = beta * (ratio - z0)
    up = _sigmoid(x)
    down = _sigmoid(-x)  # 1 - up, which would cancel
    # loss = w_d (1 - sigmoid(x)) if desirable, else w_u (1 - sigmoid(-x))
    loss = tl.where(desirable, weight_d * down, weight_u * up)
    slope = beta * (up * down)
    return loss, tl.where(desirable, -weight_d * slope, weight_u * slope)


# ------------------------------------------------------------------------------------------- forward


@triton.jit
def _add_tokens(logps, ref_logps, cu_seqlens, s, N, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """Sequence s -> its sums of logp and of (logp - ref_logp), added in an order that depends on its length alone."""
    # The host does not check the offsets, because it would wait for the GPU: clamp them to the bounds here.
    start = tl.maximum(tl.load(cu_seqlens + s).to(tl.int64), 0)
    stop = tl.minimum(tl.load(cu_seqlens + s + 1).to(tl.int64), N)
    b_sum = tl.zeros([BLOCK], tl.float64)
    b_ratio = tl.zeros([BLOCK], tl.float64)
    for first in range(start, stop, BLOCK):
        o_n = tl.arange(0, BLOCK).to(tl.int64) + first
        b_logp = tl.load(logps + o_n, mask=o_n < stop, other=0.0).to(tl.float64)
        b_sum += b_logp
        if PER_TOKEN:
            b_ratio += b_logp - tl.load(ref_logps + o_n, mask=o_n < stop, other=0.0).to(tl.float64)
    total = tl.sum(b_sum, 0)
    if PER_TOKEN:
        return total, tl.sum(b_ratio, 0)
    else:
        return total, total - tl.load(ref_logps + s).to(tl.float64)


@triton.jit
def _reference_point(ratios, K, BLOCK_S: tl.constexpr):
    """z0 = max(0, mean of the K log-ratios); 0 of none."""
    b_sum = tl.zeros([BLOCK_S], tl.float64)
    for first in range(0, K, BLOCK_S):
        o_k = first + tl.arange(0, BLOCK_S)
        b_sum += tl.load(ratios + o_k, mask=o_k < K, other=0.0)
    mean = tl.sum(b_sum, 0) / tl.maximum(K, 1).to(tl.float64)
    return tl.where(mean < 0, 0.0, mean)  # a NaN stays one


@triton.jit
def _store_metric(metrics, ROW: tl.constexpr, b_sum, count):
    tl.store(metrics + 2 * ROW, tl.sum(b_sum, 0))
    tl.store(metrics + 2 * ROW + 1, count)


@triton.jit
def _finish_pairs(
    ratios, sums, counts, losses, rewards, slopes, metrics, S, items, beta, smoothing,
    LOSS: tl.constexpr, SMOOTHED: tl.constexpr, AVERAGE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Pairs 2p (chosen) and 2p + 1 (rejected), one block after the other -> the sum of their losses."""
    pairs = S // 2
    b_total = tl.zeros([BLOCK_S], tl.float64)
    b_chosen = tl.zeros([BLOCK_S], tl.float64)
    b_rejected = tl.zeros([BLOCK_S], tl.float64)
    b_logps_c = tl.zeros([BLOCK_S], tl.float64)
    b_logps_r = tl.zeros([BLOCK_S], tl.float64)
    b_right = tl.zeros([BLOCK_S], tl.float64)
    b_margins = tl.zeros([BLOCK_S], tl.float64)
    for first in range(0, pairs, BLOCK_S):
        o_p = first + tl.arange(0, BLOCK_S)
        m_p = o_p < pairs
        o_c, o_r = 2 * o_p, 2 * o_p + 1
        b_c = tl.load(ratios + o_c, mask=m_p, other=0.0)
        b_r = tl.load(ratios + o_r, mask=m_p, other=0.0)
        if LOSS == "dpo":
            b_loss, b_slope_c, b_slope_r = _dpo(b_c, b_r, beta, smoothing, SMOOTHED)
        else:
            b_n_c = tl.full([BLOCK_S], 1.0, tl.float64)
            b_n_r = tl.full([BLOCK_S], 1.0, tl.float64)
            if AVERAGE:
                b_n_c = tl.maximum(tl.load(counts + o_c, mask=m_p, other=1), 1).to(tl.float64)
                b_n_r = tl.maximum(tl.load(counts + o_r, mask=m_p, other=1), 1).to(tl.float64)
            b_loss, b_slope_c, b_slope_r = _ipo(b_c, b_r, b_n_c, b_n_r, beta)
        tl.store(losses + o_p, b_loss.to(tl.float32), mask=m_p)
        tl.store(slopes + o_c, b_slope_c / items, mask=m_p)
        tl.store(slopes + o_r, b_slope_r / items, mask=m_p)
        b_c *= beta  # rewards from here on
        b_r *= beta
        tl.store(rewards + o_c, b_c.to(tl.float32), mask=m_p)
        tl.store(rewards + o_r, b_r.to(tl.float32), mask=m_p)
        b_total += tl.where(m_p, b_loss, 0.0)
        b_chosen += b_c
        b_rejected += b_r
        b_logps_c += tl.load(sums + o_c, mask=m_p, other=0.0)
        b_logps_r += tl.load(sums + o_r, mask=m_p, other=0.0)
        b_right += (b_c - b_r > 0).to(tl.float64)
        b_margins += b_c - b_r
    count = pairs.to(tl.float64)
    _store_metric(metrics, 0, b_chosen, count)
    _store_metric(metrics, 1, b_rejected, count)
    _store_metric(metrics, 2, b_logps_c, count)
    _store_metric(metrics, 3, b_logps_r, count)
    _store_metric(metrics, 4, b_right, count)
    _store_metric(metrics, 5, b_margins, count)
    return tl.sum(b_total, 0)


@triton.jit
def _finish_labelled(
    ratios, sums, labels, losses, rewards, slopes, metrics, S, z0, items, beta, weight_d, weight_u,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Sequences with a label, one block after the other -> the sum of their losses."""
    b_total = tl.zeros([BLOCK_S], tl.float64)
    b_chosen = tl.zeros([BLOCK_S], tl.float64)
    b_rejected = tl.zeros([BLOCK_S], tl.float64)
    b_logps_c = tl.zeros([BLOCK_S], tl.float64)
    b_logps_r = tl.zeros([BLOCK_S], tl.float64)
    b_count_c = tl.zeros([BLOCK_S], tl.float64)
    b_count_r = tl.zeros([BLOCK_S], tl.float64)
    for first in range(0, S, BLOCK_S):
        o_s = first + tl.arange(0, BLOCK_S)
        m_s = o_s < S
        b_ratio = tl.load(ratios + o_s, mask=m_s, other=0.0)
        b_sum = tl.load(sums + o_s, mask=m_s, other=0.0)
        m_d = tl.load(labels + o_s, mask=m_s, other=0) != 0
        b_loss, b_slope = _kto(b_ratio, m_d, z0, beta, weight_d, weight_u)
        b_reward = beta * b_ratio
        tl.store(losses + o_s, b_loss.to(tl.float32), mask=m_s)
        tl.store(slopes + o_s, b_slope / items, mask=m_s)
        tl.store(rewards + o_s, b_reward.to(tl.float32), mask=m_s)
        m_u = m_s & ~m_d
        b_total += tl.where(m_s, b_loss, 0.0)
        b_chosen += tl.where(m_d, b_reward, 0.0)
        b_rejected += tl.where(m_u, b_reward, 0.0)
        b_logps_c += tl.where(m_d, b_sum, 0.0)
        b_logps_r += tl.where(m_u, b_sum, 0.0)
        b_count_c += m_d.to(tl.float64)
        b_count_r += m_u.to(tl.float64)
    count_c, count_r = tl.sum(b_count_c, 0), tl.sum(b_count_r, 0)
    _store_metric(metrics, 0, b_chosen, count_c)
    _store_metric(metrics, 1, b_rejected, count_r)
    _store_metric(metrics, 2, b_logps_c, count_c)
    _store_metric(metrics, 3, b_logps_r, count_r)
    tl.store(metrics + 2 * 4, z0)
    tl.store(metrics + 2 * 4 + 1, 1.0)
    return tl.sum(b_total, 0)


@triton.jit(do_not_specialize=["N", "S", "kl_N", "K"])
def forward_kernel(
    logps, ref_logps, cu_seqlens, counts, labels, kl_logps, kl_ref_logps, kl_cu_seqlens, z0_at, items_at,
    # (N,), (N,) or (S,), (S + 1,), (S,), (S,), (kl_N,), (kl_N,) or (K,), (K + 1,), (), ()
    arrived, ratios, total, losses, sums, rewards, metrics, slopes,
    # scratch (1,) = 0, scratch (S + K,) -> (), (P,) or (S,), (S,), (S,), (metrics, 2), (S,)
    N, S, kl_N, K, z0: tl.float64, items: tl.float64, beta: tl.float64, smoothing: tl.float64,
    weight_d: tl.float64, weight_u: tl.float64,
    LOSS: tl.constexpr, SMOOTHED: tl.constexpr, AVERAGE: tl.constexpr, Z0: tl.constexpr, ITEMS: tl.constexpr,
    PER_TOKEN: tl.constexpr, KL_PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Adds the tokens of one sequence. The last program to arrive then computes what needs all sequences.

    Z0: "number", "tensor" or "mismatched". ITEMS: whether the divisor is a tensor. slopes = dtotal / dr_s.
    """
    i_s = tl.program_id(0)
    if i_s < S:
        b_sum, b_ratio = _add_tokens(logps, ref_logps, cu_seqlens, i_s, N, PER_TOKEN, BLOCK)
        tl.store(sums + i_s, b_sum)
        tl.store(ratios + i_s, b_ratio)
    elif i_s < S + K:
        if Z0 == "mismatched":
            b_sum, b_ratio = _add_tokens(kl_logps, kl_ref_logps, kl_cu_seqlens, i_s - S, kl_N, KL_PER_TOKEN, BLOCK)
            tl.store(ratios + i_s, b_ratio)

    # Released and acquired, so that the last one sees what all the others stored.
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        if ITEMS:
            items = tl.load(items_at).to(tl.float64)
        if LOSS == "kto":
            if Z0 == "tensor":
                z0 = tl.load(z0_at).to(tl.float64)
            elif Z0 == "mismatched":
                z0 = _reference_point(ratios + S, K, BLOCK_S)
            else:
                z0 = tl.full([], z0, tl.float64)
            b_total = _finish_labelled(
                ratios, sums, labels, losses, rewards, slopes, metrics, S, z0, items, beta, weight_d, weight_u, BLOCK_S
            )
        else:
            b_total = _finish_pairs(
                ratios, sums, counts, losses, rewards, slopes, metrics, S, items, beta, smoothing,
                LOSS, SMOOTHED, AVERAGE, BLOCK_S,
            )  # fmt: skip
        tl.store(total, (b_total / items).to(tl.float32))


# ------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=["N", "S", "STEPS"])
def backward_kernel(
    grad, slopes, cu_seqlens, out,  # (), (S,), (S + 1,) -> (N,) float32
    N, S, STEPS, BLOCK: tl.constexpr,
):  # fmt: skip
    """out_i = grad * slope of token i's sequence, the last s with cu_seqlens[s] <= i."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < N
    b_low = tl.zeros([BLOCK], tl.int32)  # cu_seqlens[low] <= i < cu_seqlens[high]
    b_high = tl.zeros([BLOCK], tl.int32) + S
    for _ in range(STEPS):
        b_middle = b_low + (b_high - b_low) // 2
        m_right = tl.load(cu_seqlens + b_middle, mask=m_n, other=0).to(tl.int64) <= o_n
        b_low = tl.where(m_right, b_middle, b_low)
        b_high = tl.where(m_right, b_high, b_middle)
    m_inside = m_n & (o_n >= tl.load(cu_seqlens))
    m_inside &= tl.load(cu_seqlens + b_low + 1, mask=m_n, other=0).to(tl.int64) > o_n
    b_slope = tl.load(slopes + b_low, mask=m_inside, other=0.0)
    b_grad = tl.load(grad).to(tl.float64) * b_slope
    tl.store(out + o_n, tl.where(m_inside, b_grad, 0.0).to(tl.float32), mask=m_n)
