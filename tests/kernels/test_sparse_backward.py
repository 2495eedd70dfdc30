"""gradient_tolerance: the skipped mass is what it is said to be, within the promise on hostile hidden states too; the
gradients are within the printed bounds of float64; log-probabilities and tolerance 0.0 are the exact ones, bit by bit.

The skipped mass is measured from outside: the last feature of every hidden state is 1, so with g = dL/dlogp > 0 the
last column of (sparse - exact) dweight adds up to sum of g_i p_iv over what was dropped.
"""

import math
import re
from pathlib import Path

import pytest
import torch

import prefuse
from prefuse.bench.timing import peak_bytes
from prefuse.bench.truth.head_cases import EVERY_OPTION
from prefuse.kernels import HeadOptions, record_skipped_mass, slices
from prefuse.kernels.cost import count_cost
from prefuse.kernels.logprobs import portable, sparse
from prefuse.kernels.logprobs.call import prepare_call
from prefuse.kernels.logprobs.linear_logprobs import logprobs_of

N, D, V = 56, 16, 200
TOLERANCES = [2**-3, 2**-6]
IMPLS = ["torch", "triton"]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of two row tiles, the last one not full, and several slices."""
    monkeypatch.setattr(slices, "TILE", {"cpu": (8, 32), "cuda": (8, 32)})
    monkeypatch.setattr(sparse, "BLOCK_ROWS", 16)


def on(impl, device):
    return device if impl == "triton" else torch.device("cpu")


def peaked(n=N, v=V, dtype=torch.float32):
    """Like a trained model: few columns matter in a row, some in all rows; targets drawn from the softmax."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(n, D), 1.5 * torch.randn(v, D)
    hidden[:, -1] = 1.0
    weight[:, -1] += 3.0 * (torch.arange(v) < v // 10)
    targets = torch.multinomial((hidden @ weight.T).softmax(-1), 1)[:, 0]
    return hidden.to(dtype), weight.to(dtype), targets


def uniform():
    hidden, weight, targets = peaked()
    return hidden, 0.0 * weight, targets


def one_hot_column():
    hidden, weight, targets = peaked()
    weight[7] = 0.0
    weight[7, -1] = 30.0  # z = 30 in every row
    return hidden, weight, targets.where(targets != 7, 8)


def duplicates():
    hidden, weight, targets = peaked()
    return hidden[:1].expand(N, D).clone(), weight[: V // 4].repeat(4, 1), targets[:1].expand(N).clone()


def sure():
    """p_target = 0.99999 or so."""
    hidden, weight, _ = peaked()
    logits = hidden @ weight.T
    weight[:N] = torch.linalg.lstsq(hidden, torch.diag(logits.amax() + torch.full((N,), 12.0))).solution.T
    return hidden, weight, (hidden @ weight.T).argmax(-1)


HOSTILE = {
    "peaked": peaked,
    "uniform": uniform,
    "one hot column": one_hot_column,
    "duplicates": duplicates,
    "sure": sure,
}


def gradients(x, grad, tolerance, impl, *, guess=None, needs=("hidden", "weight", "bias"), bias=None, **options):
    """(log-probabilities, {name: gradient}, what was recorded)."""
    hidden, weight, targets = x
    leaves = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    leaves = {name: t.detach().clone().requires_grad_(name in needs) for name, t in leaves.items()}
    arguments = (leaves["hidden"], leaves["weight"], targets, leaves.get("bias"))
    call = prepare_call(*arguments, HeadOptions(**options), (), impl, gradient_tolerance=tolerance)
    with record_skipped_mass(bounds=True) as record:
        logps = logprobs_of(call, guess=guess)
        logps.backward(grad.to(logps))
    return logps.detach(), {name: t.grad for name, t in leaves.items() if t.grad is not None}, record


def check_promise(x, grad, tolerance, impl, **more):
    """The skipped mass, from outside; both bounds; and the log-probabilities. Returns what was recorded."""
    exact_logps, exact, _ = gradients([t.double() if t.is_floating_point() else t for t in x], grad, 0.0, "torch")
    logps, got, record = gradients(x, grad, tolerance, impl, **more)
    same = gradients(x, grad, 0.0, impl)[0]
    assert torch.equal(logps, same)
    q = -torch.expm1(exact_logps)
    whole = (grad.double().abs() * q).sum().item()
    skipped = (got["weight"].double() - exact["weight"])[:, -1].sum().item()
    # Each row's p is right to some eps of its logits, which are as large as 40.
    rounding = 64 * torch.finfo(x[0].dtype).eps * whole
    assert abs(record.whole - whole) <= rounding
    assert abs(record.skipped - skipped) <= rounding
    assert skipped <= tolerance * whole + rounding
    error = (got["hidden"].double() - exact["hidden"]).norm(dim=1)
    scale = x[1].double().norm(dim=1).max().item() * torch.finfo(x[0].dtype).eps * 64
    bounds = record.dhidden_bounds[0].to(error.device)
    assert bool((error <= bounds + scale * (grad.double().abs() * q + 1e-6)).all())
    size = x[0].double().norm(dim=1).max().item() * torch.finfo(x[0].dtype).eps * 64 * whole
    assert (got["weight"].double() - exact["weight"]).norm().item() <= record.dweight_bound + size
    return record, {name: (got[name].double() - exact[name]).norm() / exact[name].norm() for name in got}


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("tolerance", TOLERANCES)
@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("impl", IMPLS)
def test_the_promise_holds(impl, name, tolerance, device):
    x = [t.to(on(impl, device)) for t in HOSTILE[name]()]
    grad = torch.rand(N, device=x[0].device) + 0.1
    record, _ = check_promise(x, grad, tolerance, impl)
    assert record.blocks == math.ceil(N / 16)
    if name == "peaked":
        assert record.exact_blocks < record.blocks
        assert record.kept_columns < 0.9 * V * (record.blocks - record.exact_blocks)
        assert record.share > 0


@pytest.mark.parametrize("impl", IMPLS)
def test_a_guess_that_is_wrong_by_e_20_breaks_no_promise(impl, device):
    """Rows of the last blocks are said to be impossible: their columns go, and those blocks are found out."""
    x = [t.to(on(impl, device)) for t in peaked()]
    guess = torch.zeros(N, device=x[0].device)
    guess[33::2] = -20.0
    record, _ = check_promise(x, torch.ones(N, device=x[0].device), 2**-6, impl, guess=guess)
    assert record.exact_blocks > 0
    told = torch.full((N,), 20.0, device=x[0].device)
    assert check_promise(x, torch.ones(N, device=x[0].device), 2**-6, impl, guess=told)[0].exact_blocks == 0


@pytest.mark.parametrize("guess", [None, -3.0])
def test_each_slice_of_the_statistic_has_its_rows_mass(guess):
    """While the forward runs, p_y is a guess: too large without one, here, with one, too small by e^3."""
    hidden, weight, targets = peaked()
    p = (hidden.double() @ weight.double().T).softmax(-1)
    own = p[torch.arange(N), targets].log()
    statistic = sparse.ColumnStatistic(hidden, V, None if guess is None else own + guess)
    kept = portable.forward(hidden, weight, None, targets, HeadOptions(), statistic=statistic)
    p[torch.arange(N), targets] = 0.0
    for i, truth in enumerate(p.split(16)):
        found = statistic.of_block(i, kept.logps)
        for part, mass in zip(found.split(32), truth.sum(0).split(32), strict=True):
            torch.testing.assert_close(part.sum().double(), mass.sum(), rtol=1e-4, atol=1e-6)
        if guess is not None:  # the same error in every row: the columns themselves are right
            torch.testing.assert_close(found.double(), truth.sum(0), rtol=1e-4, atol=1e-6)


def test_a_total_that_falls_by_a_rounding_makes_no_negative_statistic():
    """Totals of a GPU's segments are added up in another order at each slice."""
    statistic = sparse.ColumnStatistic(torch.zeros(2, 3), 8, None)
    statistic.sums.fill_(1.0)
    statistic.totals = {0: torch.ones(2), 4: torch.full((2,), 1.0 - 2**-24)}
    found = statistic.of_block(0, torch.tensor([-0.5, -2.0]))
    torch.testing.assert_close(found[:4].sum(), torch.tensor([-0.5, -2.0]).exp().sum())
    assert found[4:].tolist() == [0.0] * 4


@pytest.mark.parametrize("impl", IMPLS)
def test_the_dropped_columns_mean_takes_most_of_the_error_of_dhidden(impl, device, monkeypatch):
    """Columns that have much in common, as trained heads do: plain dropping would lose it."""
    hidden, weight, targets = peaked()
    weight[:, :4] += 3.0
    hidden[:, :4] -= hidden[:, :4].mean(1, keepdim=True)  # the common part changes no logit
    x = [t.to(on(impl, device)) for t in (hidden, weight, targets)]
    grad = torch.ones(N, device=x[0].device)
    _, with_mean = check_promise(x, grad, 2**-3, impl)
    blocks = sparse._blocks

    def without(*args):
        found, exact = blocks(*args)
        return [block._replace(mean=torch.zeros_like(block.mean)) for block in found], exact

    monkeypatch.setattr(sparse, "_blocks", without)
    plain = gradients(x, grad, 2**-3, impl)[1]["hidden"].double()
    truth = gradients([t.double() if t.is_floating_point() else t for t in x], grad, 0.0, "torch")[1]["hidden"]
    assert with_mean["hidden"] < 0.5 * (plain - truth).norm() / truth.norm()


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), ("hidden", "weight", "bias")], ids=repr)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_option_and_every_set_of_gradients(impl, needs, device):
    """Within the tolerance of the exact mode, ignored rows exactly 0."""
    x = [t.to(on(impl, device)) for t in peaked()]
    x[2][3::5] = -100
    options = {name: value for name, value in EVERY_OPTION.items() if name != "bias"} | {"softcap": 20.0}
    bias = torch.linspace(-1, 1, V, device=x[0].device)
    grad = torch.randn(N, device=x[0].device)
    _, exact, _ = gradients(x, grad, 0.0, impl, needs=needs, bias=bias, **options)
    _, got, record = gradients(x, grad, 2**-4, impl, needs=needs, bias=bias, **options)
    assert got.keys() == exact.keys() == set(needs)
    assert 0 < record.share <= 2**-4
    for name in needs:
        assert (got[name] - exact[name]).norm() <= 2 * 2**-4 * exact[name].norm()
    if "hidden" in needs:
        assert not got["hidden"][3::5].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_bits(impl, device):
    """Two runs are equal; a tolerance that nothing meets leaves the exact gradients."""
    x = [t.to(on(impl, device)) for t in peaked()]
    grad = torch.randn(N, device=x[0].device)
    first, second = (gradients(x, grad, 2**-4, impl)[1] for _ in range(2))
    exact, strict = (gradients(x, grad, tolerance, impl)[1] for tolerance in (0.0, 1e-12))
    for name in first:
        assert torch.equal(first[name], second[name])
        assert torch.equal(strict[name], exact[name])
        assert not torch.equal(first[name], exact[name])


