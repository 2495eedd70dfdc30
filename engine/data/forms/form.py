"""A form: which columns a row is read from, what they become, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from prefuse.engine.data.records import BadRow, Record, Text
from prefuse.engine.data.turns import is_empty

Row = dict[str, Any]
Reader = Callable[[str, Row], Iterable[Record]]


@dataclass(frozen=True)
class ReadOptions:
    """How columns are read where their names and values do not say it. Each is a setting of the same name."""

    columns: str | dict[str, Any] | None = None  # "prompt=question,unused=notes": the roles of columns
    verdict_column: str | None = None  # of several verdicts between two answers, the one that counts
    verdict_first: str | None = None  # its values that prefer the first answer: "0", "-3,-2,-1" or ">0.5"
    verdict_second: str | None = None  # those that prefer the second one, where others are left that are ties
    score_column: str | None = None  # of several scores, the one that counts
    good_from: float | None = None  # scores from here on are good answers
    bad_to: float | None = None  # scores up to here are bad answers; those between are set aside
    pairs: Literal["best_worst", "all", "best_vs_random"] = "best_worst"  # which pairs a list of answers gives
    seed: int = 0  # of best_vs_random
    keep_scores: bool = False  # scores stay scores, and no threshold is asked for
    row_weights: bool = True  # a column of weights counts
    objective_weights: str | None = None  # "safety=0.3": the objectives whose scores make the margin
    needs: tuple[str, ...] = ("margins", "scores")  # of the numbers beside a text, those that are looked for
    takes: tuple[str, ...] = ()  # those that are taken where the first rows have them: "margins"
    dataset_config: str | None = None  # of a dataset with several configurations, the one to read


@dataclass
class Tally:
    """Filled as rows are read."""

    notes: Counter[str] = field(default_factory=Counter)  # what was decided on the way, and how often
    rows: int = 0  # of the source, read so far

    @property
    def lines(self) -> list[str]:
        return [f"{words}: {number}" for words, number in self.notes.items() if number]


@dataclass(frozen=True)
class Form:
    kind: str  # what a row is by its columns: "pair", "labelled", "scored", "sft" or "prompt"
    name: str  # "prompt/chosen/rejected"
    columns: tuple[str, ...]  # those in which every row must have a value
    became: tuple[tuple[str, str], ...]  # (column, its role)
    read: Reader
    prompt: Callable[[Row], Text] | None = None  # the prompt alone, where a row may have one and no record
    as_turns: bool = False
    optional: tuple[str, ...] = ()  # columns that a row may lack
    extras: tuple[str | None, str | None] = (None, None)  # the columns of tools and of chat_template_kwargs
    nested_tools: str | None = None  # a column of objects that may hold tools beside their messages
    gather: Callable[[Iterator[tuple[str, Any]]], Iterator[Any]] | None = None  # where a record needs several rows
    numbers: Callable[[Row, Record], Record] | None = None  # adds what stands beside the text
    marks: Callable[[Row], str | None] | None = None  # why a row is set aside: what a status or a flag says of it
    tally: Tally = field(default_factory=Tally)

    def __str__(self) -> str:
        return self.name

    @property
    def roles(self) -> str:
        """ "question -> prompt; system -> first turn; chosen, rejected"."""
        same = ", ".join(column for column, role in self.became if column == role)
        parts = [f"{column} -> {role}" for column, role in self.became if column != role]
        line = "; ".join([*parts, same] if same else parts)
        return line + (" (as turns)" if self.as_turns and "prompt" in dict(self.became).values() else "")

    @property
    def used(self) -> set[str]:
        return {column for column, _ in self.became}


def make_record(row: str, prompt: Text, sides: dict[str, Text], *, label: bool | None = None, **more: Any) -> Record:
    """Checks what every record must be. `prompt` and sides are all strings, or all turns."""
    for side, text in sides.items():
        if type(text) is not type(prompt):
            raise BadRow(f'"prompt" and "{side}" must both be strings or both be messages')
        turns = text if isinstance(text, list) else []
        if not text or any(is_empty(turn) for turn in turns):
            raise BadRow(f'"{side}" is empty')
        if not (turns[-1].get("tool_calls") if turns else False) and not _words(text).strip():
            raise BadRow(f'"{side}" is empty: nothing but blanks')
        for turn in turns[:1] + turns[-1:]:  # between them: see the setting multi_turn
            if turn["role"] != "assistant":
                raise BadRow(f'"{side}" has a turn from "{turn["role"]}", expected assistant turns only')
    if prompt == []:
        raise BadRow("the prompt has no turn")
    return Record(row, prompt, sides, label, **more)


def _words(text: Text) -> str:
    return text if isinstance(text, str) else "".join(turn.get("content", "") for turn in text)
