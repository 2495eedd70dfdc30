"""Pairs in every form that people keep them in: what each becomes, by hand."""

import pytest

from rows import read

USER, GOOD, BAD = ({"role": role, "content": c} for role, c in (("user", "Q"), ("assistant", "A"), ("assistant", "B")))
HH = "\n\nHuman: Name a fruit that is red.\n\nAssistant:"
TURNS = ("user: Q", "assistant: A", "assistant: B")
ARENA = {"conversation_a": [USER, GOOD], "conversation_b": [USER, BAD], "model_a": "x", "model_b": "y", "turn": 1}
TREE = {
    "text": "Q",
    "role": "prompter",
    "replies": [
        {"text": "B", "role": "assistant", "rank": 1, "replies": []},
        {
            "text": "A",
            "role": "assistant",
            "rank": 0,
            "replies": [
                {"text": "R", "role": "prompter", "replies": [{"text": "C", "role": "assistant", "rank": None}]}
            ],
        },
    ],
}
FLAT = [
    {"message_id": "1", "parent_id": None, "text": "Q", "role": "prompter", "rank": None, "lang": "en"},
    {"message_id": "2", "parent_id": "1", "text": "B", "role": "assistant", "rank": 1, "lang": "en"},
    {"message_id": "3", "parent_id": "1", "text": "A", "role": "assistant", "rank": 0, "lang": "en"},
]
ULTRAFEEDBACK = {
    "source": "evol",
    "instruction": "Q",
    "models": ["x", "y", "z"],
    "correct_answers": ["None"],
    "incorrect_answers": ["No"],
    "completions": [
        {
            "model": "x",
            "response": "B",
            "overall_score": 2.5,
            "critique": "weak",
            "annotations": {"helpfulness": {"Rating": "2"}},
        },
        {"model": "y", "response": "A", "overall_score": 8.0, "critique": "good", "annotations": {}},
        {"model": "z", "response": "C", "overall_score": 2.5, "critique": "weak", "annotations": {}},
    ],
}
STEERED = {"correctness": 1, "coherence": 1, "complexity": 1, "verbosity": 1}

