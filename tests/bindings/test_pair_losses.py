"""The losses of pairs beside DPO and IPO: against their papers' equations in 60 digits, and by their identities."""

import dataclasses
import math
import re

import pytest
import torch

import prefuse
from prefuse import (
    AOT,
    APO,
    BCO,
    CPO,
    DPO,
    EXO,
    IPO,
    KTO,
    NCA,
    ORPO,
    RPO,
    SFT,
    SPPO,
    ChosenNLL,
    DiscoPOP,
    DPONorm,
    Hinge,
    Mixture,
    RobustDPO,
    SimPO,
    SLiC,
)
from prefuse.bench.truth import oracle
from prefuse.losses.names import LOSSES, fields_of

# Nats: almost certain, ordinary, long, and beyond what an exponential in float64 holds.
LOGPS = [-1e-8, -0.3, -2.0, -15.0, -90.0, -800.0, -1e4]
REFS = [-2.0, -0.25, -3.0, -15.0, -95.5, -700.0, -20.0]
PAIRS = [(chosen, rejected) for chosen in LOGPS for rejected in LOGPS]
PAIR_REFS = [(chosen, rejected) for chosen in REFS for rejected in REFS]
LENGTHS = [(1 + k % 5, 1 + k % 7) for k in range(len(PAIRS))]  # a pair's sides differ in length

# loss -> its oracle and the numbers that it takes after the pair's
EQUATIONS = [
    (DPONorm(0.3), oracle.dpo_norm, (0.3,)),
    (DPONorm(), oracle.dpo_norm, (5.0,)),
    (Hinge(), oracle.hinge, (0.1,)),
    (Hinge(2.0), oracle.hinge, (2.0,)),
    (RobustDPO(), oracle.robust_dpo, (0.1, 0.1)),
    (RobustDPO(0.5, 0.4), oracle.robust_dpo, (0.5, 0.4)),
    (RobustDPO(0.5, 0.0), oracle.robust_dpo, (0.5, 0.0)),
    (EXO(), oracle.exo, (0.1, 1e-3)),
    (EXO(2.0, 0.3), oracle.exo, (2.0, 0.3)),
    (DiscoPOP(), oracle.disco_pop, (0.1, 0.05)),
    (DiscoPOP(0.05, 0.9), oracle.disco_pop, (0.05, 0.9)),
    (NCA(), oracle.nca, (0.1,)),
    (NCA(3.0), oracle.nca, (3.0,)),
    (BCO(), oracle.bco, (0.1, 0.0)),
    (BCO(0.7, shift=-1.5), oracle.bco, (0.7, -1.5)),
    (SPPO(), oracle.sppo, (0.1,)),
    (SPPO(1e-3), oracle.sppo, (1e-3,)),
    (APO(), oracle.apo_zero, (0.1,)),
    (APO(2.0, "zero"), oracle.apo_zero, (2.0,)),
    (APO(0.1, "down"), oracle.apo_down, (0.1,)),
    (APO(2.0, "down"), oracle.apo_down, (2.0,)),
    (SimPO(), oracle.simpo, (2.0, 1.0, 0.0)),
    (SimPO(0.5, 0.3, 0.2), oracle.simpo, (0.5, 0.3, 0.2)),
    (CPO(), oracle.cpo, (0.1, 0.0, 1.0, 1.0)),
    (CPO(0.5, 0.2, 0.3, average_nll=False), oracle.cpo, (0.5, 0.2, 0.3, 0.0)),
    (ORPO(), oracle.orpo, (0.1, 1.0)),
    (ORPO(2.0, 0.5), oracle.orpo, (2.0, 0.5)),
    (SLiC(), oracle.slic, (1.0, 0.1)),
    (SLiC(0.0, 0.0), oracle.slic, (0.0, 0.0)),
    (RPO(), oracle.rpo, (0.1, 1.0)),
    (RPO(0.5, 0.2), oracle.rpo, (0.5, 0.2)),
    (ChosenNLL(), oracle.chosen_nll, (0.0,)),
    (ChosenNLL(mean_length=3.5), oracle.chosen_nll, (3.5,)),
]
IDS = [repr(loss) for loss, *_ in EQUATIONS]
ALL = [loss for loss, *_ in EQUATIONS] + [AOT(), AOT(0.3, 0.1, paired=False), Mixture((DPO(), ChosenNLL()), (0.7, 0.2))]
WITH_REFERENCE = [loss for loss in ALL if loss.uses_reference]
# Sums of terms of one sign, computed without cancellation: right to the last digit however small they are.
TO_THE_LAST_DIGIT = (DPONorm, NCA, BCO, APO, SimPO, ORPO, ChosenNLL)


