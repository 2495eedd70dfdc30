"""Named rows -> records in one canonical form, with every bad row kept as a named `Skipped`.

Columns are named as TRL names them; `FORMS` is the list of what is understood. Messages are `{role, content}`
turns or ShareGPT's `{from, value}` turns, wherever messages stand. Columns that no form needs are ignored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from prefuse.engine.data.sources import BadRow, DataError, describe, read_table
from prefuse.engine.data.turns import CALL_ROLES, RESULT_ROLES, Message, is_empty, make_message, parsed, read_tools

Text = str | list[Message]

TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
ROLES = ("system", "developer", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}  # the other names are the same


@dataclass(frozen=True)
class Skipped:
    row: str  # "pairs.json:17"
    reason: str


@dataclass(frozen=True)
class Record:
    """One row. Tokenization replaces `prompt` and `sides`: messages, then rendered text, then token ids."""

    row: str
    prompt: Any  # Text | list[int]
    sides: dict[str, Any]  # {"chosen": ..., "rejected": ...}, {"completion": ...} or {} (a prompt alone)
    label: bool | None = None
    rendered: bool = False  # text came from a chat template, which writes its own special tokens
    tools: list[Message] | None = None  # what the conversation may call; the chat template prints them
    template_kwargs: dict[str, Any] | None = None  # of this row, for the chat template
    learned: list[bool] | None = None  # which ids of the sides, one after the other, are learned; None: all
    conversation: bool = False  # one conversation: every answer in it is one to learn from, not the last alone


def read_records(source: str, kind: str, split: str) -> tuple[list[Record | Skipped], Form, list[str]]:
    """One record or `Skipped` per row, in order; the form they were read in; the columns it ignored."""
    table = read_table(source, split)
    if not table.columns:  # nothing in it is an object
        reasons = "\n".join(f"  {name}: {_row_problem(row)}" for name, row in table.rows[:5])
        raise DataError(f"{source}: none of its {len(table.rows)} rows is an object with columns:\n{reasons}")
    form = detect_form(table.columns, kind, source)
    ignored = [column for column in table.columns if column not in (*form.columns, *form.optional, *TEMPLATE_COLUMNS)]
    return [_parse(name, row, form) for name, row in table.rows], form, ignored


def _parse(name: str, row: Any, form: Form) -> Record | Skipped:
    if not isinstance(row, dict):
        return Skipped(name, _row_problem(row))
    try:
        for column in form.columns:
            if row.get(column) is None:
                raise BadRow(f'no value in "{column}"')
        return _with_template_columns(form.read(name, row), row)
    except BadRow as problem:
        return Skipped(name, str(problem))


def _with_template_columns(record: Record, row: dict[str, Any]) -> Record:
    """`tools` and `chat_template_kwargs` may stand beside the columns of any form, as in TRL."""
    tools, kwargs = read_tools(row.get("tools")), parsed(row.get("chat_template_kwargs"), '"chat_template_kwargs"')
    if kwargs is not None and not isinstance(kwargs, dict):
        raise BadRow(f'"chat_template_kwargs" is {describe(kwargs)}, expected an object')
    kwargs = kwargs and {key: value for key, value in kwargs.items() if value is not None}
    return replace(record, tools=tools, template_kwargs=kwargs or None) if tools or kwargs else record


def _row_problem(row: Any) -> str:
    return str(row) if isinstance(row, BadRow) else f"the row is {describe(row)}, expected an object"


# ---------------------------------------------------------------------------------------------------------
# Forms: how the columns of a row are read


@dataclass(frozen=True)
class Form:
    kind: str  # "pair", "labelled", "sft" or "prompt"
    columns: tuple[str, ...]
    read: Callable[[str, dict[str, Any]], Record]
    optional: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "/".join(self.columns)


def _read_pair(name: str, row: dict[str, Any]) -> Record:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    prompt = _text(row, "prompt")
    if isinstance(prompt, str) and not isinstance(chosen, str):
        # Many published sets repeat, as a string, the question that chosen and rejected both start with.
        record = _read_implicit(name, row)
        if not any(turn.get("content", "").strip() == prompt.strip() for turn in record.prompt):
            raise BadRow('"prompt" is a string, and it is none of the turns that chosen and rejected share')
        return record
    return _record(name, prompt, {"chosen": chosen, "rejected": rejected})


def _read_implicit(name: str, row: dict[str, Any]) -> Record:
    """The prompt is what chosen and rejected share at their start, as in TRL's `extract_prompt`."""
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    if type(chosen) is not type(rejected):
        raise BadRow('"chosen" and "rejected" must both be strings or both be messages')
    shorter = min(len(chosen), len(rejected))
    differing = (i for i in range(shorter) if chosen[i] != rejected[i])
    shared = next(differing, max(0, shorter - 1))  # where one is the start of the other, both keep its end
    if isinstance(chosen, str) and chosen[:shared].endswith(" "):
        shared -= 1  # the blank belongs to the completion's first word
    return _record(name, chosen[:shared], {"chosen": chosen[shared:], "rejected": rejected[shared:]})


def _read_sharegpt_pair(name: str, row: dict[str, Any]) -> Record:
    sides = {side: _text(row, side) for side in ("chosen", "rejected")}
    return _record(name, _text(row, "conversations"), sides)


def _read_completion(name: str, row: dict[str, Any]) -> Record:
    return _record(name, _text(row, "prompt"), {"completion": _text(row, "completion")}, _label(row))


