"""What the columns of pairs leave open is asked for, the answer is taken, and one bad row is one skipped row."""

import pytest

from prefuse.engine.data import DataError
from rows import read

USER, GOOD, BAD = ({"role": role, "content": c} for role, c in (("user", "Q"), ("assistant", "A"), ("assistant", "B")))
HH = "\n\nHuman: Name a fruit that is red.\n\nAssistant:"
TURNS = ("user: Q", "assistant: A", "assistant: B")
SAFE = {"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 1, "safer_response_id": 0}
ARENA = {"conversation_a": [USER, GOOD], "conversation_b": [USER, BAD], "model_a": "x", "model_b": "y", "turn": 1}

ASKED = {
    "two verdicts": (SAFE, {}, r"better_response_id and safer_response_id may each say .* --verdict_column better"),
    "0 and 1 of a and b": (
        {"prompt": "Q", "response_a": "A", "response_b": "B", "label": 0},
        {},
        r'"label" has the values 0, which may say in more than one way .* Fix: --verdict_first with the value',
    ),
    "0 and 1 of 1 and 2": (
        {"prompt": "Q", "response_1": "A", "response_2": "B", "label": 1},
        {},
        None,
    ),
    "signed": (
        {"prompt": "Q", "response1": "A", "response2": "B", "overall_preference": -2},
        {},
        "--verdict_first with the value",
    ),
    "true and false": (
        SAFE | {"better_response_id": True, "safer_response_id": None},
        {"verdict_column": "better_response_id"},
        "has the values true, which may say in more than one way",
    ),
    "no verdict": (
        {"prompt": "Q", "response_j": "A", "response_k": "B"},
        {},
        r"no column says which of response_j and response_k is better; .* --columns chosen=response_j",
    ),
    "two prompts": (
        {"prompt": "Q", "question": "R", "chosen": "A", "rejected": "B"},
        {},
        "prompt and question may each be the prompt. Fix: --columns prompt=prompt, and unused=question",
    ),
    "no numbers": (
        {"prompt": "Q", "responses": ["A", "B"]},
        {},
        r'"responses" is a list of answers, and nothing says which is better',
    ),
    "two lists of scores": (
        {"prompt": "Q", "responses": ["A", "B"], "scores": [1, 2], "rewards": [2, 1]},
        {},
        "scores and rewards may each say how good the answers are",
    ),
    "text that nothing uses": (
        {"question": "Q", "chosen": "A", "rejected": "B", "rationale": "because"},
        {},
        r'"rationale" holds text, and question/chosen/rejected for "pair" data does not use it '
        r"\(question -> prompt; chosen, rejected \(as turns\)\)\. Fix: .* --columns unused=rationale",
    ),
    "images": ({"prompt": "Q", "chosen": "A", "rejected": "B", "images": ["a.png"]}, {}, '"images" holds image data'),
    "a role that is none": (
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"columns": "pompt=prompt"},
        '--columns has "pompt=prompt"; expected ROLE=COLUMN',
    ),
    "a column that is none": (
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"columns": "prompt=frage"},
        'has no column "frage", which --columns or a scorer names: its columns are prompt, chosen, rejected',
    ),
    "nearly the name": ({"prompt": "Q", "chosen": "A", "rejcted": "B"}, {}, '"rejcted" may be rejected'),
}


@pytest.mark.parametrize(("row", "options", "message"), ASKED.values(), ids=ASKED)
def test_what_cannot_be_decided_is_asked(tmp_path, row, options, message):
    if message is None:  # the names decide
        assert read(tmp_path, [row], "pair", **options)[0] == [("Q", "A", "B")]
        return
    with pytest.raises(DataError, match=message):
        read(tmp_path, [row], "pair", **options)


ANSWERED = {
    "verdict_column": (SAFE, {"verdict_column": "safer_response_id"}, ("Q", "A", "B")),
    "verdict_first": (
        {"prompt": "Q", "response_a": "A", "response_b": "B", "label": 0},
        {"verdict_first": "0"},
        ("Q", "A", "B"),
    ),
    "verdict_first, signed": (
        {"prompt": "Q", "response1": "B", "response2": "A", "overall_preference": 2},
        {"verdict_first": "-3,-2,-1"},
        ("Q", "A", "B"),
    ),
    "columns": (
        {"frage": "Q", "gut": "A", "schlecht": "B", "warum": "x"},
        {"columns": "prompt=frage, chosen=gut, rejected=schlecht, unused=warum"},
        TURNS,
    ),
    "columns of two answers": (
        {"frage": "Q", "eins": "A", "zwei": "B", "sieger": "eins"},
        {"columns": {"prompt": "frage", "first": "eins", "second": "zwei", "verdict": "sieger"}},
        TURNS,
    ),
    "score_column": (
        {"instruction": "Q"} | {"completions": [{"response": "B", "x": 1}, {"response": "A", "x": 2}]},
        {"score_column": "x"},
        TURNS,
    ),
}


