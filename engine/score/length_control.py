"""The win rate if both answers were of one length: AlpacaEval 2's regression (arXiv 2404.04475).

    P(model wins) = sigmoid(theta + phi * tanh((baseline's length - model's) / its deviation) + psi * difficulty)

fitted by L1-penalized logistic regression to the preferences, which may be graded, with the penalty that five folds
choose; then the length term is set to 0 and the predictions are averaged. `difficulty` is a number for each prompt, as
AlpacaEval's own instructions have one, or left out (`length_controlled_minimal` there). Each is in the unit of
alpaca_eval 0.6.6, and the numbers are its numbers wherever its solver has converged.
"""

import math
from collections.abc import Sequence

import numpy as np

FOLDS = 5
PENALTIES = np.logspace(-4, 4, 10)  # C: the weight of the likelihood against the L1 norm; scikit-learn's ten
STEPS = 200  # of Newton's method, at most
TOLERANCE = 1e-12


def length_controlled(
    preferences: Sequence[float],  # (P,) in [0, 1]: 1 where the model wins; NaN is left out of the fit
    model_lengths: Sequence[int],  # (P,)
    baseline_lengths: Sequence[int],  # (P,)
    difficulty: Sequence[float] | None = None,  # (P,)
) -> float:
    """The mean of the predicted preferences at equal lengths; NaN where lengths or preferences say nothing."""
    wins = np.asarray(preferences, np.float64)
    difference = np.asarray(baseline_lengths, np.float64) - np.asarray(model_lengths, np.float64)
    known = ~np.isnan(wins)
    spread = difference.std(ddof=1) if len(difference) > 1 else 0.0
    if known.sum() < FOLDS or not spread > 0:
        return math.nan
    columns = [np.tanh(difference / spread), np.ones_like(wins)]
    if difficulty is not None:
        columns.insert(1, np.asarray(difficulty, np.float64))
    features = np.stack(columns, 1)  # (P, F)
    weights = fit(features[known], wins[known])
    features[:, 0] = 0.0
    return float(sigmoid(features @ weights).mean())


def fit(features: np.ndarray, wins: np.ndarray) -> np.ndarray:  # (P, F), (P,) -> (F,)
    """At the penalty with the best likelihood of what was held out, over the folds."""
    folds = folds_of(len(wins))
    likelihoods = np.zeros(len(PENALTIES))
    for fold in range(FOLDS):
        held = folds == fold
        start = np.zeros(features.shape[1])
        for number, weight in enumerate(PENALTIES):
            start = minimize(features[~held], wins[~held], weight, start)
            likelihoods[number] += _likelihood(features[held], wins[held], start) / FOLDS
    return minimize(features, wins, PENALTIES[int(likelihoods.argmax())], np.zeros(features.shape[1]))


def folds_of(count: int) -> np.ndarray:  # (P,)
    """scikit-learn's GroupKFold over groups of one size: in the order of numpy's argsort, each to the emptiest."""
    order = np.argsort(np.full(count, 2))[::-1]
    folds = np.empty(count, np.int64)
    folds[order] = np.arange(count) % FOLDS
    return folds


def minimize(features: np.ndarray, wins: np.ndarray, weight: float, start: np.ndarray) -> np.ndarray:
    """The w with the least |w|_1 + C sum_i -(y_i log p_i + (1 - y_i) log(1 - p_i)): Newton steps, each an L1-penalized
    quadratic solved by coordinate descent, halved until the objective falls."""
    w = start.copy()
    value = _objective(features, wins, weight, w)
    for _ in range(STEPS):
        p = sigmoid(features @ w)
        gradient = weight * features.T @ (p - wins)
        curvature = weight * (features * (p * (1 - p))[:, None]).T @ features
        curvature += 1e-12 * (1 + np.trace(curvature)) * np.eye(len(w))
        step = _quadratic(gradient, curvature, w)
        size = 1.0
        while (new := _objective(features, wins, weight, w + size * step)) > value and size > 1e-10:
            size /= 2
        if new > value or np.abs(size * step).max() <= TOLERANCE * (1 + np.abs(w).max()):
            break
        w, value = w + size * step, new
    return w


def _quadratic(gradient: np.ndarray, curvature: np.ndarray, w: np.ndarray) -> np.ndarray:  # (F,)
    """The d with the least gradient . d + d . curvature . d / 2 + |w + d|_1."""
    step = np.zeros_like(w)
    for _ in range(10_000):
        moved = 0.0
        for j in range(len(w)):
            slope = gradient[j] + curvature[j] @ step - curvature[j, j] * step[j]
            best = _soft(curvature[j, j] * w[j] - slope, 1.0) / curvature[j, j] - w[j]
            moved = max(moved, abs(best - step[j]))
            step[j] = best
        if moved <= TOLERANCE * (1 + np.abs(w + step).max()):
            break
    return step


def _soft(x: float, by: float) -> float:
    return math.copysign(max(abs(x) - by, 0.0), x)


def _objective(features: np.ndarray, wins: np.ndarray, weight: float, w: np.ndarray) -> float:
    z = features @ w
    return float(np.abs(w).sum() + weight * (np.logaddexp(0, z) - wins * z).sum())


def _likelihood(features: np.ndarray, wins: np.ndarray, w: np.ndarray) -> float:
    """With probabilities at least 1e-15 from 0 and 1, as alpaca_eval has them."""
    p = np.clip(sigmoid(features @ w), 1e-15, 1 - 1e-15)
    return float((wins * np.log(p) + (1 - wins) * np.log(1 - p)).mean())


def sigmoid(z: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -z))