# name: (rows, what they become, the line that says which column became what)
FORMS = {
    "question": (
        [{"question": "Q", "chosen": "A", "rejected": "B"}],
        [TURNS],
        "question -> prompt; chosen, rejected (as turns)",
    ),
    "system, question": (
        [{"system": "S", "question": "Q", "chosen": "A", "rejected": "B"}],
        [("system: S|user: Q", "assistant: A", "assistant: B")],
        "question -> prompt; system -> first turn; chosen, rejected (as turns)",
    ),
    "instruction, input": (
        [{"instruction": "Q", "input": "I", "chosen": "A", "rejected": "B"}],
        [("user: Q\n\nI", "assistant: A", "assistant: B")],
        "instruction -> prompt; input -> below the prompt; chosen, rejected (as turns)",
    ),
    "history": (
        [{"query": "Q", "history": [["q", "a"]], "chosen": "A", "rejected": "B"}],
        [("user: q|assistant: a|user: Q", "assistant: A", "assistant: B")],
        "query -> prompt; history -> turns before the prompt; chosen, rejected (as turns)",
    ),
    "other spellings": (
        [{"Request": "Q", "chosenResponse": "A", "rejected-response": "B", "prompt_id": "7"}],
        [TURNS],
        "Request -> prompt; chosenResponse -> chosen; rejected-response -> rejected (as turns)",
    ),
    "winner, loser": (
        [{"prompt": "Q", "winner": "A", "loser": "B"}],
        [("Q", "A", "B")],
        "winner -> chosen; loser -> rejected; prompt",
    ),
    "good, bad": (
        [{"prompt": "Q", "good": "A", "bad": "B"}],
        [("Q", "A", "B")],
        "good -> chosen; bad -> rejected; prompt",
    ),
    "pos, neg": (
        [{"query": "Q", "pos": "A", "neg": "B"}],
        [TURNS],
        "query -> prompt; pos -> chosen; neg -> rejected (as turns)",
    ),
    "messages, rejected_response": (
        [{"messages": [USER, GOOD], "rejected_response": "B"}],
        [TURNS],
        "messages -> chosen; rejected_response -> rejected",
    ),
    "messages, rejected_messages": (
        [{"messages": [USER, GOOD], "rejected_messages": [USER, BAD]}],
        [TURNS],
        "messages -> chosen; rejected_messages -> rejected",
    ),
    "conversations, strings": (
        [{"conversations": [{"from": "human", "value": "Q"}], "chosen": "A", "rejected": "B"}],
        [TURNS],
        "conversations -> prompt; chosen, rejected (as turns)",
    ),
    "string prompt, answers as turns": (
        [{"prompt": "Q", "chosen": [GOOD], "rejected": [BAD]}],
        [TURNS],
        "prompt, chosen, rejected",
    ),
    "the same conversation three times": (
        [
            {
                "prompt": "Q",
                "messages": [USER, GOOD],
                "chosen": [USER, GOOD],
                "rejected": [USER, BAD],
                "score_chosen": 9.0,
                "score_rejected": 2.0,
            }
        ],
        [TURNS],
        "messages -> not used: it repeats chosen; score_chosen -> score; score_rejected -> score; "
        "prompt, chosen, rejected",
    ),
    "openai": (
        [
            {
                "input": {"messages": [USER], "tools": [{"name": "f"}], "parallel_tool_calls": True},
                "preferred_output": [GOOD],
                "non_preferred_output": [BAD, GOOD],
            }
        ],
        [TURNS],
        "input -> prompt; preferred_output -> chosen; non_preferred_output -> rejected; input.tools -> tools "
        "(as turns)",
    ),
    "rm-bench": (
        [{"prompt": "Q", "chosen": ["A", "C"], "rejected": ["B", "D"]}],
        [("Q", "A", "B"), ("Q", "C", "D")],
        "prompt, chosen, rejected",
    ),
    "rm-bench, other lengths": (
        [{"prompt": "Q", "chosen": ["A"], "rejected": ["B", "D"]}],
        [("Q", "A", "B"), ("Q", "A", "D")],
        "prompt, chosen, rejected",
    ),
    "transcripts": (
        [{"chosen": HH + " A good one is the apple.", "rejected": HH + " A good one is the ant."}],
        [(HH, " A good one is the apple.", " A good one is the ant.")],
        "chosen, rejected",
    ),
    "transcripts of two turns": (
        [
            {
                "chosen": HH + " Ok.\n\nHuman: Sure?\n\nAssistant: A",
                "rejected": HH + " Ok.\n\nHuman: Sure?\n\nAssistant: B",
            }
        ],
        [(HH + " Ok.\n\nHuman: Sure?\n\nAssistant:", " A", " B")],
        "chosen, rejected",
    ),
    "strings that begin alike": (
        [{"chosen": "The sky is blue.", "rejected": "The sky is blueish."}],
        [("The sky is", " blue.", " blueish.")],
        "chosen, rejected",
    ),
    "strings with a question": (
        [{"chosen": "What is red? The apple is.", "rejected": "What is red? The ant is."}],
        [("What is red?", " The apple is.", " The ant is.")],
        "chosen, rejected",
    ),
    "strings with a line break": (
        [{"chosen": "Name one\nThe apple.", "rejected": "Name one\nThe ant."}],
        [("Name one\n", "The apple.", "The ant.")],
        "chosen, rejected",
    ),
    "strings that share no word": (
        [{"chosen": "apple", "rejected": "ant"}],
        [("", "apple", "ant")],
        "chosen, rejected",
    ),
    "the prompt repeated": (
        [{"prompt": "Q: hi A:", "chosen": "Q: hi A: yes", "rejected": "Q: hi A: no"}],
        [("Q: hi A:", " yes", " no")],
        "prompt, chosen, rejected",
    ),
    "the prompt's letters in a longer word": (
        [{"prompt": "The", "chosen": "Then", "rejected": "Theme"}],
        [("The", "Then", "Theme")],
        "prompt, chosen, rejected",
    ),
    "a question repeated": (
        [{"question": "Why?", "chosen": "Why? A", "rejected": "Why? B"}],
        [("user: Why?", "assistant:  A", "assistant:  B")],
        "question -> prompt; chosen, rejected (as turns)",
    ),
    "winner of a and b": (
        [
            {"question": "Q", "response_a": "A", "response_b": "B", "winner": "A"},
            {"question": "Q", "response_a": "B", "response_b": "A", "winner": "response_b"},
        ],
        [TURNS, TURNS],
        "question -> prompt; response_a -> first answer; response_b -> second answer; winner -> verdict (as turns)",
    ),
    "numbers 1 and 2": (
        [{"prompt": "Q", "output_1": "B", "output_2": "A", "preference": 2}],
        [("Q", "A", "B")],
        "output_1 -> first answer; output_2 -> second answer; preference -> verdict; prompt",
    ),
    "numbers 0 and 1 of answers 0 and 1": (
        [{"prompt": "Q", "response_0": "B", "response_1": "A", "better_response_id": 1}],
        [("Q", "A", "B")],
        "response_0 -> first answer; response_1 -> second answer; better_response_id -> verdict; prompt",
    ),
    "a real preference": (
        [
            {"instruction": "Q", "output_1": "A", "output_2": "B", "preference": 1.25},
            {"instruction": "Q", "output_1": "B", "output_2": "A", "preference": 1.9},
        ],
        [TURNS, TURNS],
        "instruction -> prompt; output_1 -> first answer; output_2 -> second answer; preference -> verdict (as turns)",
    ),
    "annotators": (
        [{"prompt": "Q", "output_1": "B", "output_2": "A", "preference": [2, 1, 2]}],
        [("Q", "A", "B")],
        "output_1 -> first answer; output_2 -> second answer; preference -> verdict; prompt",
    ),
    "an arena": (
        [ARENA | {"winner": "model_a"}],
        [TURNS],
        "conversation_a -> first answer; conversation_b -> second answer; winner -> verdict",
    ),
    "an arena, three columns": (
        [
            {
                "prompt": "Q",
                "response_a": "B",
                "response_b": "A",
                "winner_model_a": 0,
                "winner_model_b": 1,
                "winner_tie": 0,
            }
        ],
        [("Q", "A", "B")],
        "response_a -> first answer; response_b -> second answer; winner_model_a -> verdict; "
        "winner_model_b -> verdict; winner_tie -> verdict; prompt",
    ),
    "two answers and two scores": (
        [{"prompt": "Q", "response_a": "B", "response_b": "A", "score_a": 1.5, "score_b": 2}],
        [("Q", "A", "B")],
        "response_a -> first answer; response_b -> second answer; score_a -> verdict; score_b -> verdict; prompt",
    ),
    "a prompt that ends with the answer": (
        [{"messages": [USER, GOOD], "chosen": "A", "rejected": "B"}],
        [TURNS],
        "messages -> prompt; chosen, rejected (as turns)",
    ),
    "ultrafeedback": (
        [ULTRAFEEDBACK],
        [("user: Q", "assistant: A", "assistant: C")],
        "instruction -> prompt; completions -> answers, by their overall_score (as turns)",
    ),
    "nectar": (
        [
            {
                "prompt": HH,
                "answers": [{"answer": "B", "model": "x", "rank": 2.0}, {"answer": "A", "model": "y", "rank": 1.0}],
                "turns": 1,
                "num_responses": 2,
                "source": ["s"],
                "good_natured": True,
            }
        ],
        [(HH, "A", "B")],
        "answers -> answers, by their rank; prompt",
    ),
    "responses and scores": (
        [{"prompt": "Q", "responses": ["B", "A", "C"], "scores": [1, 3, 2]}],
        [("Q", "A", "B")],
        "responses -> answers; prompt, scores",
    ),
    "responses and an index": (
        [{"prompt": "Q", "responses": ["A", "C", "B"], "chosen_index": 0}],
        [("Q", "A", "B")],
        "responses -> answers; chosen_index -> index of the best answer; prompt",
    ),
    "helpsteer": (
        [
            {"prompt": "Q", "response": "B", "helpfulness": 1} | STEERED,
            {"prompt": "Q", "response": "A", "helpfulness": 4} | STEERED,
        ],
        [("Q", "A", "B")],
        "response -> completion; helpfulness -> score; rows of one prompt are its answers; prompt",
    ),
    "a tree": ([{"message_tree_id": "1", "prompt": TREE}], [TURNS], "prompt -> tree of turns"),
    "messages of a tree": (
        FLAT,
        [TURNS],
        "text -> turn; rank -> rank of the answer; message_id -> id; parent_id -> id of the turn before; role",
    ),
}


