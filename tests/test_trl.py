"""TRL's trainers on prefuse's head: the same runs as on TRL's own, and nothing replaced that is not known."""

import inspect
import sys
import threading
import types

import pytest
import torch

import oracle
import prefuse.trl
import trl_runs

datasets = pytest.importorskip("datasets")
utils = pytest.importorskip("trl.trainer.utils")

# In a dict: a name in this module would be found, and what it names replaced.
OWN = {"function": utils._ChunkedLogProbFunction}
EXTRAS = prefuse.trl.EXTRAS

# What TRL itself does, as the versions that are tested stand.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`[a-z_]*gradient_checkpointing[a-z_]*` is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()


@pytest.fixture(autouse=True)
def _left_as_found():
    """Every test begins and ends with TRL as it is."""
    assert_own()
    yield
    prefuse.trl.disable()
    assert_own()


def assert_own():
    import trl.kernels

    assert not prefuse.trl.is_enabled()
    assert utils._ChunkedLogProbFunction is OWN["function"]
    assert trl.kernels.ChunkedLogProbFunction is OWN["function"]
    assert sys.modules["trl.kernels.chunked_logprob"].ChunkedLogProbFunction is OWN["function"]


# ------------------------------------------------------------------------------------- whole runs


def run_both(run, folder, monkeypatch):
    """{"theirs" | "ours": (logs, weights)}; while ours runs, TRL's function must not be called."""
    theirs = trl_runs.train(run, folder)
    calls = []
    compute = prefuse.trl.logprobs_within

    def counted(*args):
        calls.append(len(args[1]))
        return compute(*args)

    def forbidden(*_):
        raise AssertionError("TRL's own function was called")

    with prefuse.trl.enabled(), monkeypatch.context() as patch:
        patch.setattr(prefuse.trl, "logprobs_within", counted)
        patch.setattr(OWN["function"], "forward", forbidden)
        ours = trl_runs.train(run, folder)
    assert len(calls) >= 5
    return {"theirs": theirs, "ours": ours}


def assert_same_logs(theirs, ours):
    """Every number of every line to 1e-5, relative above 1."""
    assert [list(line) for line in theirs] == [list(line) for line in ours]
    for a, b in zip(theirs, ours, strict=True):
        for key, value in a.items():
            assert abs(value - b[key]) <= 1e-5 * max(1.0, abs(value)), f"step {a['step']}, {key}: {value} and {b[key]}"


def assert_same_weights(theirs, ours, start):
    assert theirs.keys() == ours.keys()
    moved = 0.0
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        if name in start:
            moved = max(moved, (value - start[name]).abs().max().item())
    assert moved > 1e-3  # else it would be no comparison


MIX = {"loss_type": ["sigmoid", "ipo", "sft"], "loss_weights": [1.0, 0.01, 0.3]}
RUNS = {
    "dpo": {"trainer": "dpo"},
    "dpo ipo gemma2": {"trainer": "dpo", "model": "gemma2", "loss_type": "ipo"},
    "dpo mixture qwen3": {"trainer": "dpo", "model": "qwen3", **MIX},
    "dpo tied, weighted by WPO": {"trainer": "dpo", "model": "tied", "use_weighting": True},
    "dpo lora": {"trainer": "dpo", "lora": {}},
    "dpo lora and a head to save": {"trainer": "dpo", "lora": {"modules_to_save": ["lm_head"]}},
    "dpo frozen head": {"trainer": "dpo", "frozen_head": True},
    "dpo accumulated": {"trainer": "dpo", "gradient_accumulation_steps": 2, "max_steps": 3},
    "sft": {"trainer": "sft"},
    "sft gemma2": {"trainer": "sft", "model": "gemma2"},
    "sft tied": {"trainer": "sft", "model": "tied"},
    "kto": {"trainer": "kto"},
}
MORE = {
    "dpo ipo": {"trainer": "dpo", "loss_type": "ipo"},
    "dpo ipo qwen3": {"trainer": "dpo", "model": "qwen3", "loss_type": "ipo"},
    "dpo gemma2": {"trainer": "dpo", "model": "gemma2"},
    "dpo qwen3": {"trainer": "dpo", "model": "qwen3"},
    "dpo tied": {"trainer": "dpo", "model": "tied"},
    "dpo mixture": {"trainer": "dpo", **MIX},
    "dpo mixture gemma2": {"trainer": "dpo", "model": "gemma2", **MIX},
    "dpo cohere": {"trainer": "dpo", "model": "cohere"},
    "dpo granite": {"trainer": "dpo", "model": "granite"},
    "dpo reference computed before": {"trainer": "dpo", "reference": False, "precompute_ref_log_probs": True},
    "kto gemma2": {"trainer": "kto", "model": "gemma2"},
    "kto qwen3": {"trainer": "kto", "model": "qwen3"},
    "kto tied": {"trainer": "kto", "model": "tied"},
    "kto lora": {"trainer": "kto", "lora": {}},
    "sft qwen3": {"trainer": "sft", "model": "qwen3"},
    "sft lora": {"trainer": "sft", "lora": {}},
    "grpo": {"trainer": "grpo"},
    "grpo gemma2": {"trainer": "grpo", "model": "gemma2"},
    "grpo lora": {"trainer": "grpo", "lora": {}},
    "grpo with an entropy bonus": {"trainer": "grpo", "entropy_coef": 0.1},
    "grpo head in fp32": {"trainer": "grpo", "cast_lm_head_to_fp32": True},
    "rloo": {"trainer": "rloo"},
}
ALL = [*RUNS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]


@pytest.mark.parametrize("name", ALL)
def test_a_run_is_the_same_as_on_trls_own_function(name, tmp_path, monkeypatch):
    run = (RUNS | MORE)[name]
    runs = run_both(run, tmp_path, monkeypatch)
    (their_logs, their_weights), (our_logs, our_weights) = runs["theirs"], runs["ours"]
    assert_same_logs(their_logs, our_logs)
    trainer = trl_runs.make_trainer(run, tmp_path)
    assert_same_weights(their_weights, our_weights, trl_runs.weights_of(trainer))
