"""Rows of strangers: real kinds that were read as something else, or that might be, with what is right, by hand."""

import json

import pytest

from prefuse.engine.data import DataError, load_examples
from prefuse.engine.data.forms import read_records
from rows import read, write_lines
from tiny_tokenizer import CHATML, tiny_tokenizer

Q, A, B = ({"role": role, "content": text} for role, text in (("user", "Q"), ("assistant", "A"), ("assistant", "B")))
ANSWER = {"prompt": "Q", "completion": "A"}
TWO = {"prompt": "Q", "response_a": "A", "response_b": "B"}


def calling(call):
    return {"messages": [Q, {"role": "assistant", "content": "", "tool_calls": [call]}]}


CALLS = {
    "LangChain's args": calling({"name": "add", "args": {"a": 1}, "type": "tool_call"}),
    "Llama's parameters": calling({"name": "add", "parameters": {"a": 1}}),
    "Claude's input": calling({"type": "function", "function": {"name": "add", "input": {"a": 1}}}),
    "parameters in a turn's text": {
        "conversations": [
            {"from": "human", "value": "Q"},
            {"from": "function_call", "value": '{"name": "add", "parameters": {"a": 1}}'},
        ]
    },
    "arguments": calling({"name": "add", "arguments": {"a": 1}}),
}  # fmt: skip


@pytest.mark.parametrize("row", CALLS.values(), ids=CALLS)
def test_the_arguments_of_a_call_are_kept_under_any_name(tmp_path, row):
    (record,) = read_records(write_lines(tmp_path / "rows.jsonl", [row]), "sft").outcomes
    (call,) = record.sides["completion"][0]["tool_calls"]
    assert (call["function"]["name"], call["function"]["arguments"]) == ("add", {"a": 1})
    assert not {"args", "parameters", "input"} & call.keys() | call["function"].keys() - {"name", "arguments", "type"}


def turned(**more):
    """The first of two answers has a mark of its own."""
    return {"messages": [Q, A | more, Q, B]}


UNLEARNED = {
    "training": turned(training=False),
    "train_on_turn": turned(train_on_turn=False),
    "loss_mask": turned(loss_mask=0),
    "a word of feedback": turned(feedback="thumbs_down"),
    "feedback in an object": turned(feedback={"rating": -1}),
    "a status": turned(status="rejected"),
    "deleted": turned(deleted=True),
    "an error": turned(has_error=True),
}
LEARNED = {
    "good feedback": turned(feedback="thumbs_up"),
    "a status of nothing": turned(status="completed"),
    "no error": turned(has_error=False),
    "a score": turned(score=0.0),
}


@pytest.mark.parametrize(("row", "learned"), [
    *((row, ["B"]) for row in UNLEARNED.values()), *((row, ["A", "B"]) for row in LEARNED.values()),
], ids=[*UNLEARNED, *LEARNED])  # fmt: skip
def test_turns_that_their_own_marks_say_are_bad_are_not_learned(tmp_path, row, learned):
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    (example,) = load_examples(write_lines(tmp_path / "rows.jsonl", [row]), "sft", tokenizer, 128).examples
    mask = example.learned or [True] * len(example.completion)
    text = tokenizer.decode([token for token, is_learned in zip(example.completion, mask, strict=True) if is_learned])
    assert text.replace("<|im_end|>", " ").split() == learned


FLAGS = {
    "negative": {"negative": True}, "success": {"success": False}, "resolved": {"resolved": 0},
    "an error": {"has_error": True}, "cut off": {"truncated": True}, "excluded": {"exclude": True},
    "not kept": {"keep": False}, "not included": {"include": 0}, "skipped": {"skip": 1}, "not used": {"use": False},
    "a duplicate": {"is_duplicate": True},
}  # fmt: skip


@pytest.mark.parametrize("flag", FLAGS.values(), ids=FLAGS)
def test_a_row_that_a_flag_marks_as_bad_is_no_demonstration(tmp_path, flag):
    ((name, bad),) = flag.items()
    rows = [{"messages": [Q, A], name: bad}] + [{"messages": [Q, B], name: type(bad)(not bad)}] * 2
    found = load_examples(write_lines(tmp_path / "rows.jsonl", rows), "sft", tiny_tokenizer(chat_template=CHATML), 64)
    assert [example.row.rsplit(":")[-1] for example in found.examples] == ["2", "3"]
    assert found.skipped[0].by_rule


@pytest.mark.parametrize("flag", ["exclude", "skip", "is_duplicate", "ignored", "drop"])
def test_and_no_pair(tmp_path, flag):
    rows = [{"prompt": "Q", "chosen": "A", "rejected": "B", flag: bad} for bad in (True, False)]
    records, _, skipped = read(tmp_path, rows, "pair")
    assert len(records) == 1
    assert flag in skipped[0].reason


def test_a_flag_about_the_answer_is_nothing_that_a_pair_is_asked(tmp_path):
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "truncated": True, "success": False}
    assert read(tmp_path, [row], "pair")[0] == [("Q", "A", "B")]


