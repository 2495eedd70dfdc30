"""Small kernels to try the ahead-of-time compiler on, compiled in the processes of aot_worker."""

import triton
import triton.language as tl

from prefuse.kernels.tiles import aot


@triton.jit
def fold(x, w, out_ptr, N, V, D, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """out = max over v of x @ w.T, with host descriptors."""
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for v in tl.range(0, V, BLOCK_V):
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for d in range(0, D, BLOCK_D):
            acc = tl.dot(x.load([tl.program_id(0) * BLOCK_N, d]), w.load([v, d]).T, acc)
        best = tl.maximum(best, tl.max(acc, 1))
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + rows, best, mask=rows < N)


@triton.jit
def fold_flat(x, w, out_ptr, N, V, D, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same with the loops flattened and the tail masked under an `if`: ptxas serializes its wgmmas."""
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for v in tl.range(0, V, BLOCK_V, flatten=True):
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for d in range(0, D, BLOCK_D):
            acc = tl.dot(x.load([tl.program_id(0) * BLOCK_N, d]), w.load([v, d]).T, acc)
        if v + BLOCK_V > V:
            acc = tl.where(v + tl.arange(0, BLOCK_V)[None, :] < V, acc, float("-inf"))
        best = tl.maximum(best, tl.max(acc, 1))
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + rows, best, mask=rows < N)


@triton.jit
def row_dot(x_ptr, y_ptr, out_ptr, D, BLOCK_D: tl.constexpr):
    """No matrix product, pointers only."""
    row, total = tl.program_id(0).to(tl.int64), 0.0
    for start in range(0, D, BLOCK_D):
        o = start + tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + row * D + o, mask=o < D, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * D + o, mask=o < D, other=0.0).to(tl.float32)
        total += tl.sum(x * y, 0)
    tl.store(out_ptr + row, total)


def fold_resources(arch, block_n=128, block_v=128, *, flat=False, **options) -> aot.Resources:
    signature = {
        "x": f"tensordesc<bf16[{block_n}, 64]>",
        "w": f"tensordesc<bf16[{block_v}, 64]>",
        "out_ptr": "*fp32",
        **dict.fromkeys(("N", "V", "D"), "i32"),
    }
    constexprs = {"BLOCK_N": block_n, "BLOCK_V": block_v, "BLOCK_D": 64}
    options = {"num_warps": 8, "num_stages": 3, "enable_fp_fusion": True, **options}
    kernel = fold_flat if flat else fold
    return aot.resources(aot.compile_for(kernel, signature, constexprs, ("out_ptr", "N", "V", "D"), arch, **options))


def row_dot_resources(arch) -> aot.Resources:
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "D": "i32"}
    return aot.resources(aot.compile_for(row_dot, signature, {"BLOCK_D": 1024}, signature, arch, enable_fp_fusion=True))


def compile_with_signature(signature):
    aot.compile_for(row_dot, signature, {}, (), 90)