def flat(pairs):
    return [x for pair in pairs for x in pair]


def run(loss, pairs, refs=None, lengths=None, **options):
    """`preference_loss` of sequences with these log-probabilities: all of it in the first token."""
    lengths = flat(lengths) if lengths else [1] * 2 * len(pairs)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    logps = torch.zeros(sum(lengths), dtype=torch.float64)
    logps[cu_seqlens[:-1].long()] = torch.tensor(flat(pairs), dtype=torch.float64)
    logps.requires_grad_()
    ref_logps = None
    if loss.uses_reference:
        ref_logps = torch.tensor(flat(refs), dtype=torch.float64) if refs else torch.zeros(len(pairs) * 2).double()
    return logps, prefuse.preference_loss(logps, ref_logps, cu_seqlens, loss, **options)


@pytest.mark.parametrize(("loss", "equation", "numbers"), EQUATIONS, ids=IDS)
def test_a_loss_is_its_equation(loss, equation, numbers):
    _, out = run(loss, PAIRS, PAIR_REFS, LENGTHS)
    expected = torch.tensor(
        [equation(*pair, *numbers) for pair in zip(PAIRS, PAIR_REFS, LENGTHS, strict=True)], dtype=torch.float64
    )
    # `losses` leaves in float32 what was computed in float64 from numbers of this size.
    size = torch.tensor(PAIRS).double().abs().amax(1).clamp(min=1000.0) * max(1.0, *map(abs, numbers))
    floor = 1e-37 if isinstance(loss, TO_THE_LAST_DIGIT) else 2**-50 * size
    assert ((out.losses.double() - expected).abs() <= 2**-23 * expected.abs() + floor).all()
    assert abs(out.loss.item() - expected.mean()) <= 2**-22 * expected.abs().mean()


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2)])
def test_aot_is_its_equation(beta, smoothing, paired):
    _, out = run(AOT(beta, smoothing, paired), PAIRS, PAIR_REFS, LENGTHS)
    expected = torch.tensor(oracle.aot(PAIRS, PAIR_REFS, beta, smoothing, paired)).double()
    torch.testing.assert_close(out.losses.double(), expected, rtol=2**-22, atol=2**-50 * 1e4)


def test_aot_does_not_know_which_completions_were_paired():
    """Unpaired, any matching of chosen and rejected is the same; paired, any order of the pairs is."""
    pairs, refs = [(-i - 1.0, -i * i / 4) for i in range(12)], [(-1.5 * i, -i - 3.0) for i in range(12)]

    def matched_otherwise(pairs):
        return [(pairs[i][0], pairs[(i + 1) % len(pairs)][1]) for i in range(len(pairs))]

    for loss in (AOT(0.1), AOT(0.1, paired=False)):
        losses = run(loss, pairs, refs)[1].losses
        assert torch.equal(losses, run(loss, pairs[::-1], refs[::-1])[1].losses)
        otherwise = run(loss, matched_otherwise(pairs), matched_otherwise(refs))[1].losses
        assert torch.equal(losses, otherwise) != loss.paired


@pytest.mark.parametrize("loss", ALL, ids=repr)
@pytest.mark.parametrize("reference", ["token", "sequence"])
def test_the_gradient_agrees_with_finite_differences(loss, reference):
    torch.manual_seed(1)
    lengths = [2, 3, 1, 4, 3, 2]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    logps = -2 * torch.rand(sum(lengths), dtype=torch.float64) - 0.05
    ref_logps = None
    if loss.uses_reference:
        ref_logps = -2 * torch.rand(sum(lengths), dtype=torch.float64)
        if reference == "sequence":
            ref_logps = torch.stack([x.sum() for x in ref_logps.split(lengths)])

    def value(x):
        return prefuse.preference_loss(x, ref_logps, cu_seqlens, loss).losses.double().mean()

    leaf = logps.clone().requires_grad_()
    prefuse.preference_loss(leaf, ref_logps, cu_seqlens, loss).loss.backward()
    # The losses leave in float32, so a step must be wide, and the third derivative costs step^2.
    step = 1e-2
    for i in range(len(logps)):
        nudge = torch.zeros_like(logps)
        nudge[i] = step
        slope = (value(logps + nudge) - value(logps - nudge)) / (2 * step)
        rounding = 2**-24 * value(logps).abs().clamp(min=1.0) / step
        assert abs(slope - leaf.grad[i]) <= 2e-3 * leaf.grad.abs().max() + rounding, i


