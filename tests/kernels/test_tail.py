"""The tail kernel: sums, log-ratios, z0, loss, derivative and metrics in one launch each way, equal to the torch path.

On a GPU where there is one, else interpreted: then a program takes 16 tokens or 4 pairs in a step, and programs arrive
in a shuffled order.
"""

import contextlib
import itertools
import math

import pytest
import torch

import prefuse
from prefuse import DPO, IPO, KTO, Mismatched
from prefuse.bench.truth import oracle
from tail_cases import EPS32, EPS64, LENGTHS, LOSSES, assert_equal, batch, evaluate, labels_of, mismatched, offsets, ops

pytest.importorskip("triton")


if torch.cuda.is_available():
    program_order = contextlib.nullcontext  # the hardware's own
else:
    pass


# ---- the torch path, and plain Python ------------------------------------------------------------


@pytest.mark.quick_cases(every=5)
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


@pytest.mark.quick_cases(every=5)
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
