"""Losses of scores: their equations (bench/truth/rewards.py), gradients, what they make of ties, what is refused.

Each is compared with its paper's equation in plain Python, one group at a time, and its gradient with finite
differences in float64.
"""

import math
import re
from pathlib import Path

import pytest
import torch

import prefuse
from prefuse import AllPairs, BradleyTerry, PlackettLuce, StepReward
from prefuse.bench.truth import rewards as truth
from prefuse.score_quality import correlation, expected_calibration_error, reliability, score_quality

SIZES = [2, 4, 1, 3, 2]
CU_GROUPS = torch.tensor([0, *SIZES]).cumsum(0).int()
GENERATOR = torch.Generator().manual_seed(3)
SCORES = 3 * torch.randn(sum(SIZES), generator=GENERATOR, dtype=torch.float64)
RANKS = torch.tensor([2.0, 1.0, 1.0, 3.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 5.0])  # ties, and a group of nothing else
GROUPS = [
    list(zip(SCORES[a:b].tolist(), RANKS[a:b].tolist(), strict=True))
    for a, b in zip(CU_GROUPS[:-1].tolist(), CU_GROUPS[1:].tolist(), strict=True)
]
MARGINS = torch.tensor([0.5, 0.0, -1.0, 2.0, 0.1, 0.0])
LABELS = torch.arange(len(SCORES)) % 3 == 0


def ranked(loss, scores=SCORES, **more):
    return prefuse.reward_loss(scores, loss, cu_groups=CU_GROUPS, ranks=RANKS, **more)


def pairs_of(scores):
    return list(zip(scores[0::2].tolist(), scores[1::2].tolist(), strict=True))


@pytest.mark.parametrize(
    ("margins", "e", "c"), [(None, 0, None), (MARGINS, 0, None), (None, 0.2, 0.01), (MARGINS, 0.3, 2)]
)
def test_bradley_terry_is_its_equation(margins, e, c):
    out = prefuse.reward_loss(SCORES, BradleyTerry(c, e), margins=margins)
    given = [0.0] * 6 if margins is None else margins.tolist()
    expected = [truth.bradley_terry(a, b, m, e, c or 0.0) for (a, b), m in zip(pairs_of(SCORES), given, strict=True)]
    torch.testing.assert_close(out.losses, torch.tensor(expected), rtol=1e-6, atol=0)
    assert out.loss.item() == pytest.approx(sum(expected) / 6, rel=1e-6)


def test_rankings_are_their_equations():
    got = ranked(PlackettLuce()).losses
    torch.testing.assert_close(
        got, torch.tensor([truth.plackett_luce(group) for group in GROUPS]), rtol=1e-6, atol=1e-7
    )
    for e in 0.0, 0.3:
        got = ranked(AllPairs(label_smoothing=e)).losses
        expected = torch.tensor([truth.all_pairs(group, e) for group in GROUPS])
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_two_answers_are_one_pair_for_all_three():
    """With two answers Plackett-Luce and all pairs are Bradley-Terry, centring too."""
    for c in None, 0.7:
        expected = prefuse.reward_loss(SCORES, BradleyTerry(c)).losses
        for loss in PlackettLuce(c), AllPairs(c):
            torch.testing.assert_close(prefuse.reward_loss(SCORES, loss).losses, expected, rtol=1e-6, atol=1e-7)


def test_a_ranking_is_the_product_of_its_choices():
    """Plackett-Luce gives all orders of three answers probabilities that sum to 1."""
    scores = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    cu = torch.tensor([0, 3])
    orders = [(a, b, 3 - a - b) for a in range(3) for b in range(3) if a != b]
    losses = [prefuse.reward_loss(scores[list(order)], PlackettLuce(), cu_groups=cu).loss.item() for order in orders]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0, abs=1e-6)


def test_steps_are_binary_cross_entropy():
    out = prefuse.reward_loss(SCORES, StepReward(), labels=LABELS)
    expected = [truth.step(s, right) for s, right in zip(SCORES.tolist(), LABELS.tolist(), strict=True)]
    torch.testing.assert_close(out.losses, torch.tensor(expected), rtol=1e-6, atol=0)
    accuracy, count = out.metrics["accuracy"].tolist()
    assert (accuracy, count) == (sum((s > 0) == r for s, r in zip(SCORES.tolist(), LABELS.tolist(), strict=True)), 12)


