"""The examples of the loop hold what they claim: each stage of RLHF, a constitution, weak labels, all on the CPU."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.slow


@pytest.fixture
def example():
    sys.path.insert(0, str(EXAMPLES))
    torch.set_num_threads(1)
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(EXAMPLES))


def test_rlhf_by_a_reward_model_answers_better_than_sft(example, tmp_path):
    found = example("rlhf").stages(tmp_path)
    assert 0.3 < found["sft"] < 0.6
    assert found["iterative_dpo"] > found["sft"] + 0.05


def test_a_constitution_teaches_by_revisions_and_by_labels(example, tmp_path):
    found, trust = example("constitution").stages(tmp_path)
    assert 0.3 < found["sft"] < 0.6
    assert min(found["revised"], found["labelled"]) > found["sft"] + 0.2
    assert 0.5 < trust["gold_kappa"] < 1  # the judge is right in nine of ten questions, and both orders are asked
    assert 0.4 < trust["first_shown_wins"] < 0.6


def test_a_strong_model_is_better_than_its_weak_teacher(example, tmp_path):
    found = example("weak_to_strong").stages(tmp_path)
    assert found["weak"] > 0.55
    assert found["weak"] + 0.03 < found["strong"] < found["ceiling"] + 0.02


@pytest.mark.timeout(900)  # on a machine that does other work too
@pytest.mark.skipif("PREFUSE_SMOLLM2" not in os.environ, reason="PREFUSE_SMOLLM2 names a folder with SmolLM2-Instruct")
def test_a_real_model_learns_a_format(example, tmp_path):
    """About four CPU minutes with 135 million weights; seen: 37.5% before, 100% after."""
    before, after = example("format_rule").learn(tmp_path, os.environ["PREFUSE_SMOLLM2"])
    assert after > before + 0.2
