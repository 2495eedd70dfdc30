"""`prefuse eval --scorer`: win rates of sampled and of given answers, their files, and what is refused."""

import json

import pytest

from prefuse.engine import cli
from prefuse.engine.score import answers as files
from tiny_run import PAIRS, save_model, write_rows

LONGER = """
def longer(prompts, completions, solution, **kwargs):
    return [None if s == "skip" else float(len(c)) for c, s in zip(completions, solution)]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    rows = [{"prompt": p["prompt"], "solution": "skip" if i == 2 else "it"} for i, p in enumerate(PAIRS)]
    (folder / "rewards.py").write_text(LONGER)
    return {
        "model": save_model(folder / "model"),
        "other": save_model(folder / "other", seed=1),
        "prompts": write_rows(folder / "prompts.jsonl", rows),
        "function": f"{folder / 'rewards.py'}:longer",
    }


def evaluated(made, tmp_path, *options, models=True):
    out = tmp_path / "out.json"
    words = ["eval", "--output_file", str(out), "--device", "cpu", "--max_new_tokens", "8"]
    if models:
        words += ["--model_name_or_path", made["model"], "--ref_model_name_or_path", made["other"]]
        words += ["--eval_dataset", made["prompts"]]
    assert cli.main([*words, *options]) == 0
    return json.loads(out.read_text())


def refused(capsys, *words):
    assert cli.main(["eval", *words]) == 2
    return capsys.readouterr().err


def test_win_rate_of_two_models_by_a_function(made, tmp_path, capsys):
    folder = tmp_path / "answers"
    found = evaluated(made, tmp_path, "--scorer", made["function"], "--answers_dir", str(folder), "--temperature", "1")
    own = json.loads((folder / "model_outputs.json").read_text())
    other = json.loads((folder / "reference_outputs.json").read_text())
    notes = json.loads((folder / "annotations.json").read_text())
    assert [row["instruction"] for row in own] == [pair["prompt"] for pair in PAIRS]
    wins = [(len(a["output"]) > len(b["output"])) + 0.5 * (len(a["output"]) == len(b["output"]))
            for a, b in zip(own, other, strict=True)]  # fmt: skip
    assert [row["preference"] for row in notes] == [None if i == 2 else 1 + w for i, w in enumerate(wins)]
    assert notes[0]["output_1"] == other[0]["output"]
    assert notes[0]["output_2"] == own[0]["output"]
    kept = [w for i, w in enumerate(wins) if i != 2]
    assert found["win_rate"] == pytest.approx(sum(kept) / len(kept))
    assert found["without_verdict"] == 1
    assert found["comparisons"] == len(PAIRS) - 1
    assert found["win_rate_low"] <= found["win_rate"] <= found["win_rate_high"]
    assert found["length"] == pytest.approx(sum(len(row["output"]) for row in own) / len(own))
    assert found["score"] == pytest.approx(sum(len(r["output"]) for i, r in enumerate(own) if i != 2) / (len(own) - 1))
    said = capsys.readouterr().out
    assert "no score for 2, none given: prompts.jsonl:3" in said

    # Its own files, read again, give the same numbers; so do those of MT-Bench and Arena-Hard.
    alpaca = [
        "--model_answers",
        str(folder / "model_outputs.json"),
        "--ref_answers",
        str(folder / "reference_outputs.json"),
    ]
    arena = []
    for flag, rows in ("--model_answers", own), ("--ref_answers", other):
        arena += [flag, str(folder / "model_answer" / f"{rows[0]['generator']}.jsonl")]
    arena += ["--questions", str(folder / "question.jsonl")]
    results = []
    for name, words in ("alpaca", alpaca), ("arena", arena):
        (tmp_path / name).mkdir()
        results.append(evaluated(made, tmp_path / name, "--scorer", "length", *words, models=False))
    assert results[0] == results[1]
    words = [(len(a["output"].split()), len(b["output"].split())) for a, b in zip(own, other, strict=True)]
    assert results[0]["wins"] == sum(a > b for a, b in words)
    assert results[0]["ties"] == sum(a == b for a, b in words)


def test_best_of_n_and_two_scorers(made, tmp_path):
    options = ["--num_generations", "4", "--temperature", "1", "--num_prompts", "5", "--columns", "unused=solution"]
    found = evaluated(made, tmp_path, "--scorer", "length", "--gold_scorer", r"regex=\w", *options)
    assert found["prompts"] == 5
    assert found["comparisons"] == 20
    assert -1 <= found["cohen_kappa"] <= 1
    assert 0 <= found["gold_win_rate"] <= 1
    curve = found["best_of_n"]
    assert [point["n"] for point in curve] == [1, 2, 3, 4]
    assert curve[0]["proxy"] == pytest.approx(found["score"])
    assert curve[0]["gold"] == pytest.approx(found["gold_score"])
    assert curve[3]["proxy"] >= curve[0]["proxy"]


def test_drift_since_the_last_look_at_the_same_prompts(made, tmp_path, capsys):
    history = tmp_path / "history.jsonl"
    words = ["--model_name_or_path", made["model"], "--dataset_name", made["prompts"], "--columns", "unused=solution",
             "--scorer", "length", "--history", str(history), "--num_prompts", "3"]  # fmt: skip
    looks = []
    for name in "first", "same", "moved":
        (tmp_path / name).mkdir()
        if name == "moved":  # something has changed one answer and the score since
            rows = [json.loads(line) for line in history.read_text().splitlines()]
            rows[-1]["answers"][0][0] += " more"
            rows[-1]["metrics"]["score"] -= 2
            history.write_text("{damaged\n" + "".join(json.dumps(row) + "\n" for row in rows))
        evaluated(made, tmp_path / name, *words, models=False)
        looks.append(" ".join(capsys.readouterr().out.split()))
    assert "the first look at these prompts" in looks[0]
    assert "changed_answers 0" in looks[1]
    assert "_change" not in looks[1]
    assert "changed_answers 0.3333 score_change 2" in looks[2]


def test_a_model_alone_has_scores(made, tmp_path):
    words = ["--model_name_or_path", made["model"], "--dataset_name", made["prompts"], "--columns", "unused=solution"]
    found = evaluated(made, tmp_path, "--scorer", "length", "format=.*", *words, models=False)
    assert found["prompts"] == len(PAIRS)
    assert "win_rate" not in found


def test_a_model_does_not_judge_itself(made, tmp_path, capsys):
    words = ["--model_name_or_path", made["model"], "--ref_model_name_or_path", made["other"], "--eval_dataset",
             made["prompts"], "--max_new_tokens", "4", "--scorer_columns", "solution"]  # fmt: skip
    for judge in (made["model"], made["other"]):
        assert "would judge its own answers" in refused(capsys, *words, "--scorer", f"judge={judge}")
    served = f"judge=http://127.0.0.1:9/v1#{made['model']}"
    assert "would judge its own answers" in refused(capsys, *words, "--scorer", served)
    written = tmp_path / "own.json"
    files.write_alpaca(written, files.file_name(made["model"]), ["Hello?"], ["Yes."])
    both = ["--model_answers", str(written), "--ref_answers", str(written)]
    assert "would judge its own answers" in refused(capsys, *both, "--scorer", f"judge={made['model']}")
    found = evaluated(made, tmp_path, "--scorer", f"judge={made['model']}", "--allow_self_judge", "true",
                      "--score_cache", "none", "--columns", "unused=solution")  # fmt: skip
    assert found["without_verdict"] + found["comparisons"] == len(PAIRS)


def test_what_cannot_be(made, tmp_path, capsys):
    words = ["--model_name_or_path", made["model"], "--eval_dataset", made["prompts"]]
    named = ["--ref_model_name_or_path", made["other"], "--eval_dataset", made["prompts"]]
    assert "give --scorer" in refused(capsys, "--checkpoints", str(tmp_path), *named)
    assert "temperature above 0" in refused(capsys, *words, "--scorer", "length", "--num_generations", "2")
    assert "give both" in refused(capsys, *words, "--scorer", "length", "--model_answers", "a.json")
    assert "its columns are prompt, solution" in refused(capsys, *words, "--scorer", "exact=truth")
    assert "is no run" in refused(capsys, "--checkpoints", str(tmp_path), "--scorer", "length", "--eval_dataset", "x")


def test_answer_files_of_others(tmp_path):
    (tmp_path / "question.jsonl").write_text(
        '{"question_id": 81, "category": "writing", "turns": ["Write.", "Now in verse."]}\n'
        '{"uid": "ab", "category": "coding", "prompt": "Code."}\n'
    )
    mt = {"question_id": 81, "answer_id": "x", "model_id": "m", "tstamp": 1.0}
    (tmp_path / "mt.jsonl").write_text(json.dumps(mt | {"choices": [{"index": 0, "turns": ["One.", "Two."]}]}) + "\n\n")
    turns = [{"role": "user", "content": "Code."}, {"role": "assistant", "content": {"answer": "x = 1"}}]
    (tmp_path / "hard.jsonl").write_text(
        json.dumps({"uid": "ab", "model": "n", "messages": turns}) + "\n" + json.dumps({"uid": "no", "messages": []})
    )
    first = files.read_answers(str(tmp_path / "mt.jsonl"), str(tmp_path / "question.jsonl"))
    assert (first.model, first.answers) == ("m", {"81": "One."})
    assert first.prompts == {"81": [{"role": "user", "content": "Write."}]}
    second = files.read_answers(str(tmp_path / "hard.jsonl"), str(tmp_path / "question.jsonl"))
    assert (second.model, second.answers) == ("n", {"ab": "x = 1"})
    with pytest.raises(ValueError, match="no prompt in common"):
        files.common(first, second)
    with pytest.raises(ValueError, match=r"give --questions question.jsonl"):
        files.read_answers(str(tmp_path / "mt.jsonl"))
    (tmp_path / "bad.json").write_text('[{"text": "x"}]')
    with pytest.raises(ValueError, match="its rows have text"):
        files.read_answers(str(tmp_path / "bad.json"))
