"""The numerics contract row by row: ignored tokens, targets that are nearly sure, logits at the edge, padding."""

import functools
import math

import pytest
import torch

import prefuse
from contract_cases import DTYPES, IMPLS, head, on
from prefuse.bench.truth import oracle
from prefuse.bench.truth.head_cases import NEEDS, check_head, evaluate, random_inputs
from prefuse.kernels import slices

pytest.importorskip("triton")

from prefuse.kernels import launch


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(slices, "TILE", {"cpu": (8, 16), "cuda": (8, 16)})


# ---- ignored tokens ------------------------------------------------------------------------------

FINITE, NAN, INF = 3.0, float("nan"), float("inf")


@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("value", [FINITE, NAN, INF])
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_an_ignored_row_leaves_no_trace(impl, value, needs, device, small_tiles):
    """Not in a bit, whatever its hidden state holds; and its own gradient is exactly 0, upstream or not."""
    inputs = random_inputs(21, 16, 41, bias=True, ignored=0.3, device=on(impl, device))
    ignored = inputs.targets == -100
    other = inputs.but(hidden=torch.where(ignored[:, None], value, inputs.hidden))
    grad = torch.randn(21, device=inputs.hidden.device)
    asked = {"grad_entropy": grad, "outputs": oracle.OUTPUTS} if needs == "trainable" else {}
    first, second = (evaluate(head(impl), x, NEEDS[needs], grad, **asked).tensors() for x in (inputs, other))
    for name, x in first.items():
        assert torch.equal(second[name], x), name
    assert not first["logps"][ignored].any()
    assert not first["dhidden"][ignored].any()
    assert first["dhidden"][~ignored].any(1).all()


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_which_number_means_ignored_changes_no_bit(impl, device, small_tiles):
    # Far outside of the vocabulary, just outside, and three of its columns, which no row that counts has for target.
    inputs = random_inputs(21, 16, 41, ignored=0.3, device=on(impl, device))
    ignored = inputs.targets == -100
    free = inputs.targets.remainder(38) + 2
    grad = torch.randn(21, device=inputs.hidden.device)

    def run(number):
        x = inputs.but(targets=torch.where(ignored, number, free))
        return evaluate(head(impl), x, NEEDS["trainable"], grad, ignore_index=number).tensors()

    expected = run(-100)
    for number in (0, 40, 1, 41, -1):
        for name, x in run(number).items():
            assert torch.equal(x, expected[name]), (number, name)


# ---- gradients where the target's own term cancels -----------------------------------------------


def rows_with_target_probability(p, n, d, v, dtype):
    """Hidden states that give their targets probability `p` before rounding: how far they point there is bisected."""
    inputs = random_inputs(n, d, v, torch.float64, spread=1.0)
    towards = inputs.weight[inputs.targets] / inputs.weight[inputs.targets].square().sum(1, keepdim=True)
    low, high = torch.full((n, 1), -60.0).double(), torch.full((n, 1), 60.0).double()
    for _ in range(60):
        middle = (low + high) / 2
        logps, _ = oracle.head(inputs.hidden + middle * towards, inputs.weight, inputs.targets)
        below = (logps.exp() < p)[:, None]
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return inputs.but(hidden=(inputs.hidden + low * towards).to(dtype), weight=inputs.weight.to(dtype))


def relative_error(x, truth):
    return ((x.double() - truth).norm() / truth.norm()).item()


@pytest.mark.quick_cases(every=5)
@pytest.mark.parametrize("p", [1e-4, 0.1, 0.9, 0.99, 0.999, 0.9999, 0.99999])
@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("impl", "n"), [("torch", 1), ("torch", 128), ("triton", 17)])
def test_gradients_are_no_worse_than_eagers_at_any_target_probability(impl, n, dtype, needs, p, device):
    inputs = rows_with_target_probability(p, n, 32, 150, dtype)
    inputs = inputs.but(**{k: getattr(inputs, k).to(on(impl, device)) for k in ("hidden", "weight", "targets")})
    grad = torch.randn(n, device=inputs.hidden.device)
    truth = evaluate(oracle.head, inputs.exact(), NEEDS[needs], grad.double())
    eager = evaluate(oracle.head, inputs, NEEDS[needs], grad, dtype=dtype)
    made = evaluate(head(impl), inputs, NEEDS[needs], grad)
    assert (truth.logps.exp() - p).abs().max() < 0.1 * min(p, 1 - p) + 16 * torch.finfo(dtype).eps * p * (1 - p) + 1e-5
    largest = (inputs.exact().hidden @ inputs.exact().weight.T).abs().max().item()
    # Terms and result are rounded to the dtype; the float32 logits that p comes from are off by their own rounding.
    floor = torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps * largest
    for name, expected in truth.grads.items():
        error, yardstick = relative_error(made.grads[name], expected), relative_error(eager.grads[name], expected)
        assert error <= max(yardstick, floor), f"d{name}: {error:.3g}, eager {yardstick:.3g}"
        assert error <= 2 * floor, f"d{name}: {error:.3g} at p = {p}"


