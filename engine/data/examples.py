"""Rows -> tokenized examples: pairs, labelled completions, demonstrations, prompts.

Every row has one outcome, an example or a `Skipped` with its name and reason; none is dropped silently.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple, get_args

from prefuse.engine.data.cache import cached
from prefuse.engine.data.controls import Controls, behind_control, control_ids
from prefuse.engine.data.feed import check_numbers, row_numbers
from prefuse.engine.data.fit import Room, character_parts, count_cut, count_cut_completions
from prefuse.engine.data.forms import (
    BadRow,
    DataError,
    Message,
    ReadOptions,
    Record,
    SetAside,
    Skipped,
    name_of,
    read_records,
)
from prefuse.engine.data.outcomes import each
from prefuse.engine.data.table import Example, Examples, ExamplesBuilder, Kind, Labelled, Pair
from prefuse.engine.data.templates import TextOptions, render
from prefuse.engine.data.tokenize import tokenize

logger = logging.getLogger(__name__)

BEST_ONLY = "of rows with a better and a worse answer, or with ranked ones, the best is learned and no other"
BLOCK_ROWS = 2048  # rows that stand in memory as texts and lists of ids at once


class Prompt(NamedTuple):
    ids: list[int]
    text: str  # what to show: a string prompt, or the last turn of a conversation
    row: str
    raw: str | list[Message] = ""  # as the row has it, before any template


@dataclass(frozen=True)
class Dataset:
    examples: Examples
    skipped: list[Skipped]
    source: str
    rows: int  # rows read; a pair row may have become two labelled examples
    prompts_cut: int  # rows whose prompt lost its start to max_length
    form: str  # the columns it was read from: "prompt/chosen/rejected"
    ignored_columns: list[str]
    columns: str = ""  # what became what: "question -> prompt; chosen, rejected"
    notes: list[str] = field(default_factory=list)  # what was decided on the way, and how often
    completions_cut: int = 0  # rows of which a completion lost its end
    is_paired: bool = False  # its rows are pairs, whatever they were read as

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.examples)


def load_examples(
    source: str | Sequence[Any],
    kind: Kind,
    tokenizer: Any,
    max_length: int,
    *,
    split: str = "train",
    text: TextOptions | None = None,
    max_skipped: float = 0.5,
    cache: str = "auto",
    **reading: Any,
) -> Dataset:
    """Reads `source` (see `rows`) as "pair", "labelled", "scored" or "sft" examples.

    A list is a mixture: paths, or dicts of path, name, split, columns and fraction as in TRL.
    Pairs may be read as "labelled" (see `unpair`) or as "sft" (their chosen side), labelled rows as "sft"
    (those whose label is true), pairs with scores as "scored". `text`: how rows become text, and text tokens.
    `reading`: the fields of `ReadOptions`, for columns that do not say what they are; `needs=("margins",)` asks for a
    margin of each row.
    `cache`: where the ids are kept for the next time ("auto", "none" or a folder; see cache.py).
    Raises DataError for a source that cannot be read, whose columns are not understood, that has no usable row, or of
    whose rows more than the share `max_skipped` cannot be used (those that a stated rule sets aside do not count).
    """
    if kind not in get_args(Kind):
        raise ValueError(f'kind must be "pair", "labelled", "scored" or "sft", got {kind!r}')
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, a prompt token and a completion token; got {max_length}")
    options, text = ReadOptions(**{"needs": (), **reading}), text or TextOptions()
    if kind == "scored":
        needs = tuple(dict.fromkeys((*options.needs, "scores")))
        options = replace(options, keep_scores=True, pairs="all", needs=needs)
    if kind != "sft":
        text = replace(text, turns="last")
    settings = {"kind": kind, "max_length": max_length, "max_skipped": max_skipped}
    seed = options.seed if options.pairs == "best_vs_random" else None  # nothing else is drawn
    settings |= {"text": asdict(text), "reading": asdict(options) | {"seed": seed}}

    def read() -> Dataset:
        return _read_examples(source, kind, tokenizer, max_length, split, text, max_skipped, options)

    return cached(cache, source, split, tokenizer, settings, read)


def _read_examples(
    source: str | Sequence[Any], kind: Kind, tokenizer: Any, max_length: int, split: str, text: TextOptions,
    max_skipped: float, options: ReadOptions,
) -> Dataset:  # fmt: skip
    records, form, ignored = read_records(source, kind, split, options)
    source = name_of(source)
    controls = None if text.controls is None or kind != "labelled" else Controls.of(tokenizer, text.controls)
    room = room_of(max_length - (controls.length if controls else 0), tokenizer, text)
    has_preferences = form.kind == "pair" and kind != "sft"
    examples, skipped, prompts_cut, completions_cut = ExamplesBuilder(), [], 0, 0
    for block in _blocks(records, BLOCK_ROWS):
        if kind == "sft":
            block = each(block, _demonstrated)
        is_first = not len(examples) + len(skipped)
        if is_first and options.takes and any(isinstance(row, Record) and row.margin is not None for row in block):
            options = replace(options, needs=(*options.needs, *options.takes))
        block = check_numbers(block, kind, options.needs, source if is_first else None)
        encoded = tokenize(render(block, tokenizer, text), tokenizer)
        if has_preferences:
            encoded = each(encoded, _with_a_preference)
        fitted = each(encoded, room.fit)
        prompts_cut += count_cut(encoded, fitted)
        completions_cut += count_cut_completions(encoded, fitted)
        for outcome in fitted:
            if isinstance(outcome, Skipped):
                skipped.append(outcome)
            else:
                sides = list(outcome.sides.values())
                examples.append(
                    outcome.row, outcome.prompt, sides, outcome.label, outcome.learned, weight=outcome.weight,
                    thread=outcome.thread, **row_numbers(outcome, kind, options.needs),
                )  # fmt: skip
    require_usable(len(examples), skipped, form.tally.rows, source, max_skipped)
    table = examples.finish()
    if has_preferences and kind != "pair":
        table = table.unpaired(labelled=kind == "labelled")
    table = table if controls is None else controls.before(table)
    return Dataset(
        examples=table,
        skipped=skipped,
        source=source,
        rows=form.tally.rows,
        prompts_cut=prompts_cut,
        form=str(form),
        ignored_columns=ignored,
        columns=form.roles,
        notes=form.tally.lines + ([BEST_ONLY] if kind == "sft" and form.kind == "pair" else []),
        completions_cut=completions_cut,
        is_paired=form.kind == "pair",
    )


def room_of(max_length: int, tokenizer: Any, text: TextOptions) -> Room:
    parts = character_parts(tokenizer)
    if max_length < 2:
        raise DataError("max_length leaves no room for a prompt and an answer behind the control text")
    return Room(max_length, tokenizer.bos_token_id, parts, text.truncation_mode, text.long_completions)


def load_prompts(
    source: str | Sequence[Any],
    tokenizer: Any,
    max_length: int,
    *,
    split: str = "train",
    text: TextOptions | None = None,
    **reading: Any,
) -> list[Prompt]:
    """The prompts of `source`, in any form or with a `prompt` column alone, of at most `max_length` tokens.

    Rows that cannot be used are named in the log.
    """
    records, form, ignored = read_records(source, "prompt", split, ReadOptions(**reading))
    source = name_of(source)
    text = text or TextOptions()
    control = [] if text.control is None else control_ids(tokenizer, text.control)
    room = room_of(max_length - len(control), tokenizer, text)
    prompts, skipped, cut = [], [], 0
    for block in _blocks(records, BLOCK_ROWS):
        encoded = tokenize(render(each(block, lambda record: replace(record, sides={})), tokenizer, text), tokenizer)
        fitted = each(encoded, room.fit)
        cut += count_cut(encoded, fitted)
        for read, outcome in zip(block, fitted, strict=True):
            if isinstance(outcome, Skipped):
                skipped.append(outcome)
            else:
                ids = behind_control(outcome.prompt, control, tokenizer.bos_token_id)
                prompts.append(Prompt(ids, _shown_text(read.prompt), outcome.row, read.prompt))
    rows = form.tally.rows
    require_usable(len(prompts), skipped, rows, source)
    if skipped or cut:
        report = Dataset(Examples.of([]), skipped, source, rows, cut, str(form), ignored, form.roles, form.tally.lines)
        logger.warning("%s", summarize_skipped(report))
    return prompts


def _blocks(records: Iterable[Record | Skipped], size: int) -> Iterator[list[Record | Skipped]]:
    records = iter(records)
    while block := list(islice(records, size)):
        yield block


def unpair(pairs: Iterable[Pair]) -> list[Labelled]:
    """Each pair as two labelled completions: chosen (true), then rejected (false)."""
    return list(Examples.of(pairs).unpaired())


def summarize_skipped(dataset: Dataset, limit: int = 10) -> str:
    """What happened to the rows, as lines to print: the form, what was ignored, cut and skipped, and why.

    At most `limit` reasons, and `limit` rows of each; `dataset.skipped` has them all.
    """
    count = len(dataset.skipped)
    lines = [f"{dataset.source}: {dataset.rows} rows as {dataset.form}, {count} skipped"]
    if " -> " in dataset.columns:
        lines.append(f"  columns: {dataset.columns}")
    lines += [f"  {note}" for note in dataset.notes]
    if dataset.ignored_columns:
        lines.append(f"  columns not used: {', '.join(dataset.ignored_columns)}")
    if dataset.prompts_cut:
        lines.append(f"  prompts cut to fit max_length (by truncation_mode): {dataset.prompts_cut}")
    if dataset.completions_cut:
        lines.append(f"  completions cut at their end to fit max_length: {dataset.completions_cut}")
    rows_by_reason: dict[str, list[str]] = {}
    for skipped in dataset.skipped:
        # Rows that are too long have one reason, however long each is.
        reason = re.sub(r"has \d+ tokens", "has too many tokens", skipped.reason)
        rows_by_reason.setdefault(reason, []).append(skipped.row)
    for reason, rows in list(rows_by_reason.items())[:limit]:
        lines.append(f"  skipped {_listed(rows, limit)}: {reason}")
    if len(rows_by_reason) > limit:
        lines.append(f"  ... and {len(rows_by_reason) - limit} more reasons")
    return "\n".join(lines)


def describe_learned(dataset: Dataset) -> str:
    """How many tokens are learned, and of how many: in sft, the turns between answers stand in completions too."""
    completions, learned = int(dataset.examples.completions.lengths.sum()), dataset.examples.learned
    if learned is None:
        return f"{completions} answer tokens"
    return f"{int(learned.sum())} answer tokens are learned; {completions - int(learned.sum())} stand between answers"


def _listed(rows: list[str], limit: int) -> str:
    return ", ".join(rows[:limit]) + (f" and {len(rows) - limit} more" if len(rows) > limit else "")


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 over the token ids, lengths and labels of all examples, in order."""
    return (examples if isinstance(examples, Examples) else Examples.of(examples)).content_fingerprint()


