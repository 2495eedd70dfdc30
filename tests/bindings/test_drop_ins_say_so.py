"""What the drop-ins say and return where TRL and Liger differ by version: warnings, result classes, empty prompts."""

import types

import pytest
import torch

from prefuse.liger import LigerFusedLinearCrossEntropyLoss
from prefuse.liger.callers import say_if_trl_never_calls
from prefuse.trl.batches import Collator


@pytest.mark.parametrize("calls", [True, False])
def test_patch_says_when_trl_never_calls_it(tmp_path, monkeypatch, recwarn, calls):
    (tmp_path / "trainer").mkdir()
    source = "from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss" if calls else "import torch"
    (tmp_path / "trainer" / "dpo_trainer.py").write_text(source)
    trl = types.SimpleNamespace(__file__=str(tmp_path / "__init__.py"), __version__="1.14.2")
    monkeypatch.setitem(__import__("sys").modules, "trl", trl)
    say_if_trl_never_calls()
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (not calls)
    assert all("TRL 1.14.2 never calls" in line and "prefuse.trl" in line for line in said)


def test_the_result_with_a_z_loss_is_of_ligers_class():
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    loss = LigerFusedLinearCrossEntropyLoss(lse_square_scale=0.1, return_z_loss=True)
    result = loss(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 2, 1, 0, 2, 1]))
    assert isinstance(result, functional.CrossEntropyOutput)
    assert result.z_loss > 0


@pytest.mark.parametrize("flat", [True, False])
def test_a_row_without_a_prompt_counts_from_its_second_token(flat):
    """As in TRL, whose shifted labels leave out the first token of every row."""
    rows = [
        {"prompt_ids": [], "chosen_ids": [5, 6, 7], "rejected_ids": [5, 8]},
        {"prompt_ids": [9], "chosen_ids": [4], "rejected_ids": [3, 2]},
    ]
    inputs = Collator(flat=flat)(rows)
    batch = inputs["batch"]
    assert batch.tokens.targets.tolist() == [6, 7, 8, 4, 3, 2]
    assert batch.tokens.cu_seqlens.tolist() == [0, 2, 3, 4, 6]
    assert batch.preferred.tolist() == [True, True, False, True, False, False]
    assert inputs["num_tokens"].tolist() == [5, 5]
    predictors = batch.tokens.input_ids.flatten()[batch.tokens.predictors]
    assert predictors.tolist() == [5, 6, 5, 9, 9, 3]
