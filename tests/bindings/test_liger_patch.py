"""`prefuse.liger.patch()`: in Liger's place everywhere or nowhere, and back again."""

import sys
import types

import pytest
import torch

import prefuse
from liger_cases import SHAPES, Case, paired_truth
from prefuse import liger

# Where another test has imported a TRL that calls none of Liger's losses, `patch` says so (test_drop_ins_say_so.py).
pytestmark = pytest.mark.filterwarnings("ignore:TRL .* never calls liger_kernel:UserWarning")


@pytest.fixture(scope="module")
def theirs():
    return pytest.importorskip("liger_kernel.chunked_loss")


NAMES = [name for name in liger.__all__ if name.lower().startswith("liger")]


@pytest.fixture
def patched(theirs):
    liger.patch()
    yield
    liger.unpatch()


def a_trainer(name):
    """A module that imports Liger's losses by name, as TRL's trainers do."""
    module = types.ModuleType(name)
    exec(
        "from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss as Renamed, LigerFusedLinearDPOLoss",
        vars(module),
    )
    return module


def test_patch_swaps_them_everywhere_and_unpatch_puts_them_back(theirs, monkeypatch):
    import liger_kernel.chunked_loss.functional as functional
    import liger_kernel.transformers as transformers

    before = a_trainer("trainer_before")
    monkeypatch.setitem(sys.modules, "trainer_before", before)
    homes = {name: functional if name.startswith("liger_") else theirs for name in NAMES}
    homes["LigerFusedLinearCrossEntropyLoss"] = transformers
    originals = {name: getattr(home, name) for name, home in homes.items()}
    liger.patch()
    try:
        liger.patch()  # twice is once
        for name, home in homes.items():
            assert getattr(home, name) is getattr(liger, name) is not originals[name]
        assert before.LigerFusedLinearDPOLoss is liger.LigerFusedLinearDPOLoss
        assert a_trainer("trainer_after").LigerFusedLinearDPOLoss is liger.LigerFusedLinearDPOLoss
        assert theirs.LigerFusedLinearGRPOLoss.__module__.startswith("liger_kernel")  # left alone
    finally:
        liger.unpatch()
    for name, home in homes.items():
        assert getattr(home, name) is originals[name]
    assert before.LigerFusedLinearDPOLoss is originals["LigerFusedLinearDPOLoss"]
    liger.unpatch()  # twice is once
    assert liger.LigerFusedLinearDPOLoss.__module__ == "prefuse.liger.losses"


def test_a_module_imported_after_patching_is_caught_by_the_next_call(patched, theirs, monkeypatch):
    original = next(x for _, name, x in liger.patching._swapped if name == "LigerFusedLinearDPOLoss")
    late = types.ModuleType("late_trainer")
    late.LigerFusedLinearDPOLoss = original
    monkeypatch.setitem(sys.modules, "late_trainer", late)
    liger.patch()
    assert late.LigerFusedLinearDPOLoss is liger.LigerFusedLinearDPOLoss
    liger.unpatch()
    assert late.LigerFusedLinearDPOLoss is original is theirs.LigerFusedLinearDPOLoss


def test_what_a_patched_liger_makes_is_ours(patched, theirs):
    case = Case(SHAPES[1])
    loss, _ = a_trainer("t").LigerFusedLinearDPOLoss(beta=0.3)(case.weight, case.x, case.target, **case.reference())
    truth, _ = paired_truth(case, "sigmoid", average=False, beta=0.3)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5)


