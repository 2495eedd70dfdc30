"""Every loss of the library trains on the task of examples/demo.py, in any of its forms, and does better by its own
measure on rows that it has not seen.

The demo's rows carry what the losses ask for beside text: labels, scores, margins, other objectives, control words.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefuse.engine.config.settings import LOSS_TYPES
from prefuse.engine.train import train
from tiny_run import read_log, settings

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo.py"
SIDES = ("chosen", "rejected")
CONTROLS = {"control_good": "sort", "control_bad": "=>"}  # words that the demo's tokenizer has
ASKS = {  # what a loss is given beside its name
    "csft": CONTROLS,
    "modpo": {"objective_weights": "safety=0.2"},
    "mo_kto": {"objective_weights": "safety=0.2"},
    "sigmoid_norm": {"beta": 1.0},
    "beta_dpo": {"beta_dpo_alpha": 0.3},
}
# Settings that change a loss or its reference: each must learn too.
VARIANTS = {
    "kto, reference-free": ("kto", {"kto_reference_free": True, "beta": 0.1}),
    "kto, z0 = 0": ("kto", {"kto_reference_point": 0.0}),
    "kto, concave": ("kto", {"kto_value": "concave"}),
    "kto, linear": ("kto", {"kto_value": "linear"}),
    "kto, one y per x": ("kto", {"kto_one_per_prompt": True}),
    "kto, auto": ("kto", {"kto_weights": "auto"}),
    "dpo, WPO": ("dpo", {"use_weighting": True}),
    "dpo, soft TR-DPO": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 3}),
    "dpo, hard TR-DPO": ("dpo", {"sync_ref_model": True, "ref_model_sync_steps": 5, "ref_model_mixup_alpha": 1.0}),
    "kto, soft TR-DPO": ("kto", {"sync_ref_model": True, "ref_model_sync_steps": 3}),
    "beta_dpo, by pair": ("beta_dpo", {"beta_dpo_level": "pair"}),
    "una, squares": ("una", {"una_distance": "mse"}),
    "forward KL": ("f_dpo", {"f_divergence_type": "forward_kl"}),
}


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr("prefuse.engine.train.plot_curves", lambda log, picture: None)


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("prefuse_demo_losses", DEMO)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def task(demo, tmp_path_factory):
    """The demo's pairs with numbers beside them, answers one by one, and a small model that knows nothing yet."""
    import random

    folder, draw = tmp_path_factory.mktemp("task"), random.Random(1)
    pairs = [
        pair | {"margin": 1.0, "safety_chosen": draw.random(), "safety_rejected": draw.random()}
        for pair in demo.make_pairs(96, random.Random(0))
    ]
    single = [
        {
            "prompt": pair["prompt"],
            "completion": pair[side],
            "label": side == "chosen",
            "safety": pair[f"safety_{side}"],
        }
        for pair in pairs
        for side in SIDES
    ]
    scored = [
        {"prompt": row["prompt"], "completion": row["completion"], "score": 4.0 if row["label"] else 1.0}
        for row in single
    ]
    for name, rows in {"pairs": pairs, "single": single, "scored": scored}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = demo.make_tokenizer()
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=0, **shape)
    ).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder


def learn(loss_type, task, out, **changes):
    """{metric: (before the first step, at the end)} of the held-out rows."""
    data = "scored" if loss_type == "una_score" else "single" if loss_type in ("mo_kto", "csft", "una") else "pairs"
    data = "single" if loss_type in ("kto", "ppo_clip") else data
    common = {"beta": 0.5} if loss_type not in ("slic", "csft", "ppo_clip", "simpo") else {}
    config = settings(
        model_name_or_path=str(task / "model"), dataset_name=str(task / f"{data}.jsonl"), output_dir=str(out),
        loss_type=loss_type, max_length=32, max_steps=8, learning_rate=2e-2, per_device_train_batch_size=16,
        eval_fraction=0.3, eval_steps=8, logging_steps=8, warmup_ratio=0.0, max_loss_ratio=1e9, max_chosen_drop=1e9,
        **common | ASKS.get(loss_type, {}) | changes,
    )  # fmt: skip
    train(config, "train")
    rows = [row for row in read_log(out) if "eval_loss" in row]
    return {name: (rows[0].get(name), value) for name, value in rows[-1].items() if name.startswith("eval_")}


def check(found):
    """A reference that has moved is another measure: then it is the accuracy of its rewards that must be good."""
    before, after = found["eval_loss"]
    assert after < before
    if found.get("eval_rewards/margins", (None, 0.0))[1]:
        assert found["eval_rewards/margins"][1] > 0


QUICK = ("odpo", "csft", "una_score")


@pytest.mark.parametrize("loss_type", QUICK)
def test_a_loss_that_rows_feed_learns(loss_type, task, tmp_path):
    check(learn(loss_type, task, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", [name for name in LOSS_TYPES if name not in QUICK])
def test_every_loss_learns(loss_type, task, tmp_path):
    check(learn(loss_type, task, tmp_path / "run"))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_learns(name, task, tmp_path):
    loss_type, changes = VARIANTS[name]
    check(learn(loss_type, task, tmp_path / "run", **changes))
