"""Conversations of the AI SDK and of OpenAI's Responses API, as turns written by hand.

The rows have the shapes of ai 4 to 6 (`UIMessage`, `ModelMessage`) and of openai 2 (`ResponseInputItem`).
"""

import json

import pytest

from prefuse.engine.data import load_examples
from prefuse.engine.data.forms import read_records
from rows import read, write_lines
from tiny_tokenizer import CHATML, tiny_tokenizer

ASKED = {"id": "1", "role": "user", "parts": [{"type": "text", "text": "Q"}]}
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}, "id": "c1"}
SAID = {"role": "user", "content": "Q"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [ADD]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": '{"sum": 2}'}


def ui(*parts, **more):
    return [ASKED, {"id": "2", "role": "assistant", "parts": list(parts), **more}]


def text(words):
    return {"type": "text", "text": words, "state": "done"}


TOOL = {"type": "tool-add", "toolCallId": "c1", "state": "output-available", "input": {"a": 1}, "output": {"sum": 2}}
OLD = {"state": "result", "step": 0, "toolCallId": "c1", "toolName": "add", "args": {"a": 1}, "result": {"sum": 2}}
MESSAGE = {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Q"}]}
ANSWER = {
    "type": "message", "id": "m", "role": "assistant", "status": "completed",
    "content": [{"type": "output_text", "text": "A", "annotations": [], "logprobs": []}],
}  # fmt: skip
CALL = {
    "type": "function_call",
    "id": "f",
    "call_id": "c1",
    "name": "add",
    "arguments": '{"a": 1}',
    "status": "completed",
}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": '{"sum": 2}'}
THOUGHT = {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "T"}], "encrypted_content": "x"}
AS_TEXT = {"type": "function", "id": "c1", "function": {"name": "add", "arguments": '{"a": 1}'}}

CONVERSATIONS = {
    "text": (ui(text("A")), [SAID, {"role": "assistant", "content": "A"}]),
    "several texts": (
        ui({"type": "step-start"}, text("A"), {"type": "source-url", "url": "u", "title": "t"}, text("B")),
        [SAID, {"role": "assistant", "content": "AB"}],
    ),
    "reasoning": (
        ui({"type": "reasoning", "text": "T", "state": "done"}, text("A")),
        [SAID, {"role": "assistant", "content": "A", "reasoning_content": "T"}],
    ),
    "reasoning of ai 4": (
        ui({"type": "reasoning", "reasoning": "T", "details": [{"type": "text", "text": "T"}]}, text("A"), content="A"),
        [SAID, {"role": "assistant", "content": "A", "reasoning_content": "T"}],
    ),
    "a tool, and text behind its result": (
        ui({"type": "step-start"}, TOOL, {"type": "step-start"}, text("A")),
        [SAID, CALLED, RESULT, {"role": "assistant", "content": "A"}],
    ),
    "text before a tool, thoughts in both steps": (
        ui({"type": "reasoning", "text": "T"}, text("B"), TOOL, {"type": "reasoning", "text": "U"}, text("A")),
        [
            SAID, CALLED | {"content": "B", "reasoning_content": "T"}, RESULT,
            {"role": "assistant", "content": "A", "reasoning_content": "U"},
        ],
    ),
    "a dynamic tool that failed": (
        ui({**TOOL, "type": "dynamic-tool", "toolName": "add", "state": "output-error", "errorText": "E"}, text("A")),
        [SAID, CALLED, RESULT | {"content": "E"}, {"role": "assistant", "content": "A"}],
    ),
    "a call that the app is to answer": (ui(TOOL | {"state": "input-available"}), [SAID, CALLED]),
    "a tool of ai 4": (
        ui({"type": "tool-invocation", "toolInvocation": OLD}, text("A"), content="A", toolInvocations=[OLD]),
        [SAID, CALLED, RESULT, {"role": "assistant", "content": "A"}],
    ),
    "a flag of the message": (ui(text("A"), toxic=True), [SAID, {"role": "assistant", "content": "A", "train": False}]),
    "model messages": (
        [
            SAID,
            {"role": "assistant", "content": [
                {"type": "text", "text": "B"},
                {"type": "tool-call", "toolCallId": "c1", "toolName": "add", "input": {"a": 1}},
            ]},
            {"role": "tool", "content": [
                {"type": "tool-result", "toolCallId": "c1", "toolName": "add",
                 "output": {"type": "json", "value": {"sum": 2}}},
            ]},
            {"role": "assistant", "content": "A"},
        ],
        [SAID, CALLED | {"content": "B"}, RESULT, {"role": "assistant", "content": "A"}],
    ),
    "items": ([MESSAGE, ANSWER], [SAID, {"role": "assistant", "content": "A"}]),
    "items with a plain message": (
        [SAID, THOUGHT, ANSWER], [SAID, {"role": "assistant", "content": "A", "reasoning_content": "T"}],
    ),
    "items with a call": (
        [MESSAGE, THOUGHT, CALL, OUTPUT, ANSWER],
        [
            SAID, CALLED | {"tool_calls": [AS_TEXT], "reasoning_content": "T"}, RESULT,
            {"role": "assistant", "content": "A"},
        ],
    ),
    "two calls at once, behind a text": (
        [MESSAGE, ANSWER, CALL, CALL, OUTPUT, OUTPUT, ANSWER],
        [
            SAID, CALLED | {"content": "A", "tool_calls": [AS_TEXT, AS_TEXT]}, RESULT, RESULT,
            {"role": "assistant", "content": "A"},
        ],
    ),
    "an output in parts": (
        [MESSAGE, CALL, OUTPUT | {"output": [{"type": "input_text", "text": "E"}]}, ANSWER],
        [SAID, CALLED | {"tool_calls": [AS_TEXT]}, RESULT | {"content": "E"}, {"role": "assistant", "content": "A"}],
    ),
    "an encrypted thought": (
        [MESSAGE, THOUGHT | {"summary": []}, ANSWER], [SAID, {"role": "assistant", "content": "A"}],
    ),
    "an open thought": (
        [MESSAGE, THOUGHT | {"summary": [], "content": [{"type": "reasoning_text", "text": "T"}]}, ANSWER],
        [SAID, {"role": "assistant", "content": "A", "reasoning_content": "T"}],
    ),
}  # fmt: skip


