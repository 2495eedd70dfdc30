"""Each loss is its paper's equation: against plain Python, by its identities, and at the ends of the numbers."""

import dataclasses
import math

import pytest
import torch

import prefuse
from prefuse import DPO, IPO, KTO, SFT
from prefuse.bench.truth import oracle

# Log-ratios in nats: none, ordinary, large, and beyond what an exponential in float64 holds.
RATIOS = [0.0, 1e-8, -0.3, 2.0, -15.0, 90.0, -800.0, 1e4, -1e4]
PAIRS = [(chosen, rejected) for chosen in RATIOS for rejected in RATIOS]


def of_sums(ratios, loss, lengths=None, **options):
    """`preference_loss` of sequences that have these log-ratios: one token each, or `lengths` with zeros."""
    lengths = lengths or [1] * len(ratios)
    logps = torch.zeros(sum(lengths), dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    logps[cu_seqlens[:-1].long()] = torch.tensor(ratios, dtype=torch.float64)
    logps.requires_grad_()
    ref_logps = torch.zeros(len(ratios), dtype=torch.float64) if loss.uses_reference else None
    return logps, prefuse.preference_loss(logps, ref_logps, cu_seqlens, loss, **options)


def flat(pairs):
    return [ratio for pair in pairs for ratio in pair]


def assert_losses(out, expected):
    """Equal to float32's last digits, and finite: `losses` leaves in float32 what was computed in float64."""
    expected = torch.tensor(expected, dtype=torch.float64)
    assert out.losses.dtype == torch.float32
    assert out.losses.isfinite().all()
    torch.testing.assert_close(out.losses.double(), expected, rtol=2**-23, atol=1e-37)
    torch.testing.assert_close(out.loss.double(), expected.mean(), rtol=2**-23, atol=1e-37)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.49])
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_dpo_is_its_equation(beta, smoothing):
    _, out = of_sums(flat(PAIRS), DPO(beta, smoothing))
    assert_losses(out, [oracle.dpo(chosen, rejected, beta, smoothing) for chosen, rejected in PAIRS])


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_ipo_is_its_equation(beta, average):
    lengths = [1 + i % 7 for i in range(2 * len(PAIRS))]  # a pair's sides differ in length
    _, out = of_sums(flat(PAIRS), IPO(beta, average), lengths)
    divided = [r / n if average else r for r, n in zip(flat(PAIRS), lengths, strict=True)]
    assert_losses(out, [oracle.ipo(divided[i], divided[i + 1], beta) for i in range(0, len(divided), 2)])


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.7), (0.0, 2.0)])
@pytest.mark.parametrize("z0", [0.0, 0.4, 200.0])
@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_kto_is_its_equation(beta, z0, weights):
    ratios, labels = RATIOS * 2, [True] * len(RATIOS) + [False] * len(RATIOS)
    _, out = of_sums(ratios, KTO(beta, *weights), labels=torch.tensor(labels), z0=z0)
    expected = torch.tensor(
        [oracle.kto(r, label, z0, beta, *weights) for r, label in zip(ratios, labels, strict=True)]
    ).double()
    # The paper's 1 - sigmoid cancels where a sigmoid is near 1: the oracle's own rounding is the absolute part.
    torch.testing.assert_close(out.losses.double(), expected, rtol=2**-23, atol=max(weights) * 2**-52)
    assert out.losses.isfinite().all()


def test_sft_is_the_negative_log_likelihood_a_mean_over_tokens():
    logps = torch.randn(9)
    cu_seqlens = torch.tensor([0, 4, 4, 9])
    out = prefuse.preference_loss(logps, None, cu_seqlens, SFT())
    assert_losses_sum = [-s for s in oracle.sequence_sums(logps, [4, 0, 5])]
    torch.testing.assert_close(out.losses.double(), torch.tensor(assert_losses_sum).double(), rtol=2**-23, atol=0)
    torch.testing.assert_close(out.loss, -logps.mean())
    assert not out.rewards.any()
    assert out.metrics == {}


def test_dpo_of_a_swapped_pair_differs_by_the_margin():
    """-log sigmoid(x) + log sigmoid(-x) = -x."""
    pairs = [(a, b) for a, b in PAIRS if abs(a - b) < 1e3]
    beta = 0.3
    _, out = of_sums(flat(pairs), DPO(beta))
    _, swapped = of_sums(flat([(b, a) for a, b in pairs]), DPO(beta))
    margin = torch.tensor([beta * (a - b) for a, b in pairs]).double()
    difference = out.losses.double() - swapped.losses.double()
    # Both were rounded to float32.
    assert ((difference + margin).abs() <= 2**-23 * margin.abs() + 2**-24).all()


def test_smoothed_dpo_is_the_mixture_of_both_orders():
    e = 0.2
    _, plain = of_sums(flat(PAIRS), DPO(0.1))
    _, swapped = of_sums(flat([(b, a) for a, b in PAIRS]), DPO(0.1))
    _, smoothed = of_sums(flat(PAIRS), DPO(0.1, label_smoothing=e))
    torch.testing.assert_close(smoothed.losses, (1 - e) * plain.losses + e * swapped.losses, rtol=2**-21, atol=1e-7)


