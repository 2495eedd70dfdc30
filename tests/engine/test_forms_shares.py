"""Verdicts of one number for each answer: one-hot, probabilities, scores, as lists, objects and texts, by hand.

[1, 0] once was a tie of two annotators: no list of numbers is read as votes where it may be one number for each answer.
"""

import pytest

from prefuse.engine.data import DataError
from prefuse.engine.data.forms import ReadOptions, read_records
from rows import read, write_lines

RAW, TURNED = ("Q", "A", "B"), ("Q", "B", "A")
TWO = {"prompt": "Q", "answer_a": "A", "answer_b": "B"}
NUMBERED = {"prompt": "Q", "response_0": "A", "response_1": "B"}
MODELS = TWO | {"model_a": "gpt-4", "model_b": "llama"}
LIST = {"prompt": "Q", "responses": ["B", "A", "C"]}


def beside(rows, column, *values):
    return [rows | {column: value} for value in values]


READ = {
    "one-hot": (beside(TWO, "label", [1, 0], [0, 1]), {}, [RAW, TURNED]),
    "one-hot, floats": (beside(TWO, "winner", [1.0, 0.0], [0.0, 1.0]), {}, [RAW, TURNED]),
    "one-hot, booleans": (beside(TWO, "preference", [True, False], [False, True]), {}, [RAW, TURNED]),
    "one-hot of columns that count from 0": (beside(NUMBERED, "label", [1, 0], [0, 1]), {}, [RAW, TURNED]),
    "a tie": (beside(TWO, "label", [0.5, 0.5], [0, 1]), {}, [TURNED]),
    "one-hot with a tie's place": (beside(TWO, "label", [1, 0, 0], [0, 1, 0], [0, 0, 1]), {}, [RAW, TURNED]),
    "labels, two of them": (beside(TWO, "labels", [1, 0], [0, 1]), {}, [RAW, TURNED]),
    "as text": (beside(TWO, "label", "[1, 0]", "[0, 1]", "[0.5, 0.5]"), {}, [RAW, TURNED]),
    "as numpy writes it": (beside(TWO, "label", "[1. 0.]", "[0. 1.]"), {}, [RAW, TURNED]),
    "as Python writes an array": (beside(TWO, "label", "array([1, 0])", "(0, 1)"), {}, [RAW, TURNED]),
    "keyed by suffix": (beside(TWO, "label", {"a": 1, "b": 0}, {"a": 0, "b": 1}), {}, [RAW, TURNED]),
    "keyed by suffix, with a null": (beside(TWO, "label", {"a": 1, "b": None}, {"a": None, "b": 1}), {}, [RAW, TURNED]),
    "keyed with a tie": (beside(TWO, "winner", {"A": 0, "B": 1, "tie": 0}, {"A": 0, "B": 0, "tie": 1}), {}, [TURNED]),
    "keyed by column": (beside(TWO, "verdict", {"answer_b": 0.9, "answer_a": 0.1}), {}, [TURNED]),
    "keyed by column, as text": (beside(TWO, "verdict", "{'answer_a': 1, 'answer_b': 0}"), {}, [RAW]),
    "keyed by model": (beside(MODELS, "winner", {"llama": 1, "gpt-4": 0}, {"gpt-4": 1, "llama": 0}), {}, [TURNED, RAW]),
    "keyed scores": (beside(TWO, "preference", {"a": 3, "b": 8.5}), {}, [TURNED]),
    "the chosen one's place": (beside(NUMBERED, "label", {"chosen": 0}, {"chosen": 1}), {}, [RAW, TURNED]),
    "both places": (
        beside(TWO, "label", {"chosen": 1, "rejected": 0}, {"chosen": 0, "rejected": 1}), {}, [TURNED, RAW],
    ),
    "both places from 1": (beside(TWO, "label", {"chosen": 1, "rejected": 2}), {}, [RAW]),
    "the winner's name": (beside(TWO, "label", {"winner": "b", "confidence": 0.7}), {}, [TURNED]),
    "scores beside two answers": (beside(TWO, "scores", [8, 3], [2, 3], [4, 4]), {}, [RAW, TURNED]),
    "keyed scores beside two answers": (beside(TWO, "rewards", {"a": -1.5, "b": -0.5}), {}, [TURNED]),
    "ranks beside two answers": (beside(TWO, "ranks", [2, 1]), {}, [TURNED]),
    "votes that are counts": (beside(TWO, "votes", [3, 1], [0, 7]), {"score_column": "votes"}, [RAW, TURNED]),
    "costs": (beside(TWO, "preference", [3, 1]), {"score_column": "-preference"}, [TURNED]),
    "votes of annotators": (beside(TWO, "votes", [1, 1], [1, 2], [2, 2]), {"verdict_first": "1"}, [RAW, TURNED]),
    "annotators in words": (beside(TWO, "votes", ["a", "a", "b"], ["b"]), {}, [RAW, TURNED]),
    "three votes": (beside(NUMBERED, "votes", [0, 0, 1], [1, 1, 1], [0, 1, 0]), {}, [RAW, TURNED, RAW]),
    "a flag for each": (
        [TWO | {"chosen_a": 0, "chosen_b": 1}, TWO | {"chosen_a": 1, "chosen_b": 0}], {}, [TURNED, RAW],
    ),
    "flags of preference": ([TWO | {"answer_a_preferred": True, "answer_b_preferred": False}], {}, [RAW]),
    "one-hot over a list": (beside(LIST, "label", [0, 1, 0]), {}, [("Q", "A", "C")]),
    "one-hot over a list, as text": (beside(LIST, "label", "[0, 1, 0]"), {}, [("Q", "A", "C")]),
    "probabilities over a list": (beside(LIST, "preference", [0.1, 0.7, 0.2]), {}, [("Q", "A", "B")]),
    "flags over a list": (beside(LIST, "chosen", [False, True, False]), {}, [("Q", "A", "C")]),
    "one-hot over columns": (
        beside({"prompt": "Q", "answer_a": "B", "answer_b": "A", "answer_c": "C"}, "winner", {"a": 0, "b": 1, "c": 0}),
        {}, [("Q", "A", "C")],
    ),
    "one-hot list over columns": (
        beside({"prompt": "Q", "answer_a": "B", "answer_b": "A", "answer_c": "C"}, "label", [0, 1, 0]),
        {}, [("Q", "A", "C")],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "expected"), READ.values(), ids=READ)
