"""Conversations as apps keep them: messages of the AI SDK, and items of OpenAI's Responses API -> turns.

    {"role": "assistant", "parts": [{"type": "reasoning", "text"}, {"type": "text", "text"},
                                    {"type": "tool-add", "toolCallId", "state": "output-available", "input", "output"}]}
    -> an assistant's turn with reasoning and calls, then the tools' turns

    {"type": "reasoning", "summary": [{"text"}]}, {"type": "function_call", "call_id", "name", "arguments"},
    {"type": "function_call_output", "call_id", "output"}, {"type": "message", "role", "content"}
    -> turns too: reasoning belongs to what the assistant does next

What only a page shows (sources, data, the start of a step) is left out, as the AI SDK leaves it out of what its models
read. What a chat template cannot write (a web search, a call that never ended) refuses the row by name.
"""

from __future__ import annotations

import json
from typing import Any

from prefuse.engine.data.records import BadRow, Message
from prefuse.engine.data.turns import content_text

ROLE = "role"
ITEMS = ("message", "function_call", "function_call_output", "reasoning", "item_reference", "compaction")
SHOWN_ALONE = ("step-start", "source", "source-url", "source-document")  # parts of a page; and data-NAME
ENDED = {"output-available": "output", "result": "result", "output-error": "errorText"}  # state -> key of the result
CALLED = ("input-available", "call")
OF_ITEMS = ("type", "id", "status", "phase")  # keys of an item that are no part of its turn


def with_items(turns: list[Any]) -> list[Any]:
    """The turns that messages with parts and items are; others as they stand."""
    if any(isinstance(turn, dict) and _has_parts(turn) for turn in turns):
        turns = [part for turn in turns for part in (_of_parts(turn) if _has_parts(turn) else [turn])]
    return _of_items(turns) if any(is_item(turn) or _is_message(turn) for turn in turns) else turns


def is_item(turn: Any) -> bool:
    """Whether it is an item of the Responses API that is no message: those have a role."""
    kind = turn.get("type") if isinstance(turn, dict) and not turn.get(ROLE) else None
    return isinstance(kind, str) and (kind in ITEMS or kind.endswith(("_call", "_call_output")))


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("type") == "message"


# ---------------------------------------------------------------------------------------------------------
# The AI SDK


def _has_parts(turn: Any) -> bool:
    """Parts with types: those of Gemini have none."""
    if not isinstance(turn, dict) or not turn.get(ROLE):
        return False
    parts = turn.get("parts")
    typed = isinstance(parts, list) and any(isinstance(part, dict) and part.get("type") for part in parts)
    return typed or bool(turn.get("toolInvocations"))


def _of_parts(turn: Message) -> list[Message]:
    if turn.get("experimental_attachments"):
        raise BadRow('a turn has "experimental_attachments": prefuse reads text only. Fix: leave these rows out')
    if not turn.get("parts"):
        raise BadRow('a turn has "toolInvocations" and no "parts", which would say what it wrote before and after them')
    rest = {key: part for key, part in turn.items() if key not in ("parts", "content", "toolInvocations", *OF_ITEMS)}
    steps: list[Message] = []  # of the assistant: what it wrote up to the results of its calls
    for part in turn["parts"]:
        _add_part(part, steps, rest)
    said = "".join(step["content"] for step in steps)
    if isinstance(turn.get("content"), str) and turn["content"].strip() not in ("", said.strip()):
        raise BadRow('the "content" of a turn is not the text of its "parts"')
    if turn[ROLE] != "assistant" and any(step.get("tool_calls") or step.get("reasoning") for step in steps):
        raise BadRow(f'a turn from "{turn[ROLE]}" has parts that are an assistant\'s: a call of a tool, or reasoning')
    turns: list[Message] = []
    for step in steps or [rest | {"content": ""}]:
        results = step.pop("results", [])
        turns += [step, *results]
    return turns


