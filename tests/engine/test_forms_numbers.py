"""Answers that are numbers, as texts; and numbers that are none. And what `convert` counts, row by row."""

import json

import pytest

from prefuse.engine.cli import main
from prefuse.engine.data import DataError
from rows import read, write_lines

NUMBERS = {
    "pairs": ([{"prompt": "2 + 2?", "chosen": 4, "rejected": 5}], "pair", [("2 + 2?", "4", "5")]),
    "floats": ([{"prompt": "7 / 2?", "chosen": 3.5, "rejected": 3.0}], "pair", [("7 / 2?", "3.5", "3")]),
    "whole floats, as pandas leaves them": (
        [{"prompt": "2 + 2?", "chosen": 4.0, "rejected": 5.0}], "pair", [("2 + 2?", "4", "5")],
    ),
    "negative": ([{"prompt": "2 - 3?", "chosen": -1, "rejected": 1}], "pair", [("2 - 3?", "-1", "1")]),
    "one side": ([{"prompt": "2 + 2?", "chosen": 4, "rejected": "five"}], "pair", [("2 + 2?", "4", "five")]),
    "as turns": (
        [{"question": "2 + 2?", "chosen": 4, "rejected": 5}], "pair",
        [("user: 2 + 2?", "assistant: 4", "assistant: 5")],
    ),
    "demonstrations": ([{"question": "2 + 2?", "answer": 4}], "sft", [("user: 2 + 2?", "assistant: 4")]),
    "labelled": ([{"prompt": "2 + 2?", "completion": 5, "label": False}], "labelled", [("2 + 2?", "5", False)]),
    "two answers and a verdict": (
        [{"prompt": "2 + 2?", "answer_a": 5, "answer_b": 4, "winner": "b"}], "pair", [("2 + 2?", "4", "5")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "kind", "expected"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_are_the_text_of_answers(tmp_path, rows, kind, expected):
    records, reading, skipped = read(tmp_path, rows, kind)
    assert records == expected
    assert not skipped
    assert any("is a number, and is read as its text, such as" in line for line in reading.form.tally.lines)


def test_a_number_among_texts_is_a_bad_row(tmp_path):
    rows = [{"prompt": "Q", "chosen": "A", "rejected": "B"}] * 3 + [{"prompt": "Q", "chosen": 4, "rejected": "B"}]
    records, _, skipped = read(tmp_path, rows, "pair")
    assert len(records) == 3
    assert '"chosen" is a number' in skipped[0].reason


TWO = {"prompt": "Q", "response_a": "A", "response_b": "B"}
TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def test_places_and_scores_are_no_answers(tmp_path):
    listed = {"prompt": "Q", "responses": ["B", "C", "A"], "chosen": 2, "rejected": 0}
    assert read(tmp_path, [listed], "pair")[0] == [("Q", "A", "B")]
    assert read(tmp_path, [{"messages": TURNS, "chosen": 4, "rejected": 2}], "sft")[0] == [("user: Q", "assistant: A")]
    assert read(tmp_path, [{"prompt": "Q", "response": "A", "chosen": 4, "rejected": 2}], "sft")[0] == [("Q", "A")]
    with pytest.raises(DataError, match="--verdict_first"):
        read(tmp_path, [TWO | {"chosen": 0, "rejected": 1}, TWO | {"chosen": 1, "rejected": 0}], "pair")
    with pytest.raises(DataError, match="a column is missing"):
        read(tmp_path, [{"prompt": "Q", "good": 3, "bad": 1}], "pair")
    _, _, (flags,) = read(tmp_path, [{"prompt": "Q", "chosen": True, "rejected": False}], "pair")
    assert "is a boolean" in flags.reason


def test_convert_counts_rows_and_pairs_so_that_they_add_up(tmp_path, capsys):
    rows = [
        {"prompt": "Q", "responses": ["a", "b", "b"], "scores": [1, 2, 3]},  # b over b is no pair
        {"prompt": "R", "responses": ["a", "a"], "scores": [1, 2]},  # nothing is left
        {"prompt": "S", "responses": ["a", "b"], "scores": [1, 1]},  # a tie
        {"prompt": "T", "responses": ["a"], "scores": [1]},
    ]
    source, out = write_lines(tmp_path / "lists.jsonl", rows), tmp_path / "pairs.jsonl"
    assert main(["data", "convert", source, str(out), "--to", "pairs", "--pairs", "all"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 2
    assert lines[-5].endswith("2 rows written, of 1 row of the source")
    assert lines[-4:] == [
        "1 not: a tie: all its answers have one score",
        "1 not: one answer: nothing to compare it with",
        "2 pairs of 2 rows not: both sides are equal",
        "1 row gave nothing: none of its pairs is written",
    ]