@pytest.mark.parametrize("loss", WITH_REFERENCE, ids=repr)
def test_a_reference_per_token_is_its_sum_per_sequence(loss):
    torch.manual_seed(2)
    lengths = [3, 1, 4, 2]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    logps, ref_logps = -3 * torch.rand(2, 10, dtype=torch.float64)
    per_token = prefuse.preference_loss(logps, ref_logps, cu_seqlens, loss)
    sums = torch.stack([x.sum() for x in ref_logps.split(lengths)])
    per_sequence = prefuse.preference_loss(logps, sums, cu_seqlens, loss)
    torch.testing.assert_close(per_token.losses, per_sequence.losses, rtol=2**-22, atol=1e-12)
    torch.testing.assert_close(per_token.rewards, per_sequence.rewards, rtol=2**-22, atol=1e-12)


@pytest.mark.parametrize("loss", ALL, ids=repr)
@pytest.mark.parametrize("size", [1e4, 1e6])
def test_extreme_margins_have_finite_losses_and_gradients(loss, size):
    for pair in [(-size, -1e-9), (-1e-9, -size), (-size, -size), (0.0, 0.0), (-size, 0.0), (0.0, -size)]:
        logps, out = run(loss, [pair], [(-1.0, -1.0)], [(3, 2)])
        out.loss.backward()
        assert out.loss.isfinite(), pair
        assert logps.grad.isfinite().all(), pair


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_empty_completions_have_finite_losses_and_gradients(loss):
    for lengths in [(0, 3), (3, 0), (0, 0)]:
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
        logps = torch.full((sum(lengths),), -0.7, requires_grad=True)
        ref_logps = torch.zeros(2).double() if loss.uses_reference else None
        out = prefuse.preference_loss(logps, ref_logps, cu_seqlens, loss)
        out.loss.backward()
        assert out.loss.isfinite()
        assert logps.grad.isfinite().all()


# Not of this kind: APO "down" lowers both, DiscoPOP with its small tau has a hill there, a hinge without delta a kink.
RAISES_CHOSEN = [loss for loss in ALL if loss not in (APO(0.1, "down"), APO(2.0, "down"), DiscoPOP(), SLiC(0.0, 0.0))]


@pytest.mark.parametrize("loss", RAISES_CHOSEN, ids=repr)
def test_at_the_reference_the_chosen_one_goes_up_and_the_rejected_one_down(loss):
    logps, out = run(loss, [(-4.0, -4.0)], [(-4.0, -4.0)], [(4, 4)])
    out.loss.backward()
    chosen, rejected = logps.grad[:4], logps.grad[4:]
    assert (chosen < 0).all()
    assert (rejected == 0).all() if isinstance(loss, ChosenNLL) else (rejected > 0).all()


def test_apo_down_lowers_both_the_rejected_more():
    logps, out = run(APO(0.1, "down"), [(-4.0, -4.0)], [(-4.0, -4.0)])
    out.loss.backward()
    assert logps.grad[0] == 0.0  # sigmoid'(0) both ways: only beyond the reference it sinks
    assert logps.grad[1] > 0
    logps, out = run(APO(0.1, "down"), [(-4.0, -40.0)], [(-4.0, -4.0)])
    out.loss.backward()
    assert logps.grad[0] > 0


