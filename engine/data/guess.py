"""What rows of nobody's kind are to be read as: the first kind that fits."""

from dataclasses import replace

from prefuse.engine.data.forms import ReadOptions, read_records
from prefuse.engine.data.forms.read import Reading
from prefuse.engine.data.records import ColumnMissing

KINDS = ("pair", "labelled", "scored", "sft", "prompt")


def read_as(source: str, kind: str, split: str, options: ReadOptions) -> tuple[Reading, str]:
    """The rows as `kind`, and the kind; "auto" is the first that fits. Scores without thresholds stay scores."""
    has_thresholds = options.good_from is not None or options.bad_to is not None

    def read(kind: str) -> Reading:
        as_scores = replace(options, keep_scores=True, pairs="all")
        return read_records(source, kind, split, as_scores if kind == "scored" and not has_thresholds else options)

    if kind != "auto":
        return read(kind), kind
    refused: list[ColumnMissing] = []
    for kind in KINDS:
        try:
            reading = read(kind)
        except ColumnMissing as error:
            refused.append(error)
            continue
        if kind != "labelled" or reading.form.kind != "scored" or has_thresholds:
            return reading, kind
    raise refused[0]
