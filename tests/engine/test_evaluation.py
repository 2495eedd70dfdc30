"""Evaluation: each model runs once a batch, a policy that has not moved does not run, and what is said at the end."""

import json
import math
import shlex

import pytest
import torch

import prefuse
from prefuse.engine import cli
from prefuse.engine.data import load_examples
from prefuse.engine.data.batches import examples_of
from prefuse.engine.evaluate import compare
from prefuse.engine.model import forward
from prefuse.engine.model.load import load_model, load_tokenizer
from prefuse.engine.report import log
from prefuse.engine.report.clock import PARTS, Clock
from prefuse.engine.report.plots import curve_points
from prefuse.engine.run import held_out
from prefuse.engine.run.held_out import evaluate, hold
from prefuse.engine.train import train
from tiny_run import LABELLED, PAIRS, read_log, save_model, settings, write_rows

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "model": save_model(folder / "model"),
        "other": save_model(folder / "other", seed=1),
        "pairs": write_rows(folder / "pairs.jsonl", PAIRS),
        "labelled": write_rows(folder / "labelled.jsonl", LABELLED),
    }


def loaded(files, kind, command="eval", **changes):
    names = {"model_name_or_path": files["model"], "ref_model_name_or_path": files["other"]}
    source = files["labelled" if kind == "labelled" else "pairs"]
    config = settings(command, **names, dataset_name=source, eval_fraction=1.0, per_device_eval_batch_size=4, **changes)
    examples = examples_of(load_examples(source, kind, load_tokenizer(files["model"]), 64).examples)
    return config, examples, *(load_model(files[name], config, CPU) for name in ("model", "other"))


@pytest.fixture
def trunk_runs(monkeypatch):
    """How often each model's trunk has run, by the id of the model."""
    runs = {}
    real = forward.completion_hidden

    def counted(model, tokens):
        runs[id(model)] = runs.get(id(model), 0) + 1
        return real(model, tokens)

    monkeypatch.setattr(forward, "completion_hidden", counted)
    return runs


@pytest.mark.parametrize(
    ("loss_type", "kind", "passes"), [("dpo", "pair", 1), ("simpo", "pair", 1), ("kto", "labelled", 2)]
)
def test_each_model_runs_once_for_each_batch(loss_type, kind, passes, files, trunk_runs):
    config, examples, lm, ref = loaded(files, kind, loss_type=loss_type)
    batches = math.ceil(len(examples) / 4)
    compare(lm, ref, examples, config)
    runs = passes * batches  # KTO: mismatched completions too
    assert trunk_runs == {id(lm.model): runs, id(ref.model): runs if loss_type != "simpo" else batches}


@pytest.mark.parametrize(("loss_type", "kind"), [("dpo", "pair"), ("ipo", "pair"), ("kto", "labelled")])
def test_evaluation_while_training_says_what_prefuse_eval_says(loss_type, kind, files, trunk_runs):
    config, examples, lm, ref = loaded(files, kind, loss_type=loss_type)
    held = hold(examples, ref, config.loss(), config)
    asked = trunk_runs[id(ref.model)]
    assert asked == (2 if loss_type == "kto" else 1) * len(held.batches)
    got, wanted = evaluate(lm, held, config.loss()), compare(lm, ref, examples, config)
    assert trunk_runs[id(lm.model)] == 2 * asked
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_a_reference_cache_gives_the_same_numbers(files, tmp_path):
    config, examples, lm, ref = loaded(files, "pair")
    without = evaluate(lm, hold(examples, ref, config.loss(), config), config.loss())
    for _ in range(2):  # written, then read
        cached = settings("train", output_dir="-", model_name_or_path="-", dataset_name="-", eval_fraction=0.5,
                          per_device_eval_batch_size=4, reference_cache=str(tmp_path / "cache"))  # fmt: skip
        assert evaluate(lm, hold(examples, ref, config.loss(), cached), config.loss()) == without


@pytest.mark.parametrize(("loss_type", "kind"), [("dpo", "pair"), ("ipo", "pair"), ("kto", "labelled")])
def test_a_policy_that_has_not_moved_is_known_without_running(loss_type, kind, files, trunk_runs):
    config, examples, lm, _ = loaded(files, kind, loss_type=loss_type)
    held = hold(examples, lm, config.loss(), config)
    ran = evaluate(lm, held, config.loss())
    before = dict(trunk_runs)
    known = evaluate(lm, held, config.loss(), unmoved=True)
    assert trunk_runs == before
    assert known.pop("kl_to_ref") == 0 == pytest.approx(ran.pop("kl_to_ref"), abs=1e-10)
    assert known == ran


def test_a_run_does_not_evaluate_what_it_knows(files, tmp_path, trunk_runs, capsys):
    names = {"model_name_or_path": files["model"], "dataset_name": files["pairs"]}
    out = str(tmp_path / "run")
    train(settings(**names, output_dir=out, eval_fraction=0.2, per_device_train_batch_size=10), "train")
    first = read_log(tmp_path / "run")[0]
    assert first["step"] == 0
    assert first["eval_rewards/accuracies"] == 0
    assert first["eval_rewards/ties"] == 1
    (runs,) = trunk_runs.values()
    # The reference of the step and of the held-out rows; the step; the evaluation after it.
    assert runs == 4
    shown = capsys.readouterr().out
    assert "rewards/accuracies 0  rewards/ties 1" in shown


