"""Verbs that no other test runs: what they say of a case whose answer is known."""

import sys

import pytest
import torch

from prefuse.bench import judge, products
from prefuse.bench.record import read_result
from tiny_run import save_model


def test_two_rounded_products_lie_between_one_and_a_float32_product():
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(32, 64, generator=g).bfloat16(), torch.randn(48, 64, generator=g).bfloat16()
    exact = hidden.double() @ weight.double().T
    error = {name: (way(hidden, weight).double() - exact).abs().max().item() for name, way in products.WAYS.items()}
    assert error["float32"] < 1e-5
    assert 10 * error["float32"] < error["rounded, and what that lost"] < error["rounded to bfloat16"] / 50


@pytest.mark.slow
def test_a_model_that_always_says_the_same_is_no_judge(tmp_path, monkeypatch):
    """A head of zeros gives both letters equal probabilities: every verdict is a tie, whatever the answers."""
    from transformers import AutoModelForCausalLM

    folder = save_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(folder)
    monkeypatch.setattr(judge, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["prefuse bench judge", "--model_name_or_path", folder, "--max_new_tokens", "4"])
    judge.main()
    (path,) = tmp_path.glob("judge-*.json")
    found = {row["what"]: row["value"] for row in read_result(path).rows}
    assert found["ties"] == found["comparisons"] == len(judge.PROMPTS)
    assert found["win_rate"] == 0.5
