"""What `linear_kl` promises beside its numbers: bits, masked rows, the reference as a constant, refusals."""

import math
import re

import pytest
import torch

import prefuse
from kl_heads import FUSED, IMPLS, NEEDS, head, on
from largest_tensor import LargestTensor
from prefuse.bench.truth.kl_cases import NAMES, evaluate, random_models
from prefuse.kernels import slices
from prefuse.kernels.gradients import Needs
from prefuse.kernels.kl import portable as portable_kl
from prefuse.kernels.kl.portable import KLSide
from prefuse.kernels.options import HeadOptions

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


@pytest.mark.quick_cases(every=4)
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


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", FUSED)
def test_the_forward_passes_opcheck(impl, case, device):
    torch.library.opcheck(ops.linear_kl_forward, (*op_inputs(impl, device, case, NAMES), *SCALARS, impl))


@pytest.mark.quick_cases(every=3)
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


@pytest.mark.quick_cases(every=3)
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
    sides = KLSide(m.hidden, m.weight, None, HeadOptions()), KLSide(m.ref_hidden, m.ref_weight, None, HeadOptions())
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
        def call(*operands, **out):
            result = product(*operands, **out)
            if result.shape[-1] == 24:  # D: a gradient; logits have a slice's columns
                results.append(tuple(result.shape))
            return result

        return call

    for name in ("mm", "addmm_"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, counted(getattr(module, name)))
    models = random_models(8, 24, 100, device=on(impl, device))
    grad = torch.ones(8, device=models.hidden.device)
    evaluate(head(impl), models, ("hidden",), grad)
    assert results
    assert set(results) == {(8, 24)}  # dhidden alone
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
        ({"mask": torch.ones(4)}, TypeError, "mask must be a bool tensor, True for the rows to keep, got"),
        ({"mask": [True] * 4}, TypeError, "mask must be a bool tensor, True for the rows to keep, got list"),
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