@pytest.mark.parametrize("loss", [DPO(), DPO(label_smoothing=0.3), IPO(), IPO(average=False)])
def test_raising_the_chosen_one_lowers_the_loss_and_raising_the_rejected_one_raises_it(loss):
    logps, out = of_sums([0.1, 0.2], loss, lengths=[3, 5])
    out.loss.backward()
    assert (logps.grad[:3] < 0).all()
    assert (logps.grad[3:] > 0).all()


@pytest.mark.parametrize("z0", [0.0, 0.5])
def test_kto_pulls_desirable_ones_up_and_undesirable_ones_down(z0):
    logps, out = of_sums([0.1, 0.2], KTO(), lengths=[3, 5], labels=torch.tensor([True, False]), z0=z0)
    out.loss.backward()
    assert (logps.grad[:3] < 0).all()
    assert (logps.grad[3:] > 0).all()


@pytest.mark.parametrize("ratio", [-3.0, 0.0, 5.0])
def test_a_kto_reference_point_moves_both_sides_apart(ratio):
    """loss(desirable) rises with z0, loss(undesirable) falls; at r = z0 both are half their weight."""

    def at(z0):
        return of_sums([ratio, ratio], KTO(0.1, 2.0, 3.0), labels=torch.tensor([True, False]), z0=z0)[1].losses

    assert at(1.0)[0] > at(0.0)[0]
    assert at(1.0)[1] < at(0.0)[1]
    assert at(max(ratio, 0.0)).tolist() == [1.0, 1.5] or ratio < 0


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (DPO(0.3), {}),
        (DPO(0.3, label_smoothing=0.2), {}),
        (IPO(0.3), {}),
        (IPO(0.3, average=False), {}),
        (KTO(0.3, 1.3, 0.7), {"labels": torch.tensor([True, False, False, True, True, False]), "z0": 0.2}),
        (SFT(), {}),
    ],
    ids=repr,
)
@pytest.mark.parametrize("per_token", [True, False])
def test_the_loss_gradient_agrees_with_finite_differences(loss, options, per_token):
    lengths = [2, 3, 1, 4, 0, 2]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    logps = torch.randn(sum(lengths), dtype=torch.float64)
    ref_logps = torch.randn(sum(lengths) if per_token else 6, dtype=torch.float64) if loss.uses_reference else None

    def value(x):
        return prefuse.preference_loss(x, ref_logps, cu_seqlens, loss, **options).loss

    leaf = logps.clone().requires_grad_()
    value(leaf).backward()
    # The loss leaves in float32, so a step must be wide, and the second derivative costs step^2.
    step = 2e-2
    for i in range(len(logps)):
        nudge = torch.zeros_like(logps)
        nudge[i] = step
        slope = (value(logps + nudge).double() - value(logps - nudge).double()) / (2 * step)
        assert abs(slope - leaf.grad[i]) <= 2e-3 * leaf.grad.abs().max() + 2**-24 / step, i


@pytest.mark.parametrize("loss", [DPO(0.1), DPO(0.1, label_smoothing=0.1), KTO(0.1)], ids=repr)
@pytest.mark.parametrize("margin", [1e4, -1e4, 1e6, -1e6])
def test_extreme_margins_have_finite_losses_and_bounded_gradients(loss, margin):
    options = {"labels": torch.tensor([True, False]), "z0": 0.0} if isinstance(loss, KTO) else {}
    logps, out = of_sums([margin, -margin], loss, **options)
    out.loss.backward()
    assert out.loss.isfinite()
    assert logps.grad.isfinite().all()
    assert (logps.grad.abs() <= loss.beta).all()


@pytest.mark.parametrize("loss", [DPO(0.7), IPO(0.7), KTO(0.7)], ids=repr)
def test_a_reward_is_beta_times_the_log_ratio(loss):
    options = {"labels": torch.tensor([True, False, True, False]), "z0": 0.3} if isinstance(loss, KTO) else {}
    ratios = [0.25, -3.0, 1e-3, 700.0]
    _, out = of_sums(ratios, loss, **options)
    assert out.rewards.dtype == torch.float32
    torch.testing.assert_close(out.rewards.double(), 0.7 * torch.tensor(ratios).double(), rtol=2**-23, atol=0)


@pytest.mark.parametrize(
    ("loss", "field", "value"),
    [
        (DPO(), "beta", 0.3),
        (DPO(), "label_smoothing", 0.2),
        (IPO(), "beta", 0.3),
        (IPO(), "average", False),
        (KTO(), "beta", 0.3),
        (KTO(), "desirable_weight", 2.0),
        (KTO(), "undesirable_weight", 2.0),
    ],
)
def test_every_option_changes_the_loss(loss, field, value):
    """An option that a path ignores is the worst kind of bug: nothing fails."""
    options = {"labels": torch.tensor([True, False]), "z0": 0.3} if isinstance(loss, KTO) else {}

    def run(loss):
        return of_sums([0.5, -0.25], loss, lengths=[2, 3], **options)[1].loss.item()

    assert run(dataclasses.replace(loss, **{field: value})) != run(loss)


def test_losses_are_frozen_and_compare_by_value():
    assert DPO(0.2) == DPO(beta=0.2)
    assert hash(IPO(0.2)) == hash(IPO(0.2))
    with pytest.raises(dataclasses.FrozenInstanceError):
        DPO().beta = 3.0


def test_dpo_at_no_preference_is_ln_2():
    _, out = of_sums([3.0, 3.0], DPO())
    assert out.losses.item() == torch.tensor(math.log(2), dtype=torch.float32).item()