def test_a_number_for_each_answer(tmp_path, rows, options, expected):
    records, _, _ = read(tmp_path, rows, "pair", **options)
    assert records == expected


def test_how_sure_a_share_is_weighs_the_row(tmp_path):
    rows = beside(TWO, "label", [0.8, 0.2], [0.25, 0.75], [0.5, 0.5])
    reading = read_records(write_lines(tmp_path / "rows.jsonl", rows), "pair", "train", ReadOptions())
    found = list(reading.outcomes)
    assert [getattr(one, "weight", None) for one in found] == [pytest.approx(0.6), pytest.approx(0.5), None]
    assert found[2].by_rule
    assert "tie" in found[2].reason
    assert "label -> verdict, a share of each answer" in reading.form.roles


def test_numbers_that_are_no_share_are_bad_rows(tmp_path):
    rows = beside(TWO, "label", *[[1, 0]] * 40, [1, 1], [1], "x", [1, float("nan")])
    records, _, skipped = read(tmp_path, rows, "pair")
    assert records == [RAW] * 40
    assert len(skipped) == 4
    assert '"label" is [1, 1]' in skipped[0].reason


ASKED = {
    "numbers or votes": (beside(TWO, "label", [1, 0], [1, 1], [0, 0]), "--score_column label"),
    "counts or votes": (beside(TWO, "votes", [1, 2], [2, 1]), "--score_column votes"),
    "ranks or scores": (beside(TWO, "preference", {"a": 1, "b": 2}, {"a": 2, "b": 1}), "--score_column preference"),
    "three annotators": (beside(TWO, "votes", [0, 0, 1], [1, 1, 1]), "--verdict_first"),
    "keys of nobody": (beside(TWO, "label", {"x": 1, "y": 0}), "--verdict_first"),
    "numbers for each of a list": (beside(LIST, "label", [3, 1, 2]), "nothing says which is better"),
    "too few for a list": (beside(LIST, "label", [1, 0]), "nothing says which is better"),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), ASKED.values(), ids=ASKED)
def test_what_may_be_two_things_is_asked(tmp_path, rows, message):
    with pytest.raises(DataError) as error:
        read(tmp_path, rows, "pair")
    assert message in str(error.value)
