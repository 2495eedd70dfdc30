"""Liger's losses under Liger's names: in the shape of Liger's own tests, against float64 written from the definitions,
against the installed Liger where it is right, and on the inputs where it is not.
"""

import math

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
from prefuse import liger
from prefuse.bench.truth import oracle
from prefuse.kernels.cost import count_cost

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


# ---- the functions, and the installed Liger ------------------------------------------------------

MODULES = {
    "dpo": (liger.LigerFusedLinearDPOLoss, liger.liger_fused_linear_dpo),
    "orpo": (liger.LigerFusedLinearORPOLoss, liger.liger_fused_linear_orpo),
    "simpo": (liger.LigerFusedLinearSimPOLoss, liger.liger_fused_linear_simpo),
    "cpo": (liger.LigerFusedLinearCPOLoss, liger.liger_fused_linear_cpo),
}


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


@pytest.fixture(scope="module")
def theirs():
    """liger_kernel's own losses, eager."""
    return pytest.importorskip("liger_kernel.chunked_loss")


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


# ---- where Liger is wrong ------------------------------------------------------------------------


def finite(loss, aux, leaves):
    assert loss.isfinite()
    assert all(x.isfinite().all() for x in aux)
    for gradient in torch.autograd.grad(loss, leaves):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("nll", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("empty", ["chosen", "one", "rejected", "all"])
@pytest.mark.parametrize("name", MODULES)
def test_rows_without_tokens_are_defined(name, empty, average, nll, theirs):
    """Liger's loss is NaN where no chosen row has a token, and where one has none and means are compared."""
    case = Case((3, 5, 8, 20))
    rows = {"chosen": slice(0, 3), "one": slice(1, 2), "rejected": slice(3, 6), "all": slice(0, 6)}[empty]
    case.target[rows] = -100
    options = {"compute_nll_loss": nll} | ({"average_log_prob": average} if name in ("dpo", "cpo") else {})
    reference = case.reference() if name == "dpo" else {}
    loss, aux = MODULES[name][0](**options)(case.weight, case.x, case.target, **reference)
    finite(loss, aux, case.leaves())
    logps = torch.cat(aux[:2])
    assert (logps[rows] == 0).all()
    assert (logps.abs() > 0).sum() == 6 - len(logps[rows])
    if empty == "chosen":
        assert aux[4] == 0
        original = getattr(theirs, MODULES[name][0].__name__)(compiled=False, **options)
        assert original(case.weight, case.x, case.target, **reference)[0].isnan()


def test_an_empty_row_leaves_the_others_as_they_are():
    case = Case((3, 5, 8, 20))
    module = liger.LigerFusedLinearDPOLoss(average_log_prob=True)
    _, whole = module(case.weight, case.x, case.target, **case.reference())
    case.target[1] = -100
    _, without = module(case.weight, case.x, case.target, **case.reference())
    for number in (0, 5):
        assert torch.equal(whole[number][[0, 2]], without[number][[0, 2]])
        assert without[number][1] == 0


def test_kto_without_tokens_is_defined():
    case = Case((3, 5, 8, 20))
    case.target[2] = -100
    for average in (False, True):
        module = liger.LigerFusedLinearKTOLoss(average_log_prob=average)
        loss, aux = module(case.x, case.weight, case.target, None, case.labels, **case.reference())
        finite(loss, aux, case.leaves())


@pytest.mark.parametrize("flag", [False, True])
def test_a_reference_that_is_given_is_used(flag, theirs):
    """Liger's KTO class has use_ref_model=False as its default, and then ignores the reference it is given."""
    case = Case(SHAPES[1])
    arguments = (case.x, case.weight, case.target, None, case.labels)
    loss, _ = liger.LigerFusedLinearKTOLoss(use_ref_model=flag)(*arguments, **case.reference())
    expected = kto_truth(case)[0].item()
    ignoring = theirs.LigerFusedLinearKTOLoss(compiled=False)(*arguments, **case.reference())[0].item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert abs(ignoring - expected) > 1e-3
    paired = liger.LigerFusedLinearDPOLoss(use_ref_model=flag)(case.weight, case.x, case.target, **case.reference())
    assert paired[0].item() == pytest.approx(paired_truth(case, "sigmoid", average=False)[0].item(), rel=1e-5)


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("form", ["row", "row in float32", "token"])
def test_reference_log_probabilities_stand_for_the_reference(form, average):
    case = Case(SHAPES[0], ref_bias=True)
    sums, tokens = sequence_logps(case.ref_x, case.ref_weight, case.target, case.ref_bias, -100, torch.float64, False)
    given = {"row": sums, "row in float32": sums.float(), "token": tokens.float()}[form]
    if form == "token":
        given = torch.where(case.target == -100, math.nan, given)  # not read where nothing counts
    paired = liger.LigerFusedLinearDPOLoss(average_log_prob=average)
    unpaired = liger.LigerFusedLinearKTOLoss(average_log_prob=average)
    truths = [paired_truth(case, "sigmoid", average=average), kto_truth(case, average=average)]
    results = [
        paired(case.weight, case.x, case.target, ref_logps=given),
        unpaired(case.x, case.weight, case.target, None, case.labels, ref_logps=given),
    ]
    for (loss, aux), (true_loss, true_aux) in zip(results, truths, strict=True):
        torch.testing.assert_close(loss.double(), true_loss.detach(), rtol=2e-6, atol=1e-6)
        for x, true in zip(aux, true_aux, strict=True):
            torch.testing.assert_close(x.double(), true.detach(), rtol=1e-5, atol=1e-4)


def test_a_policy_equal_to_its_reference_has_rewards_of_exactly_0():
    case = Case(SHAPES[0], torch.bfloat16, bias=True)
    loss, aux = liger.LigerFusedLinearDPOLoss()(
        case.weight, case.x, case.target, case.bias, case.x.detach(), case.weight.detach(), case.bias.detach()
    )
    assert not aux[5].any()
    assert not aux[6].any()
    assert loss.item() == torch.tensor(math.log(2)).item()


def test_autocast_casts_what_the_head_multiplies():
    """float32 masters under autocast are what bf16 copies of them are, and keep float32 gradients."""
    case = Case(SHAPES[0], bias=True)
    module = liger.LigerFusedLinearDPOLoss(compute_nll_loss=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = module(case.weight, case.x, case.target, case.bias, **case.reference())
    low = [x.detach().bfloat16() for x in (case.weight, case.x)]
    ref = {name: None if x is None else x.bfloat16() for name, x in case.reference().items()}
    expected, _ = module(low[0], low[1], case.target, case.bias.detach(), **ref)
    assert torch.equal(loss, expected)
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(loss, case.leaves()))


@pytest.mark.parametrize("name", MODULES)
def test_without_gradients_and_with_a_frozen_head(name):
    case = Case(SHAPES[0], bias=True)
    reference = case.reference() if name == "dpo" else {}
    module = MODULES[name][0](compute_nll_loss=True)
    loss, _ = module(case.weight, case.x, case.target, case.bias, **reference)
    (gradient,) = torch.autograd.grad(loss, case.x)
    with torch.no_grad():
        assert torch.equal(module(case.weight, case.x, case.target, case.bias, **reference)[0], loss)
    frozen, _ = module(case.weight.detach(), case.x, case.target, case.bias.detach(), **reference)
    assert torch.equal(frozen, loss)
    torch.testing.assert_close(torch.autograd.grad(frozen, case.x)[0], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", [*MODULES, "kto", "orpo with other targets"])
def test_a_workspace_buys_a_product_and_changes_no_bit(name):
    case = Case((4, 16, 32, 600))
    key = name.split()[0]
    made = []
    for workspace in (0, None):
        make = liger.LigerFusedLinearKTOLoss if key == "kto" else MODULES[key][0]
        module = make(workspace=workspace)
        with count_cost() as cost:
            if key == "kto":
                loss, aux = module(case.x, case.weight, case.target, None, case.labels)
            else:
                more = {"nll_target": case.target.roll(1, 1)} if "other" in name else {}
                options = {"ref_logps": torch.zeros(8).double()} if key == "dpo" else more
                loss, aux = module(case.weight, case.x, case.target, **options)
            loss.backward()
        made.append((loss, aux, cost.flops))
    (loss, aux, flops), (other, other_aux, less) = made
    assert torch.equal(loss, other)
    assert all(torch.equal(a, b) for a, b in zip(aux, other_aux, strict=True))
    assert less <= 0.85 * flops  # 3 of 4, and the forward rounds its rows up to a tile


def test_ipo_works_where_liger_has_none(theirs):
    case = Case(SHAPES[0])
    loss, _ = liger.LigerFusedLinearDPOLoss(loss_type="ipo", beta=0.2)(
        case.weight, case.x, case.target, **case.reference()
    )
    truth, _ = paired_truth(case, "ipo", average=True, beta=0.2)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)
    with pytest.raises(ValueError, match="Unsupported loss_type"):
        theirs.LigerFusedLinearDPOLoss(loss_type="ipo")


def test_a_reference_point_for_each_row_is_of_its_row(theirs):
    """Liger documents kl of (batch_size,), and subtracts all of it from every row."""
    case = Case((2, 7, 8, 20))
    kl = torch.tensor([0.0, 30.0, -20.0, 10.0])
    arguments = (case.x, case.weight, case.target, None, case.labels)
    loss, _ = liger.LigerFusedLinearKTOLoss()(*arguments, kl=kl, **case.reference())
    expected = kto_truth(case, kl=kl)[0].item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    original = theirs.LigerFusedLinearKTOLoss(compiled=False, use_ref_model=True)
    assert abs(original(*arguments, kl=kl, **case.reference())[0].item() - expected) > 0.1


def test_smoothing_makes_the_sigmoid_loss_conservative(theirs):
    case = Case(SHAPES[1])
    for module, smoothed in ((theirs, False), (liger, True)):
        losses = [
            module.LigerFusedLinearDPOLoss(label_smoothing=e, compiled=False)(
                case.weight, case.x, case.target, **case.reference()
            )[0]
            for e in (0.0, 0.3)
        ]
        assert (losses[0] != losses[1]) == smoothed


def test_bf16_logits_cost_liger_digits_that_are_kept_here(theirs):
    """Log-ratios of long rows against float64 on the same bf16 inputs."""
    case = Case((2, 300, 64, 500), torch.bfloat16)
    truth = paired_truth(case, "sigmoid", average=False)[1]
    errors = []
    for module in (theirs, liger):
        loss = module.LigerFusedLinearDPOLoss(compiled=False)
        aux = loss(case.weight, case.x, case.target, **case.reference())[1]
        errors.append(max((x.double() - true).abs().max().item() for x, true in zip(aux[:2], truth[:2], strict=True)))
    assert errors[1] < 1e-4 * 2**2 < errors[0]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.randn(8, 8)}, r"expected _input \(B, T, H\) and target \(B, T\), got \(8, 8\) and \(6, 5\)"),
        ({"target": torch.zeros(6, 4).long()}, r"expected _input \(B, T, H\) and target"),
        ({"ref": {}}, "use_ref_model is true, but there is no reference: give ref_input and ref_weight, or ref_logps"),
        ({"ref": {"ref_input": torch.randn(6, 5, 8)}}, "ref_input needs ref_weight, the reference's head"),
        (
            {"ref": {"ref_input": torch.randn(6, 4, 8), "ref_weight": torch.randn(20, 8)}},
            r"expected ref_input \(6, 5, '...'\), got \(6, 4, 8\)",
        ),
        (
            {"ref": {"ref_logps": torch.zeros(3)}},
            r"expected ref_logps \(6,\), sums over tokens, or \(6, 5\), got \(3,\)",
        ),
        (
            {"ref": {"ref_logps": torch.zeros(6), "ref_input": torch.randn(6, 5, 8)}},
            "got ref_logps and ref_input: give the reference once",
        ),
    ],
)
def test_tensors_that_do_not_fit(changes, message):
    case = Case((3, 5, 8, 20))
    x, target = changes.get("x", case.x), changes.get("target", case.target)
    with pytest.raises(ValueError, match=message):
        liger.LigerFusedLinearDPOLoss()(case.weight, x, target, **changes.get("ref", case.reference()))


