"""Turns in every spelling -> `{"role": ..., "content": ..., ...}`.

OpenAI's {role, content} and its Responses' items, ShareGPT's {from, value}, Gemini's and the AI SDK's {role, parts},
Bedrock's content of [{text}], and rows of {human, assistant}. Roles are read in any case. Other keys of a turn stay:
the chat template may read them, and `weight` and `train` say what is learned.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from prefuse.engine.data.forms.blocks import without_blocks
from prefuse.engine.data.forms.items import is_item, with_items
from prefuse.engine.data.forms.look import holds_text
from prefuse.engine.data.forms.marks import BAD_WORDS, PLAIN, label_key
from prefuse.engine.data.forms.names import (
    BAD_FLAGS,
    BAD_REVIEWS,
    BROKEN_OFF,
    FLAGS,
    LABELS,
    REVIEWS,
    is_metadata,
    is_status,
    plain_name,
)
from prefuse.engine.data.records import BadRow, Message, Text, check_unicode, json_kind
from prefuse.engine.data.sources.tables import json_or_python
from prefuse.engine.data.turns import CALL_ROLES, LEARNED, NAMES, REASONING, RESULT_ROLES, make_message, parsed

ROLES = ("system", "developer", "user", "assistant", "tool")
SPELLINGS = {role: role for role in ROLES}
SPELLINGS |= dict.fromkeys(("human", "prompter", "instruction"), "user")
SPELLINGS |= dict.fromkeys(("gpt", "model", "bot", "chatbot", "chatgpt", "ai"), "assistant")
SPELLINGS |= {role: role for role in CALL_ROLES} | dict.fromkeys(RESULT_ROLES, "tool")
ROLE_KEYS = ("role", "from", "speaker")
TEXT_KEYS = ("content", "value", "parts", "text", "utterance")
ANSWER_KEYS = (
    "response",
    "answer",
    "text",
    "content",
    "completion",
    "output",
    "message",
    "reply",
    "generation",
    "candidate",
    "generated_text",
)  # of an object with no role
EXCHANGES = dict.fromkeys(("input", "question", "query", "prompt"), "user")  # keys of {question, answer}, as _exchange
EXCHANGES |= dict.fromkeys(("output", "answer", "response", "completion"), "assistant")
TURN_IN_TEXT = re.compile(r"\s*\{\s*['\"](?:role|from|content|messages|conversations)['\"]\s*:")
BROKEN_TURNS = re.compile(r"\s*(?:array\()?\[\s*\{\s*['\"](?:role|content|from|value)['\"]\s*:")
GOOD_MARKS, BAD_MARKS = {*FLAGS, *LABELS, *REVIEWS}, {*BAD_FLAGS, *BROKEN_OFF, *BAD_REVIEWS}
KNOWN_KEYS = {*ROLE_KEYS, *TEXT_KEYS, *NAMES, *LEARNED, *REASONING, "name", "tool_call_id"}


def read_text(value: Any, column: str) -> Text:
    """A string as it is, or turns; one turn may stand without its list."""
    if isinstance(value, str):
        check_unicode(value, column)
        if BROKEN_TURNS.match(value) and turns_in_text(value) is None:
            raise BadRow(f'"{column}" is a text that begins like a list of turns, and is none that can be read')
        return value
    if isinstance(value, dict) and (alone := _text_alone(value, column)) is not None:
        return read_text(alone, column)
    if isinstance(value, dict | list):
        return read_turns(value, column)
    raise BadRow(f'"{column}" is {json_kind(value)}, expected a string or a list of messages')


def _text_alone(value: Message, column: str) -> Any:
    """The text of an object that names no role, {"text": ..., "model": ...}; None of a turn, and of an exchange."""
    keys = [key for key in ANSWER_KEYS if isinstance(value.get(key), str)]
    if not keys or any(value.get(key) for key in ROLE_KEYS) or _exchange(value) is not None:
        return None
    others = [key for key, part in value.items() if key != keys[0] and not is_metadata(key) and holds_text(part)]
    if others:
        raise BadRow(
            f'"{column}" is an object with text under {keys[0]}, {", ".join(others)}. Fix: name the one that counts '
            f"by its path, {column}.{keys[0]}, in --columns"
        )
    return value[keys[0]]


def read_turns(value: Any, column: str) -> list[Message]:
    if isinstance(value, dict):
        nested = next((value[key] for key in ("messages", "conversations", "contents") if value.get(key)), None)
        value = [value] if nested is None else nested
    if not isinstance(value, list):
        raise BadRow(f'"{column}" is {json_kind(value)}, expected a list of messages')
    turns: list[Message] = []
    for turn in with_items(value):
        exchange = _exchange(turn)
        turns += exchange if exchange is not None else [_turn(part, column) for part in without_blocks(turn)]
    return turns


def read_history(value: Any, column: str) -> list[Message]:
    """[[question, answer], ...], or turns; also as JSON text."""
    value = parsed(value, f'"{column}"')
    if not isinstance(value, list) or not all(isinstance(pair, list) for pair in value):
        return read_turns(value, column)
    turns = []
    for pair in value:
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise BadRow(f'"{column}" holds something else than [question, answer]')
        turns += [turn_of("user", pair[0], column), turn_of("assistant", pair[1], column)]
    return turns


def turn_of(role: str, text: str, column: str) -> Message:
    check_unicode(text, column)
    return {"role": role, "content": text}


def turns_in_text(value: Any) -> list[Any] | None:
    """The turns whose JSON a string is; None if it is another text. Nothing else begins with the brackets of a list of
    objects and names a role in each; nor is {"role": ..., "content": ...} or {"messages": [...]} anything else."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return None
    turns = json_or_python(value)
    if isinstance(turns, dict):
        if not TURN_IN_TEXT.match(value):
            return None
        turns = next((turns[key] for key in ("messages", "conversations") if key in turns), [turns])
    if not isinstance(turns, list):
        return None
    is_turns = turns and all(
        isinstance(turn, dict) and (any(key in turn for key in ROLE_KEYS) or is_item(turn)) for turn in turns
    )
    return turns if is_turns else None


