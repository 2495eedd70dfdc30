"""The best evaluation: which model a run leaves, when it ends early, and that a resumed run decides alike."""

import dataclasses
import json

import pytest
import torch

from prefuse.engine import cli
from prefuse.engine import train as story
from prefuse.engine.errors import UserError
from prefuse.engine.rounds.look import ScoredRows
from prefuse.engine.run.best import Best
from prefuse.engine.run.proof import checkpoints
from prefuse.engine.run.signals import Stopped
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, weights, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "model_name_or_path": save_model(folder / "model"),
        "dataset_name": write_rows(folder / "pairs.jsonl", PAIRS),
        "eval_dataset": write_rows(folder / "held.jsonl", PAIRS[:4]),
    }


def run_of(files, folder, **changes):
    return settings(**files, output_dir=str(folder), max_steps=6, eval_steps=1, save_steps=0, **changes)


@pytest.fixture
def scripted(monkeypatch):
    """Held-out rows whose loss is as the list says, by step."""

    def script(losses):
        real = story.evaluate

        def evaluate(lm, held, loss, ranks, between, *, unmoved):
            return real(lm, held, loss, ranks, between, unmoved=unmoved) | {"loss": losses.pop(0)}

        monkeypatch.setattr(story, "evaluate", evaluate)

    return script


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_model_is_that_of_the_best_evaluation(files, tmp_path, scripted, capsys):
    scripted([0.0, 0.6, 0.5, 0.2, 0.3, 0.4, 0.9])  # the one before the first step does not count
    train(run_of(files, tmp_path / "best", load_best_model_at_end=True, save_total_limit=1), "train")
    assert same(weights(tmp_path / "best"), weights(tmp_path / "best" / "checkpoint-3"))
    said = capsys.readouterr().out
    assert "best eval_loss: 0.2, of step 3" in said
    assert "the model is that of step 3" in said
    assert 3 in [step for step, _ in checkpoints(tmp_path / "best")]


def test_a_run_ends_when_nothing_gets_better(files, tmp_path, scripted, capsys):
    scripted([0.0, 0.6, 0.5, 0.7, 0.5, 0.4, 0.3])
    train(run_of(files, tmp_path / "run", early_stopping_patience=2), "train")
    steps = [row["step"] for row in read_log(tmp_path / "run") if "loss" in row]
    assert steps == [1, 2, 3, 4]
    assert "the run ends after step 4: eval_loss has not improved in 2 evaluations" in capsys.readouterr().out
    again = dataclasses.replace(run_of(files, tmp_path / "run", early_stopping_patience=2), resume=True)
    train(again, "train")
    assert "is finished" in capsys.readouterr().out


