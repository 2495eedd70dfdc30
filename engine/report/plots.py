"""curves.png from metrics.jsonl: what was trained on as lines, what was held out as dots and lines."""

from pathlib import Path

from prefuse.engine.report.log import read_metrics
from prefuse.engine.run.files import is_number, save_figure

PANELS = {  # title -> metrics that share an axis
    "loss": ("loss",),
    "reward of samples": ("reward", "gold"),
    "length of samples, tokens": ("completions/mean_length",),
    "entropy, nats per token": ("entropy",),
    "accuracy": ("accuracy",),
    "margin of scores": ("margin",),
    "scores": ("min_reward", "mean_reward", "max_reward"),
    "calibration error": ("ece",),
    "length: correlation of scores": ("length_correlation",),
    "reward margin": ("rewards/margins",),
    "reward accuracy": ("rewards/accuracies",),
    "rewards": ("rewards/chosen", "rewards/rejected"),
    "KL to the reference, nats per token": ("kl_to_ref",),
    "kl, nats (KTO's z0; online: of samples)": ("kl",),
    "gradient norm": ("grad_norm",),
    "learning rate": ("learning_rate",),
}


def plot_curves(metrics_path: Path, image: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_metrics(metrics_path)
    # A metric may have no number at all: the reward of samples that nobody could score.
    recorded = {name.removeprefix("eval_") for row in rows for name, value in row.items() if is_number(value)}
    panels = {title: names for title, names in PANELS.items() if recorded.intersection(names)}
    columns = max(1, min(3, len(panels)))
    lines = max(1, -(-len(panels) // columns))
    figure = Figure(figsize=(4.2 * columns, 3 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, names) in zip(figure.subplots(lines, columns, squeeze=False).flat, panels.items(), strict=False):
        for name in names:
            for prefix, style in ("", {}), ("eval_", {"marker": "o", "markersize": 3, "linestyle": "--"}):
                if points := curve_points(rows, name, prefix):
                    label = f"{'held-out' if prefix else 'train'} {name}"
                    axes.plot(*zip(*points, strict=True), label=label, linewidth=1, **style)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    save_figure(figure, image, dpi=120)


def curve_points(rows: list[dict], name: str, prefix: str) -> list[tuple[int, float]]:
    """(step, mean). A tie counts as half an accuracy: before the first step all rewards are equal."""
    half = 0.5 if name == "rewards/accuracies" else 0.0
    points = [(row.get("step"), row.get(prefix + name), row.get(f"{prefix}rewards/ties") or 0.0) for row in rows]
    return [(step, mean + half * ties) for step, mean, ties in points if all(map(is_number, (step, mean, ties)))]
