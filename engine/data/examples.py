"""Rows -> tokenized examples: pairs, labelled completions, demonstrations, prompts.

Every row has one outcome, an example or a `Skipped` with its name and reason; none is dropped silently.
"""

from __future__ import annotations

import hashlib
import logging
import re
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from prefuse.engine.data.fit import count_cut, fit
from prefuse.engine.data.forms import BadRow, DataError, Message, Record, Skipped, read_records
from prefuse.engine.data.outcomes import each
from prefuse.engine.data.templates import Reading, render
from prefuse.engine.data.tokenize import tokenize

logger = logging.getLogger(__name__)


Kind = Literal["pair", "labelled", "sft"]


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    row: str  # "pairs.json:17", for messages


@dataclass(frozen=True)
class Labelled:
    prompt: list[int]
    completion: list[int]
    label: bool
    row: str


@dataclass(frozen=True)
class Demonstration:
    prompt: list[int]
    completion: list[int]
    row: str


class Prompt(NamedTuple):
    ids: list[int]
    text: str  # what to show: a string prompt, or the last turn of a conversation
    row: str


Example = Pair | Labelled | Demonstration


@dataclass(frozen=True)
class Dataset:
    examples: list[Any]  # of one of the types above
    skipped: list[Skipped]
    source: str
    fingerprint: str
    rows: int  # rows read; a pair row may have become two labelled examples
    prompts_cut: int  # rows whose prompt lost its start to max_length
    form: str  # the columns it was read from: "prompt/chosen/rejected"
    ignored_columns: list[str]


def load_examples(source: str, kind: Kind, tokenizer: Any, max_length: int, *, split: str = "train") -> Dataset:
    """Reads `source` (see `rows`) as "pair", "labelled" or "sft" examples.

    Pairs may be read as "labelled" (see `unpair`) or as "sft" (their chosen side), labelled rows as "sft"
    (those whose label is true). Raises DataError for a source that cannot be read, lacks a column or has no
    usable row.
    """
    if kind not in ("pair", "labelled", "sft"):
        raise ValueError(f'kind must be "pair", "labelled" or "sft", got {kind!r}')
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, a prompt token and a completion token; got {max_length}")
    records, form, ignored = read_records(source, kind, split)
    if kind == "sft":
        records = each(records, _demonstrated)
    rows = len(records)
    records = tokenize(render(records, tokenizer, reading), tokenizer)
    if form.kind == "pair" and kind != "sft":
        records = each(records, _with_a_preference)
    fitted = each(records, lambda record: fit(record, max_length, tokenizer.bos_token_id))
    usable, skipped = _usable(fitted, source)

    examples: list[Any] = [_example(record) for record in usable]
    if form.kind == "pair" and kind == "labelled":
        examples = unpair(examples)
    return Dataset(
        examples=examples,
        skipped=skipped,
        source=source,
        fingerprint=fingerprint(examples),
        rows=rows,
        prompts_cut=count_cut(records, fitted),
        form=str(form),
        ignored_columns=ignored,
    )


def load_prompts(source: str, tokenizer: Any, max_length: int, *, split: str = "train") -> list[Prompt]:
    """The prompts of `source`, in any form or with a `prompt` column alone, of at most `max_length` tokens.

    Rows that cannot be used are named in the log.
    """
    rows, form, ignored = read_records(source, "prompt", split)
    records = tokenize(render(each(rows, lambda record: replace(record, sides={})), tokenizer), tokenizer)
    fitted = each(records, lambda record: fit(record, max_length, tokenizer.bos_token_id))
    usable, skipped = _usable(fitted, source)
    shown = {row.row: _shown_text(row.prompt) for row in rows if isinstance(row, Record)}
    prompts = [Prompt(record.prompt, shown[record.row], record.row) for record in usable]
    cut = count_cut(records, fitted)
    if skipped or cut:
        report = Dataset(prompts, skipped, source, "", len(rows), cut, str(form), ignored)
        logger.warning("%s", summarize_skipped(report))
    return prompts


def unpair(pairs: Iterable[Pair]) -> list[Labelled]:
    """Each pair as two labelled completions: chosen (true), then rejected (false)."""
    return [
        Labelled(pair.prompt, completion, label, pair.row)
        for pair in pairs
        for completion, label in ((pair.chosen, True), (pair.rejected, False))
    ]


def summarize_skipped(dataset: Dataset, limit: int = 10) -> str:
    """What happened to the rows, as lines to print: the form, what was ignored, cut and skipped, and why.

    At most `limit` reasons, and `limit` rows of each; `dataset.skipped` has them all.
    """
    count = len(dataset.skipped)
    lines = [f"{dataset.source}: {dataset.rows} rows as {dataset.form}, {count} skipped"]
    if dataset.ignored_columns:
        lines.append(f"  columns not used: {', '.join(dataset.ignored_columns)}")
    if dataset.prompts_cut:
        lines.append(f"  prompts cut at their start to fit max_length: {dataset.prompts_cut}")
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


def _listed(rows: list[str], limit: int) -> str:
    return ", ".join(rows[:limit]) + (f" and {len(rows) - limit} more" if len(rows) > limit else "")


def fingerprint(examples: Iterable[Example]) -> str:
    """sha256 over the token ids, lengths and labels of all examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        match example:
            case Pair(prompt, chosen, rejected):
                parts = (prompt, chosen, rejected)
            case Labelled(prompt, completion, label):
                parts = (prompt, completion, [int(label)])
            case Demonstration(prompt, completion):
                parts = (prompt, completion)
        for ids in parts:
            digest.update(array("q", [len(ids), *ids]).tobytes())
    return digest.hexdigest()


def _usable(outcomes: list[Record | Skipped], source: str) -> tuple[list[Record], list[Skipped]]:
    records = [outcome for outcome in outcomes if isinstance(outcome, Record)]
    skipped = [outcome for outcome in outcomes if isinstance(outcome, Skipped)]
    if not records:
        reasons = "\n".join(f"  {skip.row}: {skip.reason}" for skip in skipped[:5])
        more = f"\n  ... and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        raise DataError(f"{source}: no usable row among {len(skipped)}:\n{reasons}{more}")
    return records, skipped


def _demonstrated(record: Record) -> Record:
    """What a row shows to imitate: its completion, unless that is labelled bad, or its chosen side."""
    if record.label is False:
        raise BadRow("its label is false, and sft learns from true ones only")
    side = "chosen" if "chosen" in record.sides else "completion"
    conversation = record.conversation and record.label is None  # a label is about the last answer
    return replace(record, sides={side: record.sides[side]}, label=None, conversation=conversation)


def _with_a_preference(record: Record) -> Record:
    if record.sides["chosen"] == record.sides["rejected"]:
        raise BadRow('"chosen" equals "rejected", token by token: no preference to learn')
    return record


def _example(record: Record) -> Example:
    match record:
        case Record(row, prompt, {"chosen": chosen, "rejected": rejected}):
            return Pair(prompt, chosen, rejected, row)
        case Record(row, prompt, {"completion": completion}, bool(label)):
            return Labelled(prompt, completion, label, row)
        case Record(row, prompt, sides):
            (completion,) = sides.values()
            return Demonstration(prompt, completion, row)


def _shown_text(prompt: str | list[Message]) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1].get("content", "")
