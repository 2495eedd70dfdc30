"""Files of forms that nobody named: scores, verdicts, rankings, marks and transcripts in other spellings, by hand.

Each was refused without need, or read wrong, once; the row beside it says what is right.
"""

import pytest

from prefuse.engine.data import DataError, load_examples
from prefuse.engine.data.forms import read_records
from rows import read, write_lines
from tiny_tokenizer import CHATML, tiny_tokenizer


def turn(role, content):
    return {"role": role, "content": content}


USER, GOOD, BAD = turn("user", "Q"), turn("assistant", "A"), turn("assistant", "B")
RAW, TURNED = ("Q", "A", "B"), ("Q", "B", "A")
TWO = {"prompt": "Q", "answer_a": "A", "answer_b": "B"}
NUMBERED = {"prompt": "Q", "response_1": "A", "response_2": "B"}
ROW = {"prompt": "Q", "chosen": "A", "rejected": "B"}


def beside(rows, column, *values):
    return [rows | {column: value} for value in values]


VERDICTS = {
    "a probability, high": (beside(TWO, "preference", 0.8, 0.1, 0.5), {"verdict_first": ">0.5"}, [RAW, TURNED]),
    "a probability, low": (beside(TWO, "preference", 0.8, "0.1"), {"verdict_first": "<0.5"}, [TURNED, RAW]),
    "a signed scale": (beside(TWO, "preference", -2, 3, 0), {"verdict_first": "<0"}, [RAW, TURNED]),
    "C is a tie": (beside(TWO, "verdict", "A", "[[C]]", "[[B]]"), {}, [RAW, TURNED]),
    "the rest are ties": (
        beside(TWO, "verdict", "yes", "no", "skip"), {"verdict_first": "yes", "verdict_second": "no"}, [RAW, TURNED],
    ),
    "a scale of five": (
        beside(NUMBERED, "preference", 1, 2, 3, 5), {"verdict_first": "1,2", "verdict_second": "4,5"},
        [RAW, RAW, TURNED],
    ),
    "the winner's model": (
        [TWO | {"model_a": a, "model_b": b, "winner": "x"} for a, b in (("y", "x"), ("x", "y"))], {},
        [TURNED, RAW],
    ),
    "the better text": (beside(NUMBERED, "chosen", "B"), {}, [TURNED]),
    "ranks of two": ([TWO | {"rank_a": 2, "rank_b": 1}], {}, [TURNED]),
    "left and right": (beside(NUMBERED, "choice", "left", "right"), {}, [RAW, TURNED]),
    "an answer alone beside a conversation": (
        [{"chosen": [USER, GOOD], "rejected": [BAD]}], {}, [("user: Q", "assistant: A", "assistant: B")],
    ),
    "scores of two out of five": ([TWO | {"score_a": "2/5", "score_b": "4/5"}], {}, [TURNED]),
}  # fmt: skip
LISTS = {
    "keyed by model": {"responses": {"gpt-4": "A", "m": "B"}, "scores": {"m": 3, "gpt-4": 9}},
    "keyed, objects": {"responses": {"gpt-4": {"text": "A", "score": 9}, "m": {"text": "B", "score": 2}}},
    "keyed, the winner's key": {"responses": {"gpt-4": "B", "m": "A"}, "winner": "m"},
    "keyed, an order of keys": {"responses": {"gpt-4": "B", "m": "A"}, "ranking": ["m", "gpt-4"]},
    "keyed, with a null": {"responses": {"x": "A", "y": None, "z": "B"}, "scores": {"x": 3, "y": None, "z": 1}},
    "names beside the list": {"models": ["x", "y"], "responses": ["B", "A"], "scores": {"x": 1, "y": 5}},
    "letters of columns": {"response_a": "A", "response_b": "C", "response_c": "B", "ranking": "A>B>C"},
    "letters of a list": {"responses": ["B", "A", "C"], "ranking": "B > C > A"},
    "numbers of a list": {"responses": ["B", "A", "C"], "ranking": "2>3>1"},
    "the number of a column": {"answer_1": "B", "answer_2": "A", "answer_3": "B", "best_response": 2},
    "a list of letters": {"responses": ["B", "A", "C"], "ranking": ["B", "C", "A"]},
    "letters, the worst first": {"responses": ["B", "A", "C"], "ranking": "A<C<B"},
    "three scores": {"answer_1": "B", "answer_2": "A", "answer_3": "C", "score_1": 1, "score_2": 3, "score_3": 2},
    "the best of three": {"response_a": "B", "response_b": "A", "response_c": "B", "winner": "response_b"},
    "the best one's text": {"responses": ["A", "B"], "best_response": "A"},
    "two places": {"responses": ["C", "A", "B"], "chosen": 2, "rejected": 3},
    "two places from 0": {"responses": ["A", "C", "B"], "chosen_index": 0, "rejected_index": 2},
    "turns": {"responses": [[GOOD], [BAD]], "scores": [2, 1]},
    "a null among them": {"responses": ["A", None, "B"], "scores": [3, 2, 1]},
    "ranks": {"responses": ["B", "A", "C"], "ranks": [3, 1, 2]},
    "stars": {"responses": ["B", "A"], "ratings": ["★☆☆☆☆", "★★★★☆"]},
}  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "expected"), VERDICTS.values(), ids=VERDICTS)
def test_verdicts(tmp_path, rows, options, expected):
    records, _, skipped = read(tmp_path, rows, "pair", **options)
    assert records == expected
    assert len(records) + len(skipped) == len(rows)