def test_a_resumed_run_decides_alike(files, tmp_path, scripted, monkeypatch):
    losses = [0.0, 0.6, 0.2, 0.5, 0.4, 0.3, 0.9]
    options = {"load_best_model_at_end": True, "early_stopping_patience": 3}
    whole, cut = (run_of(files, tmp_path / name, **options) for name in ("whole", "cut"))
    cut = dataclasses.replace(cut, save_steps=1)
    scripted(list(losses))
    train(whole, "train")
    assert [row["step"] for row in read_log(tmp_path / "whole") if "loss" in row] == [1, 2, 3, 4, 5]
    monkeypatch.undo()

    scripted(list(losses[:4]))
    real = story.optimizer_step

    def stopped(run, share, *rest):
        return _stop() if share.step == 3 else real(run, share, *rest)

    monkeypatch.setattr(story, "optimizer_step", stopped)
    with pytest.raises(Stopped):
        train(cut, "train")
    monkeypatch.undo()
    scripted(list(losses[4:]))
    train(dataclasses.replace(cut, resume=True), "train")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "cut" / "checkpoint-2"))
    state = json.loads((tmp_path / "cut" / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["best"]["step"] == 2
    assert state["best"]["waited"] == 3


def _stop():
    raise Stopped(15, "SIGTERM")


def test_evaluating_and_saving_by_epoch(files, tmp_path):
    config = settings(**files, output_dir=str(tmp_path / "run"), num_train_epochs=2, eval_strategy="epoch",
                      save_strategy="epoch", metric_for_best_model="eval_rewards/accuracies")  # fmt: skip
    train(config, "train")
    per_epoch = len(PAIRS) // 4
    evaluated = [row["step"] for row in read_log(tmp_path / "run") if "eval_loss" in row]
    assert evaluated == [0, per_epoch, 2 * per_epoch]
    assert [step for step, _ in checkpoints(tmp_path / "run")] == [2 * per_epoch, per_epoch]
    quiet = settings(**files, output_dir=str(tmp_path / "quiet"), max_steps=2, eval_strategy="no", save_strategy="no",
                     save_steps=1)  # fmt: skip
    train(quiet, "train")
    assert not any("eval_loss" in row for row in read_log(tmp_path / "quiet"))
    assert not checkpoints(tmp_path / "quiet")


def test_what_counts_as_better():
    def best(**changes):
        names = {"output_dir": "-", "model_name_or_path": "-", "dataset_name": "-", "eval_fraction": 0.5}
        return Best(settings(**names | changes))

    accuracy = best(metric_for_best_model="eval_rewards/accuracies", early_stopping_patience=1)
    assert [accuracy.on_evaluation(s, {"rewards/accuracies": v}) for s, v in ((1, 0.5), (2, 0.7))] == [True, True]
    assert not accuracy.on_evaluation(3, {"rewards/accuracies": 0.6})
    assert accuracy.stop
    small = best(early_stopping_patience=2, early_stopping_threshold=0.1)
    assert [small.on_evaluation(s, {"loss": v}) for s, v in ((1, 0.5), (2, 0.45), (3, 0.44))] == [True] * 3
    assert small.waited == 2
    assert best(metric_for_best_model="loss", greater_is_better=True).greater
    with pytest.raises(UserError, match="which have loss"):
        best(metric_for_best_model="accuracy").on_evaluation(0, {"loss": 1.0})
    for changes in {"eval_strategy": "no"}, {"eval_fraction": 0.0}:
        with pytest.raises(UserError, match="goes by"):
            best(load_best_model_at_end=True, **changes)


GREEN = "regex=green|blue"


def test_a_reward_of_sampled_answers_decides(files, tmp_path, capsys):
    """What `prefuse eval --checkpoints` says of each checkpoint is what the run has gone by."""
    options = {"scorer": [GREEN], "gold_scorer": ["length"], "num_prompts": 3, "max_new_tokens": 6}
    run = run_of(files, tmp_path / "run", metric_for_best_model="gold_score", load_best_model_at_end=True, **options)
    run = dataclasses.replace(run, max_steps=4, save_steps=1, save_total_limit=0)
    train(run, "train", ScoredRows())
    log = {row["step"]: row for row in read_log(tmp_path / "run") if "eval_gold_score" in row}
    assert list(log) == [0, 1, 2, 3, 4]
    assert log[0]["eval_kl"] == pytest.approx(0, abs=1e-9)
    assert all(log[step]["eval_kl"] > 0 for step in range(1, 5))
    best = max(range(1, 5), key=lambda step: (log[step]["eval_gold_score"], -step))
    assert same(weights(tmp_path / "run"), weights(tmp_path / "run" / f"checkpoint-{best}"))
    words = ["eval", "--checkpoints", str(tmp_path / "run"), "--eval_dataset", files["eval_dataset"], "--scorer", GREEN,
             "--gold_scorer", "length", "--temperature", "1", "--max_new_tokens", "6", "--num_prompts", "3", "--device",
             "cpu", "--max_length", "64", "--output_file", str(tmp_path / "watch.json")]  # fmt: skip
    assert cli.main(words) == 0
    points = {point["step"]: point for point in json.loads((tmp_path / "watch.json").read_text())["checkpoints"]}
    for step in range(1, 5):
        for name in ("score", "gold_score", "kl", "length", "distinct_1"):
            assert log[step][f"eval_{name}"] == pytest.approx(points[step][name], rel=1e-4), (step, name)


@pytest.mark.slow
def test_a_scorer_leaves_the_training_as_it_is(files, tmp_path):
    scored = run_of(files, tmp_path / "scored", scorer=["length"], num_prompts=2, max_new_tokens=3)
    train(scored, "train", ScoredRows())
    train(run_of(files, tmp_path / "plain"), "train")
    assert same(weights(tmp_path / "scored"), weights(tmp_path / "plain"))
    with pytest.raises(UserError, match="compares: give a scorer"):
        train(run_of(files, tmp_path / "j", scorer=[f"judge={files['model_name_or_path']}"]), "train", ScoredRows())
    changed = {**files, "eval_dataset": None}
    config = settings(**changed, output_dir=str(tmp_path / "k"), scorer=["length"], max_steps=1)
    with pytest.raises(UserError, match="held-out prompts"):
        train(config, "train", ScoredRows())
