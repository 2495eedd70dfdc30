"""Losses that labels, scores, margins and weights of rows feed: equations, gradients, the fused path, what is refused.

Each loss is compared with its paper's equation in plain Python (`oracle`), one completion at a time, and its gradient
with finite differences in float64.
"""

import dataclasses
import itertools
import math

import pytest
import torch

import prefuse
from prefuse import FDPO, KTO, LDDPO, MODPO, MOKTO, ODPO, UNA, BetaDPO, ConditionalSFT, PPOClip
from prefuse.bench.truth import oracle
from prefuse.loss_inputs import LossInputs
from prefuse.losses import needs_of
from prefuse.losses.contract import is_batchwise
from prefuse.losses.dpo_family import DIVERGENCES
from prefuse.tokens import with_control

# Six completions, three pairs: longer and shorter than their partner, of one length, and one without tokens.
LENGTHS = [3, 5, 4, 4, 2, 0]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
N, SEQUENCES, PAIRS = sum(LENGTHS), len(LENGTHS), len(LENGTHS) // 2
GENERATOR = torch.Generator().manual_seed(1)
LOGPS = -2 * torch.rand(N, generator=GENERATOR, dtype=torch.float64)
REFS = LOGPS.float() + torch.randn(N, generator=GENERATOR) * 0.6
LABELS = torch.tensor([True, False, False, True, True, False])
SCORES = torch.rand(SEQUENCES, generator=GENERATOR)
Z0 = 0.35


def given(loss) -> dict:
    """What the loss needs beside log-probabilities."""
    items = PAIRS if loss.per == "pair" else SEQUENCES
    margins = torch.linspace(-0.5, 1.5, items)
    brought = {"labels": LABELS, "z0": Z0, "margins": margins, "scores": SCORES}
    return {name: value for name, value in brought.items() if name in needs_of(loss)}


def run(loss, logps=LOGPS, **options):
    refs = REFS if "reference" in needs_of(loss) else None
    return prefuse.preference_loss(logps, refs, CU_SEQLENS, loss, **(given(loss) | options))


def completions(loss) -> list[oracle.Completion]:
    refs = REFS.double() if "reference" in needs_of(loss) else torch.zeros(N)
    tokens = list(zip(LOGPS.tolist(), refs.tolist(), strict=True))
    return [tokens[a:b] for a, b in itertools.pairwise(CU_SEQLENS.tolist())]


def of_pairs(equation):
    def losses(loss):
        y, margins = completions(loss), given(loss).get("margins", [0.0] * PAIRS)
        return [equation(loss, y[2 * i], y[2 * i + 1], float(margins[i])) for i in range(PAIRS)]

    return losses


def of_sequences(equation):
    def losses(loss):
        margins = given(loss).get("margins", [0.0] * SEQUENCES)
        rows = zip(completions(loss), LABELS.tolist(), SCORES.tolist(), margins, strict=True)
        return [equation(loss, y, good, score, float(margin)) for y, good, score, margin in rows]

    return losses


def kto(loss, y, good, score, margin):
    z0 = Z0 if loss.reference_point is None else loss.reference_point
    weights = (loss.desirable_weight, loss.undesirable_weight)
    return oracle.kto_ablation(y, good, z0, loss.beta, weights, loss.value)


def mo_kto(loss, y, good, score, margin):
    """x = (beta (r - z0) - margin) / weight, written out."""
    x = (loss.beta * (oracle.log_ratio(y) - Z0) - margin) / loss.weight
    return (1 - oracle.sigmoid(x)) if good else (1 - oracle.sigmoid(-x))


def una_pair(loss, chosen, rejected, margin):
    return sum(oracle.una(y, t, loss.beta, loss.distance) for y, t in ((chosen, 1.0), (rejected, 0.0)))