def test_policy_and_reference_the_same_gives_the_losses_at_no_preference():
    ln2 = math.log(2)
    at_zero = {
        DPONorm(): ln2, Hinge(): 1.0, RobustDPO(): ln2, EXO(0.1, 0.25): -ln2 - 0.5 * math.log(0.25 * 0.75),
        DiscoPOP(): 0.5 * ln2 + 0.5, NCA(): 2 * ln2, BCO(): 2 * ln2, SPPO(0.1): 50.0, APO(): 1.0,
        APO(anchor="down"): 1.0, AOT(): ln2,
    }  # fmt: skip
    for loss, value in at_zero.items():
        _, out = run(loss, PAIRS, PAIRS)
        torch.testing.assert_close(out.losses, torch.full_like(out.losses, value), rtol=2**-22, atol=0)
        assert not out.rewards.any()


def test_losses_of_one_family_agree_where_they_must():
    def losses(loss, lengths=LENGTHS):
        return run(loss, PAIRS, PAIR_REFS, lengths)[1].losses.double()

    def same(a, b):
        torch.testing.assert_close(a, b, rtol=2**-22, atol=1e-8)

    one = [(1, 1)] * len(PAIRS)
    same(losses(DPONorm(0.3), one), losses(DPO(0.3), one))
    same(losses(RobustDPO(0.3, 0.0)), losses(DPO(0.3)))
    # E over flips of the robust loss is DPO's own: (1 - e) robust(x) + e robust(-x) = dpo(x).
    swapped = [(b, a) for a, b in PAIRS]
    robust = run(RobustDPO(0.3, 0.2), swapped, [(b, a) for a, b in PAIR_REFS])[1].losses.double()
    same(0.8 * losses(RobustDPO(0.3, 0.2)) + 0.2 * robust, losses(DPO(0.3)))
    same(losses(RPO(0.3, 0.0)), losses(DPO(0.3)))
    same(losses(RPO(0.3, 0.4)), losses(Mixture((DPO(0.3), ChosenNLL()), (1.0, 0.4))))
    same(losses(CPO(0.3, 0.1, 0.0)), losses(SimPO(0.3, 0.0, 0.1), one))
    same(losses(CPO(0.3, nll_weight=2.0)), losses(CPO(0.3, nll_weight=0.0)) + 2 * losses(ChosenNLL()))
    same(losses(SLiC(1.0, 0.0)), run(Hinge(1.0), PAIRS, [(0.0, 0.0)] * len(PAIRS))[1].losses.double())


def test_a_mean_over_tokens_is_the_mean_over_pairs_with_the_mean_length():
    chosen_tokens = sum(n for n, _ in LENGTHS)
    _, out = run(ChosenNLL(chosen_tokens / len(PAIRS)), PAIRS, lengths=LENGTHS)
    per_token = -math.fsum(chosen for chosen, _ in PAIRS) / chosen_tokens
    assert out.loss.item() == pytest.approx(per_token, rel=2**-22)
    _, as_tensor = run(ChosenNLL(torch.tensor(chosen_tokens / len(PAIRS))), PAIRS, lengths=LENGTHS)
    assert out.loss.item() == pytest.approx(as_tensor.loss.item(), rel=2**-22)


def test_a_mixture_is_the_weighted_sum_and_logs_the_first_parts_rewards():
    parts = (BCO(0.2), IPO(0.3), SimPO(), ChosenNLL())
    weights = (0.5, 2.0, 0.25, 0.1)
    mixture = Mixture(parts, weights)
    outs = [run(part, PAIRS, PAIR_REFS, LENGTHS)[1] for part in parts]
    _, out = run(mixture, PAIRS, PAIR_REFS, LENGTHS)
    expected = sum(w * o.losses.double() for w, o in zip(weights, outs, strict=True))
    torch.testing.assert_close(out.losses.double(), expected, rtol=2**-21, atol=0)
    assert torch.equal(out.rewards, outs[0].rewards)
    assert Mixture((SimPO(), CPO())).uses_reference is False
    assert mixture.uses_reference is True
    unweighted = run(Mixture(parts), PAIRS, PAIR_REFS, LENGTHS)[1].losses.double()
    torch.testing.assert_close(unweighted, sum(o.losses.double() for o in outs), rtol=2**-21, atol=0)


