"""The strict interpreter catches what it says it catches, and lets clean kernels pass with the right numbers.

Each bug below is one that the stock interpreter runs through without a word, or with other bits than a GPU.
"""

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("kernels run on the GPU here, not interpreted", allow_module_level=True)

import numpy as np
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import strict_interpreter
from interpreter_numerics import bf16_to_float32, float32_to_bf16, fused_multiply_add
from strict_interpreter import KernelAssertion, OutOfBounds, Race, program_order, sparse_tensor

strict_interpreter.install()


def bf16(*shape, scale=1.0):
    return (torch.randn(*shape) * scale).to(torch.bfloat16)


# ---- numbers -------------------------------------------------------------------------------------


@triton.jit
def _elementwise(x_ptr, y_ptr, out_ptr, OP: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x, y = tl.load(x_ptr + o), tl.load(y_ptr + o)
    if OP == "add":
        out = x + y
    elif OP == "mul":
        out = x * y
    elif OP == "less":
        out = tl.where(x < y, x, y)
    elif OP == "negate":
        out = -x
    elif OP == "maximum":
        out = tl.maximum(x, y)
    elif OP == "clamp":
        out = tl.clamp(x, tl.full([BLOCK], -0.5, x.dtype), tl.full([BLOCK], 0.5, x.dtype))
    elif OP == "fma_minus_one":
        out = tl.fma(x, y, tl.full([BLOCK], -1.0, x.dtype))
    elif OP == "constant":
        out = tl.full([BLOCK], 1.5, tl.bfloat16) + x
    tl.store(out_ptr + o, out)


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("add", lambda x, y: x + y),
        ("mul", lambda x, y: x * y),
        ("less", torch.minimum),
        ("negate", lambda x, y: -x),
        ("maximum", torch.maximum),
        ("clamp", lambda x, y: x.clamp(-0.5, 0.5)),
        ("constant", lambda x, y: x + 1.5),
    ],
)
def test_bf16_arithmetic_has_torchs_bits(op, expected):
    x, y = bf16(256), bf16(256)
    out = torch.empty_like(x)
    _elementwise[(1,)](x, y, out, op, 256)
    assert torch.equal(out, expected(x, y))


@triton.jit
def _cast(x_ptr, out_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(out_ptr + o, tl.load(x_ptr + o).to(out_ptr.dtype.element_ty))


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32])
def test_casts_to_bf16_round_to_nearest_even(source):
    x = (torch.randn(1024) * 300).to(source)
    if source == torch.float32:  # a tie down, a tie up, infinity by rounding, the edges
        x[:6] = torch.tensor([1.00390625, 1.01171875, 3.4e38, float("inf"), float("nan"), -0.0])
    out = torch.empty(1024, dtype=torch.bfloat16)
    _cast[(1,)](x, out, 1024)
    assert torch.equal(out.nan_to_num(7.0), x.to(torch.bfloat16).nan_to_num(7.0))


@pytest.mark.parametrize("target", [torch.float32, torch.float16, torch.int32])
def test_casts_from_bf16_keep_the_value(target):
    x = bf16(256, scale=100)
    out = torch.empty(256, dtype=target)
    _cast[(1,)](x, out, 256)
    assert torch.equal(out, x.to(target))


def test_every_bf16_survives_the_round_trip():
    bits = np.arange(2**16, dtype=np.uint16)
    finite = ~np.isnan(bf16_to_float32(bits))
    assert (float32_to_bf16(bf16_to_float32(bits))[finite] == bits[finite]).all()
    assert np.isnan(bf16_to_float32(float32_to_bf16(bf16_to_float32(bits[~finite])))).all()


def test_fma_rounds_once():
    # (1 + e)(1 - e) - 1 = -e^2 exactly, where two roundings give 0.
    e, out = 2.0**-13, torch.empty(16)
    _elementwise[(1,)](torch.full((16,), 1 + e), torch.full((16,), 1 - e), out, "fma_minus_one", 16)
    assert (out == -(e**2)).all()
    # A sum just below a tie, by less than float64 holds: rounded there first, it would be the tie, and go up.
    x, y, z = np.float32([2**-24 * (1 + 2**-23)]), np.float32([1 - 2**-23]), np.float32([1 + 2**-23])
    assert (x.astype(np.float64) * y + z).astype(np.float32) == np.float32(1 + 2**-22)
    assert fused_multiply_add(x, y, z) == z


