"""Curves for a page: at most so many points each, whatever the length of the run.

A curve that is longer is cut into stretches of equally many lines; each gives its mean and its lowest and highest
value, so that a spike of one line stays visible.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from prefuse.engine.report.plots import PANELS, curve_points
from prefuse.engine.run.files import is_number

MOST_POINTS = 1500
SPEED = ("tokens_per_second", "samples_per_second", "pairs_per_second", "mfu", "tokens_saved")


@dataclass(frozen=True)
class Series:
    """One line of a chart: `low` and `high` are None where each point is a single line of the log."""

    name: str
    steps: list[float]
    values: list[float]
    low: list[float] | None = None
    high: list[float] | None = None
    held_out: bool = False


def charts_of(metrics: list[dict]) -> dict[str, list[Series]]:
    """{title: its lines}: the panels of curves.png first, then every other metric by itself."""
    recorded = {name for row in metrics for name in row if name not in ("step", "epoch")}
    plain = {name.removeprefix("eval_") for name in recorded}
    known = {name for names in PANELS.values() for name in names}
    panels = {title: names for title, names in PANELS.items() if plain.intersection(names)}
    panels |= {name: (name,) for name in sorted(plain - known)}
    charts = {}
    for title, names in panels.items():
        lines = [
            shortened(name, curve_points(metrics, name, prefix), bool(prefix))
            for name in names
            for prefix in ("", "eval_")
        ]
        charts[title] = [line for line in lines if line is not None]
    return {title: lines for title, lines in charts.items() if lines}


def in_order(titles: Iterable[str]) -> list[str]:
    """The panels as curves.png has them, other metrics, and last what is about speed."""
    known = list(PANELS)
    place = {title: number for number, title in enumerate(known)}
    return sorted(titles, key=lambda title: (title in SPEED, place.get(title, len(known)), title))


def over_kl(points: list[dict]) -> list[Series]:
    """Scores of the checkpoints of a run over the square root of their KL to the reference."""
    ordered = sorted(points, key=lambda point: point["sqrt_kl"])
    lines = [
        shortened(name, [(point["sqrt_kl"], point[name]) for point in ordered if is_number(point.get(name))], False)
        for name in ("score", "gold_score")
    ]
    return [line for line in lines if line is not None]


def shortened(name: str, points: list[tuple[int, float]], held_out: bool, most: int = MOST_POINTS) -> Series | None:
    if not points:
        return None
    steps, values = np.asarray(points, np.float64).T
    if len(steps) <= most:
        return Series(name, _short(steps), _short(values), held_out=held_out)
    starts = np.linspace(0, len(steps), most, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(starts, len(steps)))
    mean = np.add.reduceat(values, starts) / sizes
    middle = np.add.reduceat(steps, starts) / sizes
    low, high = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return Series(name, _short(middle), _short(mean), _short(low), _short(high), held_out)


def _short(values: np.ndarray) -> list[float]:
    """Six digits: more than a screen has pixels."""
    return [float(f"{value:.6g}") for value in values]
