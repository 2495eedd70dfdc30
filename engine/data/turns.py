"""One turn of a conversation -> a message that chat templates read: role, content, tool calls, other keys.

    {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}
    -> {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]}

Nulls are dropped: Arrow writes one for every key that another row has. Nulls inside JSON text stay.
"""

import json
import re
from typing import Any

from prefuse.engine.data.records import BadRow, Message, json_kind, without_nulls

MEDIA = ("image", "image_url", "input_image", "audio", "input_audio", "audio_url", "video", "video_url", "file")
PARTS_IN_TEXT = re.compile(r"\s*\[\s*\{\s*\"type\"\s*:\s*\"(?:text|input_text|output_text|image|image_url)\"")
TEXT_PARTS = ("text", "input_text", "output_text")


CALL_ROLES = ("function_call", "tool_call", "tool_calls")  # their content is the call, as JSON text
RESULT_ROLES = ("observation", "function", "function_response", "tool_response", "ipython")  # other names of "tool"
NAMES = ("role", "content", "from", "value", "tool_calls", "function_call")  # read here; other keys are the template's
# Of OpenAI and Mistral, of axolotl (train, training), of LLaMA-Factory, of ms-swift and XTuner, and what people write
# for them: 0 or false says no.
LEARNED = ("weight", "train", "loss_weight", "loss", "training", "train_on_turn", "trainable", "loss_mask")
PARTLY_LEARNED = ("train_detail", "mask", "masked")  # of parts of a turn, or of 1 and 0 that may mean either
ARGUMENTS = (
    "args",
    "parameters",
    "input",
    "kwargs",
)  # other names of a call's arguments: LangChain's, Llama's, Claude's
REASONING = ("reasoning_content", "reasoning", "thinking")  # names of one thing, as transformers has it