@pytest.mark.parametrize("where", ["__init__", "forward", "default"])
def test_a_liger_with_arguments_unknown_here_is_refused_and_left_as_it_is(where, theirs, monkeypatch):
    import liger_kernel.chunked_loss.kto_loss as home

    class Newer(torch.nn.Module):
        def __init__(self, ignore_index: int = -100, beta: float = 0.2 if where == "default" else 0.1, **options):
            super().__init__()

    class Other(torch.nn.Module):
        def __init__(self, ignore_index: int = -100):
            super().__init__()

        def forward(self, _input, lin_weight, target, labels_of_rows=None):
            raise AssertionError

    newer = Other if where == "forward" else Newer
    monkeypatch.setattr(home, "LigerFusedLinearKTOLoss", newer)
    with pytest.raises(
        RuntimeError, match=r"does not know the argument .* of this liger_kernel's LigerFusedLinearKTOLoss"
    ):
        liger.patch()
    assert home.LigerFusedLinearKTOLoss is newer
    assert theirs.LigerFusedLinearDPOLoss is not liger.LigerFusedLinearDPOLoss
    assert not liger.patching._swapped


def test_an_older_liger_that_lacks_the_last_arguments_is_fine(theirs, monkeypatch):
    import liger_kernel.chunked_loss.kto_loss as home

    class Older(torch.nn.Module):
        def __init__(self, ignore_index: int = -100, beta: float = 0.1):
            super().__init__()

        def forward(self, _input, lin_weight, target, bias=None):
            raise AssertionError

    monkeypatch.setattr(home, "LigerFusedLinearKTOLoss", Older)
    liger.patch()
    assert home.LigerFusedLinearKTOLoss is liger.LigerFusedLinearKTOLoss
    liger.unpatch()
    assert home.LigerFusedLinearKTOLoss is Older


def test_a_liger_whose_arguments_stand_in_another_order_is_called_by_its_own(theirs, monkeypatch):
    """DPO's of liger_kernel 0.6.2 to 0.8.0: without `alpha`, which now is the third; positions mean what they meant."""
    import liger_kernel.chunked_loss.dpo_loss as home
    import liger_kernel.chunked_loss.functional as functional

    class Before(torch.nn.Module):
        def __init__(
            self, ignore_index=-100, beta=0.1, compute_nll_loss=False, compiled=True, use_ref_model=True,
            average_log_prob=False, chunk_size=1, loss_type="sigmoid",
        ):  # fmt: skip
            super().__init__()

        def forward(self, lin_weight, _input, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None):
            raise AssertionError

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx, _input, weight, target, bias=None, ref_input=None, ref_weight=None, ref_bias=None, ignore_index=-100,
            beta=0.1, compute_nll_loss=False, compiled=True, use_ref_model=True, average_log_prob=False, chunk_size=1,
            loss_type="sigmoid",
        ):  # fmt: skip
            raise AssertionError

    monkeypatch.setattr(home, "LigerFusedLinearDPOLoss", Before)
    monkeypatch.setattr(functional, "liger_fused_linear_dpo", Function.apply)
    case = Case(SHAPES[1])
    more = case.reference()
    reference = (more.get("ref_input"), more.get("ref_weight"), more.get("ref_bias"))
    liger.patch()
    try:
        loss, _ = home.LigerFusedLinearDPOLoss(-100, 0.3, False, True, True, True, 1, "hinge")(
            case.weight, case.x, case.target, None, *reference
        )
        assert issubclass(home.LigerFusedLinearDPOLoss, liger.LigerFusedLinearDPOLoss)
        again, _ = functional.liger_fused_linear_dpo(
            case.x, case.weight, case.target, None, *reference, -100, 0.3, False, True, True, True, 1, "hinge"
        )
    finally:
        liger.unpatch()
    expected, _ = liger.LigerFusedLinearDPOLoss(beta=0.3, average_log_prob=True, loss_type="hinge")(
        case.weight, case.x, case.target, **more
    )
    assert loss.item() == again.item() == expected.item()
    assert home.LigerFusedLinearDPOLoss is Before


def test_patch_without_liger_says_so(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "liger_kernel"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(ImportError, match=r"prefuse\.liger\.patch\(\) needs liger_kernel: "):
        liger.patch()


def test_prefuse_itself_knows_nothing_of_liger():
    assert not hasattr(prefuse, "LigerFusedLinearDPOLoss")
