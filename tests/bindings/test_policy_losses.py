"""Policy losses over sampled tokens: equations, closed forms, gradients, metrics, advantages, and what is refused.

Each loss is compared with its paper's equation in plain Python (`bench/truth/policy.py`), one token at a time, and its
gradient with finite differences of that equation.
"""

import itertools
import math

import pytest
import torch

import prefuse
from prefuse import GRPO, RLOO, PPOClip, Reinforce
from prefuse.bench.truth import policy as truth
from prefuse.losses.sampled import POLICY_NEEDS

# Answers longer and shorter than others, of one token, and without any; advantages of both signs and 0.
LENGTHS = [3, 5, 1, 4, 0, 2]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
N, S = sum(LENGTHS), len(LENGTHS)
G = torch.Generator().manual_seed(3)
LOGPS = -2 * torch.rand(N, generator=G, dtype=torch.float64) - 0.1
OLD = LOGPS + 0.4 * torch.randn(N, generator=G, dtype=torch.float64)
REF = LOGPS + 0.5 * torch.randn(N, generator=G, dtype=torch.float64)
ENTROPY = torch.rand(N, generator=G, dtype=torch.float64)
KL = torch.rand(N, generator=G, dtype=torch.float64)
ADVANTAGES = torch.tensor([1.3, -0.7, -1.1, 0.0, 0.9, 2.0], dtype=torch.float64)

LOSSES = [
    *((GRPO(name), truth.grpo) for name in ("grpo", "bnpo", "dapo")),
    (GRPO("dr_grpo", max_completion_length=7), truth.grpo),
    (GRPO("cispo", epsilon_high=1.1), truth.grpo),
    (GRPO("sapo"), truth.grpo),
    (GRPO("luspo", importance_sampling_level="sequence"), truth.grpo),
    (GRPO("grpo", importance_sampling_level="sequence", epsilon=0.3, epsilon_high=0.4), truth.grpo),
    (GRPO("dapo", epsilon_high=0.28, entropy_coef=0.3), truth.grpo),
    (GRPO("grpo", delta=1.1, epsilon=0.1), truth.grpo),
    *((GRPO("grpo", beta=0.4, kl_estimator=k), truth.grpo) for k in ("k1", "k2", "k3", "exact")),
    (GRPO("dapo", beta=0.4, use_bias_correction_kl=True, entropy_coef=0.1), truth.grpo),
    (RLOO(), truth.rloo),
    (RLOO(epsilon_high=0.5, entropy_coef=0.2), truth.rloo),
    *((Reinforce(reduction), truth.reinforce) for reduction in ("token", "sequence", "sum")),
    (Reinforce(beta=0.3, kl_estimator="k2", entropy_coef=0.1, use_bias_correction_kl=True), truth.reinforce),
    *((PPOClip(reduction=reduction), truth.ppo_clip) for reduction in ("token", "sequence", "sum")),
    (PPOClip(0.1, clip_high=0.3, entropy_coef=0.2), truth.ppo_clip),
]
IDS = [f"{type(loss).__name__}-{loss.reduction}-{number}" for number, (loss, _) in enumerate(LOSSES)]


def brought(loss) -> dict:
    given = {"ref_logps": REF, "kl": KL, "entropy": ENTROPY}
    return {name: given[name] for name in loss.policy_needs}


def run(loss, logps=LOGPS, advantages=ADVANTAGES, **options):
    return prefuse.policy_loss(logps, OLD, advantages, CU_SEQLENS, loss, **(brought(loss) | options))


def answers(logps=LOGPS, old=OLD, advantages=ADVANTAGES) -> list[truth.Answer]:
    spread = advantages.repeat_interleave(torch.tensor(LENGTHS))
    rows = zip(*(x.tolist() for x in (logps, old, spread, REF, ENTROPY, KL)), strict=True)
    tokens = [truth.Token(*row) for row in rows]
    return [tokens[a:b] for a, b in itertools.pairwise(CU_SEQLENS.tolist())]


