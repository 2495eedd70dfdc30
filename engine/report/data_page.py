"""What `prefuse data inspect` shows: tables and bars in the terminal, the same lengths as a PNG."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from prefuse.engine.data.stats import Stats, quantiles
from prefuse.engine.report.screen import console, printable
from prefuse.engine.run.files import save_figure

BARS = " ▁▂▃▄▅▆▇█"
BINS = 32


def show_stats(stats: Stats, rows: int, unit: str, shown: int = 8) -> None:
    _show_counts(stats, rows)
    _show_skipped(stats, shown)
    _show_lengths(stats, unit)


def _show_counts(stats: Stats, rows: int) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in counts_of(stats, rows):
        table.add_row(name, str(value))
    console.print(table)


def counts_of(stats: Stats, rows: int) -> list[tuple[str, object]]:
    by_rule = sum(stats.skipped[reason] for reason in stats.set_aside)
    usable = rows - stats.skipped.total()
    lines: list[tuple[str, object]] = [
        ("rows", rows),
        ("usable", usable),
        *([("examples in them", stats.records)] if stats.records != usable else []),
        ("set aside by a rule", by_rule),
        ("cannot be used", stats.skipped.total() - by_rule),
        ("distinct prompts", stats.prompts),
        ("duplicates", _share(stats.duplicates, stats.records)),
    ]
    if "chosen" in stats.lengths:
        longer, equal, shorter = stats.longer_chosen
        lines += [
            ("sides that are equal", stats.equal_sides),
            ("contradictory", _share(stats.contradictions, stats.records)),
            ("chosen is longer", _share(longer, stats.records)),
            ("chosen is shorter", _share(shorter, stats.records)),
            ("as long", equal),
        ]
    if stats.labels:
        good, bad = stats.labels[True], stats.labels[False]
        lines += [("good, bad", f"{good}, {bad} ({good / (good + bad):.0%} good)")]
        lines += [("contradictory", _share(stats.contradictions, stats.records))]
    if stats.gaps:
        low, median, *_, high = quantiles(stats.gaps)
        lines += [("score of chosen less rejected", f"{low:g} to {high:g}, median {median:g}")]
    return lines


def _share(count: int, whole: int) -> str:
    return f"{count} ({count / whole:.1%})" if whole else str(count)


def _show_skipped(stats: Stats, shown: int) -> None:
    if not stats.skipped:
        return
    table = Table("rows", "why", "the first", box=None, title="not used", title_justify="left", pad_edge=False)
    for reason, count in stats.skipped.most_common(shown):
        why = reason + (" (by rule)" if reason in stats.set_aside else "")
        table.add_row(str(count), printable(why), printable(stats.first_skipped[reason]))
    console.print(table, markup=False)
    if len(stats.skipped) > shown:
        console.print(f"... and {len(stats.skipped) - shown} more reasons")


def _show_lengths(stats: Stats, unit: str) -> None:
    table = Table(
        "", "least", "median", "90%", "99%", "most", "", box=None, title=unit, title_justify="left", pad_edge=False
    )
    most = max((max(values) for values in stats.lengths.values() if values), default=0)
    for part, values in stats.lengths.items():
        numbers = [str(round(value)) for value in quantiles(values)]
        table.add_row(part, *numbers, bars(values, most))
    console.print(table)
    if most:
        console.print(f"(each picture from 0 to {most} {unit}, in {BINS} steps)")


def bars(values: Sequence[int], most: int) -> str:
    """A histogram in one line: a value that occurs at all shows."""
    counts = histogram(values, most)
    highest = max(counts)
    return "".join(BARS[0 if not count else 1 + round(7 * count / highest)] for count in counts)


def histogram(values: Sequence[int], most: int, bins: int = BINS) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, value * bins // (most + 1))] += 1
    return counts


def plot_stats(stats: Stats, unit: str, image: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for part, values in stats.lengths.items():
        left.hist(values, bins=40, histtype="step", label=part)
    left.set_xlabel(unit)
    left.set_ylabel("rows")
    left.legend(fontsize=8)
    if "chosen" in stats.lengths:
        pairs = zip(stats.lengths["chosen"], stats.lengths["rejected"], strict=True)
        right.hist([chosen - rejected for chosen, rejected in pairs], bins=40, histtype="step", color="black")
        right.axvline(0, linewidth=0.8, color="gray")
        right.set_xlabel(f"{unit}: chosen less rejected")
    elif stats.labels:
        right.bar(["good", "bad"], [stats.labels[True], stats.labels[False]], color=["tab:green", "tab:red"])
    else:
        right.remove()
    save_figure(figure, image, dpi=120)
