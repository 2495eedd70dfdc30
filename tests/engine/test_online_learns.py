"""Each algorithm of `prefuse online` learns to sort from the rule alone: held-out prompts are answered better."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
# Share of ascending answers to held-out prompts that the run must gain, from about one half.
GAINS = {
    "grpo": 0.15, "rloo": 0.15, "reinforce": 0.1, "ppo": 0.05, "online_dpo": 0.1, "iterative_dpo": 0.1, "kto": 0.05,
    "best_of_n": 0.1,
}  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def online():
    sys.path.insert(0, str(EXAMPLES))
    try:
        yield importlib.import_module("online")
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def start(online, tmp_path_factory):
    """A model that sorts either way."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sorting")
    online.make_start(folder, epochs=2.0)
    return folder


@pytest.mark.parametrize("algorithm", GAINS)
def test_an_algorithm_beats_its_start(algorithm, online, start):
    before, after = online.learn(start, algorithm, steps=15)
    assert 0.2 < before < 0.7
    assert after > before + GAINS[algorithm]
