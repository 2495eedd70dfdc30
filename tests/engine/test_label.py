"""`prefuse label` and `prefuse revise`: rows with provenance, principles drawn by seed, bias and agreement measured.

The judge is a rule that reads what it is asked, so that every verdict is known.
"""

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from online_runs import PROMPTS, write_rule
from prefuse.engine import label as story
from prefuse.engine.config.settings import Config, validate
from prefuse.engine.data.examples import load_examples
from prefuse.engine.errors import UserError
from prefuse.engine.revise import revise
from prefuse.engine.score.constitution import read_constitution
from prefuse.engine.score.judge import Judge, Reply
from tiny_run import save_model, write_rows
from tiny_tokenizer import tiny_tokenizer

LONGER, SHORTER = "Choose the longer answer.", "Choose the shorter answer."
CONSTITUTION = f"principles: ['{LONGER}', '{SHORTER}']\n"
# The chosen answer is longer in two thirds of the rows.
ROWS = [
    {"prompt": f"what is it {i}", "chosen": "it is blue and green" if i % 3 else "no", "rejected": "it is good"}
    for i in range(30)
]


@dataclass
class RuleBackend:
    """Follows the principle that it is shown, with probability `sure`; leans towards A by `lean`."""

    name: str = "rule"
    key: str = "rule 1"
    sure: float = 0.9
    lean: float = 0.0
    asked: list[str] = field(default_factory=list)

    def ask(self, questions, keep, cache):
        replies = {}
        for key, question in zip(keep, questions, strict=True):
            text = question[0]["content"]
            self.asked.append(text.splitlines()[0])
            a, b = re.search(r"\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\n\[End\]", text, re.S).groups()
            first = (len(a) > len(b)) == text.startswith(LONGER)
            share = min(max((self.sure if first else 1 - self.sure) + self.lean, 0.01), 0.99)
            replies[key] = Reply("", {"A": share, "B": 1 - share})
        return replies


def run(monkeypatch, tmp_path, backend=None, constitution=CONSTITUTION, rows=ROWS, **changes):
    backend = backend or RuleBackend()
    monkeypatch.setattr(story, "scorer_of", lambda specs, config, device: Judge(backend))
    path = tmp_path / "constitution.yaml"
    path.write_text(constitution)
    given = {
        "dataset_name": write_rows(tmp_path / "rows.jsonl", rows), "scorer": ["judge=x"], "constitution": str(path),
        "output_file": str(tmp_path / "out.jsonl"), "score_cache": "none", "device": "cpu",
    }  # fmt: skip
    config = validate(Config(**given | changes), "label")
    metrics = story.label(config)
    return metrics, [json.loads(line) for line in Path(config.output_file).read_text().splitlines()], backend


def test_given_answers_become_pairs_by_a_drawn_principle(monkeypatch, tmp_path):
    metrics, out, backend = run(monkeypatch, tmp_path)
    assert len(out) == len(ROWS)
    for row in out:
        longer = len(row["chosen"]) > len(row["rejected"])
        assert row["annotator_principle"] == (LONGER if longer else SHORTER)
        assert row["weight"] == pytest.approx(0.8)  # |2 p - 1| of p = 0.9
        assert row["annotator_probability"] == pytest.approx(0.9)
        assert row["annotator_name"] == "judge rule"
        assert row["meta_answers_by"] == "the rows"
    assert all(Counter(backend.asked)[principle] > 10 for principle in (LONGER, SHORTER))  # both orders of some of 30
    assert metrics["first_shown_wins"] == 0.5
    again, same, _ = run(monkeypatch, tmp_path, output_file=str(tmp_path / "again.jsonl"))
    assert (again, same) == (metrics, out)


def test_what_is_written_is_what_training_reads(monkeypatch, tmp_path):
    run(monkeypatch, tmp_path)
    read = load_examples(str(tmp_path / "out.jsonl"), "pair", tiny_tokenizer(), 64, cache="none")
    assert len(read.examples) == len(ROWS)
    assert not read.skipped
    run(monkeypatch, tmp_path, label_form="labelled", output_file=str(tmp_path / "two.jsonl"))
    labelled = load_examples(str(tmp_path / "two.jsonl"), "labelled", tiny_tokenizer(), 64, cache="none")
    assert len(labelled.examples) == 2 * len(ROWS)
    assert sum(e.label for e in labelled.examples) == len(ROWS)


def test_what_is_written_beside_the_rows_may_be_long(tmp_path):
    """A principle, the scorers of a list, a first answer are as long as they are: no text that training has to use."""
    text = "a sentence of six more words " * 5
    names = ("annotator_name", "annotator_key", "annotator_principle", "meta_answers_by", "meta_first_answer")
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair | dict.fromkeys(names, text)) + "\n")
    read = load_examples(str(tmp_path / "rows.jsonl"), "pair", tiny_tokenizer(), 64, cache="none")
    assert len(read.examples) == 1
    (tmp_path / "rows.jsonl").write_text(json.dumps(pair | {"annotator_reason": text}) + "\n")
    with pytest.raises(ValueError, match=r"annotator_reason.* holds text"):
        load_examples(str(tmp_path / "rows.jsonl"), "pair", tiny_tokenizer(), 64, cache="none")


def test_agreement_with_the_given_labels(monkeypatch, tmp_path):
    """A judge of length alone: it agrees where the chosen answer is longer, two thirds of the rows."""
    metrics, _, _ = run(monkeypatch, tmp_path, constitution=f"- {LONGER}\n")
    assert metrics["given_agreement"] == pytest.approx(2 / 3)
    assert metrics["longer_wins"] == 1.0
    assert 0 < metrics["given_kappa"] < 0.6
    assert json.loads((tmp_path / "out.trust.json").read_text())["given_kappa"] == metrics["given_kappa"]


