"""The example of over-optimization: its claims hold, and it says so when they do not."""

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RISES = [0.44, 0.8, 0.6, 0.1]
POINTS = [{"step": i, "gold_score": gold, "score": 0.1 + i, "kl": float(i)} for i, gold in enumerate(RISES)]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("prefuse_overoptimization", EXAMPLES / "overoptimization.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    for name in ("demo", "online"):
        sys.modules.pop(name, None)


def test_a_curve_that_does_not_turn_is_said(example):
    assert example.broken_claims(POINTS, 1.0) == []
    assert "gold then falls" in example.broken_claims(POINTS[:3], 1.0)[0]
    assert "gold rises first" in example.broken_claims([{**POINTS[1], "gold_score": 0.8}, *POINTS[1:]], 1.0)[0]
    assert "the proxy is higher" in example.broken_claims([*POINTS[:3], {**POINTS[3], "score": 0.2}], 1.0)[0]
    assert "95%" in example.broken_claims(POINTS, 0.8)[0]


@pytest.mark.slow
def test_gold_turns_while_the_proxy_rises(example, tmp_path, monkeypatch):
    """About 45 CPU seconds, SFT included."""
    monkeypatch.chdir(tmp_path)
    folder = example.demo.fresh(tmp_path / "runs")
    assert example.run(folder) == []
    assert (folder / "over_optimization.png").stat().st_size > 10_000