def bare(turn):
    """Without what the chat template alone may read."""
    return {key: value for key, value in turn.items() if key not in ("id", "toxic", "reasoning")}


@pytest.mark.parametrize("as_text", [False, True], ids=["objects", "JSON text"])
@pytest.mark.parametrize(("turns", "expected"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations(tmp_path, turns, expected, as_text):
    row = {"messages": json.dumps(turns) if as_text else turns}
    reading = read_records(write_lines(tmp_path / "rows.jsonl", [row]), "sft")
    (record,) = reading.outcomes
    assert [bare(turn) for turn in [*record.prompt, *record.sides["completion"]]] == expected


REFUSED = {
    "a file": (ui({"type": "file", "mediaType": "image/png", "url": "u"}, text("A")), 'type "file"'),
    "a call that never ended": (ui(TOOL | {"state": "input-streaming"}, text("A")), "it never ended"),
    "a denied call": (ui(TOOL | {"state": "output-denied"}, text("A")), "it never ended"),
    "a part of no known type": (ui({"type": "canvas", "text": "x"}, text("A")), "'canvas'"),
    "texts that differ": (ui(text("A"), content="B"), 'is not the text of its "parts"'),
    "calls without their place": (
        [ASKED, {"role": "assistant", "content": "A", "toolInvocations": [OLD]}], 'no "parts"',
    ),
    "an attachment": (
        [ASKED | {"experimental_attachments": [{"url": "u"}]}, *ui(text("A"))[1:]], "prefuse reads text only",
    ),
    "a user's call": ([ASKED | {"parts": [TOOL]}, *ui(text("A"))[1:]], "that are an assistant's"),
    "a late thought": (ui(text("A"), {"type": "reasoning", "text": "T"}), "reasoning behind its text"),
    "a web search": ([MESSAGE, {"type": "web_search_call", "id": "w"}, ANSWER], '"web_search_call"'),
    "a reference": ([MESSAGE, {"type": "item_reference", "id": "x"}, ANSWER], '"item_reference"'),
    "a thought alone": ([MESSAGE, ANSWER, THOUGHT], "before none of the assistant's"),
    "a thought before a question": ([THOUGHT, MESSAGE, ANSWER], "before none of the assistant's"),
    "text behind a call": ([MESSAGE, CALL, ANSWER], "chat templates write calls last"),
    "a refusal": ([MESSAGE, ANSWER | {"content": [{"type": "refusal", "refusal": "no"}]}], "'refusal'"),
    "an image": ([MESSAGE | {"content": [{"type": "input_image", "image_url": "u"}]}, ANSWER], '"input_image"'),
}  # fmt: skip


@pytest.mark.parametrize(("turns", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_template_writes_is_refused_by_name(tmp_path, turns, reason):
    _, _, skipped = read(tmp_path, [{"messages": turns}], "sft")
    assert reason in skipped[0].reason


def test_columns_of_items_are_prompts_and_answers(tmp_path):
    records, _, _ = read(tmp_path, [{"input": [MESSAGE], "output": [ANSWER]}] * 2, "sft")
    assert records == [("user: Q", "assistant: A")] * 2
    pair = {"prompt": [ASKED], "chosen": ui(text("A"))[1], "rejected": ui(text("B"))[1]}
    records, _, _ = read(tmp_path, [pair], "pair")
    assert records == [("user: Q", "assistant: A", "assistant: B")]


def test_they_become_the_tokens_of_the_same_turns(tmp_path):
    tokens = []
    for turns in (ui(text("A")), [MESSAGE, ANSWER], [SAID, {"role": "assistant", "content": "A"}]):
        source = write_lines(tmp_path / "rows.jsonl", [{"messages": turns}])
        (example,) = load_examples(source, "sft", tiny_tokenizer(chat_template=CHATML), 64).examples
        tokens.append((example.prompt, example.completion))
    assert tokens[0] == tokens[1] == tokens[2]