@pytest.mark.parametrize("impl", IMPLS)
def test_a_backward_in_many_pieces_loses_no_digits(impl, device, monkeypatch):
    """Sums over row blocks and slices are kept in float32: one block or many, the same but for their order."""
    n, v = (400, 40) if impl == "torch" else (60, 40)
    inputs = random_inputs(n, 16, v, torch.bfloat16, weight_dtype=torch.float32, device=on(impl, device))
    grad = torch.ones(n, device=inputs.hidden.device)
    whole = evaluate(head(impl), inputs, NEEDS["frozen trunk"], grad).grads["weight"]
    monkeypatch.setattr(slices, "TILE", {"cpu": (8, 16), "cuda": (8, 16)})
    monkeypatch.setattr(slices, "BUFFER_BYTES", 1)
    monkeypatch.setattr(launch, "SLICE", 32)
    monkeypatch.setattr(launch, "BUFFER_BYTES", 16 * 32 * 2)
    pieces = evaluate(head(impl), inputs, NEEDS["frozen trunk"], grad).grads["weight"]
    rounding = torch.finfo(torch.float32).eps * math.sqrt(n) * inputs.hidden.abs().max().item()
    assert (pieces - whole).abs().max().item() <= 2 * rounding


@pytest.mark.parametrize("impl", IMPLS)
def test_what_all_rows_of_a_frozen_head_have_in_common_cancels(impl, device):
    """d logp / d hidden is W[y] less a mean of W: rounding the weights of that mean must not shift what they sum to."""
    inputs = random_inputs(17, 16, 150, torch.bfloat16, device=on(impl, device))
    inputs.hidden[:, -1], inputs.weight[:, -1] = 0.0, 256.0
    grad = torch.ones(17, device=inputs.hidden.device)
    made = evaluate(head(impl), inputs, NEEDS["frozen head"], grad).grads["hidden"]
    # float32 sums of 150 terms. With weights rounded to bf16 that do not sum to their own normalizer it is some 0.1.
    assert made[:, -1].abs().max() <= 256 * math.sqrt(150) * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("pairs", [1, 8, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_a_preference_loss_are_no_worse_than_eagers(pairs, dtype):
    lengths = torch.randint(1, 8, (2 * pairs,))
    cu_seqlens = torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]).int()
    inputs = random_inputs(int(cu_seqlens[-1]), 48, 300, dtype, spread=3.0)
    ref_logps = evaluate(oracle.head, inputs.exact()).logps.float() + 0.1 * torch.randn(len(inputs.targets))

    def gradients(run, x):
        leaves = x.leaves(("hidden", "weight"))
        run(leaves).backward()
        return leaves.hidden.grad, leaves.weight.grad

    def eager(x, dtype):
        logps, _ = oracle.head(x.hidden, x.weight, x.targets, dtype=dtype)
        sums = torch.stack([part.sum() for part in (logps - ref_logps.to(dtype)).split(lengths.tolist())])
        return -torch.nn.functional.logsigmoid(0.1 * (sums[0::2] - sums[1::2])).mean()

    def fused(x):
        return prefuse.linear_preference_loss(x.hidden, x.weight, x.targets, cu_seqlens, ref_logps).loss

    truth = gradients(lambda x: eager(x, torch.float64), inputs.exact())
    yardsticks = gradients(lambda x: eager(x, dtype), inputs)
    largest = (inputs.exact().hidden @ inputs.exact().weight.T).abs().max().item()
    floor = torch.finfo(dtype).eps + 2 * torch.finfo(torch.float32).eps * largest
    for made, yardstick, expected in zip(gradients(fused, inputs), yardsticks, truth, strict=True):
        assert relative_error(made, expected) <= max(relative_error(yardstick, expected), floor)


# ---- logits at the edge --------------------------------------------------------------------------