@triton.jit
def _fold(x_ptr, w_ptr, out_ptr, D, ROWS: tl.constexpr, COLS: tl.constexpr, K: tl.constexpr):
    """out = max over columns of x @ w.T"""
    rows, cols, k = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, K)
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, D, K):
        d = start + k
        x = tl.load(x_ptr + rows[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
        w = tl.load(w_ptr + cols[:, None] * D + d[None, :], mask=d[None, :] < D, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision="ieee")
    tl.store(out_ptr + rows, tl.max(acc, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot_multiplies_exactly_and_adds_in_fp32(dtype):
    x, w = torch.randn(16, 70).to(dtype), torch.randn(32, 70).to(dtype)
    out = torch.empty(16)
    _fold[(1,)](x, w, out, 70, 16, 32, 16)
    torch.testing.assert_close(out, (x.double() @ w.double().T).amax(1).float(), rtol=2e-6, atol=1e-6)


def test_dot_smaller_than_the_compiler_takes_is_refused():
    x, w, out = bf16(8, 8), bf16(8, 8), torch.empty(8)
    with pytest.raises(AssertionError, match="K >= 16"):
        _fold[(1,)](x, w, out, 8, 8, 8, 8)


@triton.jit
def _reduce(x_ptr, sum_ptr, max_ptr, which_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    x = tl.load(x_ptr + rows[:, None] * COLS + cols[None, :])
    tl.store(sum_ptr + rows, tl.sum(x, 1))
    best, which = tl.max(x, 1, return_indices=True)
    tl.store(max_ptr + rows, best)
    tl.store(which_ptr + rows, which)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reductions_match_torch(dtype):
    x = torch.randn(8, 64).to(dtype)
    total, best, which = torch.empty(8).to(dtype), torch.empty(8).to(dtype), torch.empty(8, dtype=torch.int32)
    _reduce[(1,)](x, total, best, which, 8, 64)
    torch.testing.assert_close(
        total.double(), x.double().sum(1), rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-5
    )
    assert torch.equal(best, x.amax(1))
    assert torch.equal(which.long(), x.argmax(1))


@triton.jit
def _two_sum(a_high, a_low, b_high, b_low):
    total = a_high + b_high
    rest = total - a_high
    return total, a_low + b_low + ((a_high - (total - rest)) + (b_high - rest))


@triton.jit
def _compensated(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    high, low = tl.reduce((x, tl.zeros_like(x)), 0, _two_sum)
    tl.store(out_ptr, high.to(tl.float64) + low.to(tl.float64))


def test_a_reduction_with_a_combine_of_its_own():
    x = torch.randn(1024) * torch.logspace(-6, 6, 1024)
    out = torch.empty(1, dtype=torch.float64)
    _compensated[(1,)](x, out, 1024)
    assert abs(out.item() - x.double().sum().item()) <= 1e-12 * x.double().abs().sum().item()


@triton.jit
def _add_within_segment(a_start, a, b_start, b):
    return a_start | b_start, tl.where(b_start != 0, b, a + b)


@triton.jit
def _segment_scan(x_ptr, start_ptr, out_ptr, ROWS: tl.constexpr, COLS: tl.constexpr):
    o = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    _, running = tl.associative_scan((tl.load(start_ptr + o), tl.load(x_ptr + o)), 1, _add_within_segment)
    tl.store(out_ptr + o, running)


def test_a_scan_with_a_combine_of_its_own():
    x = torch.randint(-9, 9, (4, 16)).float()
    starts = (torch.arange(16) % 5 == 0).int().repeat(4, 1)
    out = torch.empty_like(x)
    _segment_scan[(1,)](x, starts, out, 4, 16)
    expected = torch.cat([part.cumsum(1) for part in x.split(5, 1)], 1)
    assert torch.equal(out, expected)


def test_a_maximum_drops_nan_as_a_gpu_does():
    x, y, out = torch.full((16,), float("nan")), torch.arange(16.0), torch.empty(16)
    _elementwise[(1,)](x, y, out, "maximum", 16)
    assert torch.equal(out, y)


# ---- memory --------------------------------------------------------------------------------------


@triton.jit
def _copy(x_ptr, out_ptr, n, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n, other=0.0) if MASK_LOAD else tl.load(x_ptr + o)
    if MASK_STORE:
        tl.store(out_ptr + o, x, mask=o < n)
    else:
        tl.store(out_ptr + o, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_masked_accesses_pass_at_a_ragged_end(dtype):
    x, out = torch.randn(70).to(dtype), torch.empty(70, dtype=dtype)
    _copy[(3,)](x, out, 70, 32, True, True)
    assert torch.equal(out, x)


@pytest.mark.parametrize(("mask_load", "mask_store", "kind"), [(False, True, "load"), (True, False, "store")])
def test_an_access_past_the_end_is_caught(mask_load, mask_store, kind):
    with pytest.raises(OutOfBounds, match=rf"{kind} of 4 bytes at byte 280 from the start of '(x|out)_ptr'"):
        _copy[(3,)](torch.randn(70), torch.empty(70), 70, 32, mask_load, mask_store)


def test_a_gap_between_the_rows_of_a_slice_is_out_of_bounds():
    # Columns 32 to 39 belong to someone else, though the addresses lie inside the slice's extent.
    x, out = torch.randn(4, 40)[:, :32], torch.empty(64)
    with pytest.raises(OutOfBounds, match=r"byte 128 .* no element"):
        _copy[(2,)](x, out, 64, 32, True, True)


def test_arguments_that_share_a_storage_are_told_apart_by_their_elements():
    both = torch.randn(2, 64)
    expected = both[0].clone()
    _copy[(2,)](both[0], both[1], 64, 32, True, True)
    assert torch.equal(both[1], expected)


def test_running_into_another_argument_is_out_of_bounds():
    both = torch.randn(2, 64)
    with pytest.raises(OutOfBounds, match="byte 256 from the start of 'x_ptr'"):
        _copy[(4,)](both[0], both[1], 128, 32, True, True)


def test_an_empty_tensor_holds_nothing():
    with pytest.raises(OutOfBounds, match="of 'out_ptr'"):
        _copy[(1,)](torch.randn(32), torch.empty(0), 32, 32, True, True)
    _copy[(1,)](torch.empty(0), torch.empty(0), 0, 32, True, True)


@triton.jit
def _sum_block(x_ptr, out_ptr, n, BLOCK: tl.constexpr, KEEP: tl.constexpr, MAX: tl.constexpr):
    o = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + o, mask=o < n)  # no `other`: what the other lanes hold is undefined
    if KEEP:
        x = tl.where(o < n, x, 0.0)
    tl.store(out_ptr, tl.max(x, 0) if MAX else tl.sum(x, 0))


@pytest.mark.parametrize("use_max", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_masked_off_lane_that_is_used_shows_as_nan(dtype, use_max):
    x, out = torch.ones(10, dtype=dtype), torch.zeros(1)
    _sum_block[(1,)](x, out, 10, 16, False, use_max)
    assert out.isnan().all()
    _sum_block[(1,)](x, out, 10, 16, True, use_max)
    assert out.item() == (1 if use_max else 10)


@triton.jit
def _look_up(index_ptr, table_ptr, out_ptr, n, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(out_ptr + o, tl.load(table_ptr + tl.load(index_ptr + o, mask=o < n)))


def test_a_masked_off_index_that_is_used_is_out_of_bounds():
    with pytest.raises(OutOfBounds):
        _look_up[(1,)](torch.zeros(10, dtype=torch.int64), torch.zeros(16), torch.empty(16), 10, 16)


@triton.jit
def _descriptor_copy(x, out, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    row, col = tl.program_id(0) * BLOCK_ROWS, tl.program_id(1) * BLOCK_COLS
    out.store([row, col], x.load([row, col]) * 2.0)


@pytest.mark.parametrize("padding", ["zero", "nan"])
def test_a_descriptor_pads_past_the_end_and_stores_only_inside(padding):
    x, out = bf16(20, 40), torch.empty(32, 48, dtype=torch.bfloat16)
    source = TensorDescriptor.from_tensor(x, [16, 16], padding)
    _descriptor_copy[(2, 3)](source, TensorDescriptor.from_tensor(out, [16, 16]), 16, 16)
    assert torch.equal(out[:20, :40], x * 2)
    for outside in (out[20:], out[:, 40:]):
        assert outside.isnan().all() if padding == "nan" else (outside == 0).all()


def test_a_descriptor_longer_than_its_tensor_is_caught():
    x, out = bf16(16, 16), torch.empty(32, 16, dtype=torch.bfloat16)
    source = TensorDescriptor(x, [32, 16], [16, 1], [16, 16])
    with pytest.raises(OutOfBounds, match="'x'"):
        _descriptor_copy[(2, 1)](source, TensorDescriptor.from_tensor(out, [16, 16]), 16, 16)


# ---- addressing in 64 bits -----------------------------------------------------------------------


@triton.jit
def _row_sums(x_ptr, out_ptr, stride, WIDE: tl.constexpr, COLS: tl.constexpr):
    row = tl.program_id(0)
    offset = row.to(tl.int64) * stride if WIDE else row * stride
    tl.store(out_ptr + row, tl.sum(tl.load(x_ptr + offset + tl.arange(0, COLS)), 0))


def test_an_offset_that_overflows_32_bits_is_caught_and_one_in_64_bits_is_right():
    x, out = (
        sparse_tensor(torch.randn(3, 64), (2**30, 1)),
        torch.empty(3),
    )  # an extent of 8 GiB, three pages used
    with pytest.raises(KernelAssertion, match="overflow"):
        _row_sums[(3,)](x, out, x.stride(0), False, 64)
    _row_sums[(3,)](x, out, x.stride(0), True, 64)
    torch.testing.assert_close(out, x.sum(1))


@triton.jit
def _check_targets(target_ptr, V, BLOCK: tl.constexpr):
    target = tl.load(target_ptr + tl.arange(0, BLOCK))
    tl.device_assert(target < V, "target outside of the vocabulary")


def test_a_device_assert_fires():
    with pytest.raises(KernelAssertion, match="target outside of the vocabulary"):
        _check_targets[(1,)](torch.arange(16), 15, 16)
    _check_targets[(1,)](torch.arange(16), 16, 16)


# ---- programs ------------------------------------------------------------------------------------


@triton.jit
def _accumulate(x_ptr, out_ptr, BLOCK: tl.constexpr, ATOMIC: tl.constexpr):
    """Every program adds its block's sum to one place."""
    total = tl.sum(tl.load(x_ptr + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0)
    if ATOMIC:
        tl.atomic_add(out_ptr, total)
    else:
        tl.store(out_ptr, tl.load(out_ptr) + total)


def test_programs_that_update_one_place_race_unless_they_do_it_atomically():
    x, out = torch.ones(64), torch.zeros(1)
    with pytest.raises(Race, match="beside another's"):
        _accumulate[(4,)](x, out, 16, False)
    out.zero_()
    _accumulate[(4,)](x, out, 16, True)
    assert out.item() == 64
    _accumulate[(1,)](x, out, 16, False)  # alone, it may
    assert out.item() == 80


@triton.jit
def _shift(x_ptr, BLOCK: tl.constexpr):
    """Reads the neighbour's block and writes its own."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x_ptr + o, tl.load(x_ptr + o + BLOCK))


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_reading_what_another_program_writes_is_a_race_in_any_order(seed):
    with pytest.raises(Race), program_order(seed):
        _shift[(2,)](torch.randn(48), 16)


@triton.jit
def _hand_over(x_ptr, counter_ptr, out_ptr, SEM: tl.constexpr, SCOPE: tl.constexpr, LATE: tl.constexpr):
    """Every program stores its number; the last to arrive adds them up. LATE: stores it after it has arrived."""
    if not LATE:
        tl.store(x_ptr + tl.program_id(0), tl.program_id(0))
    arrived = tl.atomic_add(counter_ptr, 1, sem=SEM, scope=SCOPE)
    if LATE:
        tl.store(x_ptr + tl.program_id(0), tl.program_id(0))
    if arrived == tl.num_programs(0) - 1:
        tl.store(out_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, 8)), 0))


def _handed_over(seed, *how):
    x, counter, out = (torch.full((size,), value, dtype=torch.int32) for size, value in ((8, -1), (1, 0), (1, -1)))
    with program_order(seed):
        _hand_over[(8,)](x, counter, out, *how)
    return out.item()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_what_is_released_before_it_is_acquired_is_no_race(seed):
    assert _handed_over(seed, "acq_rel", "gpu", False) == 28
    assert _handed_over(seed, "acq_rel", "sys", False) == 28


@pytest.mark.parametrize(
    "how", [("relaxed", "gpu", False), ("release", "gpu", False), ("acquire", "gpu", False), ("acq_rel", "cta", False),
            ("acq_rel", "gpu", True)], ids=str,
)  # fmt: skip
def test_a_counter_that_does_not_order_or_comes_too_early_leaves_the_race(how):
    with pytest.raises(Race, match="beside another's store"):
        _handed_over(0, *how)


@triton.jit
def _scatter(value_ptr, where_ptr, out_ptr, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(out_ptr + tl.load(where_ptr + o), tl.load(value_ptr + o))


def test_two_lanes_storing_different_values_to_one_place_race():
    where, out = torch.arange(16) // 2, torch.empty(8)
    with pytest.raises(Race, match="two lanes"):
        _scatter[(1,)](torch.arange(16.0), where, out, 16)
    _scatter[(1,)](torch.arange(16.0) // 2, where, out, 16)
    assert torch.equal(out, torch.arange(8.0))


@triton.jit
def _ticket(counter_ptr, out_ptr):
    tl.store(out_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


def test_the_order_of_programs_follows_the_seed():
    def order(seed):
        out = torch.empty(20, dtype=torch.int32)
        with program_order(seed):
            _ticket[(20,)](torch.zeros(1, dtype=torch.int32), out)
        return out.tolist()

    assert order(None) == list(range(20))
    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(20))


@triton.jit
def _nothing():
    tl.program_id(0)


def test_a_grid_longer_than_cuda_takes_is_refused():
    with pytest.raises(ValueError, match="65535"):
        _nothing[(1, 65536)]()
