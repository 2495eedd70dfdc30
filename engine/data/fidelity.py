"""What a chat template did to a row: text it dropped or doubled is found here, and named.

Templates may trim white space around a text, and may leave the reasoning of earlier answers out; all else must stand in
the text. Within a prompt they may also write white space otherwise, for the model meets it so; within an answer not.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

from prefuse.engine.data.turns import REASONING, Message

THINK = "<think>"
THOUGHT = "</think>"
# How an answer may begin: <think>, [THINK], <|begin_of_thought|>, <seed:think>, ◁think▷.
OPENING = re.compile(r"\s*(<[^<>/\s][^<>\s]*>|\[[A-Z_]+\]|◁[^◁▷\s]+▷)")
TAGS = re.compile(r"(</?[^<>\s]+>|\[/?[A-Z_]+\]|◁/?[^◁▷\s]+▷)")


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
    if not (holds(completion, content) or _continues(prompt, completion, content)):
        return f"its reasoning ({THINK}...{THOUGHT})" if _only_reasoning_lost(completion, content) else "its text"
    if not contains(completion, reasoning):
        return f'its "{next(name for name in reversed(REASONING) if turn.get(name))}"'
    name = untraced_call(turn, completion)
    return None if name is None else f'the tool call "{name}"'


def reasoning_tags(turn: Message) -> list[str]:
    """The tags by which an answer, or its "reasoning_content", marks its reasoning itself."""
    content, reasoning = turn.get("content") or "", turn.get("reasoning_content") or ""
    found = [opening_tag(content), opening_tag(reasoning)]
    found += [tag for tag in (THINK, THOUGHT) if tag in reasoning or (tag == THINK and tag in content)]
    return [tag for tag in dict.fromkeys(found) if tag]


def doubled_tag(turns: list[Message], header: str, completion: str) -> str | None:
    """One of their `reasoning_tags` that the template writes as well; `header`: what it opens the answers with."""
    around, content = header + completion, "".join(turn.get("content") or "" for turn in turns)
    for reasoning in (turn.get("reasoning_content") or "" for turn in turns):
        around = around.replace(reasoning.strip(), "", 1) if reasoning.strip() else around
    tags = [tag for turn in turns for tag in reasoning_tags(turn)]
    return next((tag for tag in tags if around.count(tag) > content.count(tag)), None)


def opening_tag(content: str) -> str | None:
    found = OPENING.match(content)
    return found and found[1]


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
    """Whether `content` is in `text`, but for white space."""
    return content.strip() in text or squeezed(content) in squeezed(text)


def holds(text: str, content: str) -> bool:
    """Whether `content` is in `text`, but for white space at its ends and beside its tags (<think>)."""
    if content.strip() in text:
        return True
    at = 0
    for part in TAGS.split(content):
        at = text.find(part.strip(), at)
        if at < 0:
            return False
        at += len(part.strip())
    return contains(text, content)


def is_trimmed(turn: Message, completion: str) -> bool:
    """Whether an answer has white space at its ends that its text has not."""
    content = turn.get("content") or ""
    return content != content.strip() and content not in completion and content.strip() in completion


def _continues(prompt: str, completion: str, content: str) -> bool:
    """Whether the tag that opens the content stands at the end of the prompt, and its rest in the completion."""
    tag = opening_tag(content)
    return bool(tag) and prompt.rstrip().endswith(tag) and holds(completion, content.partition(tag)[2])


def squeezed(text: str) -> str:
    return "".join(text.split())
