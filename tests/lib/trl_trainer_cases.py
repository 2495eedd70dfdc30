"""What the tests of trainers for TRL share: kinds of trainers, and the comparison with TRL's."""

from dataclasses import dataclass

import datasets
import pytest
import trl
from peft import LoraConfig

import prefuse
from prefuse.trl.trainers import DPOTrainer, KTOTrainer
from trainer_runs import LABELLED, ROWS, assert_same_log, assert_same_weights, build, log_of, weights_of

LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
KINDS = {
    "dpo": (trl.DPOTrainer, DPOTrainer, trl.DPOConfig, ROWS, {}),
    "kto": (trl.KTOTrainer, KTOTrainer, trl.KTOConfig, LABELLED, {"sampling": "trl"}),
}


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr("gc.collect", lambda *_: 0)  # accelerate's at the start of each run takes most of its time
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def compare(kind, model, tmp_path, rows=None, options=None, mine=None, tolerance=1e-5, **changes):
    """TRL's trainer and this one on the same rows: the same log, the same weights. Returns this one."""
    theirs, ours, config, default_rows, ours_alone = KINDS[kind]
    rows = default_rows if rows is None else rows
    expected = build(theirs, model, rows, tmp_path / "trl", config, options or {}, **changes)
    expected.train()
    got = build(ours, model, rows, tmp_path / "prefuse", config, (options or {}) | ours_alone | (mine or {}), **changes)
    before = weights_of(got.model)
    got.train()
    assert_same_log(log_of(got), log_of(expected), tolerance)
    after = weights_of(got.model)
    assert_same_weights(after, weights_of(expected.model))
    moved = max((after[name] - before[name]).abs().max().item() for name in after)
    assert moved > 1e-3  # or equal weights would say nothing
    return got


@dataclass(frozen=True)
class Likelihood(prefuse.DPO):
    """One without a reference."""

    uses_reference = False
