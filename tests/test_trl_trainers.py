"""The trainers for TRL do what TRL's own do, number by number, on flat batches; KTO samples as its paper has it."""

import pytest
import trl
from peft import LoraConfig

import trl_runs
from prefuse.trl_trainers import DPOTrainer, KTOTrainer
from trl_runs import CHATS, LABELLED, ROWS, assert_same_log, assert_same_weights, build, log_of, weights_of

# What TRL 1.16 itself says on the transformers of constraints.txt.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")

LORA = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0, task_type="CAUSAL_LM")
KINDS = {
    "dpo": (trl.DPOTrainer, DPOTrainer, trl.DPOConfig, ROWS, {}),
    "kto": (trl.KTOTrainer, KTOTrainer, trl.KTOConfig, LABELLED, {"sampling": "trl"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> folder"""
    folder = tmp_path_factory.mktemp("models")
    return {name: trl_runs.save(folder, name) for name in trl_runs.MODELS} | {
        "other": trl_runs.save(tmp_path_factory.mktemp("other"), "llama", seed=1)
    }


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")


def compare(kind, model, tmp_path, rows=None, options=None, mine=None, **changes):
    """TRL's trainer and this one on the same rows: the same log, the same weights. Returns this one."""
    theirs, ours, config, default_rows, ours_alone = KINDS[kind]
    rows = default_rows if rows is None else rows
    expected = build(theirs, model, rows, tmp_path / "trl", config, options or {}, **changes)
    expected.train()
    got = build(ours, model, rows, tmp_path / "prefuse", config, (options or {}) | ours_alone | (mine or {}), **changes)
    before = weights_of(got.model)
    got.train()
    assert_same_log(log_of(got), log_of(expected))
    after = weights_of(got.model)
    assert_same_weights(after, weights_of(expected.model))
    moved = max((after[name] - before[name]).abs().max().item() for name in after)
    assert moved > 1e-3  # or equal weights would say nothing
    return got


# ---- DPO equals TRL's ----------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("name", [*trl_runs.MODELS, "lora"])
def test_dpo_trains_and_logs_as_trls_trainer(name, loss_type, models, tmp_path):
    options = {"peft_config": LORA} if name == "lora" else {}
    model = models["llama" if name == "lora" else name]
    got = compare("dpo", model, tmp_path, options=options, loss_type=loss_type, beta=0.5)
    assert got._collate.flat
    first = log_of(got)[0]
    assert first["rewards/chosen"] == first["rewards/rejected"] == first["rewards/margins"] == 0.0


def test_conversations(models, tmp_path):
    compare("dpo", models["llama"], tmp_path, rows=CHATS)