@pytest.mark.parametrize(("loss", "equation"), LOSSES, ids=IDS)
def test_a_loss_is_its_equation(loss, equation):
    assert run(loss).loss.item() == pytest.approx(equation(answers(), loss), rel=2e-7, abs=1e-7)


@pytest.mark.parametrize(("loss", "equation"), LOSSES, ids=IDS)
def test_the_gradient_is_the_equations(loss, equation):
    """By central differences in each log-probability; CISPO's weight is a constant of the equation."""
    logps = LOGPS.clone().requires_grad_()
    run(loss, logps).loss.backward()
    step = 1e-6
    for i in range(N):
        shifted = [LOGPS.clone(), LOGPS.clone()]
        shifted[0][i] += step
        shifted[1][i] -= step
        if loss == GRPO("cispo", epsilon_high=1.1):  # w is held, log pi moves
            tokens = [token for answer in answers() for token in answer]
            weight = min(math.exp(tokens[i].logp - tokens[i].old), 1.1)
            expected = -weight * tokens[i].advantage / N
        else:
            up, down = (equation(answers(x), loss) for x in shifted)
            expected = (up - down) / (2 * step)
        assert logps.grad[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-8), i


def test_entropy_and_the_exact_kl_carry_their_gradients():
    entropy, kl = ENTROPY.clone().requires_grad_(), KL.clone().requires_grad_()
    loss = GRPO("dapo", beta=0.5, kl_estimator="exact", entropy_coef=0.25)
    run(loss, entropy=entropy, kl=kl).loss.backward()
    torch.testing.assert_close(entropy.grad, torch.full((N,), -0.25 / N, dtype=torch.float64), rtol=1e-6, atol=0)
    torch.testing.assert_close(kl.grad, torch.full((N,), 0.5 / N, dtype=torch.float64), rtol=1e-6, atol=0)


# ---- closed forms --------------------------------------------------------------------------------

FIRST_STEP = [GRPO("grpo"), GRPO(), RLOO(), PPOClip(), PPOClip(reduction="token")]


@pytest.mark.parametrize("loss", FIRST_STEP, ids=repr)
def test_in_the_first_step_every_ratio_is_exactly_1(loss):
    """So the loss is minus the mean advantage, nothing is clipped, and old_logps=None says the same to the last bit."""
    given = run(loss)
    same = [prefuse.policy_loss(LOGPS, old, ADVANTAGES, CU_SEQLENS, loss) for old in (LOGPS, None)]
    assert torch.equal(same[0].losses, same[1].losses)
    assert not torch.equal(given.losses, same[0].losses)
    counts = torch.tensor(LENGTHS)
    advantages = torch.where(counts > 0, ADVANTAGES, 0.0)
    mean = (advantages * counts).sum() / N if loss.per == "token" else advantages.mean()
    assert same[0].loss.item() == pytest.approx(-mean.item(), rel=1e-7)
    assert all(total == 0 for total, _ in (same[0].metrics[name].tolist() for name in same[0].metrics))


def test_the_first_gradient_of_rloo_is_reinforces():
    grads = []
    for loss in (RLOO(), Reinforce()):
        logps = LOGPS.clone().requires_grad_()
        prefuse.policy_loss(logps, None, ADVANTAGES, CU_SEQLENS, loss).loss.backward()
        grads.append(logps.grad)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("loss", "_"), LOSSES, ids=IDS)
def test_a_clipped_token_has_no_gradient_and_no_advantage_teaches_nothing(loss, _):
    logps = LOGPS.clone().requires_grad_()
    beta = getattr(loss, "beta", 0.0)
    run(loss, logps, torch.zeros(S)).loss.backward()
    assert beta or not logps.grad.any()
    if type(loss) is PPOClip:
        logps.grad = None
        run(loss, logps).loss.backward()
        w = torch.exp(LOGPS - OLD)
        a = ADVANTAGES.repeat_interleave(torch.tensor(LENGTHS))
        cut = ((w > 1 + loss.upper) & (a > 0)) | ((w < 1 - loss.clip) & (a < 0)) | (a == 0)
        assert torch.equal(logps.grad == 0, cut)
        assert cut.any()
        assert not cut.all()