def require_usable(count: int, skipped: list[Skipped], rows: int, source: str, max_skipped: float = 1.0) -> None:
    bad = [skip for skip in skipped if not skip.by_rule]
    if not count:
        raise DataError(f"{source}: no usable row among {len(skipped)}:\n{_first_reasons(skipped)}")
    if len(bad) > max_skipped * rows:
        raise DataError(
            f"{source}: {len(bad)} of {rows} rows cannot be used, more than max_skipped {max_skipped:g} allows:\n"
            f"{_first_reasons(bad)}"
        )


def _first_reasons(skipped: list[Skipped]) -> str:
    lines = [f"  {skip.row}: {skip.reason}" for skip in skipped[:5]]
    return "\n".join([*lines, f"  ... and {len(skipped) - 5} more"] if len(skipped) > 5 else lines)


def _demonstrated(record: Record) -> Record:
    """What a row shows to imitate: its completion, unless that is labelled bad, or its chosen side."""
    if record.label is False:
        raise SetAside("its label is false, and sft learns from true ones only")
    side = "chosen" if "chosen" in record.sides else "completion"
    conversation = record.conversation and record.label is None  # a label is about the last answer
    weight = record.weight if len(record.sides) == 1 else None  # that of a pair is about the comparison
    return replace(record, sides={side: record.sides[side]}, label=None, conversation=conversation, weight=weight)


def _with_a_preference(record: Record) -> Record:
    if record.sides["chosen"] == record.sides["rejected"]:
        raise BadRow('"chosen" equals "rejected", token by token: no preference to learn')
    return record


def _shown_text(prompt: str | list[Message]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1].get("content", "")