def other_keys(values: Iterable[Any]) -> Counter[str]:
    """How many turns in columns of turns also hold text under another key, which nothing but a template may read."""
    found: Counter[str] = Counter()
    for value in values:
        turns = [turn for turn in value if isinstance(turn, dict)] if isinstance(value, list) else []
        for turn in turns:
            if any(key in turn for key in ROLE_KEYS):
                found.update(key for key, part in turn.items() if key not in KNOWN_KEYS and holds_text(part))
    return Counter({key: count for key, count in found.items() if not is_metadata(key)})


def marked_turns(values: Iterable[Any]) -> int:
    """How many of the assistant's turns in columns of turns are marked as bad."""
    turns = [turn for value in values if isinstance(value, list) for turn in value if isinstance(turn, dict)]
    return sum(is_marked_bad(turn) for turn in turns if turn.keys() & set(ROLE_KEYS))


def is_marked_bad(turn: Message) -> bool:
    """Whether a flag or a word of the turn itself says that it is bad: such an answer is not learned."""
    names = {plain_name(key): part for key, part in turn.items() if key not in TEXT_KEYS}
    flags = {name: part for name, part in names.items() if isinstance(part, bool)}
    words = [part for name, part in names.items() if isinstance(part, str) and (name in LABELS or is_status(name))]
    inside = [said for name, said in names.items() if isinstance(said, dict) and name in LABELS]
    words += [part for said in inside for part in said.values()]
    if any(name in BAD_MARKS if said else name in GOOD_MARKS for name, said in flags.items()):
        return True
    return any(label_key(word) in BAD_WORDS - PLAIN or label_key(word) == -1 for word in words)


def _exchange(turn: Any) -> list[Message] | None:
    """{"human": ..., "assistant": ...}, {"input": ..., "output": ...}: a question and its answer in one object."""
    if not isinstance(turn, dict) or not 1 <= len(turn) <= 3 or any(turn.get(key) for key in ROLE_KEYS):
        return None
    spelled = SPELLINGS | (EXCHANGES if len(turn) > 1 else {})
    roles = {key: spelled.get(key.lower()) for key in turn if key != "system"}
    if EXCHANGES.keys() & turn.keys() and sorted(filter(None, roles.values())) != ["assistant", "user"]:
        return None
    if not roles or set(roles.values()) - {"user", "assistant"} or not all(isinstance(turn[key], str) for key in turn):
        return None
    ordered = sorted(roles, key=lambda key: roles[key] == "assistant")
    system = [turn_of("system", turn["system"], "system")] if turn.get("system") else []
    return system + [turn_of(roles[key] or "", turn[key], key) for key in ordered]


def _turn(turn: Any, column: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f'a turn of "{column}" is {json_kind(turn)}, expected {{role, content}} or {{from, value}}')
    role_key = next((key for key in ROLE_KEYS if turn.get(key) is not None), "role")
    text_key = next((key for key in TEXT_KEYS if turn.get(key) is not None), "content")
    name = turn.get(role_key)
    spelled = name.strip().lower().replace(" ", "_") if isinstance(name, str) else ""
    role = SPELLINGS.get(spelled)
    if role is None:
        known = ", ".join(ROLES) + "; human, gpt, prompter, model, bot, function_call, observation and the like"
        raise BadRow(f'unknown role {name!r:.40} in "{column}"; known: {known}')
    rest = {key: part for key, part in turn.items() if key not in (role_key, text_key)}
    if role == "assistant" and rest and is_marked_bad(rest) and not rest.keys() & set(LEARNED):
        rest["train"] = False
    content = turn.get(text_key)
    message = make_message(role, content, rest, column)
    if "content" in message:
        check_unicode(message["content"], column)
    elif role != "assistant" and text_key not in turn:  # a null is an empty turn, if the chat template takes it so
        raise BadRow(f'the content of a "{role}" turn in "{column}" is {json_kind(content)}, expected a string')
    return message
