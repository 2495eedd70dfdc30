"""Figures of README and docs as SVG text, by matplotlib. The same results give the same bytes: no date, fixed names."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib

from prefuse.bench.blocks import Results

OURS, MODES = "#1b7f5c", {"no grad": "#8fa3c8", "frozen": "#a07d1c", "trainable": "#1b7f5c"}
PEERS = ("#b5432e", "#8fa3c8", "#a07d1c", "#6b4f9e", "#4a9aa8", "#7a7a7a", "#c07aa1")
MARKS = ("s", "^", "v", "D", "P", "X", "<")
STYLE = {
    "svg.hashsalt": "prefuse", "svg.fonttype": "path", "font.family": "DejaVu Sans", "font.size": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd",
    "grid.linewidth": 0.8, "axes.axisbelow": True, "legend.frameon": False,
    "figure.constrained_layout.use": True, "path.simplify": False,
}  # fmt: skip


def drawn(draw: Callable[[Any, Results], None], size: tuple[float, float]) -> Callable[[Results], str]:
    """`draw(figure, results)` as the text of an SVG file."""

    def svg(results: Results) -> str:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(STYLE)
            figure = Figure(figsize=size)
            FigureCanvasSVG(figure)
            draw(figure, results)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"

    return svg


def accuracy(figure: Any, results: Results) -> None:
    """Error of a sequence's log-ratio by its length: ours, and each peer."""
    record = results.newest("accuracy")
    rows = [row for row in record.rows if row["what"] == "sequence log-ratio"]
    lengths = sorted({row["tokens_of_sequence"] for row in rows})
    axes = figure.subplots()
    peers = iter(zip(PEERS, MARKS, strict=True))
    for name in dict.fromkeys(row["implementation"] for row in rows):
        color, mark = (OURS, "o") if name == "prefuse" else next(peers)
        mean, worst = (
            [row[key] for row in rows if row["implementation"] == name] for key in ("error_nats", "error_nats_max")
        )
        axes.plot(lengths, mean, f"{mark}-", color=color, linewidth=2, markersize=5, label=name, alpha=0.85)
        axes.fill_between(lengths, mean, worst, color=color, alpha=0.1, linewidth=0)
    axes.set(xscale="log", yscale="log", xticks=lengths, xticklabels=[str(x) for x in lengths])
    axes.minorticks_off()
    axes.set_xlabel("completion length (tokens)")
    axes.set_ylabel("error of a sequence's log-ratio (nats)")
    axes.set_title("Log-ratio log π(y|x) − log π$_{ref}$(y|x): error against float64, same bf16 inputs", fontsize=11)
    title = "line: mean, shade: up to the worst sequence"
    axes.legend(title=title, loc="upper left", bbox_to_anchor=(0, 0.78), fontsize=9, alignment="left")


FIGURES_OF: dict[str, Callable[[Results], str]] = {"accuracy": drawn(accuracy, (8, 5))}
