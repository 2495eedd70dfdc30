"""The Triton kernels agree with float64: on a GPU where there is one, else interpreted under strict rules.

Interpreted tiles are 16 rows x 32 columns x 16 deep, in 3 vocabulary segments. Operands whose rows are multiples of 16
bytes go by tensor descriptor, others by pointer.
"""

import contextlib
import functools

import pytest
import torch

import prefuse
from prefuse.bench.truth import oracle
from prefuse.bench.truth.head_cases import EVERY_OPTION, NEEDS, OPTIONS, check_head, evaluate, random_inputs

pytest.importorskip("triton")

from prefuse.kernels import launch

head = functools.partial(prefuse.linear_logprobs, impl="triton")
SCALARS = {name: value for name, value in EVERY_OPTION.items() if name != "bias"}

if torch.cuda.is_available():
    program_order = contextlib.nullcontext  # the hardware's own
else:
    from strict_interpreter import program_order, sparse_tensor


@pytest.fixture
def small_slices(monkeypatch):
    """A backward of several vocabulary slices, not all of whole tiles, times several row blocks; casts in pieces."""
    monkeypatch.setattr(launch, "SLICE", 40)
    monkeypatch.setattr(launch, "BUFFER_BYTES", 20 * 40 * 4)
    monkeypatch.setattr(launch, "CAST_BYTES", 1)


# One of each; less than, exactly and one more than a tile on each axis; several with and without a rest; fewer tiles
# than segments and more; primes. D of 8 and 16 take descriptors in bf16, of 4 in float32 too.
SHAPES = [
    (0, 4, 7), (1, 1, 1), (1, 16, 33), (3, 5, 2), (15, 15, 31), (16, 16, 32), (17, 17, 33), (33, 8, 64), (13, 31, 97),
    (2, 40, 131),
]  # fmt: skip


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_agrees_with_float64(small_slices, device, shape, dtype):
    inputs = random_inputs(*shape, dtype, bias=True, ignored=0.2, device=device)
    check_head(head, inputs, **SCALARS)


# 37 rows and 41 columns: three row blocks of a kernel, two of the backward's buffer; two tiles. D = 13: by pointer.
@pytest.mark.quick_cases(every=4)
@pytest.mark.parametrize(
    ("name", "dtype", "d"),
    [
        *((name, dtype, d) for name in OPTIONS for dtype, d in ((torch.float32, 13), (torch.bfloat16, 16))),
        *(("all", dtype, d) for dtype, d in ((torch.float16, 13), (torch.float16, 16), (torch.float32, 16))),
    ],
)
def test_every_option_agrees_with_float64(small_slices, device, name, dtype, d):
    options = dict(OPTIONS[name])
    inputs = random_inputs(37, d, 41, dtype, bias=options.pop("bias", False), ignored=0.2, device=device)
    check_head(head, inputs, entropy=False, **options)


@pytest.mark.parametrize("entropy", [True, False], ids=["outputs", "logps"])
@pytest.mark.parametrize("needs", NEEDS)
def test_every_set_of_gradients_agrees_with_float64(small_slices, device, needs, entropy):
    inputs = random_inputs(21, 13, 41, bias=True, ignored=0.2, device=device)
    check_head(head, inputs, NEEDS[needs], entropy, **SCALARS)


