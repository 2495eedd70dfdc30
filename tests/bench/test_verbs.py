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


class Once:
    """In pytest-benchmark's place: runs what it is given, and does not time it."""

    group = None

    def __call__(self, run):
        run()


def test_every_benchmark_for_development_runs(monkeypatch):
    pytest.importorskip("trl")
    from prefuse.bench.development import bench_head, bench_losses

    monkeypatch.setattr(bench_head, "SHAPE", (16, 8, 50))
    monkeypatch.setattr(bench_head, "TOKENS", 4)
    bench_head.inputs.cache_clear()
    groups = []
    for file, bench in ((bench_head, bench_head.bench_step), (bench_losses, bench_losses.bench_loss)):
        cases = [{}]
        for name, values in parameters_of(file):
            cases = [case | dict(zip(name, value, strict=True)) for case in cases for value in values]
        for case in cases:
            once = Once()
            bench(once, **case)
            groups.append(once.group)
    bench_head.inputs.cache_clear()
    assert len(groups) > 40
    assert None not in groups


def parameters_of(file):
    """[(names, values)] that pytest would be told."""
    told = []

    class Metafunc:
        def parametrize(self, names, values, ids=None):
            several = isinstance(names, tuple)
            told.append((names if several else (names,), [value if several else (value,) for value in values]))

    file.pytest_generate_tests(Metafunc())
    return told


@pytest.mark.slow
def test_a_model_without_words_is_no_judge(tmp_path, monkeypatch):
    """Its tokenizer has no token for either letter: no verdict, and each of the three commands has had its part."""
    folder = save_model(tmp_path / "model")
    monkeypatch.setattr(judge, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["prefuse bench judge", "--model_name_or_path", folder, "--max_new_tokens", "4"])
    judge.main()
    (path,) = tmp_path.glob("judge-*.json")
    record = read_result(path)
    found = {row["what"]: row["value"] for row in record.rows}
    assert found["without_verdict"] == found["gold_comparisons"] == len(judge.PROMPTS)
    greedy, hot = (record.details["answers"][kind] for kind in ("greedy", "hot"))
    assert len(greedy) == len(hot) == len(judge.PROMPTS)
    assert greedy != hot