def test_a_half_precision_head_and_autocast():
    hidden, weight, targets = peaked(dtype=torch.bfloat16)
    _, exact, _ = gradients((hidden, weight, targets), torch.ones(N), 0.0, "torch")
    _, got, _ = gradients((hidden, weight, targets), torch.ones(N), 2**-6, "torch")
    assert got["weight"].dtype == torch.bfloat16
    for name in got:
        assert (got[name].float() - exact[name].float()).norm() <= 2**-5 * exact[name].float().norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, under, _ = gradients((hidden.float(), weight.float(), targets), torch.ones(N), 2**-6, "torch")
    assert under["weight"].dtype == torch.float32
    assert (under["weight"] - exact["weight"].float()).norm() <= 2**-5 * exact["weight"].float().norm()


def test_the_cost_is_what_the_kept_columns_say():
    """Forward 1 unit, backward 3 K / V; besides, the statistic and the mean: 1 / D and blocks / N units."""
    n = 48  # whole blocks: the portable forward multiplies whole tiles
    x = peaked(n)
    with count_cost() as cost:
        _, _, record = gradients(x, torch.ones(n), 2**-4, "torch")
    assert record.exact_blocks == 0
    products = 2 * D * (n * V + 3 * 16 * record.kept_columns + 3 * V)
    assert cost.flops == products + 2 * n * V
    assert cost.launches["statistic"] == n // 8 * math.ceil(V / 32)
    with count_cost() as frozen:
        record = gradients(x, torch.ones(n), 2**-4, "torch", needs=("hidden",))[2]
    assert frozen.flops == 2 * D * (n * V + 2 * 16 * record.kept_columns + 3 * V) + 2 * n * V


