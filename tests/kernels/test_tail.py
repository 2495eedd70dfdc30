"""The tail kernel: sums, log-ratios, z0, loss, derivative and metrics in one launch each way, equal to the torch path.

On a GPU where there is one, else interpreted: then a program takes 16 tokens or 4 pairs in a step, and programs arrive
in a shuffled order.
"""

import contextlib
import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prefuse
from prefuse import DPO, IPO, KTO, SFT, Mismatched
from prefuse.bench.truth import oracle
from prefuse.bench.truth.head_cases import random_inputs

pytest.importorskip("triton")

import triton

from aot_worker import compiling_processes
from prefuse.kernels import checks
from prefuse.kernels.preference import launch as triton_tail
from prefuse.kernels.preference import tail
from prefuse.kernels.tiles.shipped import TAIL_VARIANTS, compile_tail

ops = torch.ops.prefuse
EPS32, EPS64 = 2.0**-23, 2.0**-52

if torch.cuda.is_available():
    program_order = contextlib.nullcontext  # the hardware's own
else:
    from strict_interpreter import program_order, sparse_tensor

# No sequence; empty ones; fewer tokens than a step, as many, one more; several steps with and without a rest. 26
# sequences are three steps of pairs and a rest, and six and a rest of labelled ones.
LENGTHS = {
    "none": [],
    "empty": [0, 0],
    "one pair": [1, 1],
    "steps": [16, 17, 15, 32],
    "unequal": [3, 0, 40, 17, 0, 0, 33, 1],
    "many": [(7 * s) % 19 for s in range(26)],
    "long": [300, 90],
}
LOSSES = [DPO(), DPO(0.3, 0.2), IPO(), IPO(0.2, average=False), KTO(), KTO(0.3, 1.3, 0.7)]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def labels_of(count):
    return torch.arange(count) % 3 != 1


def batch(loss, lengths, device, per_token=True, z0=0.15):
    """Arguments of `preference_loss`; the policy's log-probabilities wander from the reference's."""
    n = sum(lengths)
    ref_logps = -torch.rand(n) * 3
    logps = ref_logps + 0.3 * torch.randn(n)
    if not per_token:
        ref_logps = torch.tensor(oracle.sequence_sums(ref_logps, lengths), dtype=torch.float64)
    arguments = {"logps": logps, "ref_logps": ref_logps, "cu_seqlens": offsets(lengths)}
    if isinstance(loss, KTO):
        arguments |= {"labels": labels_of(len(lengths)), "z0": z0}
    return {"loss": loss, **{k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}}


def evaluate(impl, arguments, upstream=1.7, **options):
    """Every number of one call, and the gradient of `upstream` times its loss."""
    logps = arguments["logps"].detach().requires_grad_()
    out = prefuse.preference_loss(**{**arguments, "logps": logps}, **options, impl=impl)
    (upstream * out.loss).backward()
    numbers = {"loss": out.loss.detach(), "losses": out.losses, "logps": out.logps, "rewards": out.rewards}
    return {**numbers, **out.metrics, "gradient": logps.grad}


