"""`linear_logprobs` on any device agrees with float64: every dtype, option, layout and set of gradients.

The Triton kernels have a file of their own, and so has the contract on bits.
"""

import functools

import pytest
import torch

import prefuse
from prefuse.bench.truth import oracle
from prefuse.bench.truth.head_cases import EVERY_OPTION, NEEDS, OPTIONS, check_head, evaluate, random_inputs
from prefuse.kernels import slices

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
IMPLS = ["torch", "reference"]

# With tiles of 8 rows x 16 columns: nothing; one of each; less than, exactly and one more than a tile on either axis,
# several tiles with and without a rest; primes; one dimension long and the others short.
SHAPES = [
    (0, 4, 7), (1, 1, 1), (1, 5, 1), (3, 1, 2), (7, 3, 15), (8, 16, 16), (9, 17, 17), (16, 32, 48), (13, 31, 37),
    (1, 64, 33), (40, 7, 129), (65, 2, 5), (2, 129, 3),
]  # fmt: skip


def head(impl):
    return functools.partial(prefuse.linear_logprobs, impl=impl)


def take(options):
    """Options as `OPTIONS` has them -> (whether there is a bias, keyword arguments of the op)."""
    return options.get("bias", False), {name: value for name, value in options.items() if name != "bias"}


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles, and a backward in several row blocks, at sizes that take no time."""
    monkeypatch.setattr(slices, "TILE", {"cpu": (8, 16), "cuda": (8, 16)})
    monkeypatch.setattr(slices, "BUFFER_BYTES", 2 * 8 * 16 * 4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [True, False], ids=["outputs", "logps"])
@pytest.mark.parametrize("needs", NEEDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_agrees_with_float64(small_tiles, shape, needs, entropy, dtype, impl):
    inputs = random_inputs(*shape, dtype, bias=True, ignored=0.2)
    _, options = take(EVERY_OPTION)
    check_head(head(impl), inputs, NEEDS[needs], entropy, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "needs"),
    [(name, needs) for name in OPTIONS for needs in NEEDS if needs != "bias only" or "bias" in OPTIONS[name]],
)
def test_every_option_agrees_with_float64(small_tiles, name, needs, dtype, impl):
    bias, options = take(OPTIONS[name])
    inputs = random_inputs(19, 23, 41, dtype, bias=bias, ignored=0.2)
    for entropy in (False, True):
        check_head(head(impl), inputs, NEEDS[needs], entropy, **options)


# One tile and a bit of the real tile shape (256 x 2048) on both axes; a vocabulary below one tile.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("shape", [(257, 33, 2049), (300, 16, 100)])
def test_real_tiles_agree_with_float64(shape, needs, dtype):
    inputs = random_inputs(*shape, dtype, bias=True, ignored=0.1)
    check_head(head("torch"), inputs, NEEDS[needs], entropy=needs == "trainable", softcap=5.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize(
    ("hidden", "weight"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
        (torch.bfloat16, torch.float16),
    ],
)
def test_a_weight_of_another_dtype_is_rounded_to_hiddens_and_gets_its_own_dtype_back(
    small_tiles, hidden, weight, needs, impl
):
    inputs = random_inputs(19, 23, 41, hidden, weight_dtype=weight, bias=True)
    check_head(head(impl), inputs, NEEDS[needs], entropy=False, softcap=3.0)


def layouts(x):
    """{name: a tensor with x's numbers and other strides}."""
    n, d = x.shape
    wide = torch.full((2 * n, d + 3), float("nan"), dtype=x.dtype)
    wide[::2, 2:-1] = x
    return {
        "transposed": x.T.contiguous().T,
        "strided rows": torch.stack([x, torch.full_like(x, float("nan"))], 1)[:, 0],
        "sliced": wide[::2, 2:-1],
        "unaligned": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(n, d),
        "strided columns": torch.stack([x, torch.full_like(x, float("nan"))], 2)[:, :, 0],
    }


LAYOUTS = list(layouts(torch.zeros(2, 2)))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("which", ["hidden", "weight"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_will_do(small_tiles, layout, which, needs, dtype, impl):
    inputs = random_inputs(19, 23, 41, dtype, ignored=0.2)
    inputs = inputs.but(**{which: layouts(getattr(inputs, which))[layout]})
    assert not getattr(inputs, which).is_contiguous() or layout == "unaligned"
    check_head(head(impl), inputs, NEEDS[needs], entropy=False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
def test_expanded_inputs_get_a_gradient_per_row(small_tiles, needs, impl):
    inputs = random_inputs(19, 23, 41, bias=True)
    inputs = inputs.but(
        hidden=inputs.hidden[:1].expand(19, 23),
        targets=inputs.targets[:1].expand(19),
        bias=inputs.bias[:1].expand(41),
    )
    check_head(head(impl), inputs, NEEDS[needs], entropy=False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_targets_may_be_any_integers(small_tiles, dtype, impl):
    inputs = random_inputs(19, 23, 41)
    expected = evaluate(head(impl), inputs)
    strided = torch.stack([inputs.targets, inputs.targets], 1)[:, 0].to(dtype)
    assert torch.equal(evaluate(head(impl), inputs.but(targets=strided)).logps, expected.logps)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_small_target_dtype_does_not_wrap_ignore_index(small_tiles, impl):
    # As a uint8, -100 is 156.
    inputs = random_inputs(9, 5, 200)
    inputs = inputs.but(targets=torch.full((9,), 156))
    expected = evaluate(head(impl), inputs).logps
    assert torch.equal(evaluate(head(impl), inputs.but(targets=inputs.targets.to(torch.uint8))).logps, expected)


# The usual one; the first and the last column; one in between.
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ignore_index", [-100, 0, 40, 17, -1])
def test_ignore_index_may_be_any_number(small_tiles, ignore_index, impl):
    inputs = random_inputs(29, 23, 41, ignored=0.4, ignore_index=ignore_index)
    result = check_head(head(impl), inputs, ignore_index=ignore_index)
    ignored = inputs.targets == ignore_index
    assert ignored.any()
    assert not ignored.all()
    assert not result.logps[ignored].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", NEEDS)
def test_nothing_but_ignored_rows_is_zero_everywhere(small_tiles, needs, impl):
    inputs = random_inputs(19, 23, 41, bias=True, ignored=1.0)
    result = check_head(head(impl), inputs, NEEDS[needs], entropy=True)
    for name, x in result.tensors().items():
        assert not x.any(), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("outputs", [(), ("entropy",)])
def test_gradients_agree_with_finite_differences(small_tiles, outputs, impl):
    inputs = random_inputs(5, 4, 21, torch.float64, bias=True, ignored=0.3).exact()
    leaves = inputs.leaves(("hidden", "weight", "bias"))

    def numbers(hidden, weight, bias):
        made = head(impl)(
            hidden, weight, inputs.targets, bias=bias, outputs=outputs, softcap=2.0, logit_scale=1.5, temperature=0.8
        )
        return (made[0], made[1]["entropy"]) if outputs else made

    assert torch.autograd.gradcheck(numbers, (leaves.hidden, leaves.weight, leaves.bias))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("asked", [("is_top1",), ("log_sum_sq_probs", "entropy"), tuple(reversed(oracle.OUTPUTS))])
def test_outputs_come_by_name_in_any_order(small_tiles, asked, impl):
    inputs = random_inputs(19, 23, 41, ignored=0.2)
    logps, outputs = head(impl)(inputs.hidden, inputs.weight, inputs.targets, outputs=asked)
    everything = evaluate(head(impl), inputs, outputs=oracle.OUTPUTS)
    assert tuple(outputs) == asked
    assert torch.equal(logps, everything.logps)
    for name in asked:
        assert torch.equal(outputs[name], everything.outputs[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_of_equal_logits_the_first_is_on_top(small_tiles, impl):
    # A hidden state of zeros makes every logit equal; small integers make ties that no rounding breaks.
    hidden = torch.tensor([[0.0, 0.0]] * 3 + [[1.0, 2.0]] * 3)
    weight = torch.tensor([[1.0, 1.0]] * 20 + [[3.0, 0.0]] * 20)
    targets = torch.tensor([0, 1, 39, 0, 19, 20])
    _, outputs = head(impl)(hidden, weight, targets, outputs=("is_top1",))
    assert outputs["is_top1"].tolist() == [1, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("impl", IMPLS)
def test_only_logps_and_entropy_carry_a_gradient(small_tiles, impl):
    inputs = random_inputs(9, 5, 21).leaves(("hidden", "weight"))
    logps, outputs = head(impl)(inputs.hidden, inputs.weight, inputs.targets, outputs=oracle.OUTPUTS)
    assert logps.requires_grad
    assert [name for name, x in outputs.items() if x.requires_grad] == ["entropy"]


@pytest.mark.parametrize("impl", IMPLS)
def test_the_entropy_may_be_the_whole_loss(small_tiles, impl):
    inputs = random_inputs(9, 5, 21, torch.float64, ignored=0.2)
    made, truth = inputs.leaves(("hidden", "weight")), inputs.leaves(("hidden", "weight"))
    head(impl)(made.hidden, made.weight, made.targets, outputs=("entropy",))[1]["entropy"].sum().backward()
    oracle.head(truth.hidden, truth.weight, truth.targets)[1]["entropy"].sum().backward()
    torch.testing.assert_close(made.hidden.grad, truth.hidden.grad)
    torch.testing.assert_close(made.weight.grad, truth.weight.grad)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gap", [0.0, 8.0, 12.0, 30.0, 39.0, 41.0, 90.0])
def test_a_frozen_head_survives_a_target_far_under_another_logit(small_tiles, gap, dtype):
    # e^11 is the largest power that float16 holds, e^40 where a row is folded again, e^88 where float32 ends.
    inputs = random_inputs(9, 16, 41, dtype, spread=0.5, bias=True)
    inputs.bias[20] += gap
    check_head(head("torch"), inputs, NEEDS["frozen head"], entropy=False)


def test_auto_is_torch_for_cpu_tensors():
    inputs = random_inputs(9, 5, 21)
    assert torch.equal(evaluate(head("auto"), inputs).logps, evaluate(head("torch"), inputs).logps)
    assert torch.equal(evaluate(prefuse.linear_logprobs, inputs).logps, evaluate(head("torch"), inputs).logps)