def test_rows_without_a_gradient_cost_nothing():
    """TRL on a CPU scores prompts and padding too and masks them afterwards. A block of such rows alone is not made."""
    x, grad = peaked(48), torch.ones(48)
    grad[::2] = grad[16:32] = 0.0
    with count_cost() as cost:
        _, got, record = gradients(x, grad, 2**-4, "torch")
    assert (record.blocks, record.exact_blocks) == (2, 0)
    assert cost.flops == 2 * D * (48 * V + 3 * 8 * record.kept_columns + 2 * V) + 2 * 48 * V
    assert not got["hidden"][grad == 0].any()
    check_promise(x, grad, 2**-4, "torch")
    none = gradients(x, torch.zeros(48), 2**-4, "torch")
    assert none[1].keys() == {"hidden", "weight"}
    assert not any(t.any() for t in none[1].values())


def test_the_triton_backward_costs_three_passes_of_the_kept_columns(device):
    x = [t.to(device) for t in peaked(48)]
    with count_cost() as cost:
        record = gradients(x, torch.ones(48, device=device), 2**-4, "triton")[2]
    assert record.exact_blocks == 0
    assert cost.flops == 2 * D * (48 * V + 3 * 16 * record.kept_columns + 3 * V) + 2 * 48 * V


def test_the_gradient_of_an_entropy_is_exact():
    hidden, weight, targets = peaked()
    grads = []
    for tolerance in (0.0, 2**-3):
        h = hidden.clone().requires_grad_()
        logps, extra = prefuse.linear_logprobs(
            h, weight, targets, outputs=("entropy",), impl="torch", gradient_tolerance=tolerance
        )
        (logps + extra["entropy"]).sum().backward()
        grads.append(h.grad)
    assert torch.equal(*grads)