def biased(device, *changes, n=19, d=8, v=70, dtype=torch.float32, spread=1.0):
    """Inputs whose bias is 0 but for `changes`, (columns, value) each."""
    inputs = random_inputs(n, d, v, dtype, spread=spread, device=device)
    bias = torch.zeros(v, device=device)
    for columns, value in changes:
        bias[columns] = value
    return inputs.but(bias=bias)


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("gap", [30.0, 50.0, 100.0, 1000.0, 10_000.0])
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_a_target_far_under_another_logit(impl, gap, device, small_tiles):
    # Column 33 towers over the others; its own row has it for target.
    inputs = biased(on(impl, device), (33, gap))
    inputs.targets[5] = 33
    check_head(head(impl), inputs)
    check_head(head(impl), inputs, NEEDS["frozen head"], entropy=False)


@pytest.mark.parametrize("gap", [50.0, 1000.0])
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_towers_that_rise_as_the_vocabulary_passes_by(impl, gap, device, small_tiles):
    # In every tile one that is higher than all before, by little: what was summed is rescaled, and still matters. The
    # kernels have several tiles in a segment, and the segments have different maxima.
    towers = range(5, 230, 25)
    inputs = biased(on(impl, device), *((column, gap + column / 200) for column in towers), v=230)
    inputs = inputs.but(targets=torch.where(inputs.targets % 25 == 5, 6, inputs.targets))
    result = check_head(head(impl), inputs)
    assert (result.logps < -gap / 2).all()
    assert (result.outputs["entropy"] > 1).all()


# One column; a whole first tile and more; the last tile with the rest; all but two columns.
MASKED = {
    "one": [3], "first tile": range(0, 35), "last tile": range(60, 70), "middle": range(20, 64),
    "all but two": [*range(1, 40), *range(41, 70)],
}  # fmt: skip


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_columns_of_minus_infinity(impl, masked, softcap, device, small_tiles):
    """A bias of -inf takes columns out of the vocabulary (with a softcap, only down to the cap). No NaN anywhere."""
    columns = list(MASKED[masked])
    inputs = biased(on(impl, device), (columns, -math.inf))
    open_columns = torch.tensor([v for v in range(70) if v not in columns], device=inputs.hidden.device)
    inputs = inputs.but(targets=open_columns[inputs.targets % len(open_columns)])
    check_head(head(impl), inputs, softcap=softcap)
    check_head(head(impl), inputs, NEEDS["frozen head"], entropy=False, softcap=softcap)


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_a_target_of_minus_infinity_has_that_log_probability_and_no_nan_beside_it(impl, device, small_tiles):
    inputs = biased(on(impl, device), ([3, 40], -math.inf))
    inputs.targets[[2, 7]] = torch.tensor([3, 40], device=inputs.hidden.device)
    result = check_head(head(impl), inputs)
    assert result.logps[[2, 7]].tolist() == [-math.inf, -math.inf]


@pytest.mark.parametrize("spread", [1e2, 1e4])
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_huge_logits(impl, spread, device, small_tiles):
    check_head(head(impl), random_inputs(19, 8, 70, bias=True, spread=spread, device=on(impl, device)))


# Neither vocabulary is a multiple of a tile. A tail column of zeros that slipped in, or one that the softcap turned
# from -inf into -cap, would outweigh everything.
@pytest.mark.quick_cases(every=5)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [35, 70])
@pytest.mark.parametrize("softcap", [None, 1.0, 30.0])
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_the_tail_of_the_vocabulary_has_no_mass(impl, softcap, v, dtype, device, small_tiles):
    place = on(impl, device)
    inputs = random_inputs(19, 8, v, dtype, device=place)
    # Strongly negative throughout, by the products themselves and not by a bias.
    inputs = inputs.but(hidden=inputs.hidden.abs() + 1, weight=-(inputs.weight.abs() + 8))
    result = check_head(head(impl), inputs, entropy=dtype == torch.float32, softcap=softcap)
    assert (result.logps < 0).all()


@pytest.mark.parametrize("shift", [10.0, -37.5])
@pytest.mark.parametrize("impl", IMPLS)
def test_the_same_number_on_every_logit_changes_nothing(impl, shift, device):
    inputs = random_inputs(19, 8, 70, bias=True, device=on(impl, device))
    grad = torch.randn(19, device=inputs.hidden.device)
    run = functools.partial(
        evaluate, head(impl), needs=NEEDS["trainable"], grad=grad, grad_entropy=grad, outputs=("entropy",)
    )
    expected, shifted = run(inputs).tensors(), run(inputs.but(bias=inputs.bias + shift)).tensors()
    # What a logit loses when a float32 as large as the shift stands beside it, on the way in and in its exponential.
    rounding = 4 * torch.finfo(torch.float32).eps * (abs(shift) + 10)
    for name, x in expected.items():
        assert (shifted[name] - x).abs().max() <= rounding * max(1.0, x.abs().max().item()), name


