"""Process rewards: a step model as a scorer equals transformers' own logits, and labels of steps equal the probability
with which a model comes out right from there.
"""

import json
import math
import re
from contextlib import suppress

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForTokenClassification

from prefuse.engine import cli
from prefuse.engine.data.steps import load_steps
from prefuse.engine.model import sampling
from prefuse.engine.model.load import load_tokenizer
from prefuse.engine.score.scorers import scorer_of
from prefuse.engine.score.steps import StepClassifier, load_step_classifier
from tiny_run import PAIRS, SHAPE, save_model, settings, write_rows
from tiny_tokenizer import CHATML, tiny_tokenizer

CPU = torch.device("cpu")
PROMPTS = ["what is grass? ", "the sky? "]
ANSWERS = [["it is green\nno\nit is blue", "it is green\nyes"], ["blue\n\nno\n"]]
COUNTS = [[3, 2], [2]]


def step_model(folder, *, labels=2, template=None):
    torch.manual_seed(5)
    tokenizer = tiny_tokenizer(chat_template=template)
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=labels, initializer_range=0.3, **SHAPE)
    LlamaForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def by_transformers(path, prompt, answer):
    """The probability of each step, by the model's own forward of the row alone."""
    model, tokenizer = (
        LlamaForTokenClassification.from_pretrained(path).double().eval(),
        AutoTokenizer.from_pretrained(path),
    )
    ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    found = []
    for step in filter(str.strip, answer.split("\n")):
        ids += tokenizer(step + "\n", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        found.append(torch.sigmoid(logits[1] - logits[0] if len(logits) == 2 else logits[0]).item())
    return found


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("shares", [True, False])
def test_each_step_has_the_models_own_probability(tmp_path, monkeypatch, labels, shares):
    path = step_model(tmp_path, labels=labels)
    if not shares:
        monkeypatch.setattr("prefuse.engine.score.steps.can_share", lambda model: False)
    scorer = load_step_classifier(path, CPU, "min", None, 2, None)
    assert scorer.shares is shares
    for prompt, answers, counts in zip(PROMPTS, ANSWERS, COUNTS, strict=True):
        found = scorer.steps([prompt] * len(answers), answers)
        assert [len(own) for own in found] == counts
        for answer, own in zip(answers, found, strict=True):
            assert own == pytest.approx(by_transformers(path, prompt, answer), rel=1e-4)
    hows = {"min": min, "product": math.prod, "last": lambda own: own[-1]}
    for how, combine in hows.items():
        values = load_step_classifier(path, CPU, how, None, 2, None).score(PROMPTS, ANSWERS).values
        expected = combine(by_transformers(path, PROMPTS[0], ANSWERS[0][0]))
        assert values[0, 0].item() == pytest.approx(expected, rel=1e-4)
        assert values[1, 1].isnan()


def test_what_a_step_model_cannot_score_is_named(tmp_path):
    scorer = load_step_classifier(step_model(tmp_path), CPU, "min", None, 2, None)
    scores = scorer.score(["p", "p", [{"role": "user", "content": "p"}]], [["\n \n"], ["a\nb"], ["a"]])
    assert [[reason and reason.kind for reason in row] for row in scores.reasons] == [["empty"], [None], ["template"]]
    other = load_step_classifier(str(tmp_path), CPU, "min", "##", 2, None)
    assert not other.score(["p"], [["a##b"]]).values.isnan().any()
    assert other.key != scorer.key


def test_steps_are_kept_by_content_and_serve_every_reduction(tmp_path, monkeypatch):
    path = step_model(tmp_path / "model", template=CHATML)
    prompts = [[{"role": "user", "content": "the sky?"}]] * 2
    first = load_step_classifier(path, CPU, "min", None, 2, tmp_path / "cache").score(prompts, ANSWERS)
    monkeypatch.setattr(StepClassifier, "_tokens", lambda self, prompts, answers: [None] * bool(prompts))
    product = load_step_classifier(path, CPU, "product", None, 2, tmp_path / "cache").score(prompts, ANSWERS)
    assert (product.values[0] < first.values[0]).all()


def test_a_step_model_is_taken_wherever_a_scorer_is(tmp_path, capsys):
    model, prm = save_model(tmp_path / "model", chat_template=None), step_model(tmp_path / "prm")
    rows = write_rows(tmp_path / "pairs.jsonl", PAIRS[:4])
    config = settings(
        "eval", model_name_or_path=model, dataset_name=rows, eval_fraction=1.0, scorer=[prm], scorer_steps="last"
    )
    assert scorer_of([prm], config, CPU).how == "last"
    common = ["--scorer", prm, "--device", "cpu", "--max_new_tokens", "4", "--scorer_steps", "product",
              "--score_cache", "none"]  # fmt: skip
    words = ["eval", "--model_name_or_path", model, "--eval_dataset", rows, "--output_file", str(tmp_path / "e.json")]
    assert cli.main([*words, "--temperature", "1", *common]) == 0
    assert 0 <= json.loads((tmp_path / "e.json").read_text())["score"] <= 1
    words = ["label", "--dataset_name", rows, "--output_file", str(tmp_path / "l.jsonl"), "--label_form", "scored"]
    assert cli.main([*words, *common]) == 0
    assert len((tmp_path / "l.jsonl").read_text().splitlines()) == 8
    words = ["online", "--model_name_or_path", model, "--dataset_name", rows, "--output_dir", str(tmp_path / "run"),
             "--max_steps", "1", "--num_generations", "2", "--per_device_train_batch_size", "4", "--eval_fraction", "0",
             "--max_completion_length", "4"]  # fmt: skip
    assert cli.main([*words, *(word for word in common if word not in ("--max_new_tokens", "4"))]) == 0


# ---- labels by rollouts --------------------------------------------------------------------------

RIGHT = r"[a-z]$"
SOLVED = [
    {"prompt": "what is it? ", "completions": ["it is", "blue", "good"]},
    {"prompt": "and the sea? ", "completion": "the sea\n!"},
    {"prompt": "tell me "},
    {"prompt": "what? ", "completions": []},
]


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """The rows above with the shares of 400 rollouts of one token each."""
    folder = tmp_path_factory.mktemp("labels")
    model = save_model(folder / "model", chat_template=None, initializer_range=0.5)
    rows = write_rows(folder / "rows.jsonl", SOLVED)
    out = folder / "steps.jsonl"
    words = ["label", "--label_form", "steps", "--model_name_or_path", model, "--dataset_name", rows, "--scorer",
             f"regex={RIGHT}", "--num_generations", "400", "--max_new_tokens", "1", "--step_labels", "soft",
             "--per_device_eval_batch_size", "400", "--device", "cpu", "--output_file", str(out)]  # fmt: skip
    assert cli.main(words) == 0
    return {"model": model, "out": out, "rows": [json.loads(line) for line in out.read_text().splitlines()]}


def chance(path, prompt, before):
    """P(the answer is right) when one more token is drawn: over the whole vocabulary, in float64."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).double().eval(), AutoTokenizer.from_pretrained(path)
    ids = [tokenizer.bos_token_id]
    for text in (prompt, before):
        ids += tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        shares = model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)
    said = [tokenizer.decode([*ids, token], skip_special_tokens=True) for token in range(len(shares))]
    start = len(tokenizer.decode(ids, skip_special_tokens=True))
    return sum(p for p, text in zip(shares.tolist(), said, strict=True) if re.search(RIGHT, before + text[start:]))


def test_a_steps_share_is_the_chance_to_come_out_right_from_there(labelled):
    rows = labelled["rows"]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in SOLVED[:3]]
    seen = 0
    for row in rows:
        steps, labels = row["completions"], row["labels"]
        assert row["rollouts"] == 400
        assert labels == row["shares"]
        for i in range(1, len(steps)):
            p = chance(labelled["model"], row["prompt"], "".join(f"{step}\n" for step in steps[:i]))
            assert 0.1 < p < 0.9
            assert labels[i - 1] == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 400))
            seen += 1
        assert labels[-1] == float(re.search(RIGHT, "\n".join(steps)) is not None)
    assert seen >= 3
    assert rows[1]["completions"] == ["the sea", "!"]
    counted = json.loads(labelled["out"].with_suffix(".trust.json").read_text())
    assert (counted["rows"], counted["left_out"]) == (3, 1)


def test_soft_labels_are_trained_on(labelled):
    config = settings(
        "reward", model_name_or_path=labelled["model"], dataset_name="-", output_dir="-", reward_loss="steps"
    )
    examples, skipped = load_steps(str(labelled["out"]), "train", load_tokenizer(labelled["model"]), config)
    assert not skipped
    assert examples.right.tolist() == [label for row in labelled["rows"] for label in row["labels"]]


SCORE = """
def f(prompts, completions, want, **kwargs):
    return [None if w is None else float(c.endswith(w)) for c, w in zip(completions, want)]
"""


def test_hard_labels_and_rows_whose_rollouts_have_no_score(tmp_path, capsys):
    model = save_model(tmp_path / "model", chat_template=None)
    (tmp_path / "f.py").write_text(SCORE)
    rows = [
        {"prompt": "one ", "completions": ["a", "b"], "want": "b"},
        {"prompt": "two ", "completions": ["a", "b"], "want": None},
        {"prompt": "three ", "completions": ["a", "b"], "want": "zzzz"},
        {"prompt": "", "completions": ["a"], "want": "a"},
    ]
    words = ["label", "--label_form", "steps", "--model_name_or_path", model, "--dataset_name",
             write_rows(tmp_path / "rows.jsonl", rows), "--scorer", f"{tmp_path / 'f.py'}:f", "--num_generations", "3",
             "--max_new_tokens", "2", "--device", "cpu"]  # fmt: skip
    assert cli.main([*words, "--output_file", str(tmp_path / "out.jsonl")]) == 0
    made = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["labels"][-1]) for row in made] == [("one ", True), ("three ", False)]
    assert made[1]["labels"] == [False, False]
    said = capsys.readouterr().out
    assert "2 rows are left out" in said
    assert "rows.jsonl:2 (a step has no rollout with a score)" in said
    assert "no score for" in said
    alone = write_rows(tmp_path / "alone.jsonl", [{"prompt": "one ", "completions": ["b"], "want": "b"}])
    assert cli.main([*words, "--dataset_name", alone, "--output_file", str(tmp_path / "alone.out.jsonl")]) == 0
    for more, why in (["--temperature", "0"], "all the same"), (["--scorer", f"judge={model}"], "compares"):
        assert cli.main([*words, "--output_file", str(tmp_path / "no.jsonl"), *more]) == 2
        assert why in capsys.readouterr().err
    del words[3:5]
    assert cli.main([*words, "--output_file", str(tmp_path / "no.jsonl")]) == 2
    assert "come from rollouts" in capsys.readouterr().err


@pytest.mark.parametrize("killed_after", [0, 2])
def test_rollouts_are_kept_across_a_kill(killed_after, labelled, tmp_path, monkeypatch, capsys):
    """The labels of a run that was killed between two batches and asked again, and only what was missing is sampled."""
    rows = write_rows(tmp_path / "rows.jsonl", SOLVED[:2])
    words = ["label", "--label_form", "steps", "--model_name_or_path", labelled["model"], "--dataset_name", rows,
             "--scorer", f"regex={RIGHT}", "--num_generations", "4", "--max_new_tokens", "2", "--step_labels", "soft",
             "--per_device_eval_batch_size", "2", "--device", "cpu"]  # fmt: skip
    whole, cut = ([*words, "--score_cache", str(tmp_path / n), "--output_file", str(tmp_path / f"{n}.jsonl")]
                  for n in ("whole", "cut"))  # fmt: skip
    calls, real = [], sampling._generate

    def counted(*given):
        calls.append(given)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(sampling, "_generate", counted)
    limit = None
    assert cli.main(whole) == 0
    batches = len(calls)
    assert batches == 6  # three steps that something follows, four rollouts of each
    calls.clear()
    limit = killed_after + 1
    with suppress(KeyboardInterrupt):
        assert cli.main(cut) != 0
    assert not (tmp_path / "cut.jsonl").exists()
    calls.clear()
    capsys.readouterr()
    limit = None
    assert cli.main(cut) == 0
    assert len(calls) == batches - killed_after
    assert ("not sampled again" in capsys.readouterr().out) == bool(killed_after)
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    calls.clear()
    other = [*cut, "--seed", "7", "--output_file", str(tmp_path / "other.jsonl")]
    assert cli.main(other) == 0
    assert len(calls) == batches  # another seed, other rollouts