def test_soft_labels_of_steps_are_a_cross_entropy():
    shares = torch.linspace(0, 1, len(SCORES), dtype=torch.float64)
    out = prefuse.reward_loss(SCORES, StepReward(), labels=shares)
    pairs = zip(SCORES.tolist(), shares.tolist(), strict=True)
    expected = [y * math.log1p(math.exp(-s)) + (1 - y) * math.log1p(math.exp(s)) for s, y in pairs]
    torch.testing.assert_close(out.losses, torch.tensor(expected), rtol=1e-6, atol=0)
    whole = prefuse.reward_loss(SCORES, StepReward(), labels=LABELS.double())
    torch.testing.assert_close(whole.loss, prefuse.reward_loss(SCORES, StepReward(), labels=LABELS).loss)
    with pytest.raises(ValueError, match="from 0 to 1"):
        prefuse.reward_loss(SCORES, StepReward(), labels=shares + 0.5)


@pytest.mark.parametrize(
    "loss",
    [BradleyTerry(0.1, 0.2), PlackettLuce(0.1), AllPairs(0.1, 0.2), StepReward()],
    ids=lambda x: type(x).__name__,
)
def test_gradients(loss):
    more = {"margins": MARGINS} if loss.per == "pair" else {"labels": LABELS} if loss.per == "token" else {}
    if loss.per == "group":
        more = {"cu_groups": CU_GROUPS, "ranks": RANKS}
    count = {"pair": 6, "group": 5, "token": 12}[loss.per]
    weights = torch.rand(count, generator=GENERATOR)
    items = len(weights)

    def value(scores):  # the door gives float32
        given = {"margins": None, "labels": None, "cu_groups": None, "ranks": None} | more
        cu = (
            given["cu_groups"]
            if given["cu_groups"] is not None
            else torch.arange(0, 13, 2 if loss.per == "pair" else 1)
        )
        ranks = torch.arange(12.0) if given["ranks"] is None else given["ranks"]
        margins = None if given["margins"] is None else given["margins"].double()
        from prefuse.losses.rewards import Scored

        return (loss.losses(Scored(scores, cu, ranks.double(), margins, given["labels"])) * weights).sum() / items

    scores = SCORES.clone().requires_grad_()
    assert torch.autograd.gradcheck(value, (scores,))
    out = prefuse.reward_loss(scores, loss, weights=weights, **more)
    assert out.loss.item() == pytest.approx(value(SCORES).item(), rel=1e-6)
    out.loss.backward()
    expected = torch.autograd.grad(value(scores), scores)[0]
    torch.testing.assert_close(scores.grad, expected, rtol=1e-6, atol=1e-7)


def test_solutions_from_their_steps():
    scores, cu = torch.tensor([2.0, -1.0, 0.5, 3.0]), torch.tensor([0, 3, 4])
    p = torch.sigmoid(scores.double())
    for how, expected in ("min", p[1]), ("product", p[:3].prod()), ("last", p[2]):
        torch.testing.assert_close(prefuse.combine_steps(scores, cu, how), torch.stack([expected, p[3]]))
    with pytest.raises(ValueError, match="how must be one of"):
        prefuse.combine_steps(scores, cu, "mean")
    with pytest.raises(ValueError, match="at least one step"):
        prefuse.combine_steps(scores, torch.tensor([0, 4, 4]))


@pytest.mark.parametrize("loss", [BradleyTerry(), PlackettLuce(), AllPairs()], ids=lambda x: type(x).__name__)
def test_a_constant_changes_nothing_and_extremes_are_finite(loss):
    a = prefuse.reward_loss(SCORES, loss).losses
    torch.testing.assert_close(prefuse.reward_loss(SCORES + 100, loss).losses, a, rtol=1e-5, atol=1e-6)
    scores = torch.tensor([1e4, -1e4, -1e4, 1e4], requires_grad=True)
    out = prefuse.reward_loss(scores, loss)
    out.loss.backward()
    assert out.losses.tolist() == [0.0, 2e4]
    assert scores.grad.isfinite().all()


