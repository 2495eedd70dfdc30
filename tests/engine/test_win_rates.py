"""Win rates, bootstrap, kappa and best-of-n by their definitions; length control against alpaca_eval's numbers."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from prefuse.engine.score.length_control import length_controlled, minimize, sigmoid
from prefuse.engine.score.winrate import best_of_n, bootstrap, cohen_kappa, win_rate

# What alpaca_eval says of the rows beside it; the file names its version and how it was made.
PUBLISHED = json.loads((Path(__file__).resolve().parents[1] / "data" / "alpaca_eval.json").read_text())


def of(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_win_rate_counts_ties_as_half_and_leaves_out_what_has_no_verdict():
    found = win_rate(of(1, 1, 0.5, 0, math.nan))
    assert found["win_rate"] == 2.5 / 4
    assert (found["wins"], found["ties"], found["losses"], found["without_verdict"]) == (2, 1, 1, 1)
    assert found["win_rate_low"] <= found["win_rate"] <= found["win_rate_high"]
    nothing = win_rate(of(math.nan, math.nan))
    assert math.isnan(nothing["win_rate"])
    assert nothing["without_verdict"] == 2


def test_the_interval_is_the_binomials():
    wins = of(*([1.0] * 300 + [0.0] * 100))
    low, high = bootstrap(wins, torch.ones(400), 0)
    half = 1.96 * (0.75 * 0.25 / 400) ** 0.5
    assert low == pytest.approx(0.75 - half, abs=0.008)
    assert high == pytest.approx(0.75 + half, abs=0.008)
    assert (low, high) == bootstrap(wins, torch.ones(400), 0)


def test_answers_of_one_prompt_are_drawn_together():
    """Eight equal answers to each prompt say no more than one."""
    one = of(*([1.0] * 30 + [0.0] * 20))
    many = one[:, None].expand(50, 8)
    assert win_rate(many)["win_rate_low"] == pytest.approx(win_rate(one)["win_rate_low"])
    mixed = win_rate(torch.stack([of(1, math.nan), of(0, 0)]))
    assert mixed["win_rate"] == pytest.approx(1 / 3)


def test_kappa():
    # Cohen's table with agreement 0.7 and chance 0.5: kappa 0.4.
    first = of(*[1] * 25, *[0] * 25)
    second = of(*[1] * 20, *[0] * 5, *[1] * 10, *[0] * 15)
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1
    assert cohen_kappa(of(1, 0, 0.5, math.nan), of(1, 0, 0.5, 1)) == 1
    assert math.isnan(cohen_kappa(of(1, 1), of(1, 1)))
    assert cohen_kappa(of(1, 0), of(0, 1)) == -1


def test_best_of_n_is_the_mean_over_all_subsets():
    torch.manual_seed(2)
    proxy, gold = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    proxy[2] = of(1, 1, 0, 1, 0)  # ties
    curve = best_of_n(proxy, gold)
    for point in curve:
        picked = []
        for p in range(3):
            for subset in map(list, itertools.combinations(range(5), point["n"])):
                best = proxy[p, subset].max()
                tied = [k for k in range(5) if proxy[p, k] == best]
                picked.append((best, gold[p, tied].mean()))
        assert point["proxy"] == pytest.approx(float(torch.stack([a for a, _ in picked]).mean()))
        assert point["gold"] == pytest.approx(float(torch.stack([b for _, b in picked]).mean()))
        assert point["kl"] == pytest.approx(math.log(point["n"]) - (point["n"] - 1) / point["n"])
    assert [point["n"] for point in curve] == [1, 2, 3, 4, 5]
    proxy[0, 0] = math.nan
    assert best_of_n(proxy, gold)[0]["gold"] == pytest.approx(float(gold[1:].mean()))


# ---------------------------------------------------------------------------------------------------------
# Length control


def published_rows():
    preferences, baseline, model, difficulty = zip(*PUBLISHED["rows"], strict=True)
    return [math.nan if p is None else p - 1 for p in preferences], model, baseline, difficulty


def test_the_raw_win_rate_is_alpaca_evals():
    wins, *_ = published_rows()
    known = [win for win in wins if win == win]
    assert 100 * sum(known) / len(known) == pytest.approx(PUBLISHED["winrate"]["win_rate"], abs=1e-9)


def test_the_length_controlled_win_rate_is_alpaca_evals():
    wins, model, baseline, difficulty = published_rows()
    minimal = 100 * length_controlled(wins, model, baseline)
    assert minimal == pytest.approx(PUBLISHED["length_controlled_minimal_tight"], abs=1e-6)
    graded = 100 * length_controlled(wins, model, baseline, difficulty)
    assert graded == pytest.approx(PUBLISHED["length_controlled_noreg_tight"], abs=1e-6)
    assert abs(minimal - 100 * np.nanmean(wins)) > 1  # the lengths do matter in these rows


def test_the_fit_is_the_minimum():
    """Against subgradients in float64: zero is in gradient + [-1, 1] where a weight is 0, and is sign elsewhere."""
    rng = np.random.default_rng(0)
    features = np.stack([rng.normal(size=60), np.ones(60), rng.normal(size=60)], 1)
    wins = rng.random(60)
    for weight in (0.01, 0.1, 1.0, 1e4):
        w = minimize(features, wins, weight, np.zeros(3))
        gradient = weight * features.T @ (sigmoid(features @ w) - wins)
        assert np.all(np.abs(gradient[w == 0]) <= 1 + 1e-9)
        assert np.all(np.abs((gradient + np.sign(w))[w != 0]) < 1e-6 * weight + 1e-9)


def test_lengths_that_say_nothing():
    assert math.isnan(length_controlled([1, 0, 1, 0, 1], [5] * 5, [5] * 5))
    assert math.isnan(length_controlled([1.0], [5], [6]))
    longer_wins = [float(i % 2) for i in range(40)]
    model, baseline = [100 + 50 * (i % 2) for i in range(40)], [125] * 40
    assert length_controlled(longer_wins, model, baseline) == pytest.approx(0.5, abs=0.02)
