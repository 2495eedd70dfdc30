"""What the KTO paper (Ethayarajh et al. 2024, arXiv 2402.01306) proves of DPO and KTO, seen on a tabular policy.

A policy of one prompt and two answers, a and b, with log pi(a) - log pi(b) = theta. Theorem 4: where p of the people
prefer a and 1 - p prefer b, DPO may end with the answer of the minority, and KTO, loss-neutral, ends with that of the
majority. Proposition 2: KTO's update vanishes for rewards that are extreme.
"""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

import prefuse

# p^(1/beta) pi_ref(a) < (1 - p)^(1/beta) pi_ref(b): the case of the theorem; and one where both agree.
CASES = [(0.6, 1.0, 0.1), (0.6, 0.5, 0.2), (0.7, 2.0, 0.05), (0.6, 1.0, 0.6)]
CU_SEQLENS = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)


def log_policy(theta):  # () -> (2,) log pi of a and b
    return torch.stack([logsigmoid(theta), logsigmoid(-theta)])


def reference(share_of_a):
    return torch.tensor([share_of_a, 1 - share_of_a], dtype=torch.float64).log()


def dpo_loss(theta, p, beta, refs):
    """p of the pairs are (a, b), the others (b, a): the two kinds of pair, weighed."""
    order = [0, 1, 1, 0]
    weights = torch.tensor([p, 1 - p], dtype=torch.float64)
    out = prefuse.preference_loss(
        log_policy(theta)[order], refs[order], CU_SEQLENS, prefuse.DPO(beta), weights=weights, num_items=1
    )
    return out.loss


def kto_loss(theta, p, beta, refs):
    """a is desirable to p of the people and undesirable to the others, b the other way round; z0 is the exact KL."""
    policy, order = log_policy(theta), [0, 0, 1, 1]
    labels = torch.tensor([True, False, False, True])
    weights = torch.tensor([p, 1 - p, p, 1 - p], dtype=torch.float64)
    z0 = (policy.exp() * (policy - refs)).sum().detach().clamp(min=0)
    out = prefuse.preference_loss(
        policy[order], refs[order], CU_SEQLENS, prefuse.KTO(beta), labels, z0, weights=weights, num_items=1
    )
    return out.loss


def slope(loss, theta, *rest):
    theta = torch.tensor(theta, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(theta, *rest), theta)[0].item()


@pytest.mark.parametrize(("p", "beta", "share"), CASES)
def test_dpo_ends_where_the_theorem_says(p, beta, share):
    """The optimum is pi(a) / pi(b) = pi_ref(a) / pi_ref(b) (p / (1 - p))^(1 / beta), which may be below 1."""
    refs = reference(share)
    optimum = math.log(share / (1 - share)) + math.log(p / (1 - p)) / beta
    assert slope(dpo_loss, optimum, p, beta, refs) == pytest.approx(0.0, abs=1e-7)
    assert slope(dpo_loss, optimum - 0.1, p, beta, refs) < 0 < slope(dpo_loss, optimum + 0.1, p, beta, refs)
    minority_wins = p ** (1 / beta) * share < (1 - p) ** (1 / beta) * (1 - share)
    assert minority_wins == (optimum < 0)
    assert minority_wins == (share < 0.5)


@pytest.mark.parametrize(("p", "beta", "share"), CASES)
def test_kto_pushes_towards_the_majority_from_everywhere(p, beta, share):
    refs = reference(share)
    for theta in torch.linspace(-8, 8, 33).tolist():
        assert slope(kto_loss, theta, p, beta, refs) < 0


@pytest.mark.parametrize(("p", "beta", "share"), CASES[:1])
def test_gradient_descent_ends_with_the_minority_by_dpo_and_the_majority_by_kto(p, beta, share):
    refs, ends = reference(share), {}
    for name, loss, steps in (("dpo", dpo_loss, 100), ("kto", kto_loss, 250)):
        theta = refs[0] - refs[1]  # the policy starts as its reference
        for _ in range(steps):
            theta = theta - 5.0 * slope(loss, float(theta), p, beta, refs)
        ends[name] = torch.sigmoid(theta).item()  # pi(a)
    assert ends["dpo"] == pytest.approx(1 / (1 + 9 / 1.5), abs=1e-3)
    assert ends["kto"] > 0.9


def test_ktos_gradient_vanishes_for_extreme_rewards_and_dpos_does_not():
    """Proposition 2: as the reward goes to either infinity KTO lets go; a hard or mislabelled row does not rule it."""
    ratios = torch.tensor([-500.0, -50.0, 0.0, 50.0, 500.0], dtype=torch.float64, requires_grad=True)
    cu_seqlens = torch.arange(6)
    for good in (True, False):
        labels = torch.full((5,), good)
        out = prefuse.preference_loss(
            ratios, torch.zeros(5).double(), cu_seqlens, prefuse.KTO(0.5), labels, 0.0, num_items=1
        )
        (slopes,) = torch.autograd.grad(out.loss, ratios)
        assert slopes.abs()[2] == pytest.approx(0.5 / 4, rel=1e-6)
        assert (slopes.abs()[[1, 3]] < 1e-10).all()
        assert (slopes.abs()[[0, 4]] < 1e-100).all()
        assert (slopes <= 0).all() if good else (slopes >= 0).all()
    # DPO, its concave and its risk-neutral kin hold on to the rows that they have most wrong.
    pair = torch.tensor([-500.0, 0.0], dtype=torch.float64, requires_grad=True)
    out = prefuse.preference_loss(pair, torch.zeros(2).double(), torch.arange(3), prefuse.DPO(0.5))
    assert torch.autograd.grad(out.loss, pair)[0].abs()[0] == pytest.approx(0.5)
    for value in ("concave", "linear"):
        loss = prefuse.KTO(0.5, value=value)
        out = prefuse.preference_loss(
            ratios, torch.zeros(5).double(), cu_seqlens, loss, torch.ones(5, dtype=torch.bool), 0.0, num_items=1
        )
        assert torch.autograd.grad(out.loss, ratios)[0].abs()[0] == pytest.approx(0.5)