def test_a_policy_with_another_reference_is_evaluated_before_the_first_step(files, tmp_path):
    names = {"model_name_or_path": files["model"], "ref_model_name_or_path": files["other"]}
    out = str(tmp_path / "run")
    train(settings(**names, dataset_name=files["pairs"], output_dir=out, eval_fraction=0.2, max_steps=1), "train")
    first = read_log(out)[0]
    assert first["step"] == 0
    assert first["eval_kl_to_ref"] > 0.01
    assert first["eval_rewards/margins"] != 0


def test_a_tie_is_shown_as_one(files):
    config, examples, lm, ref = loaded(files, "pair")
    assert compare(lm, lm, examples, config)["rewards/ties"] == 1
    metrics = compare(lm, ref, examples, config)
    assert metrics["rewards/ties"] == 0
    rewards = torch.tensor([1.0, 1.0, 2.0, 1.0, 0.5, 0.5])
    assert held_out.pair_ties(prefuse.DPO(), rewards)["rewards/ties"].tolist() == [2, 3]
    assert held_out.pair_ties(prefuse.KTO(), rewards) == {}


def test_the_curve_of_accuracies_counts_a_tie_as_half():
    rows = [{"step": 0, "eval_rewards/accuracies": 0.0, "eval_rewards/ties": 1.0, "eval_loss": None}]
    rows += [{"step": 1, "rewards/accuracies": 0.25}, {"step": 2, "eval_rewards/accuracies": 0.75}]
    assert curve_points(rows, "rewards/accuracies", "eval_") == [(0, 0.5), (2, 0.75)]
    assert curve_points(rows, "rewards/accuracies", "") == [(1, 0.25)]
    assert curve_points(rows, "loss", "eval_") == []


def test_demonstrations_have_loss_perplexity_and_accuracy(files, capsys, tmp_path):
    report = tmp_path / "eval.json"
    words = ["--model_name_or_path", files["model"], "--dataset_name", files["pairs"], "--max_length", "64"]
    assert cli.main(["eval", *words]) == 2
    assert "or --loss_type sft for loss and perplexity" in capsys.readouterr().err
    assert cli.main(["eval", *words, "--loss_type", "sft", "--output_file", str(report)]) == 0
    metrics = json.loads(report.read_text())
    lm = load_model(
        files["model"], settings("generate", model_name_or_path="-", dataset_name="-", eval_fraction=1.0), CPU
    )
    losses, right, entropies = [], [], []
    examples = load_examples(files["pairs"], "sft", load_tokenizer(files["model"]), 64).examples
    for example in examples:
        ids = torch.tensor([example.prompt + example.completion])
        logits = lm.model(input_ids=ids).logits[0, len(example.prompt) - 1 : -1].double()
        logps = torch.log_softmax(logits, -1)
        targets = torch.tensor(example.completion)
        losses.append(-logps.gather(-1, targets[:, None])[:, 0])
        right.append(logits.argmax(-1) == targets)
        entropies.append(-(logps.exp() * logps).sum(-1))
    loss = torch.cat(losses).mean().item()
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert metrics["mean_token_accuracy"] == pytest.approx(torch.cat(right).double().mean().item())
    assert metrics["entropy"] == pytest.approx(torch.cat(entropies).mean().item(), rel=1e-5)


@pytest.mark.parametrize("command", ["train", "sft"])
def test_the_end_of_a_run_names_commands_that_run(command, files, tmp_path, capsys):
    out = tmp_path / "a run"
    words = ["--model_name_or_path", files["model"], "--dataset_name", files["pairs"], "--output_dir", str(out)]
    assert cli.main([command, *words, "--max_steps", "1", "--eval_fraction", "0.2", "--max_length", "64"]) == 0
    shown = capsys.readouterr().out
    commands = [shlex.split(line)[1:] for line in shown.splitlines() if line.startswith("  prefuse ")]
    assert [words[0] for words in commands] == ["eval", "generate"]
    assert cli.main(commands[0]) == 0
    assert cli.main([*commands[1], "--max_new_tokens", "2"]) == 0
    captured = capsys.readouterr()
    assert "evaluating 2 of 12" in captured.out
    assert "not used" not in captured.err
    assert all(part in shown for part in ("trunk", "head", "data", "optimizer", "share"))


# ---------------------------------------------------------------------------------------------------------
# Time


def test_the_clock_gives_every_second_to_one_part(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("prefuse.engine.report.clock.time.perf_counter", lambda: now[0])
    clock = Clock()

    def work(seconds):
        now[0] += seconds

    work(1)
    with clock.part("head"):
        work(2)
        clock.to("trunk")
        work(4)
    with clock.part("evaluation"):
        work(8)
        with clock.part("trunk"):
            work(16)
    work(32)
    assert {name: seconds for name, seconds, _ in clock.shares()} == {
        "trunk": 4,
        "head": 2,
        "evaluation": 24,
        "other": 33,
    }
    assert sum(share for *_, share in clock.shares()) == pytest.approx(1)
    assert set(clock.seconds) <= set(PARTS)


def test_mfu_above_1_is_not_known(monkeypatch, caplog):
    now = [0.0]
    monkeypatch.setattr(log.time, "perf_counter", lambda: now[0])
    window = log.Window(peak_flops=100.0)
    now[0] = 2.0
    window.count(1, 1, 150.0)
    assert window.means()["mfu"] == 0.75
    window.count(1, 1, 100.0)
    assert "mfu" not in window.means()
    assert "mfu is left out from here on" in caplog.text
    window.clear()
    now[0] = 4.0
    assert "mfu" not in window.means()


def test_progress_says_what_is_left(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    for _ in log.progress(range(10), "reference", 10):
        now[0] += 15.0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "  reference: 2 of 10 batches, about 2 min left"
    assert lines[-1] == "  reference: 8 of 10 batches, about 30 s left"