@pytest.mark.parametrize("row", LISTS.values(), ids=LISTS)
def test_lists_of_answers(tmp_path, row):
    records = read(tmp_path, [{"prompt": "Q"} | row], "pair")[0]
    assert [tuple(text.removeprefix("user: ").removeprefix("assistant: ") for text in texts) for texts in records] == [
        RAW
    ]


def test_of_several_answers_none_may_be_the_best(tmp_path):
    row = {"prompt": "Q", "response_a": "A", "response_b": "B", "response_c": "C"}
    records, _, (skipped,) = read(tmp_path, beside(row, "winner", "a", "tie"), "pair")
    assert (len(records), skipped.reason, skipped.by_rule) == (1, "a tie: no answer is preferred", True)


def test_aspects_of_a_row_are_no_scores_of_its_answers(tmp_path):
    answers = [{"text": "B", "score": 1}, {"text": "A", "score": 2}]
    row = {"prompt": "Q", "answers": answers, "ratings": {"fluency": 3, "tone": 1}}
    assert read(tmp_path, [row], "pair")[0] == [RAW]


def test_how_sure_a_probability_is_weighs_the_row(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", beside(TWO, "preference", 0.75, 0.0))
    records = list(read_records(path, "pair", options=read_options(verdict_first=">0.5")).outcomes)
    assert [record.weight for record in records] == [0.5, None]


def read_options(**options):
    from prefuse.engine.data.forms import ReadOptions

    return ReadOptions(**options)


def test_lower_is_better_where_it_is_told(tmp_path):
    row = {"prompt": "Q", "responses": ["B", "A"], "losses": [2.0, 0.1]}
    records, reading, _ = read(tmp_path, [row], "pair", score_column="-losses")
    assert (records, reading.form.roles) == (
        [RAW],
        "responses -> answers; losses -> scores, the lowest is the best; prompt",
    )
    rows = [{"prompt": "Q", "response": text, "toxicity": n} for text, n in (("A", 0.1), ("B", 0.9), ("C", 0.5))]
    told = {"score_column": "-toxicity", "good_from": -0.2, "bad_to": -0.8}
    assert read(tmp_path, rows, "labelled", **told)[0] == [("Q", "A", True), ("Q", "B", False)]
    ranked = [{"prompt": "Q", "response": text, "rank": n} for text, n in (("B", 2), ("A", 1))]
    assert read(tmp_path, ranked, "pair")[0] == [RAW]


ANSWER = {"question": "Q", "answer": "A"}
LABELS = {
    "4/5": (beside(ANSWER, "rating", "4/5", "1/5"), {"good_from": 4, "bad_to": 2}, [True, False]),
    "4 out of 5": (beside(ANSWER, "rating", "4 out of 5", "1 out of 5"), {"good_from": 4, "bad_to": 2}, [True, False]),
    "stars": (beside(ANSWER, "stars", "5 stars", "1 star"), {"good_from": 4, "bad_to": 2}, [True, False]),
    "percent": (beside(ANSWER, "score", "85%", "20%"), {"good_from": 60, "bad_to": 40}, [True, False]),
    "no scale among scales": (beside(ANSWER, "score", "85%", "70%", 0.85), {"good_from": 60, "bad_to": 40}, [True] * 2),
    "five full stars": (beside(ANSWER, "stars", "★★★★☆", "★★★★★", "★☆☆☆☆"), {"good_from": 5}, [True]),
    "another scale is a bad row": (beside(ANSWER, "rating", "4/5", "4/5", "4/10"), {"good_from": 4}, [True, True]),
    "votes": (beside(ANSWER, "vote", 1, -1, 0), {"score_column": "vote", "good_from": 1, "bad_to": -1}, [True, False]),
    "a probability": (beside(ANSWER, "label", 0.9, 0.1), {"score_column": "label", "good_from": 0.5}, [True]),
    "status": (beside(ANSWER, "status", "Approved", "rejected"), {}, [True, False]),
    "1.0 in quotes": (beside(ANSWER, "label", "1.0", "0.0"), {}, [True, False]),
    "a thumb with a skin": (beside(ANSWER, "label", "👍🏽", "👎"), {}, [True, False]),
    "0 and 1 of a bad flag": (beside(ANSWER, "toxic", 0, 1), {}, [True, False]),
    "words of a bad flag": (beside(ANSWER, "flagged", "False", "True"), {}, [True, False]),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "options", "expected"), LABELS.values(), ids=LABELS)