F_DPO = of_pairs(
    lambda loss, c, r, m: oracle.f_dpo(
        c, r, loss.beta, loss.f_divergence_type, loss.f_alpha_divergence_coef, loss.label_smoothing
    )
)
LD_DPO = of_pairs(lambda loss, c, r, m: oracle.ld_dpo(c, r, loss.beta, loss.ld_alpha, loss.label_smoothing))
EQUATIONS = [
    *((FDPO(0.7, f_divergence_type=name), F_DPO) for name in DIVERGENCES),
    (FDPO(0.7, "alpha_divergence", 1.0, label_smoothing=0.2), F_DPO),
    (FDPO(0.7, "alpha_divergence", 2.5), F_DPO),
    (LDDPO(), LD_DPO),
    (LDDPO(0.7, ld_alpha=0.0, label_smoothing=0.1), LD_DPO),
    (LDDPO(0.7, ld_alpha=1.0), LD_DPO),
    (ODPO(0.7), of_pairs(lambda loss, c, r, m: oracle.odpo(c, r, loss.beta, m, loss.scale))),
    (ODPO(0.7, scale=2.0), of_pairs(lambda loss, c, r, m: oracle.odpo(c, r, loss.beta, m, loss.scale))),
    (MODPO(0.7, weight=0.3), of_pairs(lambda loss, c, r, m: oracle.modpo(c, r, loss.beta, m, loss.weight))),
    *((KTO(0.7, 1.3, 0.8, value=value), of_sequences(kto)) for value in ("logistic", "concave", "linear")),
    (KTO(0.7, reference_point=0.0), of_sequences(kto)),
    (KTO(0.7, reference_point=-1.5, value="concave"), of_sequences(kto)),
    (KTO(0.2, reference_free=True), of_sequences(kto)),
    (KTO(0.2, reference_free=True, reference_point=-4.0), of_sequences(kto)),
    (MOKTO(0.7, weight=0.3), of_sequences(mo_kto)),
    (PPOClip(), of_sequences(lambda loss, y, good, score, m: oracle.ppo_clip(y, good, loss.clip))),
    (PPOClip(0.7), of_sequences(lambda loss, y, good, score, m: oracle.ppo_clip(y, good, loss.clip))),
    *((UNA(0.7, "pairs", distance), of_pairs(una_pair)) for distance in ("bce", "mse")),
    *(
        (UNA(0.7, "labels", d), of_sequences(lambda loss, y, good, s, m: oracle.una(y, good, loss.beta, loss.distance)))
        for d in ("bce", "mse")
    ),
    *(
        (UNA(0.7, "scores", d), of_sequences(lambda loss, y, good, s, m: oracle.una(y, s, loss.beta, loss.distance)))
        for d in ("bce", "mse")
    ),
    (ConditionalSFT(), of_sequences(lambda loss, y, good, score, m: -math.fsum(logp for logp, _ in y))),
]
IDS = [repr(loss) for loss, _ in EQUATIONS]
ALL = [loss for loss, _ in EQUATIONS]


@pytest.mark.parametrize(("loss", "equation"), EQUATIONS, ids=IDS)
def test_a_loss_is_its_equation(loss, equation):
    out, expected = run(loss), torch.tensor(equation(loss), dtype=torch.float64)
    torch.testing.assert_close(out.losses.double(), expected, rtol=2**-22, atol=1e-7)
    count = N if loss.per == "token" else len(expected)
    assert out.loss.item() == pytest.approx(expected.sum().item() / count, rel=1e-6)


@pytest.mark.parametrize("loss", ALL, ids=IDS)
def test_the_gradient_is_that_of_finite_differences(loss):
    logps = LOGPS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(loss, logps, num_items=1).loss, logps)
    step = 1e-6
    for token in range(N):
        nudge = torch.zeros(N, dtype=torch.float64)
        nudge[token] = step
        difference = sum(exact_loss(loss, LOGPS + nudge)) - sum(exact_loss(loss, LOGPS - nudge))
        assert gradient[token].item() == pytest.approx(difference / (2 * step), rel=1e-5, abs=1e-7)


def exact_loss(loss, logps) -> list[float]:
    """Losses in float64, where `out.losses` is float32."""
    kept = []

    @dataclasses.dataclass(frozen=True)
    class Spy:
        per, needs = loss.per, needs_of(loss)

        def losses(self, seq):
            kept.append(loss.losses(seq))
            return kept[-1]

        def rewards(self, seq):
            return loss.rewards(seq)

    refs = REFS if "reference" in needs_of(loss) else None
    prefuse.preference_loss(logps, refs, CU_SEQLENS, Spy(), **given(loss))
    return kept[0].tolist()


