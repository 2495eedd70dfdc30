"""One answer a row: labels, scores, conversations, instructions; a bad answer is never a demonstration."""

import json

import pytest

from prefuse.engine.data import DataError, load_examples
from rows import read, write_lines
from tiny_tokenizer import CHATML, tiny_tokenizer

USER, GOOD = ({"role": role, "content": c} for role, c in (("user", "Q"), ("assistant", "A")))
CHAT = ("user: Q", "assistant: A")

LABELLED = {
    "prompt, completion": ({"prompt": "Q", "completion": "A", "label": True}, ("Q", "A", True)),
    "messages": ({"messages": [USER, GOOD], "label": False}, (*CHAT, False)),
    "instruction, output": ({"instruction": "Q", "output": "A", "label": False}, (*CHAT, False)),
    "kto_tag": (
        {"instruction": "Q", "input": "I", "output": "A", "kto_tag": False},
        ("user: Q\n\nI", "assistant: A", False),
    ),
    "0": ({"prompt": "Q", "completion": "A", "label": 0}, ("Q", "A", False)),
    "1": ({"prompt": "Q", "completion": "A", "label": 1}, ("Q", "A", True)),
    "-1": ({"prompt": "Q", "completion": "A", "label": -1}, ("Q", "A", False)),
    "text 1": ({"prompt": "Q", "completion": "A", "label": "1"}, ("Q", "A", True)),
    "true": ({"query": "Q", "response": "A", "label": "True"}, (*CHAT, True)),
    "down": ({"query": "Q", "response": "A", "thumb": "down"}, (*CHAT, False)),
    "thumbs_up": ({"query": "Q", "response": "A", "feedback": "THUMBS_UP"}, (*CHAT, True)),
    "bad": ({"query": "Q", "response": "A", "label": "bad"}, (*CHAT, False)),
    "emoji": ({"query": "Q", "response": "A", "reaction": "👎"}, (*CHAT, False)),
}


@pytest.mark.parametrize(("row", "expected"), LABELLED.values(), ids=LABELLED)
def test_labels(tmp_path, row, expected):
    assert read(tmp_path, [row], "labelled")[0] == [expected]


@pytest.mark.parametrize("values", [(0, 1, 2), (1, 2), ("good", "fine", "poor"), (0, -1, 1)], ids=str)
def test_labels_with_other_values_stop_the_run(tmp_path, values):
    rows = [{"prompt": "Q", "completion": "A", "label": value} for value in values]
    with pytest.raises(
        DataError, match=r'"label" has the values .*; expected true and false, 1 and 0, .* --score_column label'
    ):
        read(tmp_path, rows, "labelled")


def test_a_row_without_a_label_is_set_aside(tmp_path):
    row = {"prompt": "Q", "completion": "A", "label": True}
    _, _, (skipped,) = read(tmp_path, [row, row | {"label": None}], "labelled")
    assert (skipped.reason, skipped.by_rule) == ('no value in "label"', True)


RATED = [{"question": "Q", "answer": "A", "rating": rating, "user_id": "u7"} for rating in (1, 2, 3, 4, 5, None, "5")]


def test_scores_become_labels_by_thresholds_and_the_middle_is_set_aside(tmp_path):
    records, reading, skipped = read(tmp_path, RATED, "labelled", good_from=4, bad_to=2)
    assert [label for *_, label in records] == [False, False, True, True, True]
    assert [skip.reason for skip in skipped] == [
        'its "rating" is between good and bad (good from 4, bad to 2)',
        'no value in "rating"',
    ]
    assert all(skip.by_rule for skip in skipped)
    assert (
        reading.form.roles
        == "question -> prompt; answer -> completion; rating -> label, good from 4, bad to 2 (as turns)"
    )


@pytest.mark.parametrize("kind", ["labelled", "sft"])
def test_scores_without_thresholds_are_asked_about(tmp_path, kind):
    message = r'"rating" says how good an answer is \(from 1 to 5\), .* --good_from 4 --bad_to 2 for stars; or'
    with pytest.raises(DataError, match=message):
        read(tmp_path, RATED, kind)
    assert len(read(tmp_path, RATED, "sft", columns="unused=rating")[0]) == 7


def test_thresholds_must_leave_an_order(tmp_path):
    with pytest.raises(DataError, match="bad_to 4 must be below good_from 4"):
        read(tmp_path, RATED, "labelled", good_from=4, bad_to=4)


def test_two_scores_are_asked_about(tmp_path):
    rows = [{"question": "Q", "answer": "A", "score": 1, "reward": 2}]
    with pytest.raises(
        DataError, match=r"score and reward may each say how good an answer is\. Fix: --score_column score"
    ):
        read(tmp_path, rows, "labelled")
    assert read(tmp_path, rows, "labelled", score_column="reward", good_from=2)[0] == [(*CHAT, True)]


