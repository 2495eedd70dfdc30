"""Each row has one outcome, a record or a `Skipped`; a step maps a list of outcomes to one of the same length."""

from collections.abc import Callable

from prefuse.engine.data.forms import BadRow, Record, Skipped


def each(outcomes: list[Record | Skipped], step: Callable[[Record], Record]) -> list[Record | Skipped]:
    """Applies `step` to every record; a BadRow it raises turns that record into a Skipped."""

    def outcome(record: Record | Skipped) -> Record | Skipped:
        if isinstance(record, Skipped):
            return record
        try:
            return step(record)
        except BadRow as problem:
            return Skipped.of(record.row, problem)

    return [outcome(record) for record in outcomes]