def make_message(role: str, content: Any, turn: Message, column: str) -> Message:
    """The message of a turn whose role and content were found under one of their names."""
    where = f'a "{role}" turn in "{column}"'
    rest = {key: value for key, value in turn.items() if value is not None and key not in NAMES}
    rest |= {name: _learned(rest[name], name, where) for name in LEARNED if name in rest}
    for name in PARTLY_LEARNED:
        if role == "assistant" and name in rest:
            raise BadRow(f'"{name}" of {where} says that parts of it are not learned. Fix: "train" of whole turns')
    content, thought = _without_thought(content)
    rest |= _reasoning_of(rest | ({"thinking": thought} if thought else {}), where)
    if role in CALL_ROLES:
        calls = parsed(content_text(content, f"the content of {where}"), f"the content of {where}")
        calls = [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
        return {"role": "assistant", **rest, "content": "", "tool_calls": calls}
    text = content_text(content, f"the content of {where}")
    message = {"role": "tool" if role in RESULT_ROLES else role, **rest}
    if text is not None:
        message["content"] = text
    calls = tool_calls_of(turn, where)
    return message | ({"tool_calls": calls} if calls else {})


def _learned(value: Any, name: str, where: str) -> Any:
    """1 or true of a turn that is learned, 0 or false of another: any other weight would be lost without a word."""
    words = {"0": 0, "1": 1, "false": False, "true": True}
    said = words.get(value.strip().lower()) if isinstance(value, str) else value
    if said not in (0, 1):
        raise BadRow(f'"{name}" of {where} is {value!r:.40}; expected 1 or true (it is learned), or 0 or false (not)')
    return said


def _without_thought(content: Any) -> tuple[Any, str]:
    """A content without its parts of reasoning, {type: thinking, thinking: ...}, and what they say."""
    if not isinstance(content, list):
        return content, ""
    parts = [
        part
        for part in content
        if isinstance(part, dict) and (part.get("type") in REASONING or part.get("thought") is True)  # Gemini's
    ]
    said = [part.get("thinking") or part.get("reasoning") or part.get("text") for part in parts]
    if not parts or not all(isinstance(text, str) for text in said):
        return content, ""  # where it is refused by name
    return [part for part in content if part not in parts], "".join(said)


def _reasoning_of(turn: Message, where: str) -> Message:
    """The reasoning of a turn under the name that is looked for, whatever the row calls it."""
    name = next((name for name in REASONING if turn.get(name)), None)
    if name is None:
        return {}
    if not isinstance(turn[name], str):
        raise BadRow(f'"{name}" of {where} is {json_kind(turn[name])}, expected a string')
    return {"reasoning_content": turn[name]}


def is_empty(message: Message) -> bool:
    """Whether a turn says nothing: no text, no call, no reasoning."""
    return not (message.get("content") or message.get("tool_calls") or message.get("reasoning_content"))


def content_text(content: Any, where: str) -> str | None:
    """A content as one string: text parts are joined, images, audio and video are refused by name; None stays None."""
    if content is None or isinstance(content, str):
        if content is not None and PARTS_IN_TEXT.match(content):
            raise BadRow(f"{where} is a text, the JSON of a list of parts. Fix: write it as a list")
        return content
    parts = content if isinstance(content, list) else [content]
    if not all(isinstance(part, dict) for part in parts):
        raise BadRow(f"{where} is {json_kind(content)}, expected a string or a list of text parts")
    return "".join(_part_text(part, where) for part in parts)


def _part_text(part: Message, where: str) -> str:
    kind = part.get("type")
    for name in (kind, *(key for key, value in part.items() if value is not None)):
        if name in MEDIA:
            raise BadRow(f'{where} holds a part of type "{name}": prefuse reads text only. Fix: leave these rows out')
    text = part.get("text")
    if kind not in (None, *TEXT_PARTS) or not isinstance(text, str):
        raise BadRow(f"a part of {where} has type {kind!r:.40} and text {text!r:.40}, expected a text part")
    return text


def tool_calls_of(turn: Message, where: str) -> list[Message] | None:
    """The calls of a turn in one form, `{type, function: {name, arguments}}`; None where there are none."""
    calls = turn.get("tool_calls")
    if calls is None and turn.get("function_call") is not None:  # OpenAI's name until 2023
        calls = [turn["function_call"]]
    calls = parsed(calls, f"tool_calls of {where}")
    if isinstance(calls, dict):
        calls = [calls]
    if calls is not None and not isinstance(calls, list):
        raise BadRow(f"tool_calls of {where} is {json_kind(calls)}, expected a list")
    return [_call(call, where) for call in calls] if calls else None


def _call(call: Any, where: str) -> Message:
    call = parsed(call, f"a tool call of {where}")
    if not isinstance(call, dict):
        raise BadRow(f"a tool call of {where} is {json_kind(call)}, expected an object")
    function = call.get("function") or call
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRow(f"a tool call of {where} has no name: expected {{function: {{name, arguments}}}}")
    rest = {key: value for key, value in call.items() if key not in ("function", "name", "arguments")}
    function = without_nulls(function)
    other = next((name for name in ARGUMENTS if name in function), None)
    if "arguments" not in function and other:
        function["arguments"] = function.pop(other)
    rest = {key: value for key, value in rest.items() if key not in ARGUMENTS}
    return without_nulls({"type": "function", **rest}) | {
        "function": function | {"arguments": function.get("arguments", {})}
    }


def read_tools(value: Any) -> list[Message] | None:
    """The `tools` of a row, a list or its JSON text, as the chat template takes them; None where there are none."""
    tools = parsed(value, '"tools"')
    if isinstance(tools, dict):
        tools = [tools]
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict | str) for tool in tools)):
        raise BadRow(f'"tools" is {json_kind(tools)}, expected a list of objects')
    return [without_nulls(parsed(tool, 'a tool of "tools"')) for tool in tools] if tools else None


def parsed(value: Any, where: str) -> Any:
    """What a JSON text says; anything but a string is itself."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(f"{where} is a string that is not JSON: {error}") from None