@pytest.mark.parametrize("loss", [loss for loss in ALL if not isinstance(loss, ChosenNLL | Mixture)], ids=repr)
def test_a_reward_is_what_its_loss_compares(loss):
    _, out = run(loss, PAIRS, PAIR_REFS, LENGTHS)
    logps, refs, n = (torch.tensor(flat(x), dtype=torch.float64) for x in (PAIRS, PAIR_REFS, LENGTHS))
    if isinstance(loss, SimPO | ORPO):
        expected = loss.beta * logps / n
    elif isinstance(loss, SLiC):
        expected = logps
    else:
        expected = loss.beta * (logps - refs if loss.uses_reference else logps)
    torch.testing.assert_close(out.rewards.double(), expected, rtol=2**-22, atol=1e-12)


OTHER_VALUES = {
    "beta": 0.37, "label_smoothing": 0.23, "tau": 0.4, "shift": 0.7, "anchor": "zero", "gamma": 0.2,
    "nll_weight": 0.6, "delta": 4.0, "mean_length": 9.0, "weights": (0.5, 0.25),
    "parts": (BCO(), SimPO()),
}  # fmt: skip
EVERY_FIELD = [
    (loss, field.name) for loss in {type(loss): loss for loss in ALL}.values() for field in dataclasses.fields(loss)
]


@pytest.mark.parametrize(("loss", "field"), EVERY_FIELD, ids=lambda x: x if isinstance(x, str) else type(x).__name__)
def test_every_option_changes_the_loss(loss, field):
    """An option that a path ignores is the worst kind of bug: nothing fails."""
    pairs, refs, lengths = [(-4.0, -3.0), (-2.0, -7.0)], [(-3.5, -3.25), (-4.0, -1.0)], [(2, 3), (4, 1)]
    value = not getattr(loss, field) if isinstance(getattr(loss, field), bool) else OTHER_VALUES[field]
    other = dataclasses.replace(loss, **{field: value})
    assert run(loss, pairs, refs, lengths)[1].loss.item() != run(other, pairs, refs, lengths)[1].loss.item()


# ---- metrics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_pairs_log_trls_metrics(loss):
    _, out = run(loss, PAIRS, PAIR_REFS, LENGTHS)
    means = prefuse.reduce_metrics(out.metrics)
    assert means["logps/chosen"] == pytest.approx(math.fsum(chosen for chosen, _ in PAIRS) / len(PAIRS))
    margins = out.rewards[0::2] - out.rewards[1::2]
    assert means["rewards/accuracies"] == pytest.approx((margins > 0).float().mean().item())


# ---- names ---------------------------------------------------------------------------------------


def test_every_loss_has_a_name_and_every_name_a_loss():
    exported = {getattr(prefuse, name) for name in prefuse.__all__ if dataclasses.is_dataclass(getattr(prefuse, name))}
    exported = {cls for cls in exported if not cls.__name__.endswith("Output")}
    others = {SFT, Mixture, prefuse.FollowingReference}
    of_others = ("prefuse.losses.policy", "prefuse.losses.rewards")  # of samples and of scores; PPOClip is of both
    others |= {cls for cls in exported if cls.__module__ in of_others} - {prefuse.PPOClip}
    assert {cls for cls, _ in LOSSES.values()} == exported - others
    for name, (cls, fixed) in LOSSES.items():
        loss = prefuse.loss_named(name)
        assert type(loss) is cls
        assert loss == cls(**fixed)
        assert set(fields_of(name)) | set(fixed) == {field.name for field in dataclasses.fields(cls)}


def test_trls_names_are_known():
    trl_config = pytest.importorskip("trl").DPOConfig
    described = trl_config.__dataclass_fields__["loss_type"].metadata["help"]
    names = set(re.findall(r"`'(\w+)'`", described))
    assert {"sigmoid", "aot_unpaired", "sigmoid_norm"} <= names
    assert names <= set(LOSSES)


def test_a_name_with_its_numbers():
    assert prefuse.loss_named("simpo", beta=2.5, gamma=0.3) == SimPO(2.5, 0.3)
    assert prefuse.loss_named("sigmoid", label_smoothing=0.1) == DPO(label_smoothing=0.1)
    assert prefuse.loss_named("apo_down", beta=0.2) == APO(0.2, "down")
    assert prefuse.loss_named("kto", desirable_weight=1.3) == KTO(desirable_weight=1.3)


# ---- what is refused -----------------------------------------------------------------------------