def test_a_preference_loss_says_what_was_skipped():
    hidden, weight, targets = peaked()
    cu_seqlens = torch.tensor([0, 20, 30, 45, N], dtype=torch.int32)
    results = []
    for tolerance in (0.0, 2**-4):
        h, w = (t.clone().requires_grad_() for t in (hidden, weight))
        out = prefuse.linear_preference_loss(
            h, w, targets, cu_seqlens, torch.full((N,), -4.0), prefuse.DPO(), impl="torch", workspace=0,
            gradient_tolerance=tolerance,
        )  # fmt: skip
        out.loss.backward()
        results.append((out, h.grad, w.grad))
    (exact, *expected), (out, *got) = results
    assert torch.equal(out.loss, exact.loss)
    assert "head/skipped_mass" not in exact.metrics
    assert 0 < prefuse.reduce_metrics(out.metrics)["head/skipped_mass"] <= 2**-4
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 2 * 2**-4 * b.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gradient_tolerance": 1.0}, r"gradient_tolerance must be in \[0, 1\), 0.0 for the exact gradient, got 1.0"),
        ({"gradient_tolerance": -0.1}, r"must be in \[0, 1\)"),
        ({"impl": "reference"}, 'impl="reference" is exact: set gradient_tolerance to 0.0'),
        ({"vocab_group": object()}, "gradient_tolerance takes a whole head: leave out vocab_group"),
        ({"hidden": torch.zeros(N, D, dtype=torch.float16)}, "gradient_tolerance has no float16"),
    ],
)
def test_what_cannot_be_sparse_is_refused_by_name(change, message):
    hidden, weight, targets = peaked()
    arguments = {"hidden": hidden, "weight": weight, "targets": targets, "impl": "torch", "gradient_tolerance": 0.1}
    with pytest.raises(ValueError, match=message):
        prefuse.linear_logprobs(**arguments | change)


def test_a_second_derivative_is_refused():
    hidden, weight, targets = peaked()
    hidden.requires_grad_()
    logps = prefuse.linear_logprobs(hidden, weight, targets, impl="torch", gradient_tolerance=0.1)
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl=\"reference\""):
        torch.autograd.grad(logps.sum(), hidden, create_graph=True)


def test_the_page_that_explains_it_runs(monkeypatch):
    monkeypatch.undo()  # with the real tiles
    text = (Path(__file__).parents[2] / "docs" / "sparse_backward.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "docs/sparse_backward.md", "exec"), {})


@pytest.mark.slow
def test_it_takes_the_gathered_rows_beyond_the_exact_mode():
    """The kept rows of the weight, whose gradient takes their place, and some numbers for each column."""
    n, d, v = 64, 64, 6000
    hidden, weight = torch.randn(n, d), 0.9 * torch.randn(v, d)
    targets = torch.multinomial((hidden @ weight.T).softmax(-1), 1)[:, 0]

    def step(tolerance):
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        prefuse.linear_logprobs(h, w, targets, impl="torch", gradient_tolerance=tolerance).sum().backward()

    with record_skipped_mass() as record:
        step(2**-4)
    assert record.exact_blocks == 0
    kept = record.kept_columns / record.blocks
    assert kept < v / 8
    gathered = 4 * d * 1.3 * kept  # (the largest block has some more than the mean)
    exact, sparse = (peak_bytes(lambda tolerance=tolerance: step(tolerance)) for tolerance in (0.0, 2**-4))
    # For each column: the statistic of each block twice, and the order of one block.
    assert sparse <= exact + gathered + 4 * v * (2 * record.blocks + 8) + 2 * 4 * n * d