@pytest.mark.parametrize(
    ("hidden", "weight"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("d", [13, 16])
def test_a_weight_of_another_dtype_is_rounded_to_hiddens_and_gets_its_own_dtype_back(
    small_slices, device, d, hidden, weight
):
    # 200 columns: seven tiles, cast one segment at a time
    inputs = random_inputs(5, d, 200, hidden, weight_dtype=weight, bias=True, device=device)
    check_head(head, inputs, entropy=False, softcap=3.0)


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("which", ["hidden", "weight"])
@pytest.mark.parametrize("layout", ["transposed", "strided rows", "sliced", "strided columns", "unaligned"])
def test_any_layout_will_do(small_slices, device, layout, which):
    inputs = random_inputs(18, 16, 41, ignored=0.2, device=device)
    x = getattr(inputs, which)
    poison = torch.full_like(x, float("nan"))
    inputs = inputs.but(
        **{
            which: {
                "transposed": lambda: x.T.contiguous().T,
                "strided rows": lambda: torch.stack([x, poison], 1)[:, 0],
                "sliced": lambda: torch.cat([poison, x, poison], 1)[:, 16:32],
                "strided columns": lambda: torch.stack([x, poison], 2)[:, :, 0],
                "unaligned": lambda: torch.cat([poison[0, :1], x.flatten()])[1:].view(x.shape),
            }[layout]()
        }
    )
    check_head(head, inputs, entropy=False)


def test_an_expanded_hidden_state_and_a_strided_bias_will_do(small_slices, device):
    inputs = random_inputs(18, 16, 41, bias=True, device=device)
    pairs = torch.stack([inputs.bias, torch.full_like(inputs.bias, float("nan"))], 1)
    check_head(head, inputs.but(hidden=inputs.hidden[:1].expand(18, 16), bias=pairs[:, 0]), entropy=False)


def test_a_cast_weight_need_not_allow_the_descriptors_that_hidden_does(small_slices, device):
    # Rows of 24 numbers are multiples of 16 bytes in bf16, but of the 20 that a cast weight keeps they are not.
    inputs = random_inputs(18, 24, 41, torch.bfloat16, weight_dtype=torch.float32, device=device)
    inputs = inputs.but(hidden=inputs.hidden[:, :20], weight=inputs.weight[:, :20])
    check_head(head, inputs, entropy=False)


@pytest.mark.parametrize("ignore_index", [0, 40, 17])
def test_ignore_index_may_be_any_number(small_slices, device, ignore_index):
    inputs = random_inputs(18, 8, 41, ignored=0.4, ignore_index=ignore_index, device=device)
    result = check_head(head, inputs, entropy=False, ignore_index=ignore_index)
    assert not result.logps[inputs.targets == ignore_index].any()


def test_nothing_but_ignored_rows_is_zero_everywhere(small_slices, device):
    inputs = random_inputs(18, 8, 41, bias=True, ignored=1.0, device=device)
    for name, x in check_head(head, inputs).tensors().items():
        assert not x.any(), name


def test_targets_may_be_any_integers(device):
    inputs = random_inputs(18, 8, 41, device=device)
    expected = evaluate(head, inputs).logps
    strided = torch.stack([inputs.targets, inputs.targets], 1)[:, 0].int()
    assert torch.equal(evaluate(head, inputs.but(targets=strided)).logps, expected)


def test_a_target_that_many_rows_share_gets_all_of_them(small_slices, device):
    # The sorted segment sum: runs of one, of several, and one over a whole block; first, last and middle columns.
    inputs = random_inputs(40, 13, 41, device=device)
    targets = torch.tensor([0] * 3 + [40] * 2 + [39] + [17] * 20 + list(range(14)), device=device)
    check_head(head, inputs.but(targets=targets[torch.randperm(40)]), entropy=False)


def test_of_equal_logits_the_first_is_on_top(device):
    # A hidden state of zeros makes every logit equal; small integers make ties that no rounding breaks.
    hidden = torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 2.0]] * 3, device=device)
    weight = torch.tensor([[1.0, 1.0]] * 40 + [[3.0, 0.0]] * 40, device=device)
    targets = torch.tensor([0, 1, 79, 0, 39, 40], device=device)
    _, outputs = head(hidden, weight, targets, outputs=("is_top1",))
    assert outputs["is_top1"].tolist() == [1, 0, 0, 1, 0, 0]


def test_outputs_do_not_change_the_log_probabilities(device):
    inputs = random_inputs(18, 8, 100, bias=True, device=device)
    alone = evaluate(head, inputs).logps
    torch.testing.assert_close(evaluate(head, inputs, outputs=oracle.OUTPUTS).logps, alone, rtol=0, atol=2e-6)


@pytest.mark.parametrize("seed", [None, 1])
def test_the_order_of_programs_changes_no_bit(small_slices, device, seed):
    inputs = random_inputs(33, 8, 70, torch.bfloat16, bias=True, ignored=0.2, device=device)
    grad = torch.randn(33, device=device)
    run = functools.partial(evaluate, head, inputs, NEEDS["trainable"], grad, grad, outputs=oracle.OUTPUTS, softcap=4.0)
    expected = run().tensors()
    with program_order(seed):
        again = run().tensors()
    for name, x in expected.items():
        assert torch.equal(again[name], x), name


# Rows or columns 2**30 elements apart: a 32-bit offset to the third of them is negative. On a GPU this would take
# the memory that here is never touched.
@pytest.mark.skipif(torch.cuda.is_available(), reason="lazily mapped memory is the CPU's")
@pytest.mark.parametrize("which", ["hidden", "weight"])
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_offsets_have_64_bits(small_slices, axis, which):
    inputs = random_inputs(5, 4, 6, torch.float16, bias=True)
    strides = (2**30, 1) if axis == 0 else (1, 2**30)
    far_apart = inputs.but(**{which: sparse_tensor(getattr(inputs, which), strides)})
    grad = torch.randn(5)
    run = functools.partial(evaluate, head, needs=NEEDS["trainable"], grad=grad, grad_entropy=grad)
    expected = run(inputs, outputs=oracle.OUTPUTS).tensors()
    for name, x in run(far_apart, outputs=oracle.OUTPUTS).tensors().items():
        torch.testing.assert_close(x, expected[name], msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("d", [512, 1000, 333])
def test_real_sizes_agree_with_float64(device, d, needs, dtype):
    inputs = random_inputs(1031, d, 50_257, dtype, bias=True, ignored=0.1, device=device)
    check_head(head, inputs, NEEDS[needs], entropy=needs == "trainable", **SCALARS)
