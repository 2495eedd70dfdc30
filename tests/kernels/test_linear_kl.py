"""`linear_kl` agrees with float64, keeps its digits near 0 and far away, and is the same bits in any batch.

The Triton kernels interpreted where there is no GPU (16 rows x 32 columns x 16 deep, 3 segments), so at small sizes.
"""

import functools
import math

import pytest
import torch

from kl_heads import FUSED, IMPL_DTYPES, IMPLS, NEEDS, OPTIONS, head, on
from prefuse.bench.truth import oracle
from prefuse.bench.truth.kl_cases import NAMES, both_logits, check_kl, evaluate, exact, random_models
from prefuse.kernels import slices

pytest.importorskip("triton")


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


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_agrees_with_float64(small_tiles, device, shape, impl, dtype):
    n, d, ref_d, v = shape
    models = random_models(n, d, v, dtype, ref_d=ref_d, masked=0.2, device=on(impl, device), **OPTIONS["all"])
    check_kl(head(impl), models)


# D = 13: by pointer. D = 16: by descriptor in the kernels, and the fold in halves.
@pytest.mark.quick_cases(every=4)
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


@pytest.mark.quick_cases(every=3)
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


@pytest.mark.quick_cases(every=3)
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


@pytest.mark.quick_cases(every=3)
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
@pytest.mark.quick_cases(every=5)
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


@pytest.mark.quick_cases(every=3)
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
@pytest.mark.quick_cases(every=3)
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
