"""Device helpers that several operations' kernels use: matrix products, logits, and how a tile is stored.

N tokens, D hidden, V vocabulary, C columns of a slice. Logits in kernels are in base 2: z2 = z log2(e).
Prefixes: i_ program index, o_ offsets, m_ mask, p_ pointers, b_ a block in registers.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
NEG_INF = tl.constexpr(float("-inf"))
# A target in [0, V) is a row of this rank's weight; another rank's is V or more, or smaller than these two codes.
IGNORED = tl.constexpr(-1)
OUTSIDE = tl.constexpr(-2)  # not in the vocabulary: its log-probability is NaN


@triton.jit
def program_tile(ROWS, COLUMNS, GROUP: tl.constexpr):
    """Program -> (row block, column): GROUP row blocks sweep the columns together, so both operands stay in L2."""
    pid = tl.program_id(0)
    first = pid // (GROUP * COLUMNS) * GROUP
    size = min(ROWS - first, GROUP)
    within = pid % (GROUP * COLUMNS)
    return first + within % size, within // size


@triton.jit
def products(
    h, w, row, column, N, C, D, stride_hn, stride_hd, stride_wv, stride_wd,
    DESC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """h (N, D) from `row` times w (C, D) from `column`: (BLOCK_N, BLOCK_V) float32. Out of range: anything."""
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if DESC:
        for d in range(0, D, BLOCK_D):
            acc = tl.dot(h.load([row, d]), w.load([column, d]).T, acc, input_precision="ieee")
    else:
        o_d = tl.arange(0, BLOCK_D)
        # Clamped rows are loaded twice rather than masked; 64-bit offsets, for N * D and V * D pass 2^31.
        o_n = tl.minimum(row + tl.arange(0, BLOCK_N), N - 1).to(tl.int64)
        o_v = tl.minimum(column + tl.arange(0, BLOCK_V), C - 1).to(tl.int64)
        p_h = h + o_n[:, None] * stride_hn + o_d[None, :].to(tl.int64) * stride_hd
        p_w = w + o_v[None, :] * stride_wv + o_d[:, None].to(tl.int64) * stride_wd
        for d in range(0, D, BLOCK_D):
            b_h = tl.load(p_h, mask=o_d[None, :] < D - d, other=0.0)
            b_w = tl.load(p_w, mask=o_d[:, None] < D - d, other=0.0)
            acc = tl.dot(b_h, b_w, acc, input_precision="ieee")
            p_h += BLOCK_D * tl.cast(stride_hd, tl.int64)
            p_w += BLOCK_D * tl.cast(stride_wd, tl.int64)
    return acc


@triton.jit
def tanh_of(x2):
    """tanh(x) of x2 = 2 log2(e) x: exact at both ends, three operations fewer than 2 sigmoid - 1."""
    return 1.0 - 2.0 / (1.0 + tl.exp2(x2))


@triton.jit
def logits_of(acc, bias, o_v, C, k_in, k_out, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr):
    """Products -> base-2 logits, and the tanh that a softcap's slope needs."""
    if HAS_BIAS:
        acc += tl.load(bias + o_v, mask=o_v < C, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP:
        b_tanh = tanh_of(acc * k_in)
        return b_tanh * k_out, b_tanh
    else:
        return acc * k_out, acc


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1] without losing x's digits (Kahan)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def store_tile(out, b_x, row, column, o_n, o_v, N, C, stride, DESC: tl.constexpr):
    """Writes b_x (BLOCK_N, BLOCK_V) in out's dtype at (row, column) of out (N, C), whose rows are `stride` apart."""
    if DESC:
        out.store([row, column], b_x.to(out.dtype))
    else:
        p_out = out + o_n[:, None].to(tl.int64) * stride + o_v[None, :]
        tl.store(p_out, b_x.to(out.dtype.element_ty), mask=(o_n < N)[:, None] & (o_v < C)[None, :])
