"""Fixes for a row that a chat template changes: they are tried, and the error that refuses the row names one."""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from prefuse.engine.data.records import BadRow
from prefuse.engine.data.rendering import ChatTemplate
from prefuse.engine.data.turns import Message

# Arguments by which templates turn reasoning on and off; a template's own ones of other names come on top.
SWITCHES: list[dict[str, Any]] = [
    {"enable_thinking": False}, {"enable_thinking": True}, {"thinking": False}, {"thinking": True},
    {"enable_thinking": False, "thinking": False}, {"enable_thinking": True, "thinking": True},
    {"preserve_thinking": True}, {"clear_thinking": False},
]  # fmt: skip
SWITCH = re.compile("think|reason", re.IGNORECASE)  # in the name of an argument that is true or false
NO_SWITCH = re.compile("effort|budget|content|token|history", re.IGNORECASE)
NONE_HELPS = "No argument of the template helps. Fix: give another --chat_template"


def cure_for_prefix(
    template: ChatTemplate, prompt: list[Message], turns: list[Message], arguments: dict[str, Any]
) -> str:
    """What makes the prompt a true prefix of the conversation."""

    def holds(more: dict[str, Any]) -> bool:
        own = arguments | {"arguments": {**(arguments["arguments"] or {}), **more}}
        text = template.text(prompt, generation_prompt=True, **own)
        return template.text([*prompt, *turns], **own).startswith(text)

    return _said(more for more in _switches(template, arguments["tools"]) if _try(holds, more))


def cure_for_lost_text(
    template: ChatTemplate,
    messages: list[Message],
    tools: list[Message] | None,
    carries: Callable[[list[Message], str, dict[str, Any]], bool],
) -> str:
    """What keeps the text in the conversation: another place for the reasoning, another role, or an argument."""

    def holds(more: dict[str, Any], turns: list[Message]) -> bool:
        return carries(turns, template.text(turns, tools=tools, arguments=more), more)

    if any("<think>" in (turn.get("content") or "") for turn in messages):
        apart = [_with_reasoning_apart(turn) for turn in messages]
        if _try(holds, {}, apart):
            return 'Fix: put the reasoning into "reasoning_content"'
    if any(turn.get("reasoning_content") for turn in messages):
        inside = [_with_reasoning_inside(turn) for turn in messages]
        if _try(holds, {}, inside):
            return "Fix: put the reasoning into the content, between <think> and </think>"
    if any(turn["role"] == "developer" for turn in messages):
        renamed = [turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in messages]
        if _try(holds, {}, renamed):
            return 'Fix: name the role "developer" "system"'
    return _said(more for more in _switches(template, tools) if _try(holds, more, messages))


def _switches(template: ChatTemplate, tools: list[Message] | None) -> list[dict[str, Any]]:
    known = {name for switch in SWITCHES for name in switch}
    own = [name for name in template.reads(tools) if SWITCH.search(name) and not NO_SWITCH.search(name)]
    return SWITCHES + [{name: value} for name in own if name not in known for value in (False, True)]


def folded(messages: list[Message]) -> list[Message] | None:
    """The system turn's text within the last user turn; None without a system turn or a user turn."""
    users = [i for i, turn in enumerate(messages) if turn["role"] == "user"]
    if not users or messages[0]["role"] != "system":
        return None
    system, last = messages[0].get("content", ""), messages[users[-1]]
    turns = [*messages]
    turns[users[-1]] = last | {"content": system + "\n\n" + last.get("content", "")}
    return turns[1:]


def _with_reasoning_apart(turn: Message) -> Message:
    opening, _, rest = (turn.get("content") or "").partition("<think>")
    reasoning, end, answer = rest.partition("</think>")
    if turn["role"] != "assistant" or opening.strip() or not end:
        return turn
    return turn | {"reasoning_content": reasoning.strip("\n"), "content": answer.lstrip("\n")}


def _with_reasoning_inside(turn: Message) -> Message:
    reasoning = turn.get("reasoning_content")
    if not reasoning:
        return turn
    rest = {key: value for key, value in turn.items() if key != "reasoning_content"}
    return rest | {"content": f"<think>\n{reasoning}\n</think>\n\n{turn.get('content') or ''}"}


def _try(holds: Callable[..., bool], *arguments: Any) -> bool:
    try:
        return holds(*arguments)
    except BadRow:
        return False


def _said(found: Iterator[dict[str, Any]]) -> str:
    more = next(found, None)
    return NONE_HELPS if more is None else f"Fix: --chat_template_kwargs '{json.dumps(more)}'"