NAN = float("nan")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Hinge(beta=0.0), r"beta must be > 0, got 0\.0"),
        (lambda: SimPO(beta=-1.0), r"beta must be > 0, got -1\.0"),
        (lambda: CPO(beta=NAN), "beta must be > 0, got nan"),
        (lambda: ORPO(beta=0), "beta must be > 0, got 0"),
        (lambda: RPO(beta=0), "beta must be > 0, got 0"),
        (lambda: RobustDPO(label_smoothing=0.5), r"label_smoothing must be in \[0, 0\.5\), got 0\.5"),
        (lambda: EXO(label_smoothing=0.0), r"label_smoothing must be in \(0, 0\.5\), got 0\.0"),
        (lambda: EXO(label_smoothing=NAN), r"label_smoothing must be in \(0, 0\.5\), got nan"),
        (lambda: SimPO(label_smoothing=-0.1), r"label_smoothing must be in \[0, 0\.5\), got -0\.1"),
        (lambda: CPO(label_smoothing=0.7), r"label_smoothing must be in \[0, 0\.5\), got 0\.7"),
        (lambda: AOT(label_smoothing=NAN), r"label_smoothing must be in \[0, 0\.5\), got nan"),
        (lambda: SimPO(gamma=NAN), "gamma must be finite, got nan"),
        (lambda: DiscoPOP(tau=0.0), r"tau must be > 0, got 0\.0"),
        (lambda: APO(anchor="up"), 'anchor must be "zero" or "down", got \'up\''),
        (lambda: CPO(nll_weight=-1.0), r"nll_weight must be finite and >= 0, got -1\.0"),
        (lambda: ORPO(nll_weight=NAN), "nll_weight must be finite and >= 0, got nan"),
        (lambda: SLiC(delta=-1.0), r"delta must be finite and >= 0, got -1\.0"),
        (lambda: SLiC(nll_weight=math.inf), "nll_weight must be finite and >= 0, got inf"),
        (lambda: RPO(nll_weight=-0.5), r"nll_weight must be finite and >= 0, got -0\.5"),
        (lambda: ChosenNLL(mean_length=0.0), "mean_length must be > 0, or None for each completion's own, got 0"),
        (lambda: Mixture(()), r"parts must be one or more losses over pairs, got \(\)"),
        (lambda: Mixture((DPO(), KTO())), r"parts must be one or more losses over pairs, got \(DPO\("),
        (lambda: Mixture((DPO(), SFT())), "parts must be one or more losses over pairs"),
        (lambda: Mixture((DPO(), "ipo")), "parts must be one or more losses over pairs"),
        (lambda: Mixture((DPO(), IPO()), (1.0,)), "expected 2 weights, one per part, got 1"),
        (lambda: Mixture((DPO(), IPO()), (1.0, NAN)), "a weight must be finite and >= 0, got nan"),
        (lambda: prefuse.loss_named("simppo"), "unknown loss 'simppo'; did you mean simpo"),
        (lambda: prefuse.loss_named(""), "unknown loss ''; did you mean dpo or ipo or kto or simpo or"),
    ],
)
def test_a_hyperparameter_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_hyperparameter_that_the_named_loss_does_not_have():
    with pytest.raises(TypeError, match="the loss 'apo_zero' has no anchor, gamma; it takes beta"):
        prefuse.loss_named("apo_zero", gamma=1.0, anchor="down")


@pytest.mark.parametrize("loss", ALL, ids=repr)
def test_pairs_take_neither_labels_nor_an_odd_number_nor_a_reference_they_do_not_use(loss):
    name = type(loss).__name__
    logps, cu_seqlens = torch.zeros(3), torch.tensor([0, 1, 2, 3])
    ref = torch.zeros(3) if loss.uses_reference else None
    with pytest.raises(ValueError, match=f"{name} takes pairs .* got an odd number of sequences: 3"):
        prefuse.preference_loss(logps, ref, cu_seqlens, loss)
    ref = None if loss.uses_reference else torch.zeros(2)
    wrong = f"{name} needs ref_logps" if loss.uses_reference else f"{name} uses no reference"
    with pytest.raises(ValueError, match=wrong):
        prefuse.preference_loss(torch.zeros(2), ref, torch.tensor([0, 1, 2]), loss)