def _add_part(part: Any, steps: list[Message], rest: Message) -> None:
    """The part within the last step, or in one of its own where the last one has called a tool."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise BadRow('a part of "parts" has no type, beside others that have one')
    if kind in SHOWN_ALONE or kind.startswith("data-"):
        return
    called = kind == "dynamic-tool" or kind.startswith("tool-")
    if not steps or (not called and steps[-1].get("tool_calls")):
        steps.append(rest | {"content": ""})
    if called:
        call, results = _ui_call(part, kind)
        steps[-1]["tool_calls"] = [*steps[-1].get("tool_calls", []), call]
        steps[-1]["results"] = [*steps[-1].get("results", []), *results]
    elif kind == "reasoning":
        if steps[-1]["content"]:
            raise BadRow("an assistant's turn has reasoning behind its text: chat templates write it first")
        text = part.get("text") or part.get("reasoning") or ""
        steps[-1]["reasoning"] = steps[-1].get("reasoning", "") + text
    else:
        steps[-1]["content"] += content_text([part], f'the part "{kind}" of a turn') or ""


def _ui_call(part: Message, kind: str) -> tuple[Message, list[Message]]:
    """A call, and the turn of its result where it has one."""
    called = part.get("toolInvocation") if kind == "tool-invocation" else part
    called = called if isinstance(called, dict) else {}
    name = called.get("toolName") or kind.removeprefix("tool-")
    state, number = called.get("state"), called.get("toolCallId")
    if state not in (*ENDED, *CALLED):
        raise BadRow(f'the call of the tool "{name}" is in the state {state!r:.40}: it never ended')
    arguments = called.get("input", called.get("args"))
    call = {"type": "function", "function": {"name": name, "arguments": {} if arguments is None else arguments}}
    call |= {"id": number} if number else {}
    if state in CALLED:
        return call, []
    result = called.get(ENDED[state])
    text = result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)
    return call, [{ROLE: "tool", "tool_call_id": number, "content": text}]


# ---------------------------------------------------------------------------------------------------------
# OpenAI's Responses API


def _of_items(items: list[Any]) -> list[Any]:
    turns: list[Any] = []
    thought = ""  # that no turn has yet
    for item in items:
        kind = item.get("type") if is_item(item) else None
        last = turns[-1] if turns and isinstance(turns[-1], dict) and turns[-1].get(ROLE) == "assistant" else None
        if kind == "reasoning":
            thought = "\n\n".join(filter(None, (thought, _thought_of(item))))
            continue
        if kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
            call = {"type": "function", "id": item.get("call_id"), "function": function}
            if last is None or thought:
                turns.append({ROLE: "assistant", "content": ""} | _reasoning(thought))
            turns[-1] = turns[-1] | {"tool_calls": [*(turns[-1].get("tool_calls") or []), call]}
        elif kind == "function_call_output":
            _refuse_thought(thought)
            text = content_text(item.get("output"), 'the output of a "function_call_output"') or ""
            turns.append({ROLE: "tool", "tool_call_id": item.get("call_id"), "content": text})
        elif kind is not None:
            raise BadRow(f'an item has the type "{kind}", which no chat template writes. Fix: leave these rows out')
        elif not isinstance(item, dict) or item.get(ROLE) != "assistant":
            _refuse_thought(thought)
            turns.append(_bare(item))
        elif last and last.get("tool_calls"):
            raise BadRow(
                'a "message" of the assistant stands behind its "function_call": chat templates write calls last'
            )
        else:
            turns.append(_bare(item) | _reasoning(thought))
        thought = ""
    _refuse_thought(thought)
    return turns


def _bare(item: Any) -> Any:
    return {key: part for key, part in item.items() if key not in OF_ITEMS} if isinstance(item, dict) else item


def _reasoning(thought: str) -> Message:
    return {"reasoning_content": thought} if thought else {}


def _refuse_thought(thought: str) -> None:
    if thought:
        raise BadRow('an item "reasoning" stands before none of the assistant\'s')


def _thought_of(item: Message) -> str:
    """What it says, or its summary; "" where it is encrypted alone."""
    parts = item.get("content") or item.get("summary") or []
    texts = (
        [part.get("text") if isinstance(part, dict) else None for part in parts] if isinstance(parts, list) else [None]
    )
    if not all(isinstance(text, str) for text in texts):
        raise BadRow('an item "reasoning" has no text that can be read')
    return "\n\n".join(texts)  # type: ignore[arg-type]
