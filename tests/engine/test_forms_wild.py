"""Files as people keep them, beyond the forms of the docs' table: what each becomes, written by hand.

Each was refused or read wrong once; the row beside it says what is right.
"""

import pytest

from prefuse.engine.data import DataError, load_examples
from prefuse.engine.data.forms import read_records
from rows import read, write_lines
from tiny_tokenizer import tiny_tokenizer

USER, GOOD, BAD = ({"role": role, "content": c} for role, c in (("user", "Q"), ("assistant", "A"), ("assistant", "B")))
TURNS, RAW, TURNED = (
    ("user: Q", "assistant: A", "assistant: B"),
    ("Q", "A", "B"),
    ("user: Q", "assistant: B", "assistant: A"),
)
TWO = {"prompt": "Q", "answer_a": "A", "answer_b": "B"}

PAIRS = {
    "lists of strings as JSON text": (
        {"prompt": '["Q"]', "response_a": '["A"]', "response_b": '["B"]', "winner_a": 1, "winner_b": 0}, {}, [TURNS],
    ),
    "of several turns": (
        {"prompt": ["Q", "R"], "response_a": ["A", "C"], "response_b": ["A", "D"], "winner": "b"},
        {}, [("user: Q|assistant: A|user: R", "assistant: D", "assistant: C")],
    ),
    "of two lengths": ({"prompt": '["Q", "R"]', "response_a": '["A"]', "response_b": '["B"]', "winner": "a"}, {}, []),
    "one column for each winner": (TWO | {"winner_a": False, "winner_b": True}, {}, [("Q", "B", "A")]),
    "one column for each winner, none": (TWO | {"winner_a": False, "winner_b": False}, {}, []),
    "history is the prompt": (
        {"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "labels": 1, "score_A": 5, "score_B": 2}, {}, [TURNS],
    ),
    "a context of turns": ({"context": [USER], "response1": "A", "response2": "B", "winner": "2"}, {}, [TURNED]),
    "context_messages": ({"context_messages": [USER], "chosen": [GOOD], "rejected": [BAD]}, {}, [TURNS]),
    "A>B": (TWO | {"verdict": "A>B"}, {}, [RAW]),
    "[[B>>A]]": (TWO | {"verdict": "[[B>>A]]"}, {}, [("Q", "B", "A")]),
    "A = B": (TWO | {"verdict": "A = B"}, {}, []),
    "a tie is none of the values that were told": (TWO | {"verdict": "A=B"}, {"verdict_first": "A>B"}, []),
    "A is much better": (TWO | {"preference": "A is much better"}, {}, [RAW]),
    "B is slightly better than A": (TWO | {"preference": "B is slightly better than A"}, {}, [("Q", "B", "A")]),
    "votes": (TWO | {"votes_a": 1, "votes_b": 4}, {}, [("Q", "B", "A")]),
    "objects with a text": (
        {"prompt": "Q", "chosen": {"content": "A", "model": "m", "score": 9}, "rejected": {"content": "B"}}, {}, [RAW],
    ),
    "an object with two texts": ({"prompt": "Q", "chosen": {"text": "A", "why": "B"}, "rejected": "C"}, {}, []),
    "one against a list": (
        {"prompt": "Q", "chosen": "A", "rejected": ["B", "C"]}, {}, [RAW, ("Q", "A", "C")],
    ),
    "flags beside a list": ({"prompt": "Q", "completions": ["B", "A"], "correct": [False, True]}, {}, [RAW]),
    "flags that are named": (
        {"prompt": "Q", "completions": ["B", "A"], "labels": [False, True]}, {"columns": "scores=labels"}, [RAW],
    ),
    "a flag in the answers": (
        {"question": "Q", "answers": [{"text": "B", "selected": False}, {"text": "A", "selected": True}]}, {}, [TURNS],
    ),
    "an index from 1": ({"prompt": "Q", "candidates": ["B", "A"], "selected": 2}, {}, [RAW]),
    "an index from 0": ({"prompt": "Q", "candidates": ["A", "B"], "selected": 0}, {}, [RAW]),
    "a path": (
        {"info": {"post": "Q", "id": "x7"}, "summaries": [{"text": "A"}, {"text": "B"}], "choice": 0},
        {"columns": "prompt=info.post"}, [TURNS],
    ),
    "paths in one object": (
        {"data": {"prompt": "Q", "chosen": "A", "rejected": "B"}},
        {"columns": "prompt=data.prompt,chosen=data.chosen,rejected=data.rejected"}, [RAW],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "options", "expected"), PAIRS.values(), ids=PAIRS)
def test_pairs(tmp_path, row, options, expected):
    records, _, skipped = read(tmp_path, [row], "pair", **options)
    assert records == expected
    assert len(skipped) == (not expected)


THOUGHT = GOOD | {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "A"}]}
SAID = {
    "Claude's thoughts": (
        {"messages": [USER, THOUGHT]},
        ("user: Q", "assistant: A"),
    ),
    "input and output": ({"conversation": [{"input": "Q", "output": "A"}]}, ("user: Q", "assistant: A")),
    "a Chatbot": ({"messages": [{"role": "User", "content": "Q"}, {"role": "Chatbot", "content": "A"}]},
                  ("user: Q", "assistant: A")),
    "utterances": ({"dialogue": [{"speaker": "USER", "utterance": "Q"}, {"speaker": "ASSISTANT", "utterance": "A"}]},
                   ("user: Q", "assistant: A")),
    "inputs and targets": ({"inputs": "Q", "targets": "A", "language_code": "zul"}, ("user: Q", "assistant: A")),
    "a context below": ({"instruction": "Q", "context": "C", "response": "A"}, ("user: Q\n\nC", "assistant: A")),
    "Alpaca's own text": (
        {"instruction": "Q", "input": "", "output": "A", "text": "### Instruction:\nQ\n### Response:\nA"},
        ("user: Q", "assistant: A"),
    ),
    "paths": ({"inputs": {"q": "Q"}, "outputs": {"a": "A"}}, ("user: Q", "assistant: A")),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_demonstrations(tmp_path, name):
    row, expected = SAID[name]
    columns = "prompt=inputs.q,completion=outputs.a" if name == "paths" else None
    assert read(tmp_path, [row], "sft", columns=columns)[0] == [expected]


def test_the_thought_of_a_part_is_the_reasoning(tmp_path):
    (record,) = read_records(write_lines(tmp_path / "rows.jsonl", [{"messages": [USER, THOUGHT]}]), "sft").outcomes
    assert record.sides["completion"][0]["reasoning_content"] == "hm"


@pytest.mark.parametrize(
    ("flag", "bad"), [("is_safe", False), ("acceptable", False), ("toxic", True), ("rejected", True), ("flagged", True)]
)
def test_flags_are_labels_and_bad_rows_no_demonstrations(tmp_path, flag, bad):
    rows = [{"prompt": "Q", "response": "A", flag: not bad}, {"prompt": "R", "response": "B", flag: bad}]
    assert read(tmp_path, rows, "labelled")[0] == [("Q", "A", True), ("R", "B", False)]
    dataset = load_examples(write_lines(tmp_path / "rows.jsonl", rows), "sft", tiny_tokenizer(), 64, max_skipped=1.0)
    assert [example.row for example in dataset.examples] == ["rows.jsonl:1"]


def test_scores_of_that_name_are_no_flags(tmp_path):
    rows = [{"prompt": "Q", "response": "A", "helpful": value} for value in (0, 3)]
    assert read(tmp_path, rows, "sft")[0] == [("Q", "A")] * 2


ASKED = {
    "an index from 0 or 1": (
        {"prompt": "Q", "candidates": ["A", "B", "C"], "selected": 1}, {}, "may count from 0 or from 1",
    ),
    "the rest of an object": (
        {"info": {"post": "Q", "context": "C"}, "chosen": "A", "rejected": "B"},
        {"columns": "prompt=info.post"}, r'"info.context" holds text, .* --columns unused=info\.context',
    ),
    "what paths there are": (
        {"data": {"prompt": "Q", "chosen": "A"}}, {}, r"by its path \(data\.prompt, data\.chosen\)",
    ),
    "all columns at once": (
        {"prompt": "Q", "chosen": "A", "rejected": "B", "why": "C", "critique_of": "D"}, {},
        r'"why" and "critique_of" hold text, .* --columns unused=why,unused=critique_of',
    ),
    "an example of its kind": ({"prompt": "Q", "wrdict": "A"}, {}, "--columns prompt=question,chosen=good_answer"),
    "steps are no answers": (
        {"prompt": "Q", "completions": ["A", "B"], "labels": [True, False]}, {}, "nothing says which is better",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "options", "message"), ASKED.values(), ids=ASKED)
def test_what_is_asked(tmp_path, row, options, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, [row], "pair", **options)