READ = {
    "Gemini's thought": (
        "sft", {"contents": [
            {"role": "user", "parts": [{"text": "Q"}]},
            {"role": "model", "parts": [{"text": "T", "thought": True}, {"text": "A"}]},
        ]}, [("user: Q", "assistant: A")],
    ),
    "votes of an object": ("pair", TWO | {"votes": {"a": 1, "b": 3}}, [("Q", "B", "A")]),
    "scores as texts": ("pair", TWO | {"scores": ["3", "8"]}, [("Q", "B", "A")]),
    "one vote": ("pair", TWO | {"winner": ["b"]}, [("Q", "B", "A")]),
    "ranks from 0": ("pair", {"prompt": "Q", "responses": ["B", "A"], "rank": [1, 0]}, [("Q", "A", "B")]),
    "negative rewards": (
        "pair", {"prompt": "Q", "responses": [{"text": "B", "score": -2.5}, {"text": "A", "score": -0.5}]},
        [("Q", "A", "B")],
    ),
    "scores inside the sides": (
        "pair", {"prompt": "Q", "chosen": {"text": "A", "score": 5}, "rejected": {"text": "B", "score": 1}},
        [("Q", "A", "B")],
    ),
    "a greeting first": (
        "sft", {"conversations": [B, Q, A]}, [("assistant: B|user: Q", "assistant: A")],
    ),
    "turns alone, as JSON text": (
        "sft", {"prompt": '{"role": "user", "content": "Q"}', "completion": '{"role": "assistant", "content": "A"}'},
        [("user: Q", "assistant: A")],
    ),
    "an object of messages, as JSON text": (
        "sft", {"conversation": json.dumps({"messages": [Q, A]})}, [("user: Q", "assistant: A")],
    ),
    "an answer that is JSON": ("sft", {"prompt": "Q", "completion": '{"content": "A"}'}, [("Q", '{"content": "A"}')]),
    "an answer that is a list": ("sft", {"prompt": "Q", "completion": '["A"]'}, [("Q", '["A"]')]),
    "a label with a blank": ("labelled", ANSWER | {"label": "False "}, [("Q", "A", False)]),
    "an answer after ####": ("sft", {"question": "Q", "answer": "x #### A"}, [("user: Q", "assistant: x #### A")]),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "expected"), READ.values(), ids=READ)
def test_rows(tmp_path, kind, row, expected):
    assert read(tmp_path, [row], kind)[0] == expected


ASKED = {
    "logits": ("pair", TWO | {"label": [2.3, -1.1]}, "--score_column label"),
    "percent": ("pair", TWO | {"label": [80, 20]}, "--score_column label"),
    "votes with ties": ("pair", TWO | {"votes": {"a": 3, "b": 1, "tie": 2}}, "--verdict_first"),
    "a flag of one side": ("pair", TWO | {"a_wins": 1}, "no column says which"),
    "losses": ("pair", {"prompt": "Q", "responses": ["A", "B"], "losses": [1.0, 3.0]}, "nothing says which is better"),
    "a mask beside the turns": ("sft", {"messages": [Q, A, Q, B], "loss_mask": [0, 0, 0, 1]}, '"weight": 0 or 1'),
    "weights beside the turns": ("sft", {"messages": [Q, A], "weights": [0, 1]}, '"weight": 0 or 1'),
    "a choice among options": ("sft", {"question": "Q", "options": ["A", "B"], "answer": "B"}, '"options" holds text'),
    "an error in words": ("sft", ANSWER | {"error": "timeout occurred"}, '"error" holds text'),
    "a better answer beside it": ("sft", {"prompt": "Q", "response": "B", "corrected_response": "A"}, "corrected"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "message"), ASKED.values(), ids=ASKED)
def test_what_is_asked(tmp_path, kind, row, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, [row], kind)


SKIPPED = {
    "parts of a turn": ({"messages": [Q, A | {"train_detail": [{"begin_offset": 0}]}]}, "train_detail"),
    "a mask that may mean either": ({"messages": [Q, A | {"mask": 1}]}, '"mask"'),
    "an exchange of three": ({"conversation": [["user", "Q"], ["assistant", "A"]]}, "a turn of"),
    "parts as JSON text": (
        {"messages": [Q | {"content": '[{"type": "text", "text": "Q"}]'}, A]}, "the JSON of a list of parts",
    ),
    "a redacted thought": (
        {"messages": [Q, A | {"content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "A"}]}]},
        "redacted_thinking",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "reason"), SKIPPED.values(), ids=SKIPPED)
def test_what_is_skipped_by_name(tmp_path, row, reason):
    _, _, (skipped,) = read(tmp_path, [row], "sft")
    assert reason in skipped.reason


def test_a_stop_token_of_the_rows_own_would_stand_twice(tmp_path):
    rows = [{"messages": [Q, A | {"content": text}]} for text in ("A<|im_end|>", "A<|im_end|>\n", "A", "B")]
    found = load_examples(write_lines(tmp_path / "rows.jsonl", rows), "sft", tiny_tokenizer(chat_template=CHATML), 64)
    assert len(found.examples) == 2
    assert all("it would stand twice" in skipped.reason for skipped in found.skipped)


@pytest.mark.parametrize("flag", ["is_duplicate", "exclude", "truncated"])
def test_a_flag_that_says_to_leave_a_row_out_is_no_label(tmp_path, flag):
    """A duplicate is no bad answer: KTO would unlearn it."""
    with pytest.raises(DataError, match="a column is missing"):
        read(tmp_path, [ANSWER | {flag: True}, ANSWER | {flag: False}], "labelled")
    rows = [ANSWER | {flag: True, "label": True}, ANSWER | {flag: False, "label": True}]
    records, _, skipped = read(tmp_path, rows, "labelled")
    assert (len(records), len(skipped)) == (1, 1)