@pytest.mark.parametrize(("rows", "expected", "line"), FORMS.values(), ids=FORMS)
def test_each_form_becomes_these_pairs_and_says_so(tmp_path, rows, expected, line):
    records, reading, _ = read(tmp_path, rows, "pair")
    assert records == expected
    assert reading.form.roles == line


def test_pairs_of_a_list_by_each_rule(tmp_path):
    rows = [{"prompt": "Q", "responses": ["a", "b", "c"], "scores": [1, 3, 1]}]
    assert read(tmp_path, rows, "pair")[0] == [("Q", "b", "c")]  # of the worst, the last
    assert read(tmp_path, rows, "pair", pairs="all")[0] == [("Q", "b", "a"), ("Q", "b", "c")]
    drawn = {read(tmp_path, rows, "pair", pairs="best_vs_random", seed=seed)[0][0] for seed in range(8)}
    assert drawn == {("Q", "b", "a"), ("Q", "b", "c")}


def test_a_real_preference_keeps_how_sure_it_is(tmp_path):
    from prefuse.engine.data.forms import read_records

    row = {"prompt": "Q", "output_1": "A", "output_2": "B"}
    read(tmp_path, [row | {"preference": p} for p in (1.25, 1.0, 2.0)], "pair")
    records = list(read_records(str(tmp_path / "rows.jsonl"), "pair").outcomes)
    assert [record.weight for record in records] == [0.5, None, None]