def test_offline_ppo_is_the_same_class_with_advantages_of_the_labels():
    labels = torch.tensor([True, False, False, True, True, False])
    offline = prefuse.preference_loss(LOGPS, OLD.float(), CU_SEQLENS, PPOClip(0.1), labels)
    online = prefuse.policy_loss(LOGPS, OLD.float(), torch.where(labels, 1.0, -1.0), CU_SEQLENS, PPOClip(0.1))
    assert torch.equal(offline.losses, online.losses)


@pytest.mark.parametrize("loss", [GRPO(), GRPO("grpo"), RLOO(), Reinforce(), PPOClip()], ids=repr)
def test_microbatches_add_up(loss):
    """With the step's number of items, two calls give what one gives."""
    items, cut = N if loss.per == "token" else S, 3
    at = int(CU_SEQLENS[cut])
    parts = [
        prefuse.policy_loss(LOGPS[:at], OLD[:at], ADVANTAGES[:cut], CU_SEQLENS[: cut + 1], loss, items),
        prefuse.policy_loss(LOGPS[at:], OLD[at:], ADVANTAGES[cut:], CU_SEQLENS[cut:] - at, loss, items),
    ]
    assert sum(part.loss.item() for part in parts) == pytest.approx(run(loss).loss.item(), rel=1e-6)


def test_the_samplers_weight_multiplies_the_policys_term_alone():
    weight = torch.rand(S, generator=G) + 0.5
    loss = GRPO("grpo", beta=0.3)
    kl_alone = run(loss, advantages=torch.zeros(S)).losses
    expected = kl_alone + weight * (run(loss).losses - kl_alone)
    torch.testing.assert_close(run(loss, importance_sampling_ratio=weight).losses, expected, rtol=1e-5, atol=1e-7)


# ---- metrics -------------------------------------------------------------------------------------


def test_metrics_are_trls():
    w = torch.exp(LOGPS - OLD)
    a = ADVANTAGES.repeat_interleave(torch.tensor(LENGTHS))
    low, high = ((w < 0.8) & (a < 0)).double(), ((w > 1.2) & (a > 0)).double()
    out = run(GRPO(beta=0.1), entropy=ENTROPY)
    means = prefuse.reduce_metrics(out.metrics)
    assert low.any()
    assert high.any()
    expected = {
        "clip_ratio/low_mean": low.mean(), "clip_ratio/high_mean": high.mean(),
        "clip_ratio/region_mean": (low + high).mean(), "entropy": ENTROPY.mean(),
        "kl": (torch.exp(REF - LOGPS) - 1 - (REF - LOGPS)).mean(),
        "clip_ratio/high_max": max(part.mean() for part in high.split(LENGTHS) if len(part)),
        "clip_ratio/low_min": 0.0,
    }  # fmt: skip
    assert means == pytest.approx({name: float(x) for name, x in expected.items()}, rel=1e-9)
    by_answer = prefuse.reduce_metrics(run(RLOO()).metrics)
    sums = torch.stack([x.sum() for x in (LOGPS - OLD).split(LENGTHS)]).exp()
    cut = ((sums < 0.8) & (ADVANTAGES < 0)) | ((sums > 1.2) & (ADVANTAGES > 0))
    assert by_answer["clip_ratio/region_mean"] == pytest.approx(cut.double().mean().item())


# ---- advantages ----------------------------------------------------------------------------------

REWARDS = torch.tensor([[1.0, 0.0, 2.5, 0.5], [3.0, 3.0, 3.0, 3.0], [-1.0, 4.0, 0.0, 0.0]])


