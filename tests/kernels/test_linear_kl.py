"""`linear_kl` agrees with float64, keeps its digits near 0 and far away, and is the same bits in any batch.

The Triton kernels interpreted where there is no GPU (16 rows x 32 columns x 16 deep, 3 segments), so at small sizes.
"""

import functools
import math
import re

import pytest
import torch

import prefuse
from largest_tensor import LargestTensor
from prefuse.bench.truth import oracle
from prefuse.bench.truth.kl_cases import NAMES, both_logits, check_kl, evaluate, exact, random_models
from prefuse.kernels import slices
from prefuse.kernels.gradients import Needs
from prefuse.kernels.kl import portable as portable_kl
from prefuse.kernels.kl.portable import Side
from prefuse.kernels.options import HeadOptions

pytest.importorskip("triton")

IMPLS = ["torch", "triton", "reference"]
FUSED = ["torch", "triton"]
DTYPES = {
    "torch": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "triton": [torch.float32, torch.bfloat16],
    "reference": [torch.float32, torch.bfloat16, torch.float64],
}
IMPL_DTYPES = [(impl, dtype) for impl in IMPLS for dtype in DTYPES[impl]]
NEEDS = {"trainable": NAMES, "frozen head": ("hidden",), "frozen trunk": ("weight",), "bias only": ("bias",)}
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"options": {"softcap": 2.0}},
    "logit_scale": {"options": {"logit_scale": 0.25}},
    "temperature": {"options": {"temperature": 0.6}},
    "the reference's own": {"ref_options": {"softcap": 3.0, "logit_scale": 1.2, "temperature": 0.7}},
    "no cap for the reference": {"options": {"softcap": 2.0}, "ref_options": {"softcap": None}},
    "all": {
        "bias": True,
        "options": {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3},
        "ref_options": {"softcap": 5.0, "temperature": 0.9},
    },
}


def head(impl):
    return functools.partial(prefuse.linear_kl, impl=impl)


def on(impl, device):
    """Where an implementation's tensors go: the portable one is tested on the CPU, where its bits are promised."""
    return device if impl == "triton" else torch.device("cpu")


@pytest.fixture
def small_tiles(monkeypatch):
    """Many tiles, and a backward in several row blocks and slices, at sizes that take no time."""
    monkeypatch.setattr(slices, "TILE", {"cpu": (8, 16), "cuda": (8, 16)})
    monkeypatch.setattr(slices, "BUFFER_BYTES", 2 * 8 * 16 * 4)
    from prefuse.kernels import launch

    monkeypatch.setattr(launch, "SLICE", 40)
    monkeypatch.setattr(launch, "BUFFER_BYTES", 20 * 40 * 4)
    monkeypatch.setattr(launch, "CAST_BYTES", 1)


# ---- agreement with float64 ----------------------------------------------------------------------

# (N, D, ref D, V): nothing; one of each; less than, exactly and one more than a tile of 8 x 16 and of 16 x 32; several
# tiles and more than the interpreter's 3 segments; primes; D unequal, and such that only one side takes descriptors.
SHAPES = [
    (0, 4, 4, 7), (1, 1, 1, 1), (1, 5, 5, 1), (3, 1, 2, 2), (7, 3, 8, 15), (8, 16, 16, 16), (9, 17, 8, 17),
    (16, 32, 16, 32), (13, 31, 7, 131), (17, 8, 24, 97),
]  # fmt: skip


@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_agrees_with_float64(small_tiles, device, shape, impl, dtype):
    n, d, ref_d, v = shape
    models = random_models(n, d, v, dtype, ref_d=ref_d, masked=0.2, device=on(impl, device), **OPTIONS["all"])
    check_kl(head(impl), models)


