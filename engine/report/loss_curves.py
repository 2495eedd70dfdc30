"""Pictures of losses: the value and the slope of each over the log-ratio, for given betas.

    draw(Path("losses.png"), ["dpo", "ipo", "kto"], [0.05, 0.1, 0.5])

A loss over pairs is drawn over r_chosen - r_rejected, the rejected side held at the reference. A loss over single
sequences is drawn over r, desirable and undesirable apart, with z0 = 0. A slope is that of gradient descent: how hard
the loss pushes the log-ratio, where it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prefuse.engine.run.files import save_figure
from prefuse.losses.contract import Loss, needs_of
from prefuse.losses.names import LOSSES, fields_of, loss_named
from prefuse.preference import preference_loss

REACH = 40.0  # nats to each side
LOGP, LENGTH = -60.0, 20  # of a completion at the reference, and its tokens


@dataclass(frozen=True)
class Curve:
    """One loss of one kind of row over the log-ratio."""

    label: str
    ratios: Tensor  # (K,) nats
    losses: Tensor  # (K,)
    slopes: Tensor  # (K,) d loss / d ratio


def curves_of(loss: Loss, name: str, points: int = 401) -> list[Curve]:
    """One curve for a loss over pairs, two (desirable, undesirable) for one with labels."""
    if loss.per == "pair":
        return [_curve(loss, name, None, points)]
    if "labels" not in needs_of(loss):
        return [_curve(loss, name, None, points)]
    return [_curve(loss, f"{name}, {'desirable' if good else 'undesirable'}", good, points) for good in (True, False)]


def _curve(loss: Loss, label: str, good: bool | None, points: int) -> Curve:
    per_item = 2 if loss.per == "pair" else 1
    ratios = torch.linspace(-REACH, REACH, points, dtype=torch.float64).requires_grad_()
    first = torch.full((points, LENGTH), LOGP / LENGTH, dtype=torch.float64) + ratios[:, None] / LENGTH
    sides = [first, torch.full_like(first, LOGP / LENGTH)][:per_item]
    logps = torch.stack(sides, dim=1).flatten()  # (points * per_item * LENGTH,)
    needs, items, sequences = needs_of(loss), points, points * per_item
    given = {
        "labels": torch.full((sequences,), bool(good)) if "labels" in needs else None,
        "z0": 0.0 if "z0" in needs else None,
        "margins": torch.zeros(items) if "margins" in needs else None,
        "scores": torch.ones(sequences) if "scores" in needs else None,
    }
    refs = torch.full_like(logps, LOGP / LENGTH).detach() if "reference" in needs else None
    cu_seqlens = torch.arange(sequences + 1) * LENGTH
    out = preference_loss(logps, refs, cu_seqlens, loss, num_items=1, impl="torch", **given)
    (slopes,) = torch.autograd.grad(out.loss, ratios)
    return Curve(label, ratios.detach(), out.losses.double(), slopes)


def draw_losses(path: Path, losses: Sequence[str], betas: Sequence[float]) -> None:
    """Writes a picture, of the kind that the ending names: a row for each loss of `prefuse.loss_named`, its value on
    the left and its slope on the right, a line for each beta.

    Raises ValueError for a name that is none, or for no beta. A loss that has no beta has one line.
    """
    if not losses or not betas:
        raise ValueError(f"expected losses ({', '.join(LOSSES)}) and betas, got {list(losses)} and {list(betas)}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.6 * len(losses)), layout="constrained")
    FigureCanvasAgg(figure)
    for (left, right), name in zip(figure.subplots(len(losses), 2, squeeze=False), losses, strict=True):
        for beta in betas if "beta" in fields_of(name) else (None,):
            loss = loss_named(name) if beta is None else loss_named(name, beta=beta)
            for curve in curves_of(loss, name if beta is None else f"{name}, beta {beta:g}"):
                style = {"linewidth": 1, "linestyle": "--" if "undesirable" in curve.label else "-"}
                left.plot(curve.ratios, curve.losses, label=curve.label, **style)
                right.plot(curve.ratios, curve.slopes, label=curve.label, **style)
        over = "log-ratio, nats" if loss.per != "pair" else "log-ratio of chosen less rejected, nats"
        for axes, title in ((left, f"{name}: loss"), (right, f"{name}: slope")):
            axes.set_title(title, fontsize=9)
            axes.set_xlabel(over, fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
        left.legend(fontsize=6)
    save_figure(figure, Path(path), dpi=110)
