"""Named rows -> records, as they come, with every bad row kept as a named `Skipped`."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from prefuse.engine.data.forms.blocks import named_tools
from prefuse.engine.data.forms.detect import detect_form, unused_text
from prefuse.engine.data.forms.form import Form, ReadOptions
from prefuse.engine.data.forms.gathered import attempt
from prefuse.engine.data.forms.look import FIRST_ROWS, bad_name, columns_by_role, first_look, holds_text, passed_over
from prefuse.engine.data.forms.mixture import mixed_form, mixture_parts, sources_of
from prefuse.engine.data.forms.names import is_metadata, is_status, judges, plain_name
from prefuse.engine.data.forms.nested import opened_columns, with_opened
from prefuse.engine.data.forms.number_texts import numeric_answers, with_texts
from prefuse.engine.data.forms.turns import marked_turns, other_keys, turns_in_text
from prefuse.engine.data.records import BadRow, DataError, Record, SetAside, Skipped, json_kind
from prefuse.engine.data.sources import Source, open_source
from prefuse.engine.data.turns import parsed, read_tools


class Reading(NamedTuple):
    outcomes: Iterator[Record | Skipped]  # can be gone through once; then `form.tally` is whole
    form: Form
    ignored: list[str]  # columns that are not used


def read_records(
    source: str | Sequence[Any], kind: str, split: str = "train", options: ReadOptions | None = None
) -> Reading:
    """The rows of a source as records (or `Skipped`), in order; the first rows say in which form they are.

    `source`: a path or a hub name, or the `datasets` of a mixture (see mixture.py).
    Raises DataError for a source that cannot be read, whose columns are not understood, or that has columns with text
    that nothing uses.
    """
    options = options or ReadOptions()
    if isinstance(source, str):
        return read_source(open_source(source, split, options.dataset_config), kind, options)
    readings = [read_source(part, kind, options) for part in sources_of(mixture_parts(source), split)]
    ignored = list(dict.fromkeys(column for reading in readings for column in reading.ignored))
    outcomes = itertools.chain.from_iterable(reading.outcomes for reading in readings)
    return Reading(outcomes, mixed_form([reading.form for reading in readings]), ignored)


def read_source(source: Source, kind: str, options: ReadOptions) -> Reading:
    """The same for one source that is open."""
    rows, notes = source.rows(), Counter()
    first = list(itertools.islice(rows, FIRST_ROWS))
    if opened := opened_columns(options, first):
        first, rows = list(with_opened(first, opened)), with_opened(rows, opened)
    look = first_look(source.name, first)
    as_text = [column for column, values in look.values.items() if all(map(turns_in_text, values or [None]))]
    if as_text:
        first = list(_with_turns(first, as_text, notes))
        look = first_look(source.name, first)
    if not first:
        raise DataError(f"{source.name} has no rows")
    if not look.values:
        reasons = "\n".join(f"  {name}: {_problem(row)}" for name, row in first[:5])
        raise DataError(f"{source.name}: none of its {len(first)} rows is an object with columns:\n{reasons}")
    form = detect_form(look, kind, options)
    form.tally.notes.update(notes)
    rows = _with_turns(rows, as_text, form.tally.notes) if as_text else rows
    for key, count in other_keys(value for column in form.used for value in look.values.get(column, ())).items():
        form.tally.notes[f'turns of the first rows that also hold "{key}", for the chat template alone'] += count
    marked = marked_turns(value for column in form.used for value in look.values.get(column, ()))
    form.tally.notes["turns of the first rows that a flag of their own marks as bad: they are not learned"] += marked
    if numeric := numeric_answers(look, form):
        everything = with_texts(itertools.chain(first, rows), numeric, form.tally.notes)
        first, rows = list(itertools.islice(everything, len(first))), everything
    ignored = [column for column in look.values if column not in form.used]
    told = passed_over(columns_by_role(options.columns))
    empty = {column for column in ignored if not look.values[column]}
    checked = _checked(itertools.chain(first, rows), source, form, kind, told, set(ignored) - told, empty)
    return Reading(_outcomes(checked, form, kind), form, ignored)


def _with_turns(rows: Iterable[tuple[str, Any]], columns: list[str], notes: Counter[str]) -> Iterator[tuple[str, Any]]:
    """With the turns that these columns hold as JSON text."""
    for name, row in rows:
        found = {column: turns_in_text(row.get(column)) for column in columns} if isinstance(row, dict) else {}
        for column in [column for column, turns in found.items() if turns]:
            notes[f'rows whose "{column}" is a text, the JSON of turns, and is read as turns'] += 1
            row = row | {column: found[column]}
        yield name, row


def _problem(row: Any) -> str:
    if isinstance(row, BadRow):
        return str(row)
    return "the row has no column" if row == {} else f"the row is {json_kind(row)}, expected an object"


def _checked(
    rows: Iterator[tuple[str, Any]], source: Source, form: Form, kind: str,
    told: set[str], ignored: set[str], empty: set[str],
) -> Iterator[tuple[str, Any]]:  # fmt: skip
    """Counts the rows, and stops where one has text, or a verdict, in a column that has no value in the first rows.

    `told`: columns that are unused by the user's word; `ignored`: other columns of the first rows; `empty`: of those,
    the ones without values. What a status says is looked at in every row.
    """
    of_pairs = form.kind == "pair"
    late = {column for column in empty if kind != "prompt" and judges(column, of_pairs) and not is_status(column)}
    harmless = form.used | told | {column for column in ignored - late if is_metadata(column)}
    for name, row in rows:
        form.tally.rows += 1
        if isinstance(row, dict) and not harmless.issuperset(row):
            if bad := bad_name(row):
                yield name, bad
                continue
            for column in row:
                if column in harmless or row[column] is None:
                    continue
                if column in late or (column not in ignored and kind != "prompt" and judges(column, of_pairs)):
                    raise DataError(_late(source.name, column, name))
                if not holds_text(row[column]):
                    continue
                if column not in ignored and is_metadata(column):
                    harmless.add(column)
                elif column not in ignored or form.tally.rows > FIRST_ROWS:
                    raise DataError(unused_text(source.name, [column], form, kind, name))
        if form.gather is not None and form.marks and isinstance(row, dict) and (reason := form.marks(row)):
            yield name, SetAside(reason)
            continue
        yield name, row


def _late(source: str, column: str, row: str) -> str:
    return (
        f'{source}: "{column}" says how good a row is, and has its first value in row {row}, behind the {FIRST_ROWS} '
        f"rows by which columns are understood. Fix: move such a row to the top, or --columns unused={column}"
    )


def _outcomes(rows: Iterator[tuple[str, Any]], form: Form, kind: str) -> Iterator[Record | Skipped]:
    if form.gather is not None and kind != "prompt":
        yield from form.gather(rows)
        return

    has_extras = any((*form.extras, form.nested_tools, form.numbers))

    def read(name: str, row: dict[str, Any]) -> list[Record]:
        if kind == "prompt" and form.prompt is not None:
            records = [Record(name, form.prompt(row), {})]
        else:
            records = list(form.read(name, row))
            if form.marks and (reason := form.marks(row)) and any(record.label is not False for record in records):
                raise SetAside(reason)
        return [_with_extras(record, row, form) for record in records] if has_extras else records

    for name, row in rows:
        outcome = attempt(name, row, form.columns, read)
        if isinstance(outcome, Skipped):
            yield outcome
        else:
            yield from outcome


def _with_extras(record: Record, row: dict[str, Any], form: Form) -> Record:
    """What the chat template gets beside the turns (each may stand as JSON text), and what the loss gets."""
    record = record if form.numbers is None else form.numbers(row, record)
    if not any((*form.extras, form.nested_tools)):
        return record
    tools, settings = (row.get(column or "") for column in form.extras)
    if form.nested_tools and isinstance(row.get(form.nested_tools), dict):
        tools = row[form.nested_tools].get("tools")
    settings = parsed(settings, f'"{form.extras[1]}"')
    if settings is not None and not isinstance(settings, dict):
        raise BadRow(f'"{form.extras[1]}" is {json_kind(settings)}, expected an object')
    settings = {key: value for key, value in (settings or {}).items() if value is not None}
    tools = named_tools(read_tools(tools), legacy=plain_name(form.extras[0] or "") == "functions")
    return replace(record, tools=tools, template_kwargs=settings or None)