def _read_conversation(column: str) -> Callable[[str, dict[str, Any]], Record]:
    """A whole conversation in one column: its last turn, the assistant's, is the completion."""

    def read(name: str, row: dict[str, Any]) -> Record:
        turns = _messages(row[column], column)
        if not turns or turns[-1]["role"] != "assistant":
            last = f'is from "{turns[-1]["role"]}"' if turns else "is missing"
            raise BadRow(f'the last turn of "{column}" {last}, expected "assistant"')
        return replace(_record(name, turns[:-1], {"completion": turns[-1:]}, _label(row)), conversation=True)

    return read


def _read_alpaca(name: str, row: dict[str, Any]) -> Record:
    """The instruction, then the input (if any) below an empty line, as one user turn."""
    parts = [_string(row, "instruction"), _string(row, "input") if row.get("input") is not None else ""]
    prompt = [{"role": "user", "content": "\n\n".join(part for part in parts if part)}]
    return _record(name, prompt, {"completion": [{"role": "assistant", "content": _string(row, "output")}]})


def _read_text(name: str, row: dict[str, Any]) -> Record:
    return _record(name, "", {"completion": _string(row, "text")})


def _read_prompt(name: str, row: dict[str, Any]) -> Record:
    return _record(name, _text(row, "prompt"), {})


FORMS = (  # of the forms that fit, the first one counts
    Form("pair", ("prompt", "chosen", "rejected"), _read_pair),
    Form("pair", ("conversations", "chosen", "rejected"), _read_sharegpt_pair),
    Form("pair", ("chosen", "rejected"), _read_implicit),
    Form("labelled", ("prompt", "completion", "label"), _read_completion),
    Form("labelled", ("messages", "label"), _read_conversation("messages")),
    Form("labelled", ("conversations", "label"), _read_conversation("conversations")),
    Form("sft", ("prompt", "completion"), _read_completion),
    Form("sft", ("messages",), _read_conversation("messages")),
    Form("sft", ("conversations",), _read_conversation("conversations")),
    Form("sft", ("instruction", "output"), _read_alpaca, optional=("input",)),
    Form("sft", ("text",), _read_text),
    Form("prompt", ("prompt",), _read_prompt),
)
READABLE_AS = {  # a pair holds two labelled completions; its chosen side is a demonstration
    "pair": ("pair",),
    "labelled": ("labelled", "pair"),
    "sft": ("pair", "labelled", "sft"),
    "prompt": ("pair", "labelled", "sft", "prompt"),
}


def detect_form(columns: list[str], kind: str, source: str) -> Form:
    fitting = [form for form in FORMS if set(form.columns) <= set(columns)]
    for form in fitting:
        if form.kind in READABLE_AS[kind]:
            return form
    readable = [form for form in FORMS if form.kind in READABLE_AS[kind]]
    accepted = ", ".join(str(form) for form in sorted(readable, key=lambda form: form.kind != kind))
    fix = "rename its columns to one of these"
    if fitting:
        fix += f', or use it as "{fitting[0].kind}" data, whose {fitting[0]} it has'
    raise DataError(
        f'{source}: a column is missing for "{kind}" data. Found: {", ".join(columns)}. '
        f"Accepted: {accepted}. Fix: {fix}."
    )


# ---------------------------------------------------------------------------------------------------------
# Values: each reader returns what it promises or raises BadRow


def _record(name: str, prompt: Text, sides: dict[str, Text], label: bool | None = None) -> Record:
    for side, text in sides.items():
        if type(text) is not type(prompt):
            raise BadRow(f'"prompt" and "{side}" must both be strings or both be messages')
        if not text or (isinstance(text, list) and any(is_empty(turn) for turn in text)):
            raise BadRow(f'"{side}" is empty')
        for turn in text if isinstance(text, list) else ():
            if turn["role"] != "assistant":
                raise BadRow(f'"{side}" has a turn from "{turn["role"]}", expected assistant turns only')
    if prompt == []:
        raise BadRow("the prompt has no turn")
    return Record(name, prompt, sides, label)


def _label(row: dict[str, Any]) -> bool | None:
    label = row.get("label")
    if label is not None and not isinstance(label, bool):
        raise BadRow(f'"label" is {label!r:.40}, {describe(label)}; expected true or false')
    return label


def _text(row: dict[str, Any], column: str) -> Text:
    """A string as it is, or messages; one message may stand without its list."""
    value = row[column]
    if isinstance(value, str):
        return _string(row, column)
    if isinstance(value, dict | list):
        return _messages(value if isinstance(value, list) else [value], column)
    raise BadRow(f'"{column}" is {describe(value)}, expected a string or a list of messages')


def _messages(turns: Any, column: str) -> list[Message]:
    if not isinstance(turns, list):
        raise BadRow(f'"{column}" is {describe(turns)}, expected a list of messages')
    return [_message(turn, column) for turn in turns]


def _message(turn: Any, column: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f'a turn of "{column}" is {describe(turn)}, expected {{role, content}} or {{from, value}}')
    sharegpt = turn.get("role") is None and turn.get("from") is not None
    role, content = (turn.get(key) for key in (("from", "value") if sharegpt else ("role", "content")))
    if sharegpt and isinstance(role, str):
        role = SHAREGPT_ROLES.get(role, role)
    if role not in (*ROLES, *CALL_ROLES, *RESULT_ROLES):
        known = ", ".join(ROLES) + "; human and gpt in {from, value} turns"
        raise BadRow(f'unknown role {role!r:.40} in "{column}"; known: {known}')
    message = make_message(role, content, turn, column)
    _check_unicode(message.get("content", ""), column)
    return message


def _string(row: dict[str, Any], column: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise BadRow(f'"{column}" is {describe(value)}, expected a string')
    _check_unicode(value, column)
    return value


def _check_unicode(text: str, column: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may say "\ud800"; no tokenizer takes it
        raise BadRow(f'"{column}" holds half a surrogate pair at character {error.start}, not a Unicode text') from None