@pytest.mark.parametrize("level", ["batch", "pair"])
def test_the_strength_of_beta_dpo_follows_the_batch_and_lets_no_gradient_through(level):
    loss = BetaDPO(0.7, alpha=0.5, baseline=0.2, level=level)
    y = completions(loss)
    pairs = list(zip(y[0::2], y[1::2], strict=True))
    if level == "batch":
        expected = oracle.beta_dpo(pairs, 0.7, 0.5, 0.2)
    else:
        expected = [oracle.beta_dpo([pair], 0.7, 0.5, 0.2)[0] for pair in pairs]
    logps = LOGPS.clone().requires_grad_()
    out = run(loss, logps)
    torch.testing.assert_close(out.losses.double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)
    assert is_batchwise(loss) == (level == "batch")
    # With the strength as a number the gradient is DPO's of that strength.
    ratios = torch.tensor([oracle.log_ratio(each) for each in y], dtype=torch.float64)
    gaps = 0.7 * (ratios[0::2] - ratios[1::2])
    strength = 0.7 * (1 + 0.5 * ((gaps.mean() if level == "batch" else gaps) - 0.2))
    slopes = -strength * torch.sigmoid(-strength * gaps / 0.7) / PAIRS
    expected = torch.stack([slopes, -slopes], 1).flatten().repeat_interleave(torch.tensor(LENGTHS))
    torch.testing.assert_close(torch.autograd.grad(out.loss, logps)[0], expected, rtol=1e-5, atol=1e-9)
    assert loss.after(1.2) == BetaDPO(0.7, 0.5, pytest.approx(0.9 * 0.2 + 0.1 * 1.2), level)


def test_special_cases_are_the_losses_that_they_generalize():
    dpo = run(prefuse.DPO(0.7)).losses
    for loss in (FDPO(0.7), LDDPO(0.7, ld_alpha=1.0), FDPO(0.7, "alpha_divergence", 1.0), BetaDPO(0.7, alpha=0.0)):
        torch.testing.assert_close(run(loss).losses, dpo, rtol=1e-6, atol=0)
    zeros = {"margins": torch.zeros(PAIRS)}
    for loss in (ODPO(0.7), MODPO(0.7, weight=1.0)):
        out = prefuse.preference_loss(LOGPS, REFS, CU_SEQLENS, loss, **zeros)
        torch.testing.assert_close(out.losses, dpo, rtol=1e-6, atol=0)
    # KTO at a constant is KTO with that number as its z0, to the last bit.
    fixed = run(KTO(0.7, reference_point=Z0))
    assert torch.equal(fixed.losses, run(KTO(0.7)).losses)
    assert "kl" not in fixed.metrics


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_divergence_overflows(name):
    """Log-ratios of thousands, as untrained pairs of long completions have them."""
    logps = torch.tensor([-5000.0, -1.0, -3000.0, -9000.0], dtype=torch.float64, requires_grad=True)
    refs = torch.tensor([-1.0, -4000.0, -9000.0, -2.0])
    out = prefuse.preference_loss(logps, refs, torch.tensor([0, 1, 2, 3, 4]), FDPO(0.1, name))
    assert out.losses.isfinite().all()
    assert torch.autograd.grad(out.loss, logps)[0].isfinite().all()