def test_bias_for_the_answer_that_is_shown_first(monkeypatch, tmp_path):
    """A judge that takes A whatever it says: all ties by both orders, and the bias is seen."""
    metrics, out, _ = run(monkeypatch, tmp_path, RuleBackend(sure=0.6, lean=0.5))
    assert metrics["first_shown_wins"] == 1.0
    assert metrics["ties"] == len(ROWS)
    assert all(row["weight"] < 0.5 for row in out)


def test_sampled_answers_by_a_rule(tmp_path, monkeypatch, caplog):
    model = save_model(tmp_path / "model")
    rule = write_rule(tmp_path)
    given = {
        "model_name_or_path": model, "dataset_name": write_rows(tmp_path / "p.jsonl", PROMPTS), "num_generations": 4,
        "scorer": [f"{rule}:vowels"], "gold_scorer": [f"{rule}:gold"], "max_new_tokens": 8, "score_cache": "none",
        "device": "cpu", "output_file": str(tmp_path / "out.jsonl"), "pairs": "all",
    }  # fmt: skip
    metrics = story.label(validate(Config(**given), "label"))
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    vowels = lambda text: sum(letter in "aeiou" for letter in text)  # noqa: E731
    assert out
    assert all(vowels(row["chosen"]) > vowels(row["rejected"]) for row in out)
    assert {row["meta_answers_by"] for row in out} == {model}
    assert metrics["gold_agreement"] == pytest.approx(metrics["ties"] / metrics["comparisons"])
    assert metrics["gold_kappa"] < 0
    assert "first_shown_wins" not in metrics
    given |= {"label_form": "scored", "output_file": str(tmp_path / "scored.jsonl")}
    story.label(validate(Config(**given), "label"))
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert len(scored) == 4 * len(PROMPTS)
    assert all(0 <= row["score"] <= 1 for row in scored)


def test_a_judge_of_its_own_answers_is_named(monkeypatch, tmp_path, caplog):
    model = save_model(tmp_path / "model")
    run(
        monkeypatch, tmp_path, RuleBackend(name=model), rows=[{"prompt": row["prompt"]} for row in ROWS[:2]],
        model_name_or_path=model, max_new_tokens=3,
    )  # fmt: skip
    assert "judges its own answers" in caplog.text


def test_shares_of_comparisons():
    soft = {(0, 0, 1): 0.9, (0, 0, 2): 0.6, (0, 1, 2): math.nan}
    assert story.share_of(0, 0, 3, soft) == pytest.approx(0.75)
    assert story.share_of(0, 1, 3, soft) == pytest.approx(0.1)
    assert story.share_of(0, 2, 3, soft) == pytest.approx(0.4)
    assert math.isnan(story.share_of(0, 0, 1, {}))
    values = torch.tensor([1.0, 0.0, math.nan, 0.5])
    assert story.agreement("x", values, torch.tensor([1.0, 1.0, 0.0, 0.5]))["x_agreement"] == pytest.approx(2 / 3)


def test_a_constitution_is_read_and_draws_alike(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("principles: [one, two, three]\ncritiques: [{critique: c, revision: r}]\n")
    read = read_constitution(str(path))
    drawn = Counter(read.principle_of(1, f"row{i}") for i in range(300))
    assert set(drawn) == {"one", "two", "three"}
    assert min(drawn.values()) > 60
    assert read.principle_of(1, "row5") == read.principle_of(1, "row5")
    assert read.critique_of(1, "row", 0).revision == "r"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("principles: [1, 2]", "each principle is a text"),
        ("rules: [a]", "has rules: expected principles and critiques"),
        ("critiques: [{critique: a}]", "two texts, critique and revision"),
        ("just words", "expected a list of principles"),
        ("{", "cannot read constitution"),
    ],
)
def test_a_bad_constitution_is_named(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_constitution(str(path))


@pytest.mark.parametrize("template", [pytest.param(True, marks=pytest.mark.slow), False])
def test_revise_writes_demonstrations(template, tmp_path):
    options = {} if template else {"chat_template": None}
    model = save_model(tmp_path / "model", **options)
    path = tmp_path / "c.yaml"
    path.write_text("critiques:\n- {critique: 'what is bad?', revision: write it again}\n")
    given = {
        "model_name_or_path": model, "dataset_name": write_rows(tmp_path / "p.jsonl", PROMPTS), "num_prompts": 5,
        "scorer": [f"{write_rule(tmp_path)}:vowels"], "max_new_tokens": 6, "score_cache": "none", "device": "cpu",
        "output_file": str(tmp_path / "sft.jsonl"), "constitution": str(path), "num_revisions": 2,
    }  # fmt: skip
    metrics = revise(validate(Config(**given), "revise"))
    out = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert len(out) == 5
    assert {"changed/1", "changed/2", "score/0", "score/2", "length/2"} <= set(metrics)
    for row in out:
        assert len(row["meta_critiques"]) == 2
        assert row["meta_requests"] == ["what is bad?"] * 2
        assert row["meta_model"] == model
    read = load_examples(str(tmp_path / "sft.jsonl"), "sft", tiny_tokenizer(), 64, cache="none")
    assert len(read.examples) + len(read.skipped) == 5


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("label", {"scorer": None}, "scorer is required"),
        ("label", {"num_generations": 1, "model_name_or_path": "m"}, "set num_generations to 2 or more"),
        ("label", {"output_file": None}, "output_file is required"),
        ("revise", {"model_name_or_path": "m"}, "constitution is required"),
    ],
)
def test_a_setting_that_is_missing_is_named(command, changes, message):
    given = {"dataset_name": "d", "output_file": "o.jsonl", "scorer": ["length=5"]}
    with pytest.raises(UserError, match=message):
        validate(Config(**given | changes), command)