def test_metrics_are_trls():
    metrics = prefuse.reduce_metrics(prefuse.reward_loss(SCORES, BradleyTerry()).metrics)
    chosen, rejected = SCORES[0::2], SCORES[1::2]
    expected = {
        "accuracy": (chosen > rejected).double().mean().item(), "margin": (chosen - rejected).mean().item(),
        "mean_reward": SCORES.mean().item(), "min_reward": SCORES.min().item(), "max_reward": SCORES.max().item(),
    }  # fmt: skip
    assert metrics == pytest.approx(expected)
    of_groups = prefuse.reduce_metrics(ranked(AllPairs()).metrics)
    shares = [[a > b for a, r in group for b, s in group if r < s] for group in GROUPS]
    shares = [sum(share) / len(share) for share in shares if share]
    assert of_groups["accuracy"] == pytest.approx(sum(shares) / len(shares))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: prefuse.reward_loss(SCORES[:3]), "odd number of scores: 3"),
        (lambda: prefuse.reward_loss(SCORES, prefuse.DPO()), "one of scores"),
        (lambda: prefuse.reward_loss(SCORES, BradleyTerry), "one of scores"),
        (lambda: prefuse.reward_loss(SCORES.long()), "floating point"),
        (lambda: prefuse.reward_loss(SCORES, margins=MARGINS[:2]), r"expected margins \(6,\)"),
        (lambda: prefuse.reward_loss(SCORES, AllPairs(), margins=MARGINS), "takes no margins"),
        (lambda: prefuse.reward_loss(SCORES, cu_groups=CU_GROUPS), "takes pairs, got groups of"),
        (lambda: prefuse.reward_loss(SCORES, AllPairs(), cu_groups=CU_GROUPS - 1), "must rise from 0 to S = 12"),
        (lambda: prefuse.reward_loss(SCORES, AllPairs(), ranks=RANKS[:2]), r"expected ranks \(12,\)"),
        (lambda: prefuse.reward_loss(SCORES, StepReward()), "needs labels"),
        (lambda: prefuse.reward_loss(SCORES, weights=MARGINS[:1]), r"expected weights \(6,\)"),
        (lambda: BradleyTerry(-1.0), "center_rewards_coefficient must be"),
        (lambda: BradleyTerry(label_smoothing=0.5), "label_smoothing must be"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_calibration_of_a_perfect_and_of_a_boastful_model():
    """Preferences drawn with the model's own probabilities: the error is noise; with margins tripled it is not."""
    margins = torch.linspace(0.05, 4, 4000, dtype=torch.float64)
    flipped = torch.rand(4000, generator=torch.Generator().manual_seed(0)) > torch.sigmoid(margins)
    drawn = torch.where(flipped, -margins, margins)
    assert expected_calibration_error(drawn) < 0.02
    assert expected_calibration_error(3 * drawn) > 0.05
    for confidence, right, count in reliability(drawn):
        assert 0.5 <= confidence <= 1
        assert abs(confidence - right) < 4 * math.sqrt(0.25 / count)


def test_length_is_seen():
    lengths = torch.tensor([5.0, 2.0, 3.0, 9.0, 4.0, 4.0])
    quality = score_quality(lengths * 2, lengths)
    assert quality["length_correlation"] == pytest.approx(1.0)
    assert quality["prefers_longer"] == 1.0
    assert quality["longer_is_chosen"] == 0.5
    assert correlation(torch.ones(3), torch.arange(3.0)) == 0.0


def test_every_loss_of_scores_is_in_the_docs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
    written = re.findall(r"^\| `(\w+)\((.*?)\)` \|", page, re.M)
    assert {name for name, _ in written} == {"BradleyTerry", "PlackettLuce", "AllPairs", "StepReward"}
    for name, arguments in written:
        cls = getattr(prefuse, name)
        assert cls(**eval(f"dict({arguments})")) == cls()
