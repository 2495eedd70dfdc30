"""Stepwise rows: a prompt, the steps of a solution, and whether each is right (TRL's stepwise supervision).

    {"prompt": "3 + 4 * 2?", "completions": ["4 * 2 is 8.", "3 + 8 is 12."], "labels": [true, false]}

A step is followed by `step_separator`, as in TRL, and its score stands at the last token of that. The whole solution is
one sequence, which runs once.

E rows, M steps of all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import Batch
from prefuse.engine.data.dataset import hold_out_rows, text_options
from prefuse.engine.data.examples import require_usable, room_of
from prefuse.engine.data.forms.look import columns_by_role, holds_text
from prefuse.engine.data.forms.names import is_metadata
from prefuse.engine.data.outcomes import each
from prefuse.engine.data.records import BadRow, DataError, Record, Skipped, check_unicode
from prefuse.engine.data.rendering import ChatTemplate
from prefuse.engine.data.sources import open_source
from prefuse.engine.data.table import Examples, ExamplesBuilder
from prefuse.engine.data.templates import template_of
from prefuse.engine.data.tokenize import tokenize
from prefuse.engine.report.log import say

COLUMNS = ("prompt", "completions", "labels")
SEPARATOR = "\n"  # unless step_separator says otherwise, as in TRL


@dataclass(frozen=True)
class StepBatch(Batch):
    step_labels: Tensor | None = None  # (M,) whether each step of the batch is right: bool, or a share from 0 to 1


@dataclass(frozen=True, eq=False)
class Solutions(Examples):
    """`learned` is true at the tokens that end steps, and nowhere else."""

    offsets: np.ndarray | None = None  # (E + 1,) int64, where the steps of each row stand
    right: np.ndarray | None = None  # (M,) bool, or float64 where some are shares

    def select(self, indices: Sequence[int]) -> Solutions:
        chosen = np.asarray(indices, np.int64)
        steps = np.concatenate([np.arange(*self.offsets[i : i + 2]) for i in chosen] or [np.empty(0, np.int64)])
        offsets = np.concatenate([[0], np.diff(self.offsets)[chosen].cumsum()])
        return dataclasses.replace(super().select(indices), offsets=offsets, right=self.right[steps])

    def rows_as_bytes(self):
        for index, row in enumerate(super().rows_as_bytes()):
            yield bytes(row) + self.right[slice(*self.offsets[index : index + 2])].tobytes()

    def finish(self, batch: Batch, indices: Sequence[int]) -> StepBatch:
        labels = np.concatenate([self.right[slice(*self.offsets[i : i + 2])] for i in indices])
        fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return StepBatch(**fields, step_labels=torch.from_numpy(labels))


def read_steps(config: Config, tokenizer: Any) -> tuple[Solutions, Solutions | None, list[Skipped]]:
    """Rows to train on, held-out rows or None, and all that were skipped, as `read_training_data` has them."""
    if config.datasets:
        raise DataError("reward_loss steps reads one dataset_name, no mixture")
    examples, skipped = load_steps(config.dataset_name, config.dataset_train_split, tokenizer, config)
    if config.eval_dataset is not None:
        held, more = load_steps(config.eval_dataset, config.dataset_test_split, tokenizer, config)
        return examples, held, skipped + more
    kept, held = hold_out_rows(examples.prompts, config)
    if not held:
        return examples, None, skipped
    say(f"  {len(held)} of {len(examples)} held out for evaluation (eval_fraction {config.eval_fraction})")
    return examples.select(kept), examples.select(held), skipped


def load_steps(source: str, split: str, tokenizer: Any, config: Config) -> tuple[Solutions, list[Skipped]]:
    """The usable rows of a source, and the others, named and counted."""
    named = list(open_source(source, split, config.dataset_config).rows())
    absent = [column for column in COLUMNS if not any(isinstance(row, dict) and column in row for _, row in named)]
    if absent:
        raise DataError(f"{source} has no column {absent[0]}: expected prompt, completions and labels (lists)")
    unused = _unused(source, named, config)
    text = text_options(config)
    template = template_of(tokenizer, text) if tokenizer.chat_template else None
    labels: dict[str, list[float]] = {}
    records = [_record(name, row, template, config.separator() or SEPARATOR, labels) for name, row in named]
    room = room_of(config.max_length, tokenizer, text)
    builder, right, skipped = ExamplesBuilder(), [], []
    for outcome in each(encoded(records, tokenizer), room.fit):
        if isinstance(outcome, Skipped):
            skipped.append(outcome)
            continue
        ((_, ids),) = outcome.sides.items()
        builder.append(outcome.row, outcome.prompt, [ids], None, outcome.learned)
        right.append(labels[outcome.row][: sum(outcome.learned)])
    require_usable(len(builder), skipped, len(named), source, config.max_skipped)
    table = builder.finish()
    fields = {field.name: getattr(table, field.name) for field in dataclasses.fields(table)}
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in right], dtype=np.int64)])
    flat = np.asarray([label for row in right for label in row])
    flat = flat.astype(bool) if np.isin(flat, (0, 1)).all() else flat
    say(f"{source}: {len(named)} rows as prompt/completions/labels, {len(skipped)} skipped")
    if unused:
        say(f"  columns not used: {', '.join(unused)}")
    say(f"  {len(flat)} steps, {flat.mean():.0%} of them right")
    fields |= {"bos": tokenizer.bos_token_id}
    return Solutions(**fields, offsets=offsets, right=flat), skipped


def _unused(source: str, named: list[tuple[str, Any]], config: Config) -> list[str]:
    """The columns beside those that are read; one with text that is no metadata stops the run."""
    told = columns_by_role(config.columns).get("unused", [])
    found: dict[str, bool] = {}  # whether it holds text
    for column, value in ((column, row[column]) for _, row in named if isinstance(row, dict) for column in row):
        if column not in COLUMNS:
            found[column] = found.get(column, False) or holds_text(value)
    for column, has_text in found.items():
        if has_text and column not in told and not is_metadata(column):
            raise DataError(
                f'{source}: "{column}" holds text, and reward_loss steps reads {", ".join(COLUMNS)} alone. '
                f"Fix: put it into prompt; or --columns unused={column}"
            )
    return list(found)


def _record(
    name: str, row: Any, template: ChatTemplate | None, separator: str, labels: dict[str, list[float]]
) -> Record | Skipped:
    try:
        if not isinstance(row, dict):
            raise BadRow("the row is no object")
        prompt, steps, right = (row.get(column) for column in COLUMNS)
        record = solution(name, prompt, steps, template, separator)
        if not isinstance(right, list) or len(right) != len(steps) or not all(map(_is_label, right)):
            raise BadRow(f'"labels" must be a list of {len(steps)} booleans or shares of 1, one for each step')
    except BadRow as problem:
        return Skipped.of(name, problem)
    labels[name] = [float(label) for label in right]
    return record


def _is_label(value: Any) -> bool:
    return isinstance(value, bool | int | float) and 0 <= value <= 1


def solution(name: str, prompt: Any, steps: Any, template: ChatTemplate | None, separator: str) -> Record:
    """A prompt and the steps of an answer as text, each with the separator behind it; BadRow if they are none."""
    if isinstance(prompt, list) and prompt and template is not None:
        prompt = template.prompt(prompt)
    if not isinstance(prompt, str) or not prompt:
        raise BadRow('"prompt" must be a text, or messages where the tokenizer has a chat template')
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) and step for step in steps):
        raise BadRow('"completions" must be a list of texts, one for each step')
    for text in (prompt, *steps):
        check_unicode(text, "completions")
    pieces = [piece for step in steps for piece in ((step, False), (separator, True))]
    return Record(name, prompt, {"completion": pieces}, rendered=True)


def encoded(records: list[Record | Skipped], tokenizer: Any) -> list[Record | Skipped]:
    """Solutions as token ids; `learned` is true at the tokens that end steps, one for each."""
    return each(tokenize(records, tokenizer), lambda record: _at_ends(record, tokenizer))


def steps_of(text: str, separator: str) -> list[str]:
    """The steps of an answer as one text: what stands between its separators, without what is empty."""
    return [step for step in text.split(separator) if step.strip()]


def _at_ends(record: Record, tokenizer: Any) -> Record:
    """With the BOS that strings lack; of each separator the last token alone counts."""
    bos, prompt = tokenizer.bos_token_id, record.prompt
    if bos is not None and prompt[:1] != [bos]:
        prompt = [bos, *prompt]
    learned = record.learned or []
    ends = [here and not after for here, after in zip(learned, [*learned[1:], False][: len(learned)], strict=True)]
    return dataclasses.replace(record, prompt=prompt, learned=ends)
