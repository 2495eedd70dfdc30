"""What a chat template did to a row: text it dropped or doubled is found here, and named.

Templates may trim white space, and may leave the reasoning of earlier answers out; all else must stand in the text.
"""

import json
from collections.abc import Iterator
from typing import Any

from prefuse.engine.data.turns import REASONING, Message

THINK = "<think>"
THOUGHT = "</think>"


def lost_in_prompt(messages: list[Message], text: str) -> str | None:
    """The role of a turn of the prompt that does not stand in its text, or None."""
    for turn in messages:
        content = turn.get("content") or ""
        if turn["role"] == "assistant":  # the reasoning of earlier answers is left out by design
            content = content.rpartition(THOUGHT)[2]
        if not contains(text, content) and not (turn["role"] == "tool" and _stands_as_json(content, text)):
            return f'the text of a "{turn["role"]}" turn'
        if (name := untraced_call(turn, text)) is not None:
            return f'the tool call "{name}"'
    return None


def lost_in_answer(turn: Message, prompt: str, completion: str) -> str | None:
    """What of an answer does not stand in its text, or None. Its opening may stand at the end of the prompt."""
    content, reasoning = turn.get("content") or "", turn.get("reasoning_content") or ""
    if not (contains(completion, content) or _continues(prompt, completion, content)):
        return f"its reasoning ({THINK}...{THOUGHT})" if _only_reasoning_lost(completion, content) else "its text"
    if not contains(completion, reasoning):
        return f'its "{next(name for name in reversed(REASONING) if turn.get(name))}"'
    name = untraced_call(turn, completion)
    return None if name is None else f'the tool call "{name}"'


def doubles_reasoning(turn: Message, prompt: str, completion: str) -> bool:
    """Whether <think> stands more often in the answer's text than in the answer."""
    content = turn.get("content") or ""
    if THINK not in content:
        return False
    opened = prompt.rstrip().endswith(THINK)
    return completion.count(THINK) + opened > content.count(THINK)


def _only_reasoning_lost(completion: str, content: str) -> bool:
    return THOUGHT in content and contains(completion, content.rpartition(THOUGHT)[2])


def untraced_call(turn: Message, text: str) -> str | None:
    """The name of a tool call whose name or arguments do not stand in the text, or None."""
    for call in turn.get("tool_calls") or ():
        name = call["function"]["name"]
        if name not in text or not _stands_as_json(call["function"].get("arguments"), text):
            return name
    return None


def _stands_as_json(value: Any, text: str) -> bool:
    """Whether arguments or a result are in the text, whose JSON may be spaced or escaped otherwise than the row's."""
    if isinstance(value, str) and not _stands(value, text):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return False
    return all(_stands(leaf, text) for leaf in _leaves(value))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif value is not None:
        yield value


def _stands(leaf: Any, text: str) -> bool:
    spellings = {str(leaf), json.dumps(leaf), json.dumps(leaf, ensure_ascii=False)}
    if isinstance(leaf, str):
        spellings |= {json.dumps(leaf)[1:-1], json.dumps(leaf, ensure_ascii=False)[1:-1], leaf.strip()}
    return any(spelling in text for spelling in spellings)


def contains(text: str, content: str) -> bool:
    """Whether `content` is in `text`, but for white space: templates trim it."""
    return content.strip() in text or squeezed(content) in squeezed(text)


def _continues(prompt: str, completion: str, content: str) -> bool:
    """Whether the content's opening <think> stands at the end of the prompt, and the rest of it in the completion."""
    opening, thought, rest = content.lstrip().partition(THINK)
    return opening == "" and thought != "" and prompt.rstrip().endswith(THINK) and contains(completion, rest)


def squeezed(text: str) -> str:
    return "".join(text.split())