SET_ASIDE = {
    "tie": (ARENA | {"winner": "tie (bothbad)"}, "a tie: neither answer is preferred"),
    "no verdict": (ARENA | {"winner": None}, 'no verdict in "winner"'),
    "annotators of two minds": (ARENA | {"winner": ["model_a", "model_b"]}, "a tie: neither answer is preferred"),
}


@pytest.mark.parametrize(("row", "reason"), SET_ASIDE.values(), ids=SET_ASIDE)
def test_ties_are_set_aside_by_rule_and_counted(tmp_path, row, reason):
    records, _, (skipped,) = read(tmp_path, [ARENA | {"winner": "model_a"}, row], "pair")
    assert (len(records), skipped.reason, skipped.by_rule) == (1, reason, True)


def test_lists_that_tie_or_have_one_answer_are_set_aside(tmp_path):
    row = {"prompt": "Q", "responses": ["a", "b"], "scores": [1, 2]}
    rows = [row, row | {"scores": [1, 1]}, row | {"responses": ["a"], "scores": [1]}, row | {"scores": [1]}]
    _, _, skipped = read(tmp_path, rows, "pair")
    assert [(skip.reason, skip.by_rule) for skip in skipped] == [
        ("a tie: all its answers have one score", True),
        ("one answer: nothing to compare it with", True),
        ('"scores" must be a list of 2 numbers, one for each answer', False),
    ]


def test_what_was_decided_on_the_way_is_counted(tmp_path):
    row = {"prompt": "Q: hi A:", "chosen": "Q: hi A: yes", "rejected": "Q: hi A: no"}
    _, reading, _ = read(tmp_path, [row, row, row | {"chosen": "yes", "rejected": "no"}], "pair")
    assert reading.form.tally.lines == ["rows whose prompt stood at the start of both sides, and is cut off there: 2"]
    _, reading, _ = read(tmp_path, [{"chosen": "The sky is blue.", "rejected": "The sky is green."}], "pair")
    assert reading.form.tally.lines == [
        "prompts are what both sides share up to a whole word, for no mark says where the answer begins: 1"
    ]