def test_a_prompt_that_is_not_in_its_conversation_is_no_repetition(tmp_path):
    row = {"prompt": "Q", "messages": [USER, GOOD]}
    with pytest.raises(DataError, match='"prompt" holds text'):
        read(tmp_path, [row, row | {"prompt": "R"}], "sft")
    _, _, (skipped,) = read(tmp_path, [row] * 1000 + [row | {"prompt": "R"}], "sft")
    assert (skipped.row, skipped.reason) == (
        "rows.jsonl:1001",
        '"prompt" is none of the turns of "messages", as in other rows',
    )


BAD = {
    "text": ({"text": "B", "label": 0}, {}),
    "label": ({"instruction": "Q", "output": "B", "label": False}, {}),
    "kto_tag": ({"instruction": "Q", "output": "B", "kto_tag": False}, {}),
    "thumb": ({"instruction": "Q", "output": "B", "thumb": "down"}, {}),
    "rating": ({"instruction": "Q", "output": "B", "rating": 1}, {"good_from": 4, "bad_to": 2}),
    "rating in the middle": ({"instruction": "Q", "output": "B", "rating": 3}, {"good_from": 4}),
}


@pytest.mark.parametrize(("row", "options"), BAD.values(), ids=BAD)
def test_a_row_marked_bad_is_never_a_demonstration(tmp_path, row, options):
    better = {False: True, "down": "up", 1: 5, 3: 5, "B": "A"}
    good = {key: better.get(value, value) for key, value in row.items()}
    source = write_lines(tmp_path / "rows.jsonl", [row, row, good])
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    dataset = load_examples(source, "sft", tokenizer, 64, **options)
    assert [tokenizer.decode(example.completion) for example in dataset.examples] == [
        "A</s>" if "text" in row else "A<|im_end|>"
    ]
    assert [skip.by_rule for skip in dataset.skipped] == [True, True]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
DEMONSTRATIONS = {
    "messages": ({"messages": [USER, GOOD]}, CHAT),
    "text parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, GOOD]}, CHAT),
    "a system column": ({"system": "S", "messages": [USER, GOOD]}, ("system: S|user: Q", "assistant: A")),
    "an empty system column": ({"system": "", "messages": [USER, GOOD]}, CHAT),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}, CHAT),
    "roles in any case": ({"conversation": [{"from": "Human", "value": "Q"}, {"from": "GPT", "value": "A"}]}, CHAT),
    "prompter": ({"messages": [{"role": "prompter", "content": "Q"}, {"role": "model", "content": "A"}]}, CHAT),
    "bot": ({"messages": [{"speaker": "user", "text": "Q"}, {"speaker": "bot", "text": "A"}]}, CHAT),
    "exchanges": (
        {"conversation": [{"human": "q", "assistant": "a"}, {"human": "Q", "assistant": "A"}]},
        ("user: q|assistant: a|user: Q", "assistant: A"),
    ),
    "function_call, observation": (
        {
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "A"},
            ],
            "tools": '[{"name": "add"}]',
        },
        ("user: Q|assistant: |tool: 1", "assistant: A"),
    ),
    "gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "S"}]},
            "contents": [{"role": "user", "parts": [{"text": "Q"}]}, {"role": "model", "parts": [{"text": "A"}]}],
        },
        ("system: S|user: Q", "assistant: A"),
    ),
    "bedrock": (
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": [{"text": "S"}],
            "messages": [
                {"role": "user", "content": [{"text": "Q"}]},
                {"role": "assistant", "content": [{"text": "A"}]},
            ],
        },
        ("system: S|user: Q", "assistant: A"),
    ),
    "alpaca": ({"instruction": "Q", "input": "", "output": "A"}, CHAT),
    "alpaca, system and history": (
        {"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": [["q", "a"]]},
        ("system: S|user: q|assistant: a|user: Q\n\nI", "assistant: A"),
    ),
    "query, response": ({"query": "Q", "response": "A"}, CHAT),
    "prompt, response": ({"prompt": "Q", "response": "A"}, ("Q", "A")),
    "question, answer": ({"question": "Q", "answer": "A"}, CHAT),
    "input, output": ({"input": "Q", "output": "A"}, CHAT),
    "prompt, completion": ({"prompt": "Q", "completion": "A"}, ("Q", "A")),
    "a prompt beside its conversation": ({"prompt": "Q", "prompt_id": "7", "messages": [USER, GOOD]}, CHAT),
    "turns without roles": ({"conversations": ["Q", "A"]}, CHAT),
    "text": ({"text": "A"}, ("", "A")),
    "the chosen side": ({"prompt": "Q", "chosen": "A", "rejected": "B"}, ("Q", "A", "B")),
}


@pytest.mark.parametrize(("row", "expected"), DEMONSTRATIONS.values(), ids=DEMONSTRATIONS)
def test_demonstrations(tmp_path, row, expected):
    assert read(tmp_path, [row], "sft")[0] == [expected]


