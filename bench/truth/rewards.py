"""The truth about losses of reward models: their papers' equations in plain Python, one group at a time.

Imports nothing of the package. A group is a list of (score, rank); less is better.
"""

from __future__ import annotations

import math

Group = list[tuple[float, float]]


def log_sigmoid(x: float) -> float:
    return -(max(-x, 0.0) + math.log1p(math.exp(-abs(x))))


def bradley_terry(
    chosen: float, rejected: float, margin: float = 0.0, smoothing: float = 0.0, center: float = 0.0
) -> float:
    """Ouyang et al. 2022, eq. 1, of one pair; margin: Touvron et al. 2023, eq. 2; center: Eisenstein et al. 2023."""
    d = chosen - rejected - margin
    return -(1 - smoothing) * log_sigmoid(d) - smoothing * log_sigmoid(-d) + center * (chosen + rejected) ** 2


def plackett_luce(group: Group) -> float:
    """-log of the product over places of exp(s) / sum of exp over those not yet placed, ties not compared."""
    product = 1.0
    for score, rank in group:
        rest = sum(math.exp(other) for other, worse in group if worse > rank)
        product *= math.exp(score) / (math.exp(score) + rest)
    return -math.log(product)


def all_pairs(group: Group, smoothing: float = 0.0) -> float:
    """InstructGPT's mean over the pairs of one prompt."""
    pairs = [a - b for a, rank in group for b, worse in group if rank < worse]
    total = sum(-(1 - smoothing) * log_sigmoid(d) - smoothing * log_sigmoid(-d) for d in pairs)
    return total / len(pairs) if pairs else 0.0


def step(score: float, right: bool) -> float:
    """Binary cross-entropy of one step."""
    p = 1 / (1 + math.exp(-score))
    return -math.log(p if right else 1 - p)
