"""What the tests of TRL's switch share: TRL's own function, and TRL as it is before and after each test."""

import sys

import pytest
import torch

import prefuse.trl.switch

datasets = pytest.importorskip("datasets")
utils = pytest.importorskip("trl.trainer.utils")
# In a dict: a name in this module would be found, and what it names replaced.
OWN = {"function": utils._ChunkedLogProbFunction}
EXTRAS = prefuse.trl.switch.EXTRAS


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


# 37 tokens, 16 wide, 301 words in their chunks of 128: nothing is a multiple of the next.
N, D, V = 37, 16, 301


def head_inputs(dtype=torch.float32, bias=False):
    hidden = (1.5 * torch.randn(N, D)).to(dtype).requires_grad_()
    weight = torch.randn(V, D).to(dtype).requires_grad_()
    vector = torch.randn(V).to(dtype).requires_grad_() if bias else None
    targets = torch.randint(V, (N,))
    targets[:3] = torch.tensor([0, V - 1, V - 1])
    with torch.no_grad():  # some targets are the most likely word, as in a model that has learned
        hidden[:9] = weight[targets[:9]]
    return hidden, weight, vector, targets


def call(function, inputs, options, outputs=EXTRAS):
    hidden, weight, bias, targets = inputs
    return function.apply(
        hidden, weight, bias, targets, options.get("temperature", 1.0), 128, options.get("softcap"),
        options.get("logit_scale", 1.0), outputs,
    )  # fmt: skip
