"""Rows and models of the kinds that TRL's trainers take: empty prompts, rotary embeddings that follow the batch, the
first example of the docs."""

import re
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import trl

from prefuse.trl.trainers import DPOTrainer
from tiny_run import PAIRS, SHAPE, save_model
from trainer_runs import ROWS, SETTINGS, build, log_of
from trl_trainer_cases import _quiet, compare  # noqa: F401

# What TRL 1.16 itself says on the transformers of constraints.txt.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")
DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_a_row_with_an_empty_prompt_trains_as_with_trl(models, tmp_path):
    """Seven steps of one row each: nothing predicts the first token of its answers, which TRL leaves out too."""
    rows = [*ROWS[:6], ROWS[6] | {"prompt": ""}]
    trainer = compare("dpo", models["llama"], tmp_path, rows=rows, per_device_train_batch_size=1, max_steps=7)
    steps = [row for row in log_of(trainer) if "loss" in row]
    assert len(steps) == 7
    assert all(row["loss"] > 0 for row in steps)


def follows_the_batch(kind, folder):
    """Rows of more than 12 or 16 tokens turn the frequencies of their whole batch; logits are large."""
    torch.manual_seed(0)
    if kind == "longrope":
        rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
        rope["original_max_position_embeddings"] = 12
        config = transformers.Phi3Config(
            **SETTINGS | SHAPE, pad_token_id=0, max_position_embeddings=128, original_max_position_embeddings=12,
            rope_parameters=rope, sliding_window=None,
        )  # fmt: skip
    else:
        rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
        config = transformers.LlamaConfig(**SETTINGS | SHAPE, max_position_embeddings=16, rope_parameters=rope)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return save_model(folder, model=model)


@pytest.mark.filterwarnings("ignore:.*rotary embedding depends on:UserWarning")
@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_policy_that_does_not_move_stays_its_reference_whatever_is_in_its_batch(kind, tmp_path):
    """Learning rate 0, three epochs of short and long rows in pairs drawn anew: ln 2 in every step."""
    model = follows_the_batch(kind, tmp_path / "model")
    short = [{"prompt": "what?", "chosen": good, "rejected": bad} for good, bad in (("blue", "no"), ("good", "the"))]
    rows = [*short, *(pair | {"prompt": 4 * pair["prompt"]} for pair in PAIRS[:2]), *reversed(short)]
    changes = {"learning_rate": 0.0, "per_device_train_batch_size": 2, "max_steps": 9}
    trainer = build(DPOTrainer, model, rows, tmp_path / "run", trl.DPOConfig, {}, **changes)
    trainer.train()
    losses = [row["loss"] for row in log_of(trainer) if "loss" in row]
    assert losses == pytest.approx([0.693147] * 9, abs=2e-6)
    trainer = build(DPOTrainer, model, rows, tmp_path / "kept", trl.DPOConfig, {}, **changes)
    trainer._rope_follows_batch = False  # with numbers kept from other batches it is not
    trainer.train()
    losses = [row["loss"] for row in log_of(trainer) if "loss" in row]
    assert max(abs(loss - 0.693147) for loss in losses) > 1e-3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_first_example_of_the_docs_runs(tmp_path, monkeypatch):
    text = (DOCS / "trl_trainers.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert 'DPOTrainer("path/to/model"' in example
    example = example.replace("\nDPOTrainer(", "\nmade = DPOTrainer(").replace(".train()", "")
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "path/to/model")
    names = {"dataset": datasets.Dataset.from_list(ROWS[:2])}
    exec(compile(example, "example", "exec"), names)
    names["made"].train()
    assert isinstance(names["made"], DPOTrainer)
    assert names["made"].state.global_step == 3  # as many as TRL's three epochs