def test_group_advantages():
    for rewards, plain, scaled, others in zip(
        REWARDS.tolist(),
        prefuse.group_advantages(REWARDS, scale="none").tolist(),
        prefuse.group_advantages(REWARDS).tolist(),
        prefuse.group_advantages(REWARDS, baseline="leave_one_out", scale="none").tolist(),
        strict=True,
    ):
        assert plain == pytest.approx(truth.group_relative(rewards, False), abs=1e-12)
        assert scaled == pytest.approx(truth.group_relative(rewards, True), abs=1e-12)
        assert others == pytest.approx(truth.leave_one_out(rewards), abs=1e-12)
    batch = prefuse.group_advantages(REWARDS, scale="batch")
    torch.testing.assert_close(
        batch, prefuse.group_advantages(REWARDS, scale="none") / (REWARDS.double().std() + 1e-4), rtol=1e-12, atol=0
    )
    assert not prefuse.group_advantages(REWARDS)[1].any()


def test_an_answer_without_a_reward_counts_nowhere():
    rewards = REWARDS.clone()
    rewards[0, 1] = torch.nan
    three = REWARDS[:1, [0, 2, 3]]
    for options in ({}, {"scale": "none"}, {"baseline": "leave_one_out", "scale": "none"}):
        full = prefuse.group_advantages(rewards[:1], **options)
        assert full[0, 1] == 0
        torch.testing.assert_close(full[:, [0, 2, 3]], prefuse.group_advantages(three, **options))
    alone = torch.tensor([[2.0, torch.nan]])
    assert not prefuse.group_advantages(alone, baseline="leave_one_out").any()
    assert prefuse.batch_advantages(torch.tensor([1.0, torch.nan, 3.0])).tolist() == [-1, 0, 1]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.97, 0.0)])
def test_gae(gamma, lam):
    rewards, values = torch.randn(N, generator=G), torch.randn(N, generator=G)
    advantages, returns = prefuse.gae(rewards, values, CU_SEQLENS, gamma, lam)
    for a, b in itertools.pairwise(CU_SEQLENS.tolist()):
        expected = truth.gae(rewards[a:b].double().tolist(), values[a:b].double().tolist(), gamma, lam)
        assert advantages[a:b].tolist() == pytest.approx(expected, abs=1e-12)
    torch.testing.assert_close(returns, advantages + values.double(), rtol=0, atol=0)


def test_kl_in_the_reward():
    cu = torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    scores, logps, refs = torch.tensor([1.0, -2.0, 0.5]), LOGPS[:9], REF[:9]
    rewards = prefuse.token_rewards(scores, logps, refs, cu, beta=0.1)
    expected = -0.1 * (logps - refs)
    expected[[2, 3, 8]] += scores.double()
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-15)
    with pytest.raises(ValueError, match="without tokens"):
        prefuse.token_rewards(torch.ones(2), LOGPS[:3], REF[:3], torch.tensor([0, 3, 3]), beta=0.1)