def test_labels(tmp_path, rows, options, expected):
    assert [record[-1] for record in read(tmp_path, rows, "labelled", **options)[0]] == expected


MARKED = {  # rows of which the last one is marked as bad
    "sft": ("sft", beside({"prompt": "Q", "completion": "A"}, "status", "done", "rejected")),
    "pairs": ("pair", beside(ROW, "flagged", False, True)),
    "pairs, a status": ("pair", beside(ROW, "review_status", "fine", "Discarded")),
    "pairs, approved": ("pair", beside(ROW, "approved", True, False)),
    "turns": ("sft", beside({"messages": [USER, GOOD]}, "state", "final", "deleted")),
    "a second flag": ("labelled", beside(ANSWER | {"approved": True}, "toxic", False, True)),
    "rows of one prompt": (
        "pair", [ANSWER | {"score": n, "answer": "xyz"[n], "status": ("", "", "spam")[n]} for n in range(3)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "rows"), MARKED.values(), ids=MARKED)
def test_rows_that_are_marked_as_bad_are_set_aside_and_counted(tmp_path, kind, rows):
    records, reading, (skipped,) = read(tmp_path, rows, kind)
    assert (len(records), skipped.by_rule, skipped.row) == (1, True, f"rows.jsonl:{len(rows)}")
    assert "z" not in records[0]
    assert "rows that it marks as bad are set aside" in reading.form.roles


def test_a_column_that_judges_late_stops_the_run_and_may_be_unused(tmp_path):
    row = {"prompt": "Q", "completion": "A"}
    for first in ({}, {"flagged": None}):
        rows = [row | first] * 1000 + [row | {"flagged": True}]
        with pytest.raises(
            DataError, match=r'"flagged" says how good a row is, and has its first value in row .*:1001'
        ):
            read(tmp_path, rows, "sft")
        assert len(read(tmp_path, rows, "sft", columns="unused=flagged")[0]) == 1001
    rows = [row] * 1000 + [row | {"why": "words"}]
    assert len(read(tmp_path, rows, "sft", columns="unused=why")[0]) == 1001
    assert len(read(tmp_path, [row | {"why": "words"}] * 1001, "sft", columns="unused=why")[0]) == 1001
    marked = [row | {"status": None}] * 1000 + [row | {"status": "rejected"}]
    assert len(read(tmp_path, marked, "sft")[0]) == 1000


def test_a_status_of_plain_words_says_nothing(tmp_path):
    rows = beside({"prompt": "Q", "completion": "A"}, "status", "no", "yes")
    assert read(tmp_path, rows, "sft")[0] == [("Q", "A")] * 2


def test_a_bad_answer_stays_where_it_is_asked_for(tmp_path):
    row = {"prompt": "Q", "completion": "A"}
    rows = [row | {"label": True, "flagged": False}, row | {"label": False, "flagged": True}]
    assert [label for *_, label in read(tmp_path, rows, "labelled")[0]] == [True, False]


HH = "\n\nHuman: q\n\nAssistant: a\n\nHuman: Q\n\nAssistant: A"
TURN = "<|im_start|>{}\n{}<|im_end|>\n"
VICUNA = "A chat between a curious user and an assistant."
SPOKEN = {
    "Human and Assistant": ({"transcript": HH}, "user: q|assistant: a|user: Q"),
    "### Human": ({"chat": "### Human: Q### Assistant: A"}, "user: Q"),
    "words before": ({"chat": "Be brief.\n\n### Instruction:\nQ\n\n### Response:\nA"}, "system: Be brief.|user: Q"),
    "functions": (
        {"system": "S", "chat": "USER: Q\n\nASSISTANT: f() <|endoftext|>\n\nFUNCTION RESPONSE: 1\n\nASSISTANT: A"},
        "system: S|user: Q|assistant: f()|tool: 1",
    ),
    "chatml": (
        {"conversation": "".join(map(TURN.format, ("system", "user", "assistant"), "SQA"))}, "system: S|user: Q",
    ),
    "in brackets": ({"conversation": "[USER] Q\n[ASSISTANT] A"}, "user: Q"),
    "Llama 2": ({"conversation": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s>"}, "system: S|user: Q"),
    "Vicuna": ({"conversation": f"{VICUNA} USER: q ASSISTANT: a</s>USER: Q ASSISTANT: A</s>"},
               f"system: {VICUNA}|user: q|assistant: a|user: Q"),
    "Vicuna without ends": ({"chat": "USER: q ASSISTANT: a USER: Q ASSISTANT: A"}, "user: q|assistant: a|user: Q"),
    "Vicuna, in lines": (
        {"chat": "USER: q\nASSISTANT: a</s>USER: Q\nASSISTANT: A</s>"}, "user: q|assistant: a|user: Q",
    ),
    "Vicuna, a system's mark": ({"chat": "SYSTEM: S USER: Q ASSISTANT: A"}, "system: S|user: Q"),
    "HH in one line": ({"chat": "Human: q Assistant: a Human: Q Assistant: A"}, "user: q|assistant: a|user: Q"),
    "words that look like marks": (
        {"chat": "USER: q\nASSISTANT: say USER: x ASSISTANT: y\nUSER: Q\nASSISTANT: A"},
        "user: q|assistant: say USER: x ASSISTANT: y|user: Q",
    ),
    "a label within": ({"chat": "User: Q\nAnswer: no\nUser: R\nAnswer: A"}, "user: Q|assistant: no|user: R"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "prompt"), SPOKEN.values(), ids=SPOKEN)
def test_transcripts_in_one_column_are_cut_into_turns(tmp_path, row, prompt):
    records, reading, _ = read(tmp_path, [row], "sft")
    assert records == [(prompt, "assistant: A")]
    assert "turns, cut at its marks" in reading.form.roles


def test_a_text_is_a_text_and_says_that_it_is_a_transcript(tmp_path):
    records, reading, _ = read(tmp_path, [{"text": HH}], "sft")
    assert records == [("", HH)]
    (line,) = reading.form.tally.lines
    assert "--columns messages=text" in line
    assert read(tmp_path, [{"text": HH}], "sft", columns="messages=text")[0] == [
        ("user: q|assistant: a|user: Q", "assistant: A")
    ]


def test_transcripts_of_pairs_are_cut_at_their_own_mark(tmp_path):
    sides = {
        side: f"\n\nHuman: Q\n\nAssistant: so\nAnswer: {text}" for side, text in (("chosen", "A"), ("rejected", "B"))
    }
    prompt, *answers = read(tmp_path, [sides], "pair")[0][0]
    assert (prompt, answers) == ("\n\nHuman: Q\n\nAssistant:", [" so\nAnswer: A", " so\nAnswer: B"])


def test_a_mark_within_a_line_counts_only_where_speakers_take_turns(tmp_path):
    for text in (
        "USER: q USER: r ASSISTANT: a",
        "ASSISTANT: a USER: q",
        "Say User: q Assistant: a",
        "USER: q Assistant: a ASSISTANT: b",
        "USER:q ASSISTANT:a",
    ):
        with pytest.raises(DataError, match="a column is missing"):
            read(tmp_path, [{"chat": text}], "sft")


def test_pairs_in_one_line_are_cut_behind_the_last_mark(tmp_path):
    sides = {side: f"{VICUNA} USER: Q ASSISTANT: so {text}" for side, text in (("chosen", "A"), ("rejected", "B"))}
    prompt, *answers = read(tmp_path, [sides], "pair")[0][0]
    assert (prompt, answers) == (f"{VICUNA} USER: Q ASSISTANT:", [" so A", " so B"])


USE = {"type": "tool_use", "id": "t1", "name": "add", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "2"}]}
SCHEMA = {"type": "object"}


def test_claude_s_blocks_are_calls_and_their_results(tmp_path):
    said = {"type": "text", "text": "so"}
    turns = [USER, turn("assistant", [said, USE]), turn("user", [RESULT, {"type": "text", "text": "and?"}]), GOOD]
    row = {"messages": turns, "tools": [{"name": "add", "description": "D", "input_schema": SCHEMA}]}
    (record,) = read_records(write_lines(tmp_path / "rows.jsonl", [row]), "sft").outcomes
    call = {"id": "t1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    assert record.prompt == [
        USER, turn("assistant", "so") | {"tool_calls": [call]}, turn("tool", "2") | {"tool_call_id": "t1"},
        turn("user", "and?"),
    ]  # fmt: skip
    function = {"name": "add", "description": "D", "parameters": SCHEMA}
    assert record.tools == [{"type": "function", "function": function}]
    late = {"messages": [USER, turn("assistant", [USE, said])]}
    assert read(tmp_path, [late], "sft")[2][0].reason.startswith("an assistant's turn has text behind")


def test_turns_that_are_not_learned(tmp_path):
    flagged = [USER, BAD | {"toxic": True}, USER, GOOD | {"toxic": False}]
    (record,) = read_records(write_lines(tmp_path / "rows.jsonl", [{"messages": flagged}]), "sft").outcomes
    assert [turn.get("train") for turn in record.prompt + record.sides["completion"]] == [None, False, None, None]
    row = {"messages": [USER, BAD | {"loss": False}, USER, GOOD | {"loss": True}]}  # ms-swift's key
    path, tokenizer = write_lines(tmp_path / "rows.jsonl", [row]), tiny_tokenizer(chat_template=CHATML)
    (example,) = load_examples(path, "sft", tokenizer, 64).examples
    assert (tokenizer.decode(example.completion), example.learned) == ("A<|im_end|>", None)


def test_functions_are_tools(tmp_path):
    function = {"name": "add", "parameters": SCHEMA}
    row = {"messages": [USER, GOOD], "functions": [function]}
    (record,) = read_records(write_lines(tmp_path / "rows.jsonl", [row]), "sft").outcomes
    assert record.tools == [{"type": "function", "function": function}]


NAMED = {
    "user, assistant": ({"system": "S", "user": "Q", "assistant": "A"}, {}, ("system: S|user: Q", "assistant: A")),
    "source, target": ({"source": "Q", "target": "A"}, {}, ("user: Q", "assistant: A")),
    "two messages": (
        {"message_1": "Q", "message_2": "A"}, {"columns": "prompt=message_1,completion=message_2"},
        ("user: Q", "assistant: A"),
    ),
    "a label that is a text": ({"prompt": "Q", "label": "A"}, {"columns": "completion=label"}, ("Q", "A")),
    "a dialogue of names": (
        {"dialogue": "Amy: hi\nJo: ho", "summary": "A"}, {"columns": "prompt=dialogue,completion=summary"},
        ("user: Amy: hi\nJo: ho", "assistant: A"),
    ),
    "a conversation, and its parts": (
        {"conversations": [USER, GOOD], "instruction": "Q", "response": "A"}, {}, ("user: Q", "assistant: A"),
    ),
    "other answers beside a conversation": (
        {"problem": "Q", "generations": ["x y"], "messages": [USER, GOOD]}, {"columns": "unused=generations"},
        ("user: Q", "assistant: A"),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "options", "expected"), NAMED.values(), ids=NAMED)
def test_demonstrations(tmp_path, row, options, expected):
    assert read(tmp_path, [row], "sft", **options)[0] == [expected]


ASKED = {
    "a probability": ("pair", beside(TWO, "preference", 0.8), {}, '--verdict_first ">0.5" if a high'),
    "values beside the one told": ("pair", beside(NUMBERED, "label", 1, 2, 3), {"verdict_first": "1"}, "_second"),
    "keyed, no numbers": ("pair", [{"prompt": "Q", "responses": {"x": "A", "y": "B"}}], {}, "nothing says which"),
    "sides in an object": (
        "pair", [{"prompt": "Q", "responses": {"chosen": "A", "rejected": "B"}}], {}, "responses.chosen, resp",
    ),
    "swapped": ("pair", beside(ROW, "swapped", True, False), {}, "unused=swapped if they stand as they should"),
    "a verdict beside the sides": ("pair", beside(ROW, "preference", 1, 2), {}, "are to be swapped"),
    "ranks of demonstrations": ("sft", beside(ANSWER, "rank", 1, 2), {}, "--good_from -1 --bad_to -3"),
    "a role that nothing takes": ("pair", [ROW | {"title": "x"}], {"columns": "label=title"}, "has no such role"),
    "a weight of joined rows": (
        "pair", beside(ANSWER | {"w": 1}, "score", 1, 2), {"columns": "weight=w"}, "has no such role",
    ),
    "a source that may be the prompt": ("sft", [{"prompt": "Translate", "source": "Q", "target": "A"}], {}, "each be"),
    "a title of many words": ("sft", [ANSWER | {"title": "word " * 30}], {}, '"title" holds text'),
    "a task that is an instruction": ("sft", [{"task": "Put it into French"} | ANSWER], {}, '"task" h'),
    "functions that are no tools": ("sft", [{"messages": [USER, GOOD], "functions": ["a b"]}], {}, '"functions" h'),
    "other answers": ("sft", [{"problem": "Q", "generations": ["x"], "messages": [USER, GOOD]}], {}, '"generations" h'),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "rows", "options", "message"), ASKED.values(), ids=ASKED)