# D = 13: by pointer. D = 16: by descriptor in the kernels, and the fold in halves.
@pytest.mark.parametrize(
    ("impl", "name", "dtype", "d"),
    [
        *((impl, name, dtype, 13) for impl, dtype in IMPL_DTYPES if impl != "triton" for name in OPTIONS),
        *(("triton", name, dtype, d) for name in OPTIONS for dtype, d in ((torch.float32, 13), (torch.bfloat16, 16))),
        *(("triton", "all", dtype, d) for dtype, d in ((torch.float16, 13), (torch.float16, 16), (torch.float32, 16))),
    ],
)
def test_every_option_agrees_with_float64(small_tiles, device, impl, name, dtype, d):
    check_kl(head(impl), random_models(19, d, 70, dtype, masked=0.2, device=on(impl, device), **OPTIONS[name]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", NEEDS)
def test_every_set_of_gradients_agrees_with_float64(small_tiles, device, needs, impl):
    models = random_models(21, 13, 70, masked=0.2, device=on(impl, device), **OPTIONS["all"])
    made = check_kl(head(impl), models, NEEDS[needs])
    assert torch.equal(made.kl, evaluate(head(impl), models).kl)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_tiles_agree_with_float64(dtype):
    """One tile of 256 x 2048 and a bit on both axes."""
    check_kl(head("torch"), random_models(257, 33, 2049, dtype, masked=0.1, **OPTIONS["all"]))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("hidden", "weight"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("d", [13, 16])
def test_a_weight_of_another_dtype_is_rounded_to_hiddens_and_gets_its_own_back(
    small_tiles, device, d, hidden, weight, impl
):
    check_kl(head(impl), random_models(9, d, 200, hidden, ref_d=d + 3, weight_dtype=weight, device=on(impl, device)))


def layouts(x):
    """{name: a tensor with x's numbers and other strides}."""
    poison = torch.full_like(x, float("nan"))
    return {
        "transposed": x.T.contiguous().T,
        "strided rows": torch.stack([x, poison], 1)[:, 0],
        "strided columns": torch.stack([x, poison], 2)[:, :, 0],
        "sliced": torch.cat([poison, x, poison], 1)[:, x.shape[1] : 2 * x.shape[1]],
        "unaligned": torch.cat([poison[0, :1], x.flatten()])[1:].view(x.shape),
    }


LAYOUTS = list(layouts(torch.zeros(2, 2)))


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("which", ["hidden", "weight", "ref_hidden", "ref_weight"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_will_do(small_tiles, device, layout, which, impl):
    models = random_models(18, 16, 41, masked=0.2, device=on(impl, device))
    check_kl(head(impl), models.but(**{which: layouts(getattr(models, which))[layout]}))


@pytest.mark.parametrize("impl", FUSED)
def test_expanded_inputs_and_upstream_gradients_will_do(small_tiles, device, impl):
    models = random_models(18, 16, 41, bias=True, device=on(impl, device))
    pairs = torch.stack([models.bias, torch.full_like(models.bias, float("nan"))], 1)
    models = models.but(hidden=models.hidden[:1].expand(18, 16), ref_bias=pairs[:, 0])
    check_kl(head(impl), models, grad=torch.full((1,), 0.7, device=models.hidden.device).expand(18))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_gradients_agree_with_finite_differences(small_tiles, impl):
    models = exact(random_models(5, 4, 21, masked=0.3, **OPTIONS["all"]))
    leaves = [x.requires_grad_() for x in (models.hidden, models.weight, models.bias)]

    def numbers(hidden, weight, bias):
        changed = models.but(hidden=hidden, weight=weight, bias=bias)
        return head(impl)(hidden, weight, models.ref_hidden, models.ref_weight, **changed.keywords())

    assert torch.autograd.gradcheck(numbers, leaves)


# Rows or columns 2**30 elements apart: a 32-bit offset to the third of them is negative. On a GPU this would take
# the memory that here is never touched.
@pytest.mark.skipif(torch.cuda.is_available(), reason="lazily mapped memory is the CPU's")
@pytest.mark.parametrize("which", ["hidden", "weight", "ref_hidden", "ref_weight"])
@pytest.mark.parametrize("axis", [0, 1], ids=["rows", "columns"])
def test_offsets_have_64_bits(small_tiles, axis, which):
    from strict_interpreter import sparse_tensor

    models = random_models(5, 4, 6, torch.float16, bias=True)
    strides = (2**30, 1) if axis == 0 else (1, 2**30)
    far_apart = models.but(**{which: sparse_tensor(getattr(models, which), strides)})
    grad = torch.randn(5)
    expected = evaluate(head("triton"), models, NAMES, grad).tensors()
    for name, x in evaluate(head("triton"), far_apart, NAMES, grad).tensors().items():
        torch.testing.assert_close(x, expected[name], msg=name)


@pytest.mark.parametrize("seed", [None, 1])
def test_the_order_of_programs_changes_no_bit(small_tiles, device, seed):
    if torch.cuda.is_available():
        pytest.skip("the hardware has its own order")
    from strict_interpreter import program_order

    models = random_models(33, 16, 150, torch.bfloat16, bias=True, masked=0.2, device=device)
    grad = torch.randn(33, device=device)
    expected = evaluate(head("triton"), models, NAMES, grad).tensors()
    with program_order(seed):
        again = evaluate(head("triton"), models, NAMES, grad).tensors()
    for name, x in expected.items():
        assert torch.equal(again[name], x), name


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("d", "ref_d"), [(512, 1000), (333, 512)])
def test_real_sizes_agree_with_float64(device, d, ref_d, dtype):
    models = random_models(517, d, 32_003, dtype, ref_d=ref_d, masked=0.1, device=device, **OPTIONS["all"])
    check_kl(head("triton"), models)


# ---- near and far --------------------------------------------------------------------------------


# The kernels load the same numbers from any layout, which other tests hold them to; a BLAS has a choice of its own.
@pytest.mark.parametrize(
    ("impl", "layout"),
    [
        *(("torch", name) for name in (None, "unaligned", "sliced", "transposed")),
        ("triton", None),
        ("triton", "unaligned"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [7, 16, 64])
def test_equal_models_have_exactly_no_divergence_and_no_gradient(device, d, dtype, layout, impl):
    n, v = (300, 4500) if impl == "torch" else (20, 150)
    models = random_models(n, d, v, dtype, bias=True, device=on(impl, device), options={"softcap": 9.0})
    other = {name: getattr(models, name) for name in NAMES}
    if layout:
        other |= {name: layouts(other[name])[layout] for name in ("hidden", "weight")}
    models = models.but(**{f"ref_{name}": x for name, x in other.items()})
    made = evaluate(head(impl), models, NAMES, torch.randn(n, device=models.hidden.device))
    for name, x in made.tensors().items():
        assert not x.any(), name


@pytest.mark.parametrize(("impl", "v"), [("torch", 4500), ("triton", 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apart", [1e-3, 1e-2, 0.1, 1.0, 4.0])
def test_a_divergence_from_1e_6_to_100_nats_keeps_its_digits(device, apart, dtype, impl, v):
    """To within what logits rounded to float32 leave of it: `eps * |logit| * sqrt(2 KL)`."""
    models = random_models(16, 32, v, dtype, apart=apart, spread=4.0, device=on(impl, device))
    if dtype == torch.bfloat16:  # which cannot hold a change of 0.001: heads are left apart by a bias instead
        models = models.but(ref_hidden=models.hidden, ref_bias=4 * apart * torch.randn(v).to(models.hidden.device))
    kl = check_kl(head(impl), models).kl
    truth = oracle.kl(*both_logits(exact(models), torch.float64))
    assert apart**2 * 0.01 < truth.median() < apart**2 * 100
    largest = max(x.abs().max().item() for x in both_logits(exact(models), torch.float64))
    error = 8 * torch.finfo(torch.float32).eps * (largest * (2 * truth).sqrt() + truth)
    assert ((kl - truth).abs() <= error).all()


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("shift", [5.0, 300.0])
def test_a_constant_between_the_logits_changes_little(small_tiles, device, shift, impl):
    models = random_models(18, 16, 100, apart=0.05, bias=True, device=on(impl, device))
    near = models.but(ref_bias=models.bias)
    check_kl(head(impl), near.but(ref_bias=models.bias + shift))


# Logits apart by more than float32's exponent, in both directions; all of the policy on what the reference cannot hold.
@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("gap", [30.0, 90.0, 200.0, 1e4])
def test_models_far_apart(small_tiles, device, gap, impl):
    models = random_models(9, 16, 100, bias=True, device=on(impl, device))
    bias, ref_bias = torch.zeros(100), torch.zeros(100)
    bias[3] += gap
    ref_bias[70] += gap  # in another tile, and in another segment
    for own, other in ((bias, ref_bias), (bias, -bias), (-bias, bias), (bias, ref_bias * 0), (0 * bias, ref_bias)):
        place = models.hidden.device
        kl = check_kl(head(impl), models.but(bias=own.to(place), ref_bias=other.to(place))).kl
        assert kl.isfinite().all()


@pytest.mark.parametrize("impl", [*FUSED, "reference"])
def test_columns_that_neither_model_can_produce_count_nowhere(small_tiles, device, impl):
    models = random_models(18, 16, 100, bias=True, device=on(impl, device))
    dead = torch.zeros(100, dtype=torch.bool, device=models.hidden.device)
    dead[[0, 5, 99]] = dead[32:80] = True  # whole tiles among them
    bias, ref_bias = (torch.where(dead, -math.inf, x) for x in (models.bias, models.ref_bias))
    made = check_kl(head(impl), models.but(bias=bias, ref_bias=ref_bias))
    alive = models.but(
        weight=models.weight[~dead], ref_weight=models.ref_weight[~dead], bias=bias[~dead], ref_bias=ref_bias[~dead]
    )
    torch.testing.assert_close(made.kl, evaluate(head(impl), alive).kl)
    assert not made.grads["weight"][dead].any()
    assert not made.grads["bias"][dead].any()


@pytest.mark.parametrize("impl", [*FUSED, "reference"])
def test_what_only_the_reference_can_produce_is_finite_and_what_only_the_policy_can_is_not(small_tiles, device, impl):
    models = random_models(9, 16, 100, bias=True, device=on(impl, device))
    for columns in ([7], range(32, 64), range(10, 100)):
        one_sided = models.bias.clone()
        one_sided[list(columns)] = -math.inf
        check_kl(head(impl), models.but(bias=one_sided))
        made = evaluate(head(impl), models.but(ref_bias=one_sided), NAMES, torch.ones_like(models.hidden[:, 0]))
        assert (made.kl == math.inf).all()
        assert not made.grads["hidden"].isfinite().any()  # loud, not a number that looks like one


@pytest.mark.parametrize("impl", [*FUSED, "reference"])
def test_one_token_is_certain(device, impl):
    made = check_kl(head(impl), random_models(5, 3, 1, bias=True, device=on(impl, device)))
    for name, x in made.tensors().items():
        assert not x.any(), name


@pytest.mark.parametrize("impl", [*FUSED, "reference"])
def test_a_row_that_holds_a_nan_says_so_and_leaves_the_others_alone(small_tiles, device, impl):
    models = random_models(18, 16, 41, bias=True, device=on(impl, device))
    expected = evaluate(head(impl), models).kl
    for which in ("hidden", "ref_hidden"):
        broken = getattr(models, which).clone()
        broken[4, 2] = math.nan
        kl = evaluate(head(impl), models.but(**{which: broken})).kl
        assert kl[4].isnan()
        others = torch.arange(18, device=kl.device) != 4
        assert torch.equal(kl[others], expected[others])


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("p", [0.9, 0.999, 0.99999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_no_worse_than_eagers_where_one_token_has_it_all(device, dtype, p, impl):
    """The likeliest token's dlogit is a difference of two numbers that agree in all but 1 - p of their size."""
    models = random_models(24, 16, 90, dtype, apart=0.3, spread=1.0, device=on(impl, device))
    v = models.weight.shape[0]
    bias = torch.zeros(v)
    bias[33] = math.log(p / (1 - p)) + math.log(v)
    bias = bias.to(models.hidden.device)
    models = models.but(bias=bias, ref_bias=0.7 * bias)
    grad = torch.randn(24, device=models.hidden.device)
    made, truth, eager = (
        evaluate(run, m, NAMES, grad.to(t)).grads
        for run, m, t in (
            (head(impl), models, torch.float32),
            (functools.partial(_eager, torch.float64), exact(models), torch.float64),
            (functools.partial(_eager, dtype), models, dtype),
        )
    )
    largest = max(x.abs().max().item() for x in both_logits(exact(models), torch.float64))
    floor = torch.finfo(dtype).eps + 4 * torch.finfo(torch.float32).eps * largest
    for name, expected in truth.items():
        error, yardstick = (((x[name].double() - expected).norm() / expected.norm()).item() for x in (made, eager))
        assert error <= max(yardstick, floor), f"d{name}: {error:.3g}, eager {yardstick:.3g}"
        assert error <= 4 * floor, f"d{name}: {error:.3g} at p = {p}"


def _eager(dtype, hidden, weight, ref_hidden, ref_weight, *, bias, ref_bias, mask, ref_options):
    z = oracle.logits(hidden, weight, bias, dtype=dtype)
    return oracle.kl(z, oracle.logits(ref_hidden, ref_weight, ref_bias, dtype=dtype))


# ---- the same bits -------------------------------------------------------------------------------


def assert_rows_keep_their_bits(run, models, splits):
    n = len(models.hidden)
    expected = run(models)
    assert torch.equal(run(models), expected), "a second run"
    order = torch.randperm(n).to(expected.device)
    assert torch.equal(run(models.rows(order)), expected[order]), "permuted"
    for size in splits:
        parts = [run(models.rows(slice(i, i + size))) for i in range(0, n, size)]
        assert torch.equal(torch.cat(parts), expected), f"batches of {size}"
    thrice = order.repeat_interleave(3)
    mask = torch.arange(3 * n, device=expected.device) % 3 == 0
    assert torch.equal(run(models.rows(thrice).but(mask=mask))[::3], expected[order]), "packed with masked rows"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [1, 7, 64])
def test_a_row_has_the_same_bits_in_any_batch(d, dtype):
    models = random_models(300, d, 2500, dtype, ref_d=9, bias=d == 7)
    models.hidden[::5] *= 30.0  # some rows far from their reference
    assert_rows_keep_their_bits(lambda m: evaluate(head("torch"), m).kl, models, splits=[99, 257])
    alone = models.rows(slice(299, 300))
    assert torch.equal(evaluate(head("torch"), alone).kl, evaluate(head("torch"), models).kl[299:])


@pytest.mark.parametrize(("d", "dtype"), [(7, torch.float32), (16, torch.bfloat16)])
def test_a_row_has_the_same_bits_in_any_batch_of_the_kernels(device, d, dtype):
    models = random_models(33, d, 120, dtype, ref_d=d + 8, bias=True, device=device)
    assert_rows_keep_their_bits(lambda m: evaluate(head("triton"), m).kl, models, splits=[15])


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
def test_a_second_run_has_the_same_bits(small_tiles, device, needs, impl):
    models = random_models(33, 16, 100, torch.bfloat16, bias=True, masked=0.2, device=on(impl, device))
    grad = torch.randn(33, device=models.hidden.device)
    first, second = (evaluate(head(impl), models, NEEDS[needs], grad).tensors() for _ in range(2))
    for name, x in first.items():
        assert torch.equal(second[name], x), name


# ---- rows that do not count, and the reference ---------------------------------------------------


@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("value", [3.0, float("nan"), float("inf")])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_masked_row_leaves_no_trace(small_tiles, device, value, needs, impl):
    """Not in a bit, whatever its hidden states hold."""
    models = random_models(21, 16, 41, bias=True, masked=0.3, device=on(impl, device))
    out = ~models.mask
    other = {n: torch.where(out[:, None], value, getattr(models, n)) for n in ("hidden", "ref_hidden")}
    grad = torch.randn(21, device=models.hidden.device)
    loud = torch.where(out, math.nan, grad)
    runs = [
        evaluate(head(impl), m, NEEDS[needs], g).tensors()
        for m, g in ((models, grad), (models.but(**other), grad), (models, loud))
    ]
    for name, x in runs[0].items():
        assert torch.equal(runs[1][name], x), name
        if impl != "reference":  # whose where passes 0 * NaN on
            assert torch.equal(runs[2][name], x), name
    assert not runs[0]["kl"][out].any()
    assert not runs[0]["dhidden"][out].any()
    assert runs[0]["dhidden"][~out].any(1).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_nothing_but_masked_rows_is_zero_everywhere(small_tiles, device, impl):
    models = random_models(9, 16, 41, bias=True, device=on(impl, device))
    models = models.but(mask=torch.zeros(9, dtype=torch.bool, device=models.hidden.device))
    for name, x in evaluate(head(impl), models, NAMES, torch.ones(9, device=models.hidden.device)).tensors().items():
        assert not x.any(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_the_reference_is_a_constant(device, impl):
    models = random_models(9, 16, 41, bias=True, device=on(impl, device))
    leaves = [x.clone().requires_grad_() for x in (models.ref_hidden, models.ref_weight, models.ref_bias)]
    kl = head(impl)(models.hidden, models.weight, *leaves[:2], bias=models.bias, ref_bias=leaves[2])
    assert not kl.requires_grad
    # A head that both share gets the policy's gradient alone.
    shared = models.weight.clone().requires_grad_()
    head(impl)(models.hidden, shared, models.ref_hidden, shared).sum().backward()
    alone = models.but(ref_weight=models.weight, bias=None, ref_bias=None)
    own = evaluate(head(impl), alone, ("weight",), torch.ones_like(kl))
    assert torch.equal(shared.grad, own.grads["weight"])


def test_auto_is_torch_for_cpu_tensors():
    models = random_models(9, 5, 21)
    expected = evaluate(head("torch"), models).kl
    assert torch.equal(evaluate(head("auto"), models).kl, expected)
    assert torch.equal(evaluate(prefuse.linear_kl, models).kl, expected)


# ---- as torch sees it ----------------------------------------------------------------------------

ops = torch.ops.prefuse
SCALARS = (3.0, 0.7, 1.2, None, 1.0, 0.9)


def op_inputs(impl, device, case, needs=()):
    models = random_models(5, 16, 40, ref_d=8, bias=True, device=on(impl, device))
    if "masked" in case:
        models = models.but(mask=torch.tensor([True, True, False, True, False], device=models.hidden.device))
    if "transposed" in case:
        names = ("hidden", "weight", "ref_hidden", "ref_weight")
        models = models.but(**{name: getattr(models, name).T.contiguous().T for name in names})
    m = models.but(**{name: getattr(models, name).detach().requires_grad_() for name in needs})
    return (m.hidden, m.weight, m.bias, m.ref_hidden, m.ref_weight, m.ref_bias, m.mask)


CASES = ["plain", "masked", "transposed", "transposed, masked"]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", FUSED)
def test_the_forward_passes_opcheck(impl, case, device):
    torch.library.opcheck(ops.linear_kl_forward, (*op_inputs(impl, device, case, NAMES), *SCALARS, impl))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("impl", "needs"),
    [("torch", (True, True, True)), ("torch", (True, False, False)), ("torch", (False, True, False)),
     ("triton", (True, True, True))],
)  # fmt: skip
def test_the_backward_passes_opcheck(impl, needs, case, device):
    tensors = op_inputs(impl, device, case)
    _, lse, anchor, mean = ops.linear_kl_forward(*tensors, *SCALARS, impl)
    arguments = (torch.randn_like(lse), *tensors, lse, anchor, mean, *SCALARS, *needs, impl)
    torch.library.opcheck(ops.linear_kl_backward, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
def test_it_compiles_without_a_graph_break(dynamic):
    def loss(hidden, weight, ref_hidden, ref_weight, mask):
        x = torch.tanh(hidden)
        options = {"softcap": 5.0, "ref_options": {"temperature": 0.9}}
        return prefuse.linear_kl(x, weight, ref_hidden, ref_weight, mask=mask, **options).square().mean()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for n in (3, 8, 300):
        models = random_models(n, 6, 30, masked=0.2)
        results = []
        for run in (loss, compiled):
            hidden, weight = (x.clone().requires_grad_() for x in (models.hidden, models.weight))
            value = run(hidden, weight, models.ref_hidden, models.ref_weight, models.mask)
            value.backward()
            results.append([value.detach(), hidden.grad, weight.grad])
        for eager, made in zip(*results, strict=True):
            torch.testing.assert_close(made, eager)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", FUSED)
def test_under_autocast_the_op_computes_in_its_dtype(impl, dtype, device):
    place = on(impl, device)
    models = random_models(18, 16, 40, bias=True, device=place)
    mixed = models.but(ref_hidden=models.ref_hidden.to(dtype))  # a reference that ran under autocast itself
    grad = torch.randn(18, device=place)
    rounded = evaluate(head(impl), mixed.but(hidden=models.hidden.to(dtype)), NAMES, grad)
    with torch.autocast(place.type, dtype=dtype):
        made = evaluate(head(impl), models, NAMES, grad)
        assert torch.equal(evaluate(head(impl), mixed).kl, made.kl)
    assert torch.equal(made.kl, rounded.kl)
    for name, x in made.grads.items():
        assert x.dtype == torch.float32, name  # as its master is
        torch.testing.assert_close(x, rounded.grads[name].float(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_without_grad_mode_there_is_no_graph(impl, device):
    models = random_models(18, 16, 40, device=on(impl, device))
    expected = evaluate(head(impl), models).kl
    hidden = models.hidden.clone().requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            kl = head(impl)(hidden, models.weight, models.ref_hidden, models.ref_weight)
        assert not kl.requires_grad
        assert torch.equal(kl, expected)


def test_a_second_derivative_is_refused_but_by_the_reference():
    m = random_models(5, 4, 9, torch.float64)
    x = m.hidden.requires_grad_()
    (first,) = torch.autograd.grad(prefuse.linear_kl(x, *_rest(m), impl="torch").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear_kl has no second derivative.*impl=\"reference\""):
        first.square().sum().backward()
    assert torch.autograd.gradgradcheck(lambda h: prefuse.linear_kl(h, *_rest(m), impl="reference"), x)


def _rest(m):
    return m.weight, m.ref_hidden, m.ref_weight


@pytest.mark.parametrize("impl", FUSED)
@pytest.mark.parametrize(
    "needs", [Needs(True, True, False), Needs(True, False, False)], ids=["trainable", "frozen head"]
)
def test_no_tensor_grows_with_tokens_times_vocabulary(impl, needs, device, monkeypatch):
    """Called beneath the operators, where a dispatch mode sees every tensor that is made."""
    from prefuse.kernels import launch
    from prefuse.kernels.kl import launch as triton_kl

    n, d, v = (130, 4, 500) if impl == "torch" else (66, 4, 300)
    monkeypatch.setattr(slices, "TILE", {"cpu": (16, 32), "cuda": (16, 32)})
    monkeypatch.setattr(slices, "BUFFER_BYTES", 16 * 32 * 4)
    monkeypatch.setattr(launch, "SLICE", 64)
    monkeypatch.setattr(launch, "BUFFER_BYTES", 16 * 64 * 4)
    m = random_models(n, d, v, device=on(impl, device))
    sides = Side(m.hidden, m.weight, None, HeadOptions()), Side(m.ref_hidden, m.ref_weight, None, HeadOptions())
    module = {"torch": portable_kl, "triton": triton_kl}[impl]
    with LargestTensor() as forward:
        made = module.forward(*sides, None)
    with LargestTensor() as backward:
        grads = module.backward(torch.ones_like(made.kl), *sides, None, made, needs)
    # Four tiles (a number a row and segment is less), the two gradients, one buffer; all logits would be n * v.
    assert forward.largest <= 4 * 4 * 16 * 32 < 4 * n * v // 2
    assert backward.largest <= 4 * max(v * d, 16 * 64, n * 8) < 4 * n * v // 2
    assert [g is not None for g in grads] == list(needs)


@pytest.mark.parametrize("impl", FUSED)
def test_a_frozen_head_costs_no_product_for_its_gradient(small_tiles, device, impl, monkeypatch):
    from prefuse.kernels import launch

    module = {"torch": slices, "triton": launch}[impl]
    results = []

    def counted(product):
        return lambda acc, *operands, **out: results.append(acc.shape) or product(acc, *operands, **out)

    for name in ("mm", "addmm_"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
    models = random_models(8, 16, 100, device=on(impl, device))
    grad = torch.ones(8, device=models.hidden.device)
    evaluate(head(impl), models, ("hidden",), grad)
    assert results
    assert set(results) == {(8, 16)}  # dhidden alone
    alone = len(results)
    evaluate(head(impl), models, ("hidden", "weight"), grad)
    assert len(results) == 3 * alone  # as many for dhidden, and as many for dweight


# ---- what is refused at the door -----------------------------------------------------------------

GOOD = {
    "hidden": torch.randn(4, 3), "weight": torch.randn(7, 3), "ref_hidden": torch.randn(4, 2),
    "ref_weight": torch.randn(7, 2),
}  # fmt: skip


def call(**changes):
    return prefuse.linear_kl(**GOOD | {"impl": "torch"} | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden must be a torch.Tensor, got list"),
        ({"ref_hidden": [1.0]}, TypeError, "of the reference: hidden must be a torch.Tensor, got list"),
        ({"weight": torch.randn(7, 2)}, ValueError, "expected hidden (N, D) and weight (V, D) with the same D"),
        ({"ref_weight": torch.randn(7, 3)}, ValueError, "of the reference: expected hidden (N, D) and weight (V, D)"),
        ({"bias": torch.randn(6)}, ValueError, "expected bias (7,), one per row of weight, got (6,)"),
        ({"ref_bias": torch.randn(6)}, ValueError, "of the reference: expected bias (7,)"),
        ({"ref_weight": torch.randn(9, 2)}, ValueError, "weight has 7 rows and ref_weight 9; if the surplus is"),
        ({"ref_hidden": torch.randn(5, 2)}, ValueError, "expected ref_hidden (4, D), a row for each row of hidden"),
        ({"ref_hidden": torch.randn(4, 2).double()}, TypeError, "but ref_hidden is torch.float64; cast one of them"),
        ({"mask": torch.ones(4)}, TypeError, "mask must be a bool tensor, True for the rows that count, got"),
        ({"mask": [True] * 4}, TypeError, "mask must be a bool tensor, True for the rows that count, got list"),
        ({"mask": torch.ones(3).bool()}, ValueError, "expected mask (4,), one per row of hidden, got (3,)"),
        ({"mask": torch.ones(4).bool().to("meta")}, TypeError, "mask is on meta but hidden is on cpu; move one"),
        ({"ref_hidden": torch.randn(4, 2).to("meta"), "ref_weight": torch.randn(7, 2).to("meta")}, TypeError,
         "ref_hidden is on meta but hidden is on cpu; move one of them"),
        ({"softcap": 0.0}, ValueError, "softcap must be > 0, or None for no cap, got 0.0"),
        ({"ref_options": {"temperature": 0.0}}, ValueError, "of the reference: temperature must be > 0, got 0.0"),
        ({"ref_options": {"bias": None}}, ValueError, "unknown ref_options ['bias']; choose from ['softcap', 'logit"),
        ({"impl": "cuda"}, ValueError, "impl must be one of ['auto', 'triton', 'torch', 'reference'], got 'cuda'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(changes, error, message):
    assert call().shape == (4,)
    with pytest.raises(error, match=re.escape(message)):
        call(**changes)


def test_an_impl_that_cannot_run_is_refused():
    doubles = {name: x.double() for name, x in GOOD.items()}
    with pytest.raises(RuntimeError, match='impl="triton" has no float64'):
        call(**doubles, impl="triton")


@pytest.mark.parametrize("name", ["weight", "ref_weight"])
def test_a_dtensor_is_refused(name, tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        sharded = distribute_tensor(GOOD[name], init_device_mesh("cpu", (1,)))
        with pytest.raises(TypeError, match=r"weight is a DTensor.*FSDP root module"):
            call(**{name: sharded})
    finally:
        dist.destroy_process_group()