def test_an_odd_number_of_rows_has_no_pairs(theirs):
    case = Case((3, 5, 8, 20), rows=5)
    for make, _ in MODULES.values():
        with pytest.raises(ValueError, match="expected as many chosen rows as rejected ones, got 5 rows"):
            make()(case.weight, case.x, case.target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sft"}, "loss_type must be one of sigmoid, sigmoid_norm, hinge, .*, got 'sft'"),
        ({"loss_type": "exo_pair"}, r"label_smoothing must be in \(0, 0\.5\), got 0\.0"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0\.5\), got 0\.5"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "loss_type 'hinge' has no label smoothing"),
        ({"beta": 0.0}, r"beta must be > 0, got 0\.0"),
    ],
)
def test_a_loss_that_cannot_be_is_refused_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        liger.LigerFusedLinearDPOLoss(**options)


def test_what_kto_refuses():
    case = Case((3, 5, 8, 20))
    module = liger.LigerFusedLinearKTOLoss()
    arguments = (case.x, case.weight, case.target, None)
    with pytest.raises(
        ValueError, match=r"expected preference_labels \(B,\) bool, true for the desirable rows, got None"
    ):
        module(*arguments)
    with pytest.raises(TypeError, match=r"labels must be bool, got torch\.int64"):
        module(*arguments, torch.ones(6).long())
    with pytest.raises(ValueError, match=r"expected kl as one number or \(6,\), one for each row, got \(2,\)"):
        module(*arguments, case.labels, kl=torch.zeros(2))


def test_an_nll_target_of_another_shape():
    case = Case((3, 5, 8, 20))
    with pytest.raises(ValueError, match=r"expected nll_target \(6, 5\) as target, got \(3, 5\)"):
        liger.LigerFusedLinearORPOLoss()(case.weight, case.x, case.target, None, case.target[:3])
