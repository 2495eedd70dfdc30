"""Where the losses under Liger's names differ from Liger on purpose: inputs on which it is wrong, and refusals."""

import math

import pytest
import torch

from liger_cases import (
    SHAPES,
    Case,
    kto_truth,
    paired_truth,
    sequence_logps,
)
from liger_checks import MODULES
from prefuse import liger
from prefuse.kernels.cost import count_cost

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
