"""What a chat template does to conversations of one shape, seen on texts that stand nowhere else.

"4" is found in many a text, also where the turn that says it was dropped. So a conversation with short texts or tool
calls is rendered once more with a mark in each turn; the marks that are missing are the turns that the template drops.
Conversations of one shape (roles, calls, reasoning, tools, arguments) share one look.
"""

import json
from typing import Any

from prefuse.engine.data.fidelity import THOUGHT
from prefuse.engine.data.records import BadRow
from prefuse.engine.data.rendering import ChatTemplate
from prefuse.engine.data.turns import Message

LONG = 12  # characters of a text that stands in another by chance no more
MOST_SHAPES = 4096  # that are remembered


class Marks:
    """The turns that one template drops, by the shape of the conversation."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._found: dict[str, list[str | None]] = {}

    def lost(
        self, messages: list[Message], start: int, tools: list[Message] | None, arguments: dict[str, Any] | None,
        *, generation_prompt: bool = False,
    ) -> str | None:  # fmt: skip
        """What the template drops of the turns from `start` on, or None."""
        if not any(map(_is_short, messages[start:])):
            return None
        key = _shape(messages, tools, arguments, generation_prompt)
        if key not in self._found:
            self._remember(key, self._look(messages, tools, arguments, generation_prompt))
        return next((what for what in self._found[key][start:] if what is not None), None)

    def unseen_tools(
        self, prompt: list[Message], text: str, tools: list[Message], arguments: dict[str, Any] | None
    ) -> list[str]:
        """The names of those tools that do not stand in `text`, the prompt's."""
        key = _shape(prompt, tools, arguments, "tools")
        if key not in self._found:
            try:
                bare = self.template.text(prompt, generation_prompt=True, arguments=arguments)
            except BadRow:  # it asks for tools
                bare = ""
            self._remember(key, ["dropped"] if bare == text else [])
        names = [str(tool.get("function", tool).get("name", "")) for tool in tools]
        return names if self._found[key] else [name for name in names if name not in text]

    def _remember(self, key: str, found: list[str | None]) -> None:
        if len(self._found) == MOST_SHAPES:
            self._found.clear()
        self._found[key] = found

    def _look(
        self, messages: list[Message], tools: list[Message] | None, arguments: Any, generation_prompt: bool
    ) -> list[str | None]:
        """What is lost of each turn."""
        marked = [_marked(turn, i) for i, turn in enumerate(messages)]
        try:
            text = self.template.text(marked, generation_prompt=generation_prompt, tools=tools, arguments=arguments)
        except BadRow:  # it asks for texts of some kind
            return [None] * len(messages)
        return [_missing(turn, i, text) for i, turn in enumerate(messages)]


def _shape(messages: list[Message], *more: Any) -> str:
    """What a template may look at, but for the texts."""
    turns = [
        [turn["role"], *_parts(turn), [_has_arguments(c) for c in turn.get("tool_calls") or ()]] for turn in messages
    ]
    tools, *rest = more
    return json.dumps([turns, bool(tools), *rest], sort_keys=True, default=str)


def _parts(turn: Message) -> tuple[bool, ...]:
    content = turn.get("content") or ""
    return bool(content.strip()), THOUGHT in content, bool(turn.get("reasoning_content"))


def _is_short(turn: Message) -> bool:
    return 0 < len((turn.get("content") or "").rpartition(THOUGHT)[2].strip()) < LONG or bool(turn.get("tool_calls"))


def _marked(turn: Message, i: int) -> Message:
    content = turn.get("content") or ""
    marked = dict(turn)
    if content.strip():
        before, end, _ = content.rpartition(THOUGHT)
        marked["content"] = before + end + f"text{i}mark"
    if turn.get("tool_calls"):
        marked["tool_calls"] = [_marked_call(call, i) for call in turn["tool_calls"]]
    return marked


def _marked_call(call: Message, i: int) -> Message:
    """With a mark among its arguments, or for its name where it has none."""
    function = call["function"]
    if not _has_arguments(call):
        return call | {"function": function | {"name": f"call{i}mark"}}
    said = function["arguments"]
    try:
        said = json.loads(said) if isinstance(said, str) else said
    except (ValueError, RecursionError):
        return call
    if not isinstance(said, dict):
        return call
    marked = said | {f"key{i}mark": f"call{i}mark"}
    arguments = json.dumps(marked) if isinstance(function["arguments"], str) else marked
    return call | {"function": function | {"arguments": arguments}}


def _has_arguments(call: Message) -> bool:
    return call["function"].get("arguments") not in (None, {}, "", "{}")


def _missing(turn: Message, i: int, text: str) -> str | None:
    if (turn.get("content") or "").strip() and f"text{i}mark" not in text:
        return f'the text of a "{turn["role"]}" turn'
    for call in turn.get("tool_calls") or ():
        if _marked_call(call, i) is not call and f"call{i}mark" not in text:
            return f'the tool call "{call["function"]["name"]}"'
    return None