def test_a_function_call_turn_is_a_tool_call_and_tools_are_kept(tmp_path):
    from prefuse.engine.data.forms import read_records

    row, _ = DEMONSTRATIONS["function_call, observation"]
    (record,) = read_records(write_lines(tmp_path / "rows.jsonl", [row]), "sft").outcomes
    assert record.prompt[1]["tool_calls"] == [CALL]
    assert record.tools == [{"name": "add"}]


def test_keys_that_say_what_is_learned_stay(tmp_path):
    from prefuse.engine.data.forms import read_records

    turns = [USER, GOOD | {"weight": 0}, USER, GOOD | {"train": True, "name": "Bot", "reasoning_content": "so"}]
    row = {"messages": turns, "chat_template_kwargs": {"enable_thinking": False}}
    (record,) = read_records(write_lines(tmp_path / "rows.jsonl", [row]), "sft").outcomes
    assert record.prompt + record.sides["completion"] == turns
    assert record.template_kwargs == {"enable_thinking": False}


BAD_TURNS = {
    "an image": ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "image_url"),
    "a role": ({"role": "robot", "content": "Q"}, "unknown role 'robot'"),
    "no text": ({"role": "user", "name": "Ann"}, 'the content of a "user" turn in "messages" is null'),
}


@pytest.mark.parametrize(("turn", "reason"), BAD_TURNS.values(), ids=BAD_TURNS)
def test_turns_that_are_no_text_are_named(tmp_path, turn, reason):
    _, _, (skipped,) = read(tmp_path, [{"messages": [turn, GOOD]}, {"messages": [USER, GOOD]}], "sft")
    assert reason in skipped.reason
    assert skipped.row == "rows.jsonl:1"


def test_prompts_alone_need_no_verdict_and_no_threshold(tmp_path):
    for row in (
        {"question": "Q", "response_a": "A", "response_b": "B", "winner": "tie"},
        {"question": "Q", "answer": "A", "rating": 3},
        {"messages": [USER]},
    ):
        rows = [row | {"winner": "A"}] if "winner" in row else [row]
        assert read(tmp_path, [*rows, row], "prompt")[0] == [("user: Q",)] * 2


def test_a_prompt_that_stands_at_the_start_of_nearly_all_answers_is_cut_off_and_counted(tmp_path):
    said = "rows whose prompt stood at the start of the answer, and is cut off there: 2"
    question, other = "what is the sky?", "what is the sea?"
    rows = [{"prompt": q, "completion": f"{q} A", "label": True} for q in (question, other)]
    for kind in ("sft", "labelled"):
        records, reading, _ = read(tmp_path, rows, kind)
        assert records == [(question, " A", True), (other, " A", True)]
        assert said in reading.form.tally.lines
    asked = [{"question": q, "answer": f"{q}\nA"} for q in (question, other)]
    assert read(tmp_path, asked, "sft")[0] == [(f"user: {q}", "assistant: \nA") for q in (question, other)]
    once = [rows[0], rows[1] | {"completion": "A"}]  # an answer that begins with its question, among others
    assert read(tmp_path, once, "labelled")[0] == [(question, f"{question} A", True), (other, "A", True)]
    short = [{"prompt": "hello", "completion": "hello there"}]
    assert read(tmp_path, short, "sft")[0] == [("hello", "hello there")]


def test_keys_of_turns_that_nothing_reads_are_said(tmp_path):
    turn = GOOD | {"explanation": "some words", "model": "m-7b", "logprob": -0.5, "header": {"accept": "any"}}
    _, reading, _ = read(tmp_path, [{"messages": [USER, turn]}] * 2, "sft")
    assert reading.form.tally.lines == [
        'turns of the first rows that also hold "explanation", for the chat template alone: 2',
        'turns of the first rows that also hold "header", for the chat template alone: 2',
    ]


def test_turns_that_stand_as_json_text_are_read_as_turns_and_said(tmp_path):
    question, reply = json.dumps([USER]), json.dumps([GOOD])
    for kind, row, expected in (
        ("sft", {"messages": json.dumps([USER, GOOD])}, CHAT),
        ("pair", {"prompt": question, "chosen": reply, "rejected": json.dumps([GOOD | {"content": "B"}])},
         (*CHAT, "assistant: B")),
        ("pair", {"prompt": question, "chosen": "A", "rejected": "B"}, (*CHAT, "assistant: B")),
    ):  # fmt: skip
        records, reading, skipped = read(tmp_path, [row, row], kind)
        assert records == [expected] * 2
        assert not skipped
        column = next(iter(row))
        assert (
            f'rows whose "{column}" is a text, the JSON of turns, and is read as turns: 2' in reading.form.tally.lines
        )
    mixed = [{"prompt": question, "completion": "A"}, {"prompt": "[x] y", "completion": "A"}]
    assert read(tmp_path, mixed, "sft")[0] == [(question, "A"), ("[x] y", "A")]
    assert read(tmp_path, [{"prompt": "[1, 2]", "completion": "3"}], "sft")[0] == [("[1, 2]", "3")]
