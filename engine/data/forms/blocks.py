"""Claude's content blocks, and the older names of tools, as OpenAI has them now.

{"role": "assistant", "content": [{"type": "text", ...}, {"type": "tool_use", "id", "name", "input"}]}
-> an assistant's turn with tool_calls
{"role": "user", "content": [{"type": "tool_result", "tool_use_id", "content"}, {"type": "text", ...}]}
-> a tool's turn, then the user's

The AI SDK's `tool-call` and `tool-result` in a content are such blocks too.
"""

from __future__ import annotations

import json
from typing import Any

from prefuse.engine.data.records import BadRow, Message
from prefuse.engine.data.turns import content_text

USE, RESULT = "tool_use", "tool_result"
SDK = ("tool-call", "tool-result")


def without_blocks(turn: Any) -> list[Any]:
    """The turns that a turn's blocks are; the turn itself, where none of them is a call or its result."""
    content = turn.get("content") if isinstance(turn, dict) else None
    if isinstance(content, list) and any(isinstance(part, dict) and part.get("type") in SDK for part in content):
        content = [_block(part) for part in content]
        turn = turn | {"content": content}
    kinds = {part.get("type") for part in content if isinstance(part, dict)} if isinstance(content, list) else set()
    role = str(turn.get("role")).lower() if kinds & {USE, RESULT} else ""
    if USE in kinds and role == "assistant" and RESULT not in kinds:
        return [_with_calls(turn, content)]
    if RESULT in kinds and role in ("user", "tool") and USE not in kinds:
        return _results(turn, content)
    return [turn]  # others are refused by the name of their part


def _block(part: Any) -> Any:
    """The AI SDK's {type: tool-call, toolCallId, toolName, input} and {type: tool-result, toolCallId, output}."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "tool-call":
        arguments = part.get("input", part.get("args"))
        return {"type": USE, "id": part.get("toolCallId"), "name": part.get("toolName"), "input": arguments}
    if kind != "tool-result":
        return part
    output = part.get("output", part.get("result"))
    if isinstance(output, dict) and output.keys() == {"type", "value"} and output["type"] != "content":
        output = output["value"]
    text = output if isinstance(output, str) else json.dumps(output, ensure_ascii=False)
    return {"type": RESULT, "tool_use_id": part.get("toolCallId"), "content": text}


def _with_calls(turn: Message, content: list[Any]) -> Message:
    said = [part for part in content if not (isinstance(part, dict) and part.get("type") == USE)]
    calls = [part for part in content if part not in said]
    if content[: len(said)] != said:
        raise BadRow('an assistant\'s turn has text behind its "tool_use": chat templates write calls last')
    calls = [
        ({"id": call["id"]} if call.get("id") else {})
        | {"type": "function", "function": {"name": call.get("name"), "arguments": call.get("input") or {}}}
        for call in calls
    ]
    return turn | {"content": said or "", "tool_calls": calls}


def _results(turn: Message, content: list[Any]) -> list[Message]:
    turns: list[Message] = []
    for part in content:
        if isinstance(part, dict) and part.get("type") == RESULT:
            text = content_text(part.get("content") or "", 'the content of a "tool_result"')
            turns.append(turn | {"role": "tool", "content": text, "tool_call_id": part.get("tool_use_id")})
        elif turns and turns[-1].get("role") != "tool":
            turns[-1]["content"].append(part)
        else:
            turns.append(turn | {"content": [part]})
    return turns


def named_tools(tools: list[Any] | None, legacy: bool) -> list[Any] | None:
    """Claude's {name, input_schema} and, of a column `functions`, OpenAI's {name, parameters} as {type, function}."""
    if tools is None:
        return None
    return [_tool(tool, legacy) if isinstance(tool, dict) else tool for tool in tools]


def _tool(tool: Message, legacy: bool) -> Message:
    if "input_schema" in tool and "name" in tool:
        known = {name: tool[name] for name in ("name", "description") if name in tool}
        return {"type": "function", "function": known | {"parameters": tool["input_schema"]}}
    return {"type": "function", "function": tool} if legacy and "function" not in tool else tool