@pytest.mark.parametrize(("row", "options", "expected"), ANSWERED.values(), ids=ANSWERED)
def test_and_the_answer_is_taken(tmp_path, row, options, expected):
    assert read(tmp_path, [row], "pair", **options)[0] == [expected]


def test_zero_among_signed_verdicts_is_a_tie(tmp_path):
    row = {"prompt": "Q", "response1": "A", "response2": "B", "overall_preference": 0}
    _, _, (skipped,) = read(tmp_path, [row], "pair", verdict_first="-3,-2,-1")
    assert skipped.reason == "a tie: neither answer is preferred"


BAD_ROWS = {
    "transcripts that differ before": (
        {"chosen": HH + " Ok.\n\nHuman: a\n\nAssistant: A", "rejected": HH + " No.\n\nHuman: a\n\nAssistant: B"},
        {"chosen": HH + " A", "rejected": HH + " B"},
        "chosen and rejected differ before the last turn",
    ),
    "a transcript without an answer's marker": (
        {"chosen": "\n\nHuman: hi", "rejected": HH + " B"},
        {"chosen": HH + " A", "rejected": HH + " B"},
        '"chosen" has no assistant\'s turn, as the transcripts of other rows have',
    ),
    "a verdict of its own": (
        ARENA | {"winner": "model_c"},
        ARENA | {"winner": "model_b"},
        "\"winner\" is 'model_c', which",
    ),
    "two systems": (
        {"system": "S", "messages": [{"role": "system", "content": "T"}, USER], "chosen": "A", "rejected": "B"},
        {"system": "S", "messages": [{"role": "system", "content": "S"}, USER], "chosen": "A", "rejected": "B"},
        '"system" and the first turn are two different system texts',
    ),
}


@pytest.mark.parametrize(("bad", "good", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_one_bad_row_is_one_skipped_row(tmp_path, bad, good, reason):
    records, _, (skipped,) = read(tmp_path, [good] * 12 + [bad], "pair")
    assert (len(records), skipped.row) == (12, "rows.jsonl:13")
    assert skipped.reason.startswith(reason)


def test_the_name_of_a_column_is_a_text_of_any_script(tmp_path):
    row = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    with pytest.raises(DataError, match='"问题" holds text'):
        read(tmp_path, [row | {"问题": "什么"}], "pair")
    assert read(tmp_path, [{"问题": "Q", "好": "A", "坏": "B"}], "pair", columns="prompt=问题,chosen=好,rejected=坏")[
        0
    ] == [TURNS]
    for rows in ([row, row, row | {"\ud800": "x"}], [row | {"\ud800": "x"}, row, row]):
        records, _, (skipped,) = read(tmp_path, rows, "pair")
        assert (len(records), skipped.reason) == (
            2,
            "the name of a column holds half a surrogate pair, not a Unicode text",
        )


def test_numbers_in_quotes_and_dates_are_no_text(tmp_path):
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "Unnamed: 0": "17", "day": "2026-11-28", "length": "3.5e2"}
    with pytest.raises(DataError, match='"length" holds text'):
        read(tmp_path, [row | {"length": "long"}], "pair")
    row["length"] = "350"
    assert read(tmp_path, [row], "pair")[1].ignored == ["Unnamed: 0", "day", "length"]


def test_columns_that_first_hold_text_late_stop_the_run(tmp_path):
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "more": None}
    rows = [row] * 1200
    assert len(read(tmp_path, rows, "pair")[0]) == 1200
    with pytest.raises(DataError, match=r'"more" holds text \(first in row rows.jsonl:1101\)'):
        read(tmp_path, [*rows[:1100], row | {"more": "text"}], "pair")
    with pytest.raises(DataError, match=r'"system" holds text \(first in row rows.jsonl:1101\)'):
        read(tmp_path, [*rows[:1100], row | {"system": "text"}], "pair")
    assert len(read(tmp_path, [*rows[:1100], row | {"annotator_id": "ann"}], "pair")[0]) == 1101
