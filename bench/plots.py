"""Figures of README and docs as SVG text, by matplotlib. The same results give the same bytes: no date, fixed names."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import matplotlib

from prefuse.bench import roofline
from prefuse.bench.found import Results
from prefuse.bench.tables import dpo_steps

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
    # Peers that round logits to bf16 lie on one line: drawn from thick to thin, each is seen.
    peers = iter(zip(PEERS, MARKS, (9, 6.5, 4.5, 2.5, 1, 1, 1), strict=True))
    for name in dict.fromkeys(row["implementation"] for row in rows):
        color, mark, width = (OURS, "o", 2) if name == "prefuse" else next(peers)
        mean, worst = (
            [row[key] for row in rows if row["implementation"] == name] for key in ("error_nats", "error_nats_max")
        )
        axes.plot(lengths, mean, f"{mark}-", color=color, linewidth=width, markersize=4 + width / 2, label=name)
        axes.fill_between(lengths, mean, worst, color=color, alpha=0.1, linewidth=0)
    axes.set(xscale="log", yscale="log", xticks=lengths, xticklabels=[str(x) for x in lengths])
    axes.minorticks_off()
    axes.set_xlabel("completion length (tokens)")
    axes.set_ylabel("error of a sequence's log-ratio (nats)")
    axes.set_title("Log-ratio log π(y|x) − log π$_{ref}$(y|x): error against float64, same bf16 inputs", fontsize=11)
    title = "line: mean, shade: up to the worst sequence"
    axes.legend(title=title, loc="center left", bbox_to_anchor=(0, 0.46), fontsize=9, alignment="left")


def head(figure: Any, results: Results) -> None:
    """Time of a DPO step and its log-ratio's error beside peers, by dtype: everything trained."""
    records = [record for record in results.every("head") if dpo_steps(record)]
    for axes, record in zip(figure.subplots(1, len(records), squeeze=False)[0], records, strict=True):
        rows = sorted(dpo_steps(record), key=lambda row: -row["ratio_to_gemms"])
        names, ratios = ([row[key] for row in rows] for key in ("implementation", "ratio_to_gemms"))
        colors = [OURS if name.startswith("prefuse") else "#8fa3c8" for name in names]
        bars = axes.barh(names, ratios, color=colors)
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.set(xscale="log", xlim=(0.5, 2.5 * max(ratios)))
        axes.tick_params(axis="y", labelsize=8)
        axes.set_xlabel("time / that of 4 bare products (log)")
        axes.set_title(f"DPO step, {record.settings['dtypes'][0]}, {record.rows[0]['shape']}", fontsize=10)


def memory(figure: Any, results: Results) -> None:
    """Peak beyond gradients, by tokens and by vocabulary, everything trained."""
    record = results.newest("memory")
    rows = [row for row in record.rows if row["mode"] == "trainable" and "peak_mib" in row]
    sizes = {row["shape"]: tuple(map(int, row["shape"].split("x"))) for row in rows}
    largest = [max(size[axis] for size in sizes.values()) for axis in (0, 2)]
    styles = dict(zip([x for x in dict.fromkeys(row["implementation"] for row in rows) if not x.startswith("prefuse")],
                      zip(PEERS, MARKS, strict=True), strict=False))  # fmt: skip
    for axes, axis, fixed, label in zip(
        figure.subplots(1, 2, sharey=True), (0, 2), (2, 0), ("tokens", "vocabulary"), strict=True
    ):
        at = largest[0 if fixed == 0 else 1]
        for name in dict.fromkeys(row["implementation"] for row in rows):
            own = sorted(
                (sizes[row["shape"]][axis], max(row["peak_mib_beyond_gradients"], 0.01))
                for row in rows
                if row["implementation"] == name and sizes[row["shape"]][fixed] == at
            )
            color, mark = styles.get(name, (OURS, "o" if name == "prefuse" else "*"))
            axes.plot(*zip(*own, strict=True), f"{mark}-", color=color, label=name, markersize=5)
        axes.set(xscale="log", yscale="log", xticks=[x for x, _ in own], xticklabels=[str(x) for x, _ in own])
        axes.minorticks_off()
        axes.set_xlabel(f"{label} ({'vocabulary' if fixed == 2 else 'tokens'} {at})")
    figure.axes[0].set_ylabel("peak MiB beyond inputs and gradients")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)


def scale(figure: Any, results: Results) -> None:
    """Milliseconds by tokens, vocabulary and ranks, with the fitted exponents in the legend."""
    record = results.newest("scale")
    rows = [row for row in record.rows if "ms" in row]
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    styles = dict(zip(names, [(OURS, "o"), ("#5fb58f", "*"), *zip(PEERS, MARKS, strict=True)], strict=False))
    exponents = {(row["what"], row["implementation"]): row["exponent"] for row in record.rows if "exponent" in row}
    for axes, what in zip(figure.subplots(1, 3), ("tokens", "vocabulary", "ranks"), strict=True):
        for name in names:
            own = [(row["size"], row["ms"]) for row in rows if (row["what"], row["implementation"]) == (what, name)]
            if not own:
                continue
            color, mark = styles[name]
            exponent = exponents[f"exponent of ms in {what}", name]
            axes.plot(*zip(*own, strict=True), f"{mark}-", color=color, markersize=5, label=f"{name}: {exponent:.2f}")
            ticks = [size for size, _ in own]
        axes.set(xscale="log", yscale="log", xticks=ticks, xticklabels=[str(x) for x in ticks])
        axes.minorticks_off()
        axes.set_xlabel(what)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
        axes.legend(title="exponent", fontsize=7, title_fontsize=8, loc="upper left")
    figure.axes[0].set_ylabel("CPU ms of forward and backward")


FIGURES_OF: dict[str, Callable[[Results], str]] = {
    "accuracy": drawn(accuracy, (8, 5)),
    "head": drawn(head, (10, 3.6)),
    "memory": drawn(memory, (9, 4.2)),
    "roofline": drawn(roofline.draw, (8, 5.5)),
    "scale": drawn(scale, (11, 3.8)),
}