def test_the_value_loss_and_whitening():
    v, old, target = (torch.randn(12, generator=G) for _ in range(3))
    v.requires_grad_()
    losses = prefuse.clipped_value_loss(v, old, target, 0.3)
    rows = zip(v.tolist(), old.tolist(), target.tolist(), strict=True)
    assert losses.tolist() == pytest.approx([truth.value(*row, 0.3) for row in rows], rel=1e-6)
    losses.sum().backward()
    assert v.grad.any()
    x = torch.randn(50, generator=G, dtype=torch.float64) * 3 + 2
    white = prefuse.whiten(x)
    assert white.mean().item() == pytest.approx(0, abs=1e-12)
    assert white.std().item() == pytest.approx(1, abs=1e-6)
    assert prefuse.whiten(x, shift_mean=False).mean().item() == pytest.approx(x.mean().item())


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GRPO("grop"), r"loss_type must be one of grpo, .*, got 'grop'"),
        (lambda: GRPO(epsilon=-0.1), r"clip bounds must be >= 0, got -0\.1"),
        (lambda: GRPO(delta=0.9), r"delta .* must be > 1, got 0\.9"),
        (lambda: GRPO("dr_grpo"), r"max_completion_length is what dr_grpo divides by.*got None"),
        (lambda: GRPO(max_completion_length=5), r"nothing else does: got 5"),
        (lambda: GRPO(importance_sampling_level="word"), r'must be "token" or "sequence", got'),
        (lambda: GRPO(kl_estimator="k4"), r"kl_estimator must be k1, k2, k3 or exact, got 'k4'"),
        (lambda: GRPO(sapo_temperature_pos=0.0), r"sapo_temperature_pos must be > 0, got 0\.0"),
        (lambda: GRPO(beta=-1.0), r"beta must be finite and >= 0, got -1\.0"),
        (lambda: RLOO(entropy_coef=math.inf), r"entropy_coef must be finite and >= 0, got inf"),
        (lambda: Reinforce("mean"), r'reduction must be "token", "sequence" or "sum", got \'mean\''),
        (lambda: PPOClip(clip=1.0), r"clip must be in \(0, 1\), got 1\.0"),
        (lambda: run(GRPO(beta=0.1), ref_logps=None), "this loss needs ref_logps"),
        (lambda: run(GRPO(beta=0.1, kl_estimator="exact"), kl=None), "this loss needs kl"),
        (lambda: run(GRPO(), ref_logps=REF), "this loss uses no ref_logps"),
        (lambda: run(GRPO(entropy_coef=0.1), entropy=None), "needs entropy"),
        (lambda: run(GRPO(), advantages=None), "advantages are missing"),
        (lambda: run(GRPO(), advantages=torch.ones(S + 1)), rf"expected advantages \({N},\) or \({S},\), got \(7,\)"),
        (lambda: run(GRPO(), num_items=0), "num_items must be at least 1, got 0"),
        (lambda: prefuse.group_advantages(torch.ones(3)), r"expected rewards \(P, K\).*got \(3,\)"),
        (lambda: prefuse.gae(LOGPS, LOGPS, CU_SEQLENS, lam=1.5), r"lam must be in \[0, 1\], got 1\.5"),
        (lambda: prefuse.preference_loss(LOGPS, None, CU_SEQLENS, PPOClip()), "PPOClip needs ref_logps"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_two_doors_name_each_other():
    with pytest.raises(TypeError, match=r"GRPO is a loss over sampled tokens: give it to prefuse\.linear_policy_loss"):
        prefuse.preference_loss(LOGPS, None, CU_SEQLENS, GRPO())
    with pytest.raises(TypeError, match=r"loss must be an instance such as prefuse.GRPO\(epsilon=0.2\), got DPO"):
        prefuse.policy_loss(LOGPS, OLD, ADVANTAGES, CU_SEQLENS, prefuse.DPO())
    with pytest.raises(TypeError, match=r"advantages must be a floating-point tensor, got torch.int64"):
        prefuse.policy_loss(LOGPS, OLD, torch.ones(S, dtype=torch.long), CU_SEQLENS)
    with pytest.raises(ValueError, match="entropy_coef needs the distributions"):
        prefuse.preference_loss(
            LOGPS, OLD.float(), CU_SEQLENS, PPOClip(entropy_coef=0.1), torch.ones(S, dtype=torch.bool)
        )


def test_a_loss_of_ones_own_says_what_it_needs():
    class Own:
        per = "token"
        policy_needs = frozenset({"ref_logps"})

        def policy_losses(self, seq):
            return -seq.sums(seq.advantages * (seq.logps - seq.ref_logps))

        def policy_metrics(self, seq):
            return {}

    out = prefuse.policy_loss(LOGPS, OLD, ADVANTAGES, CU_SEQLENS, Own(), ref_logps=REF)
    spread = ADVANTAGES.repeat_interleave(torch.tensor(LENGTHS))
    assert out.loss.item() == pytest.approx(-(spread * (LOGPS - REF)).mean().item())
    Own.policy_needs = frozenset({"weather"})
    with pytest.raises(ValueError, match=r"Own.policy_needs names weather; known: "):
        prefuse.policy_loss(LOGPS, OLD, ADVANTAGES, CU_SEQLENS, Own())
    assert set(POLICY_NEEDS) == {"ref_logps", "kl", "entropy"}