def assert_equal(made, expected, scale=1.0):
    """To rounding: float64 to 1e-12 of what was summed, float32 to its last digit."""
    assert list(made) == list(expected)
    for name, x in expected.items():
        assert (made[name].dtype, made[name].shape) == (x.dtype, x.shape), name
        exact = x.dtype == torch.float64
        torch.testing.assert_close(
            made[name], x, rtol=1e-12 if exact else EPS32, atol=1e-13 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---- the torch path, and plain Python ------------------------------------------------------------


@pytest.mark.parametrize("per_token", [True, False], ids=["per token", "per sequence"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_the_tail_equals_the_torch_path(loss, lengths, per_token, device):
    arguments = batch(loss, LENGTHS[lengths], device, per_token)
    assert_equal(evaluate("triton", arguments), evaluate("torch", arguments), scale=max(LENGTHS[lengths], default=0))


def plain_losses(loss, ratios, lengths, labels, z0):
    """Every loss as a function of the log-ratios, in plain Python."""
    if isinstance(loss, KTO):
        weights = (loss.desirable_weight, loss.undesirable_weight)
        return [oracle.kto(r, label, z0, loss.beta, *weights) for r, label in zip(ratios, labels, strict=True)]
    if isinstance(loss, IPO):
        h = [r / max(n, 1) if loss.average else r for r, n in zip(ratios, lengths, strict=True)]
        return [oracle.ipo(h[i], h[i + 1], loss.beta) for i in range(0, len(h), 2)]
    return [oracle.dpo(*ratios[i : i + 2], loss.beta, loss.label_smoothing) for i in range(0, len(ratios), 2)]


@pytest.mark.parametrize("lengths", ["one pair", "unequal", "many"])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_the_tail_agrees_with_plain_python(loss, lengths, device):
    lengths = LENGTHS[lengths]
    arguments = batch(loss, lengths, device)
    labels, z0 = labels_of(len(lengths)).tolist(), 0.15
    logps, ref_logps = arguments["logps"].double().cpu(), arguments["ref_logps"].double().cpu()
    ratios = oracle.sequence_sums(logps - ref_logps, lengths)
    made = evaluate("triton", arguments, upstream=1.0)

    def close(name, expected, rtol, atol):
        torch.testing.assert_close(
            made[name].double().cpu(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=atol
        )

    expected = plain_losses(loss, ratios, lengths, labels, z0)
    close("losses", expected, EPS32, 4 * EPS64)
    close("loss", math.fsum(expected) / len(expected), EPS32, 0)
    close("logps", oracle.sequence_sums(logps, lengths), 1e-14, 0)
    close("rewards", [loss.beta * r for r in ratios], EPS32, 1e-15)

    # Each token's derivative is its sequence's: a central difference, whose error is step^2 and rounding / step.
    step, gradient = 1e-4, []
    for s, n in enumerate(lengths):
        up, down = (plain_losses(loss, [r + (i == s) * h for i, r in enumerate(ratios)], lengths, labels, z0)
                    for h in (step, -step))  # fmt: skip
        slope = math.fsum(a - b for a, b in zip(up, down, strict=True)) / (2 * step) / len(expected)
        gradient += [slope] * n
    close("gradient", gradient, 1e-6, 1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_metrics_agree_with_plain_python(loss, device):
    lengths = LENGTHS["many"]
    arguments = batch(loss, lengths, device)
    logps, ref_logps = arguments["logps"].double().cpu(), arguments["ref_logps"].double().cpu()
    rewards = [loss.beta * r for r in oracle.sequence_sums(logps - ref_logps, lengths)]
    sums = oracle.sequence_sums(logps, lengths)
    chosen = labels_of(26).tolist() if isinstance(loss, KTO) else [s % 2 == 0 for s in range(26)]
    expected = {}
    for name, values in (("rewards", rewards), ("logps", sums)):
        for side, wanted in (("chosen", True), ("rejected", False)):
            picked = [x for x, is_chosen in zip(values, chosen, strict=True) if is_chosen == wanted]
            expected[f"{name}/{side}"] = [math.fsum(picked), len(picked)]
    if isinstance(loss, KTO):
        expected["kl"] = [0.15, 1]
    else:
        margins = [rewards[i] - rewards[i + 1] for i in range(0, 26, 2)]
        expected["rewards/accuracies"] = [sum(m > 0 for m in margins), 13]
        expected["rewards/margins"] = [math.fsum(margins), 13]
    made = prefuse.preference_loss(**arguments, impl="triton").metrics
    assert set(made) == set(expected)
    for name, value in expected.items():
        assert made[name].tolist() == pytest.approx(value, rel=1e-12, abs=1e-13), name


# ---- the equations, at every end of the numbers --------------------------------------------------

# None, ordinary, large, beyond what an exponential in float64 holds; both signs.
RATIOS = [0.0, 1e-8, -0.3, 2.0, -15.0, 90.0, -800.0, 1e4, -1e4]
EQUATIONS = [
    *(DPO(beta, smoothing) for beta in (0.01, 5.0) for smoothing in (0.0, 0.1, 0.49)),
    *(IPO(beta, average) for beta in (0.01, 5.0) for average in (True, False)),
    *(KTO(beta, *weights) for beta in (0.01, 5.0) for weights in ((1.0, 1.0), (1.3, 0.7), (0.0, 2.0))),
]


def of_ratios(ratios, lengths, device):
    """Sequences that have exactly these log-ratios: log-probabilities of 0, and a reference per sequence."""
    zeros = torch.zeros(sum(lengths), device=device)
    return {
        "logps": zeros,
        "ref_logps": -torch.tensor(ratios, dtype=torch.float64, device=device),
        "cu_seqlens": offsets(lengths).to(device),
    }


def operate(arguments, loss, labels=None, z0=0.0, items=1.0):
    """The operator's outputs; the last is d total / d log-ratio in float64."""
    fields = {"label_smoothing": 0.0, "average": False, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    fields |= vars(loss)
    cu_seqlens = arguments["cu_seqlens"]
    order = ("beta", "label_smoothing", "average", "desirable_weight", "undesirable_weight")
    return ops.preference_tail_forward(
        arguments["logps"], arguments["ref_logps"], cu_seqlens, cu_seqlens.diff().long(), labels, None, None, None,
        None, None, z0, items, type(loss).__name__.lower(), *(fields[name] for name in order), False, False,
    )  # fmt: skip


@pytest.mark.parametrize("loss", EQUATIONS, ids=repr)
def test_each_device_equation_is_its_dataclass_everywhere(loss, device):
    """Losses, and derivatives in float64, over every pair of extremes (for KTO: every ratio, label and z0)."""
    unpaired = isinstance(loss, KTO)
    ratios = RATIOS * 2 if unpaired else [r for pair in itertools.product(RATIOS, RATIOS) for r in pair]
    lengths = [1 + s % 5 for s in range(len(ratios))]
    arguments = of_ratios(ratios, lengths, device)
    labels = (torch.arange(len(ratios)) < len(RATIOS)).to(device) if unpaired else None
    for z0 in (0.0, 0.4, 200.0) if unpaired else (None,):
        extra = {"labels": labels, "z0": z0} if unpaired else {}
        exact = {**arguments, "logps": arguments["logps"].double().requires_grad_()}
        expected = prefuse.preference_loss(**exact, loss=loss, **extra, impl="torch")
        expected.loss.backward()
        items = len(expected.losses)
        total, losses, _, rewards, _, slopes = operate(arguments, loss, labels, z0 or 0.0, float(items))
        assert losses.isfinite().all()
        assert slopes.isfinite().all()
        torch.testing.assert_close(losses, expected.losses, rtol=EPS32, atol=2.0**-149)
        torch.testing.assert_close(total, expected.loss.detach(), rtol=EPS32, atol=0)
        assert torch.equal(rewards, expected.rewards)
        first_tokens = arguments["cu_seqlens"][:-1].long()
        # PyTorch's sigmoid has the derivative y (1 - y), which cancels where y is near 1: up to its own rounding.
        atol = loss.beta * max(loss.desirable_weight, loss.undesirable_weight) * EPS64 / items if unpaired else 0.0
        torch.testing.assert_close(slopes, exact["logps"].grad[first_tokens], rtol=1e-12, atol=atol)


def test_kto_derivatives_keep_their_digits_where_the_sigmoid_is_flat(device):
    """beta w sigmoid(x) sigmoid(-x) is beta w exp(-|x|) far out, where 1 - sigmoid would be all rounding."""
    labels = torch.tensor([True, False], device=device)
    slopes = operate(of_ratios([60.0, -60.0], [1, 1], device), KTO(1.0), labels)[-1]
    assert slopes.tolist() == pytest.approx([-math.exp(-60.0), math.exp(-60.0)], rel=1e-12)


@pytest.mark.parametrize("loss", [DPO(0.1), DPO(0.7, 0.3)], ids=repr)
@pytest.mark.parametrize("lengths", ["unequal", "many", "long"])
def test_equal_policies_have_a_loss_of_ln_2_and_no_reward_exactly(loss, lengths, device):
    arguments = batch(loss, LENGTHS[lengths], device)
    out = prefuse.preference_loss(**{**arguments, "ref_logps": arguments["logps"]}, impl="triton")
    assert torch.equal(out.losses, torch.full_like(out.losses, math.log(2)))
    assert out.loss.item() == torch.tensor(math.log(2)).item()
    assert not out.rewards.any()
    assert not out.metrics["rewards/margins"][0]
    assert not out.metrics["rewards/accuracies"][0]


def test_equal_rewards_are_a_tie_and_no_win(device):
    """beta r_c - beta r_r of equal log-ratios, both rounded: a fused multiply-add would leave a difference."""
    arguments = of_ratios([r for x in range(1, 14) for r in (x / 7, x / 7)], [1] * 26, device)
    metrics = prefuse.preference_loss(**arguments, loss=DPO(0.1), impl="triton").metrics
    assert metrics["rewards/accuracies"].tolist() == [0, 13]
    assert metrics["rewards/margins"].tolist() == [0, 13]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_shows_as_in_torch(loss, value, device):
    arguments = batch(loss, LENGTHS["unequal"], device)
    arguments["logps"][5] = value  # in the third sequence
    made, expected = (evaluate(impl, arguments) for impl in ("triton", "torch"))
    for name, x in expected.items():
        torch.testing.assert_close(made[name], x, rtol=EPS32, atol=1e-12, equal_nan=True, msg=name)


def test_token_differences_are_taken_before_they_are_summed(device):
    """A thousand tokens at -10 nats, the policy one float32 step above its reference on each."""
    step, ref_logps = 2.0**-20, torch.full((1000,), -10.0, device=device)
    cu_seqlens = offsets([1000, 0]).to(device)
    out = prefuse.preference_loss(ref_logps + step, ref_logps, cu_seqlens, IPO(beta=1.0), impl="triton")
    assert out.rewards.tolist() == [1000 * step, 0.0]


# ---- KTO's reference point -----------------------------------------------------------------------


def mismatched(lengths, device, per_token=True, lift=0.1):
    n = sum(lengths)
    ref_logps = -torch.rand(n) * 5
    logps = ref_logps + lift + 0.3 * torch.randn(n)
    if not per_token:
        ref_logps = torch.tensor(oracle.sequence_sums(ref_logps, lengths), dtype=torch.float64)
    return Mismatched(logps.to(device), ref_logps.to(device), offsets(lengths).to(device))


@pytest.mark.parametrize("impl", ["triton", "torch"])
@pytest.mark.parametrize("per_token", [True, False], ids=["per token", "per sequence"])
@pytest.mark.parametrize("lengths", [[], [5], [0, 20, 3], LENGTHS["many"]], ids=len)
def test_z0_is_computed_from_mismatched_completions(lengths, per_token, impl, device):
    """More of them than sequences, and fewer; the same as a `kto_reference_point` given as a tensor."""
    given = mismatched(lengths, device, per_token)
    arguments = batch(KTO(0.3), LENGTHS["unequal"], device)
    sums = oracle.sequence_sums(given.logps, lengths)
    refs = oracle.sequence_sums(given.ref_logps, lengths if per_token else [1] * len(lengths))
    expected = oracle.kto_reference_point([x - y for x, y in zip(sums, refs, strict=True)])
    made = evaluate(impl, {**arguments, "z0": given})
    assert made["kl"].tolist() == pytest.approx([expected, 1.0], rel=1e-12)
    assert expected > 0 or not lengths
    assert_equal(made, evaluate("torch", {**arguments, "z0": prefuse.kto_reference_point(*given)}), scale=40)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_a_computed_z0_is_clamped_as_a_mean_and_stays_nan(impl, device):
    arguments = batch(KTO(), LENGTHS["unequal"], device)

    def z0_of(*ratios):
        given = Mismatched(torch.tensor(ratios), torch.zeros(len(ratios)), offsets([1] * len(ratios)))
        given = Mismatched(*(x.to(device) for x in given))
        out = prefuse.preference_loss(**{**arguments, "z0": given}, impl=impl)
        assert out.loss.isnan() == out.metrics["kl"][0].isnan()
        return out.metrics["kl"][0].item()

    assert z0_of(3.0, -1.0) == 1.0
    assert z0_of(-3.0, 1.0) == 0.0
    assert math.isnan(z0_of(3.0, math.nan))


@pytest.mark.parametrize("z0", [0.3, 0, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)], ids=repr)
def test_z0_may_be_a_number_or_a_tensor(z0, device):
    """A number is as exact as a float64, and a tensor may be the host's."""
    arguments = batch(KTO(0.3), LENGTHS["unequal"], device, z0=z0)
    made = evaluate("triton", arguments)
    assert made["kl"].tolist() == [float(z0), 1.0]
    assert_equal(made, evaluate("torch", arguments), scale=40)
    if isinstance(z0, torch.Tensor):
        assert torch.equal(made["losses"], evaluate("triton", {**arguments, "z0": z0.to(device)})["losses"])


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_no_gradient_reaches_reference_or_z0(impl, device):
    arguments = batch(KTO(), LENGTHS["unequal"], device)
    others = [arguments["ref_logps"], *mismatched([3, 4], device)[:2], torch.tensor(0.3, device=device)]
    for x in others:
        x.requires_grad_()
    for z0 in (Mismatched(*others[1:3], offsets([3, 4]).to(device)), others[3]):
        logps = arguments["logps"].clone().requires_grad_()
        out = prefuse.preference_loss(**{**arguments, "logps": logps, "z0": z0}, impl=impl)
        out.loss.backward()
        assert logps.grad.any()
    assert all(x.grad is None for x in others)


@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_label_leaves_the_other_side_uncounted(label, device):
    arguments = batch(KTO(), LENGTHS["many"], device)
    arguments["labels"] = torch.full((26,), label, device=device)
    metrics = prefuse.preference_loss(**arguments, impl="triton").metrics
    present, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert metrics[f"rewards/{present}"][1] == 26
    assert metrics[f"rewards/{absent}"].tolist() == metrics[f"logps/{absent}"].tolist() == [0, 0]


# ---- divisor, layouts, dtypes --------------------------------------------------------------------


@pytest.mark.parametrize("loss", [DPO(), KTO()], ids=repr)
@pytest.mark.parametrize(
    "num_items", [1, 2**24 + 1, torch.tensor(7), torch.tensor(7, dtype=torch.int32), torch.tensor(6.5)], ids=repr
)
def test_the_divisor_may_be_a_number_or_a_tensor(num_items, loss, device):
    arguments = batch(loss, LENGTHS["unequal"], device)
    for where in {"cpu", str(device)}:
        items = num_items.to(where) if isinstance(num_items, torch.Tensor) else num_items
        made, expected = (evaluate(impl, arguments, num_items=items) for impl in ("triton", "torch"))
        assert_equal(made, expected, scale=40)


def test_numbers_cross_in_float64(device):
    """beta, smoothing, weights, z0 and the divisor: none is a float32 in between, which would show at 1e-8."""
    arguments = of_ratios([1.0, 0.0], [1, 1], device)
    slopes = operate(arguments, DPO(0.1, 0.3), items=float(2**24 + 1))[-1]
    s = oracle.sigmoid(0.1)
    expected = 0.1 * (-0.7 * (1 - s) + 0.3 * s) / (2**24 + 1)
    assert slopes.tolist() == pytest.approx([expected, -expected], rel=1e-14)
    labels = torch.tensor([True, False], device=device)
    slopes = operate(arguments, KTO(0.1, 1.1, 0.7), labels, z0=0.3)[-1]
    s, t = oracle.sigmoid(0.07), oracle.sigmoid(-0.03)
    assert slopes.tolist() == pytest.approx([-0.11 * s * (1 - s), 0.07 * t * (1 - t)], rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_token", [True, False])
def test_any_dtype_of_log_probabilities_will_do(per_token, dtype, device):
    arguments = batch(DPO(), LENGTHS["unequal"], device, per_token)
    rounded = {**arguments, "logps": arguments["logps"].to(dtype), "ref_logps": arguments["ref_logps"].to(dtype)}
    made, expected = evaluate("triton", rounded), evaluate("torch", rounded)
    for numbers in (made, expected):
        numbers["gradient"] = numbers["gradient"].float()
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(made.pop("gradient"), expected.pop("gradient"), rtol=eps, atol=0)
    assert_equal(made, expected, scale=40)


@pytest.mark.parametrize("loss", [IPO(), KTO()], ids=repr)
def test_any_layout_will_do(loss, device):
    arguments = batch(loss, LENGTHS["unequal"], device)
    expected = evaluate("triton", arguments)

    def strided(x):
        return torch.stack([x, torch.full_like(x, 1)], 1)[:, 0]

    spread = {k: strided(x) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
    spread["cu_seqlens"] = strided(arguments["cu_seqlens"].long())
    assert not spread["logps"].is_contiguous()
    made = evaluate("triton", spread)
    for name, x in expected.items():
        assert torch.equal(made[name], x), name


def test_an_expanded_and_a_missing_upstream_gradient_will_do(device):
    arguments = batch(DPO(), LENGTHS["unequal"], device)
    logps = arguments["logps"].requires_grad_()
    out = prefuse.preference_loss(**arguments, impl="triton")
    (expanded,) = torch.autograd.grad(out.loss.expand(3).sum(), logps, retain_graph=True)
    (single,) = torch.autograd.grad(out.loss, logps, retain_graph=True)
    torch.testing.assert_close(expanded, 3 * single, rtol=EPS32, atol=0)
    (again,) = torch.autograd.grad(out.loss, logps)  # a graph kept gives its gradients again
    assert torch.equal(again, single)
    assert not any(x.requires_grad for x in (out.losses, out.logps, out.rewards, *out.metrics.values()))


def test_without_grad_mode_the_numbers_are_the_same_and_there_is_no_graph(device):
    arguments = batch(DPO(), LENGTHS["unequal"], device)
    with_graph = prefuse.preference_loss(**{**arguments, "logps": arguments["logps"].clone().requires_grad_()})
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = prefuse.preference_loss(**arguments, impl="triton")
        assert not out.loss.requires_grad
        torch.testing.assert_close(out.loss, with_graph.loss.detach(), rtol=EPS32, atol=0)


# ---- one launch, any order, any batch ------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of the operations that torch runs, views and bookkeeping left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in ("detach", "slice", "unbind", "alias", "view", "_unsafe_view", "select"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Names of the Triton kernels launched."""
    names = []
    if torch.cuda.is_available():

        def record(metadata):
            names.append(metadata.get()["name"])

        triton.knobs.runtime.launch_enter_hook.add(record)
        yield names
        triton.knobs.runtime.launch_enter_hook.remove(record)
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **k: names.append(self.fn.__name__) or launch(self, *a, **k)
    )
    yield names


@pytest.mark.parametrize("loss", [DPO(0.1, 0.1), IPO(), KTO()], ids=repr)
def test_each_way_is_one_launch(loss, launches, device):
    arguments = batch(loss, LENGTHS["many"], device)
    if isinstance(loss, KTO):
        arguments["z0"] = mismatched([3, 4, 5], device)
    logps = arguments["logps"].requires_grad_()
    prefuse.preference_loss(**arguments, impl="triton").loss.backward()  # what torch does once is done
    launches.clear()
    with Calls() as forward:
        out = prefuse.preference_loss(**arguments, impl="triton")
    assert launches == ["forward_kernel"]
    assert set(forward.names) - {"ne", "diff", "any", "lt"} <= {"sub", "_to_copy", "_local_scalar_dense",
                                                                "preference_tail_forward"}  # fmt: skip
    launches.clear()
    with Calls() as backward:
        torch.autograd.grad(out.loss, logps)
    assert launches == ["backward_kernel"]
    assert set(backward.names) <= {"ones_like", "preference_tail_backward"}


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_any_order_of_arrival_has_the_same_bits(loss, device):
    """Another program is the last, and adds everything up."""
    arguments = batch(loss, LENGTHS["many"], device)
    if isinstance(loss, KTO):
        arguments["z0"] = mismatched(LENGTHS["unequal"], device)
    runs = []
    for seed in (None, 1, 2):
        with program_order(seed):
            runs.append(evaluate("triton", arguments))
    for other in runs[1:]:
        for name, x in runs[0].items():
            assert torch.equal(other[name], x), name


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_sequence_has_the_same_bits_in_any_batch(loss, device):
    """Alone or beside others, first or last: losses, sums, rewards, gradients."""
    lengths = LENGTHS["many"]
    arguments = batch(loss, lengths, device)
    whole = evaluate("triton", arguments, num_items=5)
    cuts, group = offsets(lengths).tolist(), 1 if isinstance(loss, KTO) else 2
    for s in (0, 6, 24):
        part = slice(cuts[s], cuts[s + group])
        own = {**arguments, "cu_seqlens": offsets(lengths[s : s + group]).to(device)}
        own |= {name: arguments[name][part] for name in ("logps", "ref_logps")}
        if group == 1:
            own["labels"] = arguments["labels"][s : s + 1]
        alone = evaluate("triton", own, num_items=5)
        assert torch.equal(alone["gradient"], whole["gradient"][part])
        assert torch.equal(alone["losses"], whole["losses"][s // group : s // group + 1])
        for name in ("logps", "rewards"):
            assert torch.equal(alone[name], whole[name][s : s + group])


def test_a_large_batch_in_the_real_kernels_steps(device, monkeypatch):
    monkeypatch.setitem(triton_tail.BLOCKS, True, triton_tail.BLOCKS[False])
    count = 4096 if torch.cuda.is_available() else 530  # several steps of pairs, or one and a rest
    lengths = [s % 3 for s in range(count)]
    arguments = batch(IPO(), lengths, device)
    made, expected = evaluate("triton", arguments), evaluate("torch", arguments)
    assert_equal(made, expected, scale=40)


# ---- memory --------------------------------------------------------------------------------------


def forward_at(logps, ref_logps, cu_seqlens):
    """The launcher by itself: nothing looks at the offsets before it."""
    counts = cu_seqlens.diff().long()
    outputs = tail._empty_outputs(logps, counts, "dpo")
    triton_tail.forward(
        logps, ref_logps, cu_seqlens, counts, None, None, None, None, 0.0, 1.0, "dpo", 0.1, 0.0, False, (1.0, 1.0),
        True, False, outputs,
    )  # fmt: skip
    return outputs


@pytest.mark.skipif(torch.cuda.is_available(), reason="sparse memory is the interpreter's")
def test_offsets_beyond_two_to_the_31():
    first = 2**31 + 7
    values, refs = torch.randn(9), torch.randn(9)
    cu_seqlens = first + torch.tensor([0, 4, 9])

    def at_the_end(x):
        memory = sparse_tensor(torch.zeros(2), (first + 8,)).as_strided((first + 9,), (1,))
        memory[first:] = x
        return memory

    made = forward_at(at_the_end(values), at_the_end(refs), cu_seqlens)
    expected = forward_at(values, refs, cu_seqlens - first)
    for x, y in zip(made, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("wrong", [[0, 4, 100], [-9, 4, 9], [0, 100, 4]], ids=repr)
def test_offsets_that_nobody_checked_never_lead_out_of_bounds(wrong, device):
    """On CUDA they are not looked at, for that would wait for them."""
    values, cu_seqlens = torch.randn(9, device=device), torch.tensor(wrong, dtype=torch.int32, device=device)
    slopes = forward_at(values, values + 1, cu_seqlens)[-1]
    grad = triton_tail.backward(torch.ones((), device=device), slopes, cu_seqlens, 9)
    assert grad.isfinite().all()


def test_a_token_outside_of_every_sequence_has_no_gradient(device):
    slopes = torch.tensor([2.0, 3.0], dtype=torch.float64, device=device)
    cu_seqlens = torch.tensor([2, 4, 5], dtype=torch.int32, device=device)
    grad = triton_tail.backward(torch.ones((), device=device), slopes, cu_seqlens, 7)
    assert grad.tolist() == [0, 0, 2, 2, 3, 0, 0]


# ---- which implementation ------------------------------------------------------------------------


class Doubled(DPO):
    """Another equation under a known name."""

    def losses(self, seq):
        return 2 * super().losses(seq)


@pytest.mark.parametrize("loss", [SFT(), Doubled()], ids=repr)
def test_a_loss_that_the_kernel_does_not_know_runs_in_torch(loss, launches, device):
    arguments = batch(loss, LENGTHS["unequal"], device)
    if isinstance(loss, SFT):
        arguments["ref_logps"] = None
    made, expected = (evaluate(impl, arguments) for impl in ("triton", "torch"))
    assert not launches
    assert all(torch.equal(made[name], x) for name, x in expected.items())
    if isinstance(loss, Doubled):
        arguments["loss"] = DPO()
        torch.testing.assert_close(made["losses"], 2 * evaluate("torch", arguments)["losses"])


@pytest.mark.parametrize(("impl", "launched"), [("auto", 0), ("torch", 0), ("reference", 0), ("triton", 1)])
def test_only_who_asks_for_the_kernel_on_a_cpu_gets_it(impl, launched, launches):
    if torch.cuda.is_available():
        pytest.skip("about CPU tensors where the kernels are interpreted")
    prefuse.preference_loss(**batch(DPO(), [2, 3], "cpu"), impl=impl)
    assert len(launches) == launched


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_runs_by_itself(launches):
    prefuse.preference_loss(**batch(DPO(), [2, 3], "cuda"))
    assert launches == ["forward_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("z0", [0.3, torch.tensor(0.3)], ids=repr)
def test_nobody_waits_for_the_gpu(z0):
    arguments, others = batch(KTO(), LENGTHS["many"], "cuda", z0=z0), mismatched([3, 4], "cuda")
    for each in (z0, others):  # compile
        evaluate("triton", {**arguments, "z0": each})
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate("triton", arguments, num_items=torch.tensor(7, device="cuda"))
        evaluate("triton", {**arguments, "z0": others})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_asking_for_what_cannot_run_raises(monkeypatch, device):
    arguments = batch(DPO(), [2, 3], device)
    with pytest.raises(ValueError, match=r"impl must be one of \['auto', 'triton', 'torch', 'reference'\], got 'cuda'"):
        prefuse.preference_loss(**arguments, impl="cuda")
    with pytest.raises(RuntimeError, match='impl="triton" has no float64; use impl="torch" or "reference"'):
        prefuse.preference_loss(**{**arguments, "logps": arguments["logps"].double()}, impl="triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        with pytest.raises(RuntimeError, match='impl="triton" needs CUDA tensors, got cpu; use impl="torch"'):
            prefuse.preference_loss(**arguments, impl="triton")


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_what_does_not_fit_is_refused(impl, device):
    arguments = batch(KTO(), [2, 3], device)
    good = mismatched([3, 4], device)
    for wrong, message in [
        (good._replace(ref_logps=good.ref_logps[:5]), r"expected ref_logps \(7,\) per token or \(2,\) per sequence"),
        (good._replace(logps=good.logps[None]), r"expected logps \(N,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            prefuse.preference_loss(**{**arguments, "z0": wrong}, impl=impl)
    wrong = good._replace(ref_logps=good.ref_logps.to("meta"))
    with pytest.raises(TypeError, match=f"z0.ref_logps is on meta but logps is on {device.type}.*; move one of them"):
        prefuse.preference_loss(**{**arguments, "z0": wrong}, impl=impl)
    for name in ("ref_logps", "labels"):
        with pytest.raises(TypeError, match=f"{name} is on meta but logps is on {device.type}.*; move one of them"):
            prefuse.preference_loss(**{**arguments, name: arguments[name].to("meta")}, impl=impl)


def test_a_second_derivative_is_refused(device):
    arguments = batch(DPO(), [2, 3], device)
    logps = arguments["logps"].requires_grad_()
    out = prefuse.preference_loss(**arguments, impl="triton")
    (first,) = torch.autograd.grad(out.loss, logps, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative in Triton.*impl=\"torch\""):
        first.square().sum().backward()


# ---- as torch sees it ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
@pytest.mark.parametrize("given", ["numbers", "tensors"])
def test_the_operators_pass_opcheck(loss, given, device):
    arguments = batch(DPO(), LENGTHS["unequal"], device)
    logps, ref_logps, cu_seqlens = (arguments[name] for name in ("logps", "ref_logps", "cu_seqlens"))
    labels = labels_of(8).to(device) if loss == "kto" else None
    others = mismatched([3, 4], device) if loss == "kto" and given == "tensors" else (None, None, None)
    items = torch.tensor(3, device=device) if given == "tensors" else None
    torch.library.opcheck(
        ops.preference_tail_forward,
        (
            *(logps.requires_grad_(), ref_logps, cu_seqlens, cu_seqlens.diff().long(), labels, None, *others, items),
            *(0.2, 4.0, loss, 0.1, 0.1, True, 1.2, 0.8, True, True),
        ),
    )


def test_the_backward_passes_opcheck(device):
    cu_seqlens = offsets([2, 0, 3]).to(device)
    slopes = torch.randn(3, dtype=torch.float64, device=device)
    torch.library.opcheck(ops.preference_tail_backward, (torch.tensor(2.0, device=device), slopes, cu_seqlens, 5))


@pytest.mark.parametrize("given", ["numbers", "tensors", "mismatched"])
@pytest.mark.parametrize("loss", [DPO(0.1, 0.1), KTO()], ids=repr)
def test_a_training_step_compiles_without_a_graph_break(loss, given, device, monkeypatch):
    """So nothing is taken off the device on the way, either. On a GPU as it is; elsewhere a graph cannot ask whether
    the interpreter is on, so that is answered beforehand."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(checks, "resolve", lambda impl, x: impl)
    arguments = batch(loss, [3, 1, 5, 2], device)
    del arguments["logps"]
    if given != "numbers":
        arguments["num_items"] = torch.tensor(7, device=device)
    if given != "numbers" and isinstance(loss, KTO):
        arguments["z0"] = torch.tensor(0.3) if given == "tensors" else mismatched([3, 4], device)
    inputs = random_inputs(11, 12, 50, device=device)

    def step(hidden, weight):
        out = prefuse.linear_preference_loss(hidden, weight, inputs.targets, **arguments, impl="triton")
        return out.loss, out.rewards, out.metrics

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = inputs.leaves(("hidden", "weight"))
        loss_value, rewards, metrics = run(x.hidden, x.weight)
        loss_value.backward()
        results.append([loss_value, rewards, *metrics.values(), x.hidden.grad, x.weight.grad])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


# ---- with the head in front ----------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_behind_the_head_ignored_tokens_count_nowhere(loss, device):
    lengths = [3, 1, 5, 2]
    inputs = random_inputs(11, 12, 50, device=device)
    inputs.targets[[0, 3, 7]] = -100  # the second sequence is ignored whole
    arguments = batch(loss, lengths, device)
    del arguments["logps"]
    arguments["ref_logps"][[0, 3, 7]] = math.nan
    results = []
    for impl in ("triton", "torch"):
        x = inputs.leaves(("hidden", "weight"))
        out = prefuse.linear_preference_loss(x.hidden, x.weight, x.targets, **arguments, impl=impl)
        out.loss.backward()
        assert not x.hidden.grad[[0, 3, 7]].any()
        results.append([out.loss, out.losses, out.logps, out.rewards, *out.metrics.values(), x.hidden.grad])
    for made, expected in zip(*results, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


# ---- chips that are not here ---------------------------------------------------------------------


def check_compiled(chips, names):
    with compiling_processes() as pool:
        jobs = {(chip, name): pool.submit(compile_tail, chip, name) for chip in chips for name in names}
        problems = {job: future.result().problems(matrix_unit=False) for job, future in jobs.items()}
    assert not {job: found for job, found in problems.items() if found}


def test_the_common_variants_compile_without_spills():
    check_compiled([90], ["tail, dpo", "tail, kto, mismatched", "tail, backward"])


@pytest.mark.slow
def test_every_variant_compiles_without_spills_on_every_chip():
    check_compiled([80, 89, 90, 100, 120, "gfx942"], TAIL_VARIANTS)