def test_what_is_asked(tmp_path, kind, rows, options, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, rows, kind, **options)


def test_a_prompt_that_one_side_alone_repeats_is_counted(tmp_path):
    row = {"prompt": "Name a red fruit:", "chosen": "Name a red fruit: A", "rejected": " B"}
    records, reading, _ = read(tmp_path, [row], "pair")
    assert records == [tuple(row.values())]
    assert reading.form.tally.lines == ["rows whose prompt stands at the start of one side alone, and stays there: 1"]


def test_pairs_whose_scores_say_the_opposite_are_counted(tmp_path):
    rows = [ROW | {"chosen_score": 1, "rejected_score": n} for n in (0, 5, None)]
    for needs in ((), ("scores",)):
        _, reading, _ = read(tmp_path, rows, "pair", needs=needs)
        assert reading.form.tally.lines == ["rows with a lower chosen_score than rejected_score, kept as they stand: 1"]


def test_rows_of_one_prompt_are_all_counted(tmp_path):
    rows = [ANSWER | {"question": q, "score": n, "answer": str(n)} for q, n in (("Q", 1), ("Q", 2), ("R", 3), ("R", 3))]
    records, _, skipped = read(tmp_path, rows, "pair")
    assert records == [("user: Q", "assistant: 2", "assistant: 1")]
    assert [skip.row for skip in skipped] == ["rows.jsonl:3", "rows.jsonl:4"]


def test_scored_rows_that_share_no_prompt_are_no_pairs(tmp_path):
    rows = [ANSWER | {"question": f"Q{n}", "score": n} for n in range(3)]
    with pytest.raises(DataError, match='or use it as "labelled" data'):
        read(tmp_path, rows, "pair")
