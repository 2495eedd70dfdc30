"""What a row becomes, and the two ways in which data can be wrong: one row, or the whole source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefuse.engine.errors import UserError

Message = dict[str, Any]  # {"role": ..., "content": str, and whatever else the chat template reads}
Text = str | list[Message]


class DataError(UserError):
    """The source as a whole cannot be used; the run stops."""


class ColumnMissing(DataError):
    """The source has no columns of the kind that is wanted; it may have those of another one."""


class BadRow(Exception):
    """One row cannot be used; its message is the reason. It becomes a `Skipped`."""

    by_rule = False


class SetAside(BadRow):
    """Nothing is wrong with the row; a stated rule leaves it out: a tie, a label that is false, a middling score."""

    by_rule = True


@dataclass(frozen=True)
class Skipped:
    row: str  # "pairs.json:17"
    reason: str
    by_rule: bool = False  # see SetAside

    @classmethod
    def of(cls, row: str, problem: BadRow) -> Skipped:
        return cls(row, str(problem), problem.by_rule)


@dataclass(frozen=True)
class Record:
    """One row. Tokenization replaces `prompt` and `sides`: messages, then rendered text, then token ids.

    Messages keep every key that a template may read or that says what is learned: tool_calls, reasoning_content,
    name, tool_call_id, weight, train. Their content is a string; a turn that says nothing but its calls may have none.
    """

    row: str
    prompt: Any  # Text | list[int]
    sides: dict[str, Any]  # {"chosen": ..., "rejected": ...}, {"completion": ...} or {} (a prompt alone)
    label: bool | None = None
    rendered: bool = False  # text came from a chat template, which writes its own special tokens
    tools: list[Message] | None = None  # what the conversation may call; the chat template prints them
    template_kwargs: dict[str, Any] | None = None  # of this row, for the chat template
    learned: list[bool] | None = None  # sft: which ids of the completion are learned; None: all
    conversation: bool = False  # turns of one column: every answer in it is one to learn from, not the last alone
    scores: dict[str, float] | None = None  # what the source says of each side: {"chosen": 4.0, "rejected": 1.5}
    objectives: dict[str, float] | None = None  # what other objectives say of each side, weighted and added up
    margin: float | None = None  # by how much the better side should win; of one answer, what other objectives say
    weight: float | None = None  # of the row's loss; of a preference between 1 and 2 how sure it is: 0 (a tie) to 1
    thread: str | None = None  # the conversation that it is a part of, where that is more than its row


def json_kind(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def check_unicode(text: str, column: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may say "\ud800"; no tokenizer takes it
        raise BadRow(f'"{column}" holds half a surrogate pair at character {error.start}, not a Unicode text') from None


def without_nulls(value: Any) -> Any:
    """JSON without its nulls, at any depth: tables have them where an object lacks a key."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value
