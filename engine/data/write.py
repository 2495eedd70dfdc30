"""Records -> rows under TRL's names, and rows -> a JSONL or Parquet file that appears whole."""

from __future__ import annotations

import datetime
import gzip
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from prefuse.engine.data.forms.implicit import are_spoken, turns_of_transcript
from prefuse.engine.data.records import BadRow, Record, SetAside
from prefuse.engine.data.table import source_row
from prefuse.engine.data.turns import REASONING
from prefuse.engine.errors import UserError

Row = dict[str, Any]
TARGETS = {"pairs": "pair", "labelled": "labelled", "scored": "scored", "sft": "sft"}  # what rows become: their kind
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")


@dataclass
class LeftOut:
    """What is not written, by its reason: whole rows, and pairs or answers of rows that give several."""

    rows: Counter[str] = field(default_factory=Counter)
    parts: Counter[str] = field(default_factory=Counter)
    parts_of: dict[str, set[str]] = field(default_factory=dict)  # reason -> the rows that they are of
    repeated: int = 0  # answers that stand in several pairs, written once

    def add(self, place: str, reason: str) -> None:
        """`place`: "rows.json:3", or of a pair "rows.json:3 (0 over 2)"."""
        row = source_row(place)
        if row == place:
            self.rows[reason] += 1
        else:
            self.parts[reason] += 1
            self.parts_of.setdefault(reason, set()).add(row)

    def lines(self, used: set[str] | None = None) -> list[str]:
        """`used`: the rows that gave something. They, those that are named and those that gave nothing are all."""
        said = [f"{count} not: {reason}" for reason, count in self.rows.most_common()]
        for reason, count in self.parts.most_common():
            said.append(f"{_counted(count, 'pair')} of {_counted(len(self.parts_of[reason]), 'row')} not: {reason}")
        if empty := set().union(*self.parts_of.values()) - (used or set()):
            said.append(f"{_counted(len(empty), 'row')} gave nothing: none of its pairs is written")
        if self.repeated:
            said.append(f"{_counted(self.repeated, 'answer')} not again: it is written already")
        return said


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def written_rows(record: Record, target: str) -> Iterator[Row]:
    """The rows that a record becomes: one, or two where a pair is taken apart."""
    sides = {side: as_given(text) for side, text in record.sides.items()}
    record = replace(record, prompt=as_given(record.prompt), sides=sides)
    extras = {"tools": record.tools, "chat_template_kwargs": record.template_kwargs}
    extras = {name: value for name, value in extras.items() if value}
    own = {"weight": record.weight, "margin": record.margin}
    own = {name: value for name, value in own.items() if value is not None}
    weight = {name: value for name, value in own.items() if name == "weight"}
    scores = record.scores or {}
    if len(record.sides) == 2 and target != "sft" and record.sides["chosen"] == record.sides["rejected"]:
        raise BadRow("both sides are equal")
    if target == "pairs":
        numbers = {f"score_{side}": value for side, value in scores.items()}
        yield {"prompt": record.prompt, **record.sides, **numbers, **own, **extras}
    elif target == "labelled":
        own = own if len(record.sides) == 1 else weight  # a margin is the pair's
        for side, text in record.sides.items():
            label = record.label if side == "completion" else side == "chosen"
            yield {"prompt": record.prompt, "completion": text, "label": label, **own, **extras}
    elif target == "scored":
        if not scores:
            raise SetAside("it has no scores")
        for side, text in record.sides.items():
            yield {"prompt": record.prompt, "completion": text, "score": scores[side], **weight, **extras}
    else:
        if record.label is False:
            raise SetAside("its label is false: no demonstration")
        text = record.sides.get("chosen", record.sides.get("completion"))
        weight = weight if len(record.sides) == 1 else {}  # that of a pair is about the comparison
        answers = isinstance(record.prompt, list) and any(turn["role"] == "assistant" for turn in record.prompt)
        is_whole = not answers or (record.conversation and record.label is None)
        if isinstance(record.prompt, list) and is_whole:  # of "messages" every answer is learned
            yield {"messages": record.prompt + text, **weight, **extras}
        else:
            yield {"prompt": record.prompt, "completion": text, **weight, **extras}


def as_given(turns: Any) -> Any:
    """Without the second name that reading gave to the reasoning of a turn."""
    if not isinstance(turns, list):
        return turns
    doubled = [any(turn.get(name) for name in REASONING[1:]) for turn in turns]
    return [
        {key: value for key, value in turn.items() if key != REASONING[0]} if twice else turn
        for turn, twice in zip(turns, doubled, strict=True)
    ]


def with_turns(record: Record) -> Record:
    """Strings as turns: transcripts are cut at their markers, any other prompt is one user turn."""
    if not isinstance(record.prompt, str):
        return record
    if not record.prompt and set(record.sides) == {"completion"}:
        return _turns_of_text(record)
    sides = {side: [{"role": "assistant", "content": text.strip()}] for side, text in record.sides.items()}
    return replace(record, prompt=turns_of_transcript(record.prompt), sides=sides)


def _turns_of_text(record: Record) -> Record:
    """A text that is a transcript."""
    text = record.sides["completion"]
    turns = turns_of_transcript(text) if are_spoken([text]) else []
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("it is a text without a prompt, and no transcript that ends with the assistant's turn")
    return replace(record, prompt=turns[:-1], sides={"completion": turns[-1:]}, conversation=True)


def check_output(path: Path) -> None:
    if not path.name.endswith(SUFFIXES):
        raise UserError(f"{path}: expected a name that ends in {', '.join(SUFFIXES)}")
    if path.exists():
        raise UserError(f"{path} exists: give another name, or remove it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path} is in a folder that does not exist: make it first")


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """How many were written. The file appears when all are."""
    aside = path.with_name("." + path.name + ".tmp")
    try:
        count = _write_parquet(aside, rows) if path.suffix == ".parquet" else _write_lines(aside, rows)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return count


def _write_lines(path: Path, rows: Iterable[Row]) -> int:
    count = 0
    opened = gzip.open if path.name.endswith(".gz.tmp") else open
    with opened(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, default=_as_json) + "\n")
            count += 1
    return count


def _as_json(value: Any) -> Any:
    """Values of Parquet and Arrow that JSON has no word for."""
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise UserError(f"a row holds a {type(value).__name__}, which JSON cannot hold; write .parquet instead")


def _write_parquet(path: Path, rows: Iterable[Row]) -> int:
    """By `datasets`, which writes objects that differ from row to row as JSON text. All rows stand in memory."""
    import datasets

    datasets.disable_progress_bars()
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = {column: [row.get(column) for row in rows] for column in columns}
    try:
        datasets.Dataset.from_dict(table, on_mixed_types="use_json").to_parquet(path)
    except (ValueError, TypeError, OverflowError) as error:  # pyarrow's errors are ValueErrors and TypeErrors
        raise UserError(f"these rows do not fit into Parquet ({error}); write .jsonl instead") from error
    return len(rows)