# ---- through the fused head ----------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", [*ALL, BetaDPO(), prefuse.DPO()], ids=repr)
def test_the_fused_path_equals_its_two_halves(loss, weighted):
    """With ignored tokens in it, in one piece and with gradients made in the forward for groups of whole items."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(N + 2, 6, requires_grad=True), torch.randn(40, 6, requires_grad=True)
    targets = torch.randint(40, (N,))
    at = torch.tensor([1, 9])  # ignored tokens, within the first and the third completion
    places = torch.tensor([i for i in range(N + 2) if i not in (1, 9)])
    longer = torch.tensor([4, 5, 5, 4, 2, 0])
    with_gaps, refs_with_gaps = torch.full((N + 2,), -100), torch.full((N + 2,), float("nan"))
    with_gaps[places], refs_with_gaps[places] = targets, REFS
    assert (with_gaps[at] == -100).all()
    cu_seqlens = torch.cat([torch.zeros(1), longer.cumsum(0)]).int()

    items = PAIRS if loss.per == "pair" else SEQUENCES
    options = given(loss) | ({"weights": torch.linspace(0.2, 2.0, items)} if weighted else {})
    reference = "reference" in needs_of(loss)
    logps = prefuse.linear_logprobs(hidden[places], weight, targets, impl="torch")
    out = prefuse.preference_loss(logps, REFS if reference else None, CU_SEQLENS, loss, **options)
    wanted = torch.autograd.grad(out.loss, (hidden, weight))
    for workspace in (0, 1 << 30, 40 * 4 * 10):
        fused = prefuse.linear_preference_loss(
            hidden, weight, with_gaps, cu_seqlens, refs_with_gaps if reference else None, loss, **options,
            workspace=workspace, impl="torch",
        )  # fmt: skip
        torch.testing.assert_close(fused.losses, out.losses, rtol=1e-5, atol=1e-6)
        for got, expected in zip(torch.autograd.grad(fused.loss, (hidden, weight)), wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_a_group_takes_the_numbers_of_its_own_items():
    """Of pairs 1 and 2, sequences 2 to 5: labels and scores by sequence, weights and margins by pair."""
    inputs = LossInputs(
        labels=torch.arange(8) > 3, z0=None, weights=torch.arange(4.0), margins=torch.arange(4.0) + 10,
        scores=torch.arange(8.0) + 20,
    )  # fmt: skip
    part = inputs.of(slice(2, 6), 2)
    assert part.labels.tolist() == [False, False, True, True]
    assert part.scores.tolist() == [22.0, 23.0, 24.0, 25.0]
    assert part.weights.tolist() == [1.0, 2.0]
    assert part.margins.tolist() == [11.0, 12.0]


# ---- numbers of rows -----------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [prefuse.DPO(), prefuse.KTO(), prefuse.SFT(), prefuse.SimPO()], ids=repr)
def test_weights_multiply_the_loss_of_each_item_and_not_the_divisor(loss):
    items = PAIRS if loss.per == "pair" else SEQUENCES
    weights = torch.linspace(0.0, 3.0, items)
    plain, weighted = run(loss), run(loss, weights=weights)
    torch.testing.assert_close(weighted.losses, plain.losses * weights, rtol=1e-6, atol=0)
    count = N if loss.per == "token" else items
    assert weighted.loss.item() == pytest.approx((plain.losses * weights).sum().item() / count, rel=1e-6)
    assert torch.equal(weighted.rewards, plain.rewards)


def test_the_weights_of_wpo():
    squares = -torch.rand(N, generator=torch.Generator().manual_seed(5))
    weights = prefuse.wpo_weights(LOGPS, squares, CU_SEQLENS)
    tokens = list(zip(LOGPS.tolist(), squares.tolist(), strict=True))
    ends = CU_SEQLENS.tolist()
    y = [tokens[a:b] for a, b in itertools.pairwise(ends)]
    expected = [oracle.wpo_weight(y[2 * i], y[2 * i + 1]) for i in range(PAIRS)]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    # From the head itself: a uniform policy writes everything as likely as anything, so its weights are 1.
    logps, extra = prefuse.linear_logprobs(
        torch.zeros(N, 4), torch.randn(7, 4), torch.zeros(N).long(), outputs=("log_sum_sq_probs",), impl="torch"
    )
    ones = prefuse.wpo_weights(logps, extra["log_sum_sq_probs"], CU_SEQLENS)
    torch.testing.assert_close(ones, torch.ones(PAIRS, dtype=torch.float64), rtol=1e-5, atol=0)


def test_the_margins_of_other_objectives():
    scores = torch.tensor([[1.0, 5.0, 2.0], [3.0, 1.0, 0.0], [0.5, 0.0, 1.0], [0.0, 2.0, 4.0]])
    pairs = prefuse.objective_margins(scores, (0.5, 0.3, 0.2), objective=0)
    assert pairs.tolist() == pytest.approx([0.3 * 4 + 0.2 * 2, 0.3 * -2 + 0.2 * -3])
    single = prefuse.objective_margins(scores, (0.5, 0.3, 0.2), objective=1, pairs=False)
    assert single.tolist() == pytest.approx([0.5 + 0.4, 1.5, 0.25 + 0.2, 0.8])
    with pytest.raises(ValueError, match=r"expected scores \(S, K\), K weights and an objective in \[0, K\)"):
        prefuse.objective_margins(scores, (0.5, 0.5), objective=0)


@pytest.mark.parametrize(
    ("good", "bad", "expected"),
    [(10, 10, (1, 1)), (4, 3, (1, 1)), (10, 30, (3, 1)), (30, 10, (1, 2.25)), (1, 1, (1, 1))],
)
def test_class_weights_bring_the_ratio_into_the_papers_range(good, bad, expected):
    desirable, undesirable = prefuse.kto_weights(good, bad)
    assert (desirable, undesirable) == pytest.approx(expected)
    assert 1 - 1e-12 <= desirable * good / (undesirable * bad) <= 4 / 3 + 1e-12
    for counts in ((0, 3), (3, 0)):
        with pytest.raises(ValueError, match="expected rows of both kinds"):
            prefuse.kto_weights(*counts)


def test_a_reference_free_point_is_the_mean_log_probability_and_not_clamped():
    z0 = prefuse.kto_reference_point(LOGPS, None, CU_SEQLENS)
    assert z0.item() == pytest.approx(LOGPS.sum().item() / SEQUENCES)
    assert z0.item() < 0


def test_control_tokens_stand_before_the_prompt():
    assert with_control([5, 6], True, [1], [2, 3]) == [1, 5, 6]
    assert with_control([5, 6], False, [1], [2, 3]) == [2, 3, 5, 6]


# ---- a reference that follows --------------------------------------------------------------------


def test_the_reference_follows_every_so_many_steps():
    torch.manual_seed(0)
    policy, reference = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    before = {name: p.clone() for name, p in reference.named_parameters()}
    following = prefuse.FollowingReference(alpha=0.25, steps=4)
    assert [following.update(step, reference, policy) for step in (1, 2, 3)] == [False] * 3
    assert all(torch.equal(p, before[name]) for name, p in reference.named_parameters())
    assert following.update(4, reference, policy)
    for name, p in reference.named_parameters():
        wanted = 0.25 * dict(policy.named_parameters())[name] + 0.75 * before[name]
        torch.testing.assert_close(p, wanted)
    assert prefuse.FollowingReference(1.0, 1).update(1, reference, policy)
    assert torch.equal(reference.weight, policy.weight)
    with pytest.raises(ValueError, match="reference and policy differ in weight"):
        prefuse.FollowingReference(1.0, 1).update(1, torch.nn.Linear(4, 2), policy)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FDPO(f_divergence_type="kl"), "f_divergence_type must be one of reverse_kl, .* got 'kl'"),
        (lambda: FDPO(f_alpha_divergence_coef=math.inf), "f_alpha_divergence_coef must be finite, got inf"),
        (lambda: LDDPO(ld_alpha=1.5), r"ld_alpha must be in \[0, 1\], got 1\.5"),
        (lambda: BetaDPO(level="row"), 'level must be "batch" or "pair"'),
        (lambda: BetaDPO(alpha=-1.0), r"alpha must be finite and >= 0, got -1\.0"),
        (lambda: ODPO(scale=math.nan), "scale must be finite and >= 0, got nan"),
        (lambda: MODPO(weight=0.0), r"weight must be in \(0, 1\], got 0\.0"),
        (lambda: MOKTO(weight=2.0), r"weight must be in \(0, 1\], got 2\.0"),
        (lambda: KTO(value="convex"), 'value must be "logistic", "concave" or "linear"'),
        (lambda: KTO(reference_point=math.nan), "reference_point must be finite, or None"),
        (lambda: PPOClip(clip=1.0), r"clip must be in \(0, 1\), got 1\.0"),
        (lambda: UNA(feedback="ranks"), 'feedback must be "labels", "scores" or "pairs"'),
        (lambda: UNA(distance="mae"), 'distance must be "bce" or "mse"'),
        (lambda: UNA(beta=0.0), r"beta must be > 0, got 0\.0"),
        (lambda: prefuse.FollowingReference(alpha=0.0), r"alpha must be in \(0, 1\], got 0\.0"),
        (lambda: prefuse.FollowingReference(steps=0), "steps must be at least 1, got 0"),
        (lambda: run(ODPO(), margins=None), "ODPO needs margins, one number for each item"),
        (lambda: run(prefuse.DPO(), margins=torch.zeros(3)), "DPO takes no margins: leave it out"),
        (lambda: run(prefuse.DPO(), scores=torch.zeros(6)), "DPO takes no scores: leave it out"),
        (lambda: run(prefuse.DPO(), weights=torch.zeros(6)), r"expected weights \(3,\), one per pair, got \(6,\)"),
        (lambda: run(prefuse.KTO(), weights=torch.zeros(3)), r"expected weights \(6,\), one per sequence, got \(3,\)"),
        (lambda: run(KTO(reference_point=1.0), z0=0.3), "KTO takes no z0: leave it out"),
    ],
)
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_of_rows_are_floating_point():
    with pytest.raises(TypeError, match=r"weights must be floating-point, got torch\.int64"):
        run(prefuse.DPO(), weights=torch.ones(3, dtype=torch.int64))


@pytest.mark.parametrize("loss", [LDDPO(), PPOClip()], ids=repr)
def test_a_loss_of_tokens_refuses_a_reference_per_sequence(loss):
    with pytest.raises(ValueError, match="this loss reads log-ratios token by token"):
        prefuse.preference_loss(LOGPS, torch.zeros(SEQUENCES).double(), CU_SEQLENS, loss, **given(loss))
