"""The over-optimization curve: proxy and gold reward over sqrt(KL), where gold turns, and a picture of it.

Gao, Schulman, Hilton (arXiv 2210.10760): with d = sqrt(KL(policy || reference)), gold(d) = gold(0) + d (alpha - beta
d); the proxy keeps rising, and gold turns at d = alpha / (2 beta).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Turn:
    alpha: float
    beta: float
    turns_at: float | None  # in sqrt(nats); None where it has not turned within what was seen
    best: int  # of the points, by what was measured


def turning_point(distances: Sequence[float], rewards: Sequence[float]) -> Turn | None:
    """The least-squares fit of alpha and beta through the first point, which is the reference; None below 3 points."""
    d, r = np.asarray(distances, np.float64), np.asarray(rewards, np.float64)
    known = np.isfinite(d) & np.isfinite(r)
    if known.sum() < 3 or not known[0]:
        return None
    best = int(np.flatnonzero(known)[r[known].argmax()])
    d, r = d[known], r[known] - r[0]
    (alpha, minus_beta), *_ = np.linalg.lstsq(np.stack([d, d * d], 1), r, rcond=None)
    beta = -float(minus_beta)
    at = float(alpha) / (2 * beta) if beta > 0 and alpha > 0 else math.inf
    return Turn(float(alpha), beta, at if at < d.max() else None, best)


def draw_over_optimization(image: Path, points: Sequence[dict[str, float]], turn: Turn | None) -> None:
    """`points`: {step, sqrt_kl, score, gold_score} of each checkpoint."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = sorted(points, key=lambda point: point["sqrt_kl"])
    for name, label in ("score", "proxy (scorer)"), ("gold_score", "gold (gold_scorer)"):
        if name in points[0]:
            axes.plot([p["sqrt_kl"] for p in points], [p[name] for p in points], marker="o", markersize=4, label=label)
    for point in points:
        named = "gold_score" if "gold_score" in point else "score"
        axes.annotate(f"{point['step']}", (point["sqrt_kl"], point[named]), fontsize=7, xytext=(3, 4),
                      textcoords="offset points")  # fmt: skip
    if turn is not None and turn.turns_at is not None:
        axes.axvline(turn.turns_at, linestyle=":", color="gray", label=f"turns at {turn.turns_at:.2f}")
    axes.set_xlabel("sqrt(KL to the reference), nats per answer; points are optimizer steps")
    axes.set_ylabel("mean score")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(image, dpi=120)
