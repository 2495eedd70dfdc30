"""The page of `prefuse data inspect --html`: what a set of rows is like."""

from dataclasses import dataclass, field
from pathlib import Path

from prefuse.engine.data.pieces import Side, sides_as_json
from prefuse.engine.data.stats import Stats, quantiles
from prefuse.engine.report.data_page import counts_of, histogram
from prefuse.engine.report.page.render import write_rendered

BINS = 40
MOST_REASONS = 30
UNEVEN = 0.65  # a share of pairs or labels from which on it is said
MANY = 0.01  # the same for duplicates and contradictions


@dataclass
class Looked:
    """What `prefuse data inspect` knows of a source beside its numbers."""

    source: str
    rows: int
    form: str
    read_as: str
    columns: list[tuple[str, str]] = field(default_factory=list)  # (what is said, of what)
    notes: list[str] = field(default_factory=list)
    examples: list[tuple[str, list[tuple[str, str]]]] = field(default_factory=list)  # (row, [(part, text)])
    tokens: list[tuple[str, list[Side]]] = field(default_factory=list)  # the same rows by their tokens


def write_data_page(path: Path, looked: Looked, stats: Stats, unit: str) -> None:
    most = max((max(values) for values in stats.lengths.values() if values), default=0)
    lengths = [
        {"name": part, "numbers": quantiles(values), "counts": histogram(values, most, BINS), "most": most}
        for part, values in stats.lengths.items()
        if values
    ]
    skipped = [
        (reason + (" (by rule)" if reason in stats.set_aside else ""), count, stats.first_skipped[reason])
        for reason, count in stats.skipped.most_common(MOST_REASONS)
    ]
    write_rendered(
        path,
        "data.html.j2",
        [looked.source],
        rows=looked.rows,
        form=looked.form,
        read_as=looked.read_as,
        columns=looked.columns,
        counts=counts_of(stats, looked.rows),
        notes=[*looked.notes, *notes_of(stats)],
        lengths=lengths,
        gaps=_gaps(stats),
        unit=unit,
        skipped=skipped,
        examples=looked.examples,
        tokens=[(name, sides_as_json(sides)) for name, sides in looked.tokens],
    )


def notes_of(stats: Stats) -> list[str]:
    """What a run on these rows would learn beside what is meant."""
    notes = []
    longer, equal, shorter = stats.longer_chosen
    if (pairs := longer + equal + shorter) and max(longer, shorter) > UNEVEN * pairs:
        word, share = ("longer", longer / pairs) if longer > shorter else ("shorter", shorter / pairs)
        notes.append(f"Length bias: the chosen side is {word} in {share:.0%} of the pairs, which a model learns too.")
    good, bad = stats.labels[True], stats.labels[False]
    if good + bad and max(good, bad) > UNEVEN * (good + bad):
        notes.append(f"Labels are uneven: {good} good, {bad} bad; --kto_weights auto weighs them.")
    if stats.records and stats.contradictions > MANY * stats.records:
        notes.append(
            f"{stats.contradictions} rows contradict another: `prefuse data filter --drop_contradictions` drops them."
        )
    if stats.records and stats.duplicates > MANY * stats.records:
        notes.append(
            f"{stats.duplicates} rows equal an earlier one: `prefuse data filter --drop_duplicates` drops them."
        )
    if stats.equal_sides:
        notes.append(f"{stats.equal_sides} pairs have equal sides: there is nothing to prefer.")
    unusable = sum(count for reason, count in stats.skipped.items() if reason not in stats.set_aside)
    if unusable:
        notes.append(f"Rows that cannot be used: {unusable}; the reasons are below.")
    return notes


def _gaps(stats: Stats) -> dict | None:
    """The histogram of chosen less rejected, with its zero in sight."""
    if not stats.lengths.get("chosen"):
        return None
    gaps = [a - b for a, b in zip(stats.lengths["chosen"], stats.lengths["rejected"], strict=True)]
    low, high = min(*gaps, 0), max(*gaps, 1)
    counts = histogram([gap - low for gap in gaps], high - low, BINS)
    return {"counts": counts, "low": low, "high": high, "middle": -low / (high - low + 1)}
