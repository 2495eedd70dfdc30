"""Liger's losses under Liger's names: in the shape of Liger's own tests, against float64 written from the definitions,
and against the installed Liger where it is right.
"""

import pytest
import torch

from liger_cases import (
    PAIR_LOSSES,
    SHAPES,
    Case,
    assert_as_good_as_eager,
    kto_truth,
    paired_truth,
    sequence_logps,
)
from liger_checks import MODULES
from prefuse import liger
from prefuse.bench.truth import oracle

OPTIONS = [  # bias, ref_bias, ignore_index, beta
    (False, False, -100, 0.1),
    (True, False, -100, 0.3),
    (True, True, 5, 0.2),
]
DTYPES = [torch.float32, torch.bfloat16]


def check_paired(module, kind, case, call=None, **numbers):
    got = module(case.weight, case.x, case.target, bias=case.bias, **(call or {}))
    truths = [paired_truth(case, kind, dtype, **numbers) for dtype in (torch.float64, case.dtype)]
    assert_as_good_as_eager(got, *truths, case, scale=3.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("nll", [None, 0.7])
@pytest.mark.parametrize(("bias", "ref_bias", "ignore_index", "beta"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_dpo(shape, dtype, average, nll, bias, ref_bias, ignore_index, beta):
    case = Case(shape, dtype, bias=bias, ref_bias=ref_bias, ignore_index=ignore_index)
    module = liger.LigerFusedLinearDPOLoss(
        ignore_index, beta, alpha=nll or 1.0, compute_nll_loss=nll is not None, average_log_prob=average
    )
    check_paired(module, "sigmoid", case, case.reference(), average=average, beta=beta, alpha=nll)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("nll", [None, 1.0])
@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_every_dpo_loss_type(loss_type, nll, average, dtype):
    smoothing = 0.2 if loss_type in ("sigmoid", "robust", "exo_pair") else 0.0
    tau = 0.4 if loss_type == "discopop" else 0.05
    case = Case(SHAPES[0], dtype, bias=True)
    module = liger.LigerFusedLinearDPOLoss(
        beta=0.3, compute_nll_loss=nll is not None, average_log_prob=average, loss_type=loss_type,
        label_smoothing=smoothing, discopop_tau=tau,
    )  # fmt: skip
    # These two are of means per token whatever `average_log_prob` says; their rewards are not.
    of_means = loss_type in ("ipo", "sigmoid_norm")
    numbers = {"beta": 0.3, "alpha": nll, "label_smoothing": smoothing, "discopop_tau": tau}
    if not of_means or average:
        check_paired(module, loss_type, case, case.reference(), average=average, **numbers)
    else:
        loss, aux = module(case.weight, case.x, case.target, bias=case.bias, **case.reference())
        means = paired_truth(case, loss_type, average=True, **numbers)
        torch.testing.assert_close(loss.double(), means[0].detach(), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(aux[0].double(), means[1][0].detach(), rtol=0.1)


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_losses_that_sort_see_the_whole_batch(loss_type):
    case = Case((6, 5, 8, 30))
    module = liger.LigerFusedLinearDPOLoss(loss_type=loss_type)
    loss, _ = module(case.weight, case.x, case.target, **case.reference())
    policy, _ = sequence_logps(case.x, case.weight, case.target, None, -100, torch.float64, False)
    refs, _ = sequence_logps(case.ref_x, case.ref_weight, case.target, None, -100, torch.float64, False)
    pairs, ref_pairs = (list(zip(x[:6].tolist(), x[6:].tolist(), strict=True)) for x in (policy.detach(), refs))
    expected = oracle.aot(pairs, ref_pairs, 0.1, 0.0, loss_type == "aot")
    assert loss.item() == pytest.approx(sum(expected) / 6, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("nll", "smoothing"), [(None, 0.0), (1.0, 0.1), (0.3, 0.0)])
@pytest.mark.parametrize(("bias", "ref_bias", "ignore_index", "beta"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_simpo(shape, dtype, nll, smoothing, bias, ref_bias, ignore_index, beta):
    case = Case(shape, dtype, bias=bias, ignore_index=ignore_index)
    module = liger.LigerFusedLinearSimPOLoss(
        ignore_index, beta, alpha=nll or 1.0, label_smoothing=smoothing, compute_nll_loss=nll is not None, gamma=0.8
    )
    check_paired(module, "simpo", case, average=True, beta=beta, alpha=nll, gamma=0.8, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize(("nll", "smoothing"), [(None, 0.0), (1.0, 0.1), (0.3, 0.0)])
@pytest.mark.parametrize(("bias", "ref_bias", "ignore_index", "beta"), OPTIONS)
def test_cpo(dtype, average, nll, smoothing, bias, ref_bias, ignore_index, beta):
    case = Case(SHAPES[0], dtype, bias=bias, ignore_index=ignore_index)
    module = liger.LigerFusedLinearCPOLoss(
        ignore_index, beta, nll or 1.0, smoothing, compute_nll_loss=nll is not None, average_log_prob=average
    )
    check_paired(module, "cpo", case, average=average, beta=beta, alpha=nll, label_smoothing=smoothing)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nll", [False, True])
@pytest.mark.parametrize(("bias", "ref_bias", "ignore_index", "beta"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_orpo(shape, dtype, nll, bias, ref_bias, ignore_index, beta):
    case = Case(shape, dtype, bias=bias, ignore_index=ignore_index)
    module = liger.LigerFusedLinearORPOLoss(ignore_index, beta, compute_nll_loss=nll)
    check_paired(module, "orpo", case, average=True, beta=beta, alpha=1.0 if nll else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["wider", "narrower", "other", "none"])
def test_orpo_with_other_targets_for_its_sft_term(kind, dtype):
    """Prompt and completion, as TRL's ORPOTrainer has it; and what nobody does."""
    case = Case(SHAPES[0], dtype, bias=True)
    nll_target = case.target.clone()
    if kind == "wider":
        nll_target[nll_target == -100] = 7
    elif kind == "narrower":
        nll_target[:, 3:] = -100
    elif kind == "other":
        nll_target = torch.where(nll_target == -100, 7, (nll_target + 1) % 123)
        nll_target[1] = -100
    else:
        nll_target[:] = -100
    module = liger.LigerFusedLinearORPOLoss(beta=0.3)
    got = module(case.weight, case.x, case.target, case.bias, nll_target)
    if kind == "none":  # no tokens: the term is 0
        plain = liger.LigerFusedLinearORPOLoss(beta=0.3, compute_nll_loss=False)(
            case.weight, case.x, case.target, case.bias
        )
        torch.testing.assert_close(got[0], plain[0], rtol=1e-6, atol=1e-7)
        assert got[1][4] == 0
        return
    truths = [
        paired_truth(case, "orpo", d, average=True, beta=0.3, alpha=1.0, nll_target=nll_target)
        for d in (torch.float64, dtype)
    ]
    case.target = torch.maximum(case.target, torch.where(torch.arange(6)[:, None] < 3, nll_target, -100))
    assert_as_good_as_eager(got, *truths, case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("kl", [None, 0.4, "row"])
@pytest.mark.parametrize(("bias", "ref_bias", "ignore_index", "beta"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kto(shape, dtype, average, kl, bias, ref_bias, ignore_index, beta):
    case = Case(shape, dtype, bias=bias, ref_bias=ref_bias, ignore_index=ignore_index, rows=5)
    if kl == "row":  # the shape that Liger documents
        kl = torch.linspace(-0.5, 1.0, 5)
    module = liger.LigerFusedLinearKTOLoss(ignore_index, beta, use_ref_model=True, average_log_prob=average)
    got = module(case.x, case.weight, case.target, case.bias, case.labels, kl=kl, **case.reference())
    truths = [
        kto_truth(case, d, average=average, beta=beta, kl=0.0 if kl is None else kl) for d in (torch.float64, dtype)
    ]
    assert_as_good_as_eager(got, *truths, case, scale=3.0)


@pytest.mark.parametrize("name", MODULES)
def test_a_function_is_its_module(name):
    make, function = MODULES[name]
    case = Case(SHAPES[0], bias=True)
    reference = case.reference() if name == "dpo" else {}
    module = make(beta=0.2, compute_nll_loss=True)
    loss, aux = module(case.weight, case.x, case.target, case.bias, **reference)
    again, aux_again = function(
        case.x, case.weight, case.target, case.bias, beta=0.2, compute_nll_loss=True, **reference
    )
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(aux, aux_again, strict=True))


def test_the_kto_function_is_its_module_and_has_a_reference_by_default():
    case = Case(SHAPES[0], bias=True)
    loss, aux = liger.LigerFusedLinearKTOLoss(beta=0.2)(
        case.x, case.weight, case.target, case.bias, case.labels, *case.reference().values(), 0.1
    )
    again, aux_again = liger.liger_fused_linear_kto(
        case.x, case.weight, case.target, case.labels, case.bias, *case.reference().values(), 0.1, beta=0.2
    )
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(aux, aux_again, strict=True))
    with pytest.raises(ValueError, match="use_ref_model is true, but there is no reference"):
        liger.liger_fused_linear_kto(case.x, case.weight, case.target, case.labels)


def test_called_as_trl_calls_it():
    """By keywords, with slices of longer tensors, a kl of shape (1,), and an auxiliary loss added in place."""
    case = Case(SHAPES[0], bias=True)
    longer, ref_longer = (torch.cat([x, x[:, :1]], 1).detach() for x in (case.x, case.ref_x))
    ids = torch.cat([case.target[:, :1], case.target], 1)
    longer.requires_grad_()
    heads = {"lin_weight": case.weight, "bias": case.bias, "ref_weight": case.ref_weight, "ref_bias": None}
    states = {"_input": longer[:, :-1], "ref_input": ref_longer[:, :-1], "target": ids[:, 1:]}
    loss, aux = liger.LigerFusedLinearKTOLoss(beta=0.1, use_ref_model=True)(
        **states, **heads, preference_labels=case.labels, kl=torch.zeros(1)
    )
    truth, true_aux = kto_truth(case)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    assert aux[4].nansum().item() == pytest.approx(true_aux[4].item(), rel=1e-4)
    loss += 0.25
    loss.backward()
    expected = torch.autograd.grad(truth, case.x)[0]
    torch.testing.assert_close(longer.grad[:, :-1], expected.float(), rtol=1e-3, atol=1e-6)
    assert not longer.grad[:, -1].any()
    paired, _ = liger.LigerFusedLinearDPOLoss(beta=0.1)(**states, **heads)
    assert paired.item() == pytest.approx(paired_truth(case, "sigmoid", average=False)[0].item(), rel=1e-5)


THEIR_CASES = [
    ("DPO", {}, True),
    ("DPO", {"average_log_prob": True, "compute_nll_loss": True, "alpha": 0.4, "beta": 0.3}, True),
    ("DPO", {"use_ref_model": False}, False),
    *[("DPO", {"loss_type": name, "label_smoothing": 0.2}, True) for name in ("robust", "exo_pair")],
    *[
        ("DPO", {"loss_type": name}, True)
        for name in ("hinge", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop")
    ],
    ("ORPO", {}, False),
    ("ORPO", {"beta": 0.4, "compute_nll_loss": False}, False),
    ("SimPO", {}, False),
    ("SimPO", {"beta": 2.0, "gamma": 0.2, "alpha": 0.3, "label_smoothing": 0.1}, False),
    ("CPO", {}, False),
    ("CPO", {"average_log_prob": True, "label_smoothing": 0.2, "alpha": 0.5}, False),
    ("KTO", {"use_ref_model": True}, True),
    ("KTO", {"use_ref_model": False, "beta": 0.4, "average_log_prob": True}, False),
]


@pytest.mark.parametrize(("name", "options", "reference"), THEIR_CASES, ids=str)
@pytest.mark.parametrize("chunk_size", [1, 2])
def test_the_installed_liger_returns_the_same(name, options, reference, chunk_size, theirs):
    """Values, shapes, dtypes and gradients, where Liger is right; float32, so that both are."""
    case = Case((4, 9, 16, 50), bias=True, ref_bias=True)
    made = []
    for module in (theirs, liger):
        loss = getattr(module, f"LigerFusedLinear{name}Loss")(compiled=False, chunk_size=chunk_size, **options)
        if name == "KTO":
            call = {"preference_labels": case.labels, "kl": torch.tensor([0.3])}
            arguments = (case.x, case.weight, case.target, case.bias)
        else:
            call, arguments = {}, (case.weight, case.x, case.target, case.bias)
        value, aux = loss(*arguments, **call, **(case.reference() if reference else {}))
        made.append(((value, *aux), torch.autograd.grad(2 * value, case.leaves())))
    (expected, expected_gradients), (got, gradients) = made
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        b = torch.as_tensor(b)
        assert (a.shape, a.dtype, a.requires_grad) == (b.shape, b.dtype, b.requires_grad)
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5 * max(1.0, b.abs().max().item()))
    for a, b in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * b.abs().max().item())