# ---- upstream gradients --------------------------------------------------------------------------


@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_any_upstream_gradient_is_taken_by_row(impl, needs, device, small_tiles):
    """Expanded (a sum's), strided, float64, zero in places: always as if each row had its own."""
    inputs = random_inputs(19, 8, 41, device=on(impl, device))
    own = torch.randn(19, device=inputs.hidden.device)
    own[3] = 0.0

    def gradients(loss):
        leaves = inputs.leaves(NEEDS[needs])
        logps = head(impl)(leaves.hidden, leaves.weight, leaves.targets)
        loss(logps).backward()
        return [getattr(leaves, name).grad for name in NEEDS[needs] if name != "bias"]

    def by_row(g):
        return gradients(lambda x: x.backward(g, retain_graph=True) or (x * 0).sum())

    ones = torch.ones_like(own)
    for made, expected in [
        (gradients(lambda x: x.sum()), by_row(ones)),
        (gradients(lambda x: (x[None].expand(3, 19) * own).sum() / 3), by_row(own)),
        (by_row(torch.stack([own, own + 1], 1)[:, 0]), by_row(own)),
        (gradients(lambda x: (x.double() * own).sum()), by_row(own)),
    ]:
        for x, y in zip(made, expected, strict=True):
            torch.testing.assert_close(x, y)
    assert not by_row(own)[0][3].any()
    assert not any(x.any() for x in by_row(torch.zeros_like(own)))


@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_graph_kept_gives_its_gradients_again(impl, needs, device):
    inputs = random_inputs(19, 8, 41, device=on(impl, device)).leaves(NEEDS[needs])
    logps = head(impl)(inputs.hidden, inputs.weight, inputs.targets)
    first, second, doubled = (
        torch.autograd.grad(logps, inputs.hidden, g, retain_graph=True)[0]
        for g in (torch.ones_like(logps), torch.ones_like(logps), 2 * torch.ones_like(logps))
    )
    assert torch.equal(first, second)
    assert torch.equal(2 * first, doubled)  # a power of two rounds nothing


def test_a_backward_does_not_touch_what_it_was_given():
    inputs = random_inputs(19, 8, 41, bias=True, ignored=0.2)
    before = [x.clone() for x in (inputs.hidden, inputs.weight, inputs.targets, inputs.bias)]
    evaluate(head("torch"), inputs, NEEDS["trainable"], torch.randn(19), outputs=oracle.OUTPUTS, softcap=3.0)
    for x, y in zip((inputs.hidden, inputs.weight, inputs.targets, inputs.bias), before, strict=True):
        assert torch.equal(x, y)


# ---- padded vocabularies -------------------------------------------------------------------------


@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("impl", IMPLS)
def test_a_slice_leaves_padded_rows_out(impl, needs, device, small_tiles):
    """`weight[:vocab_size]` is a view: the rows behind it are never read, and their gradient is exactly 0."""
    vocab = 61
    inputs = random_inputs(21, 16, 64, bias=True, device=on(impl, device))
    inputs = inputs.but(targets=inputs.targets % vocab)
    inputs.weight[vocab:] = math.nan
    inputs.bias[vocab:] = math.nan

    def sliced(hidden, weight, targets, bias=None, **options):
        return head(impl)(hidden, weight[:vocab], targets, bias=bias[:vocab], **options)

    grad = torch.randn(21, device=inputs.hidden.device)
    padded = evaluate(sliced, inputs, NEEDS[needs], grad)
    short = inputs.but(weight=inputs.weight[:vocab].clone(), bias=inputs.bias[:vocab].clone())
    alone = evaluate(head(impl), short, NEEDS[needs], grad)
    assert torch.equal(padded.logps, alone.logps)
    for name, expected in alone.grads.items():
        made = padded.grads[name]
        assert torch.equal(made[: len(expected)], expected), name
        assert not made[len(expected) :].any(), name


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_rows_that_stay_count_as_the_models_own_logits_have_them(impl, device, small_tiles):
    """An embedding padded with zeros puts e^0 into every denominator; so does `model(...).logits`."""
    inputs = random_inputs(21, 16, 64, device=on(impl, device))
    inputs = inputs.but(targets=inputs.targets % 61)
    inputs.weight[61:] = 0.0
    check_head(head(impl), inputs)
