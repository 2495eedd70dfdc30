"""Guards: each sees what it is for, says it once with what to do, and stops the run only where that was asked for."""

import dataclasses
import math

import pytest
import torch

import prefuse
from prefuse.engine import train as train_module
from prefuse.engine.config.settings import FIELDS
from prefuse.engine.errors import UserError
from prefuse.engine.run.guards import Guards, _ordinal
from prefuse.engine.train import train
from tiny_run import LABELLED, PAIRS, read_log, save_model, settings, weights, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {
        "model_name_or_path": save_model(folder / "model"),
        "dataset_name": write_rows(folder / "pairs.jsonl", PAIRS),
        "labelled": write_rows(folder / "labelled.jsonl", LABELLED),
    }


def guards(**changes):
    return Guards(settings(model_name_or_path="m", dataset_name="d", output_dir="o", **changes), beta=0.1)


def config(files, out, **changes):
    return settings(**{k: v for k, v in files.items() if k != "labelled"} | {"output_dir": str(out)} | changes)


# ---------------------------------------------------------------------------------------------------------
# Steps that are no numbers


def spoil(monkeypatch, calls_to_spoil, what="loss"):
    """The loss of some microbatches, or its gradient alone, becomes NaN. Returns the rows of every microbatch."""
    real, rows = train_module.fused_loss, []

    def spoiled(lm, batch, *args):
        out = real(lm, batch, *args)
        rows.append(batch.rows)
        if len(rows) not in calls_to_spoil:
            return out
        if what == "loss":
            return dataclasses.replace(out, loss=out.loss * float("nan"))
        out.loss.register_hook(lambda grad: grad * float("nan"))
        return out

    monkeypatch.setattr(train_module, "fused_loss", spoiled)
    return rows


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_no_number_is_skipped_counted_and_its_rows_named(what, files, tmp_path, monkeypatch, caplog):
    """12 pairs in microbatches of 2, two to a step: the fourth microbatch is the second of step 2."""
    cut = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "padding_free": False}
    cut |= {"save_steps": 1, "save_total_limit": 0}
    rows = spoil(monkeypatch, {4}, what)
    train(config(files, tmp_path / "run", max_steps=3, **cut), "train")
    named = caplog.text[caplog.text.index("is not finite in step 2 at rows ") :]
    assert all(row in named for row in rows[3])
    assert all(row in named for row in rows[2]) == (what == "gradient")  # a gradient does not say whose it is
    first, second, third = (row for row in read_log(tmp_path / "run") if "tokens_per_second" in row)
    assert second["skipped_steps"] == 1
    assert "loss" not in second
    assert all(math.isfinite(row["loss"]) for row in (first, third))
    assert not (tmp_path / "run/checkpoint-2").exists()  # it would be checkpoint-1 once more
    before, last = (weights(tmp_path / f"run/checkpoint-{step}") for step in (1, 3))
    assert any(not torch.equal(last[name], value) for name, value in before.items())


def test_too_many_such_steps_in_a_row_end_the_run_with_the_last_checkpoint_whole(files, tmp_path, monkeypatch):
    spoil(monkeypatch, {2, 4, 5, 6})
    cut = {"max_steps": 8, "save_steps": 1, "max_skipped_steps": 2}
    with pytest.raises(UserError, match=r"in step 6 at rows .*, the 3rd such step in a row: no update was made of it"):
        train(config(files, tmp_path / "run", **cut), "train")
    assert all(value.isfinite().all() for value in weights(tmp_path / "run/checkpoint-1").values())
    assert not (tmp_path / "run/model.safetensors").exists()


def test_at_most_eight_rows_are_named(caplog):
    guards().on_step(1, math.inf, 1.0, [f"r:{i}" for i in range(11)])
    assert "r:7 and 3 more: no update was made (1 such steps so far)" in caplog.text
    assert "r:8" not in caplog.text


def test_ordinals():
    assert [_ordinal(n) for n in (1, 2, 3, 4, 11, 12, 13, 21, 112)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "112th",
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# What a run comes to


def feed(guard, losses):
    for step, loss in enumerate(losses, 1):
        assert guard.on_step(step, loss, 1.0, [])


def test_a_loss_far_above_the_usual_is_an_explosion(caplog):
    guard = guards()
    feed(guard, [0.69, *[0.3] * 11, 1.4])
    assert caplog.text == ""  # below 5 times the median
    feed(guard, [1.6, 9.9])
    assert caplog.text.count("guard, loss explosion: the loss of step 1 is 1.6, where 0.3 was usual and 0.69") == 1
    assert "9.9" not in caplog.text  # said once
    assert guard.stop == ""


def test_a_small_loss_that_jumps_below_the_first_is_no_explosion(caplog):
    feed(guards(), [0.69, *[0.01] * 20, 0.5])
    assert caplog.text == ""


def test_a_few_losses_are_not_enough_to_know_the_usual(caplog):
    feed(guards(), [0.69, 0.3, 0.3, 99.0])
    assert caplog.text == ""


# The chosen completions had log-probability -20 under the reference; beta is 0.1.
@pytest.mark.parametrize(("chosen", "fires"), [(-29.0, False), (-31.0, True), (-12.0, False)])
@pytest.mark.parametrize("where", ["training", "held-out"])
def test_chosen_completions_that_become_unlikely_are_a_collapse(where, chosen, fires, caplog):
    guard = guards()
    means = {"logps/chosen": chosen, "rewards/chosen": 0.1 * (chosen + 20.0)}
    (guard.on_log if where == "training" else guard.on_evaluation)(7, means)
    assert ("guard, collapse of chosen" in caplog.text) == fires
    assert (f"log-probability {chosen:.4g} at step 7, where the reference gives -20:" in caplog.text) == fires
    assert ("the held-out chosen" in caplog.text) == (fires and where == "held-out")


@pytest.mark.parametrize(
    ("train_accuracy", "held", "fires"),
    [(1.0, [0.8, 0.7], True), (0.98, [0.8, 0.7], False), (1.0, [0.8, 0.79], False), (1.0, [0.7, 0.8], False)],
)
def test_mastered_rows_and_falling_held_out_accuracy_are_over_fitting(train_accuracy, held, fires, caplog):
    guard = guards()
    for step, accuracy in enumerate(held):
        guard.on_log(step, {"rewards/accuracies": train_accuracy})
        guard.on_evaluation(step, {"rewards/accuracies": accuracy})
    assert (
        "guard, over-fitting: reward accuracy is 1.000 in training and has fallen from 0.800 to" in caplog.text
    ) == fires


def test_kl_has_a_limit_only_if_given(caplog):
    guards().on_evaluation(3, {"kl_to_ref": 1e9})
    guards(max_kl=0.5).on_evaluation(3, {"kl_to_ref": 0.4})
    assert caplog.text == ""
    guards(max_kl=0.5).on_evaluation(3, {"kl_to_ref": 0.6})
    assert "guard, KL: the policy is 0.6 nats per token from its reference at step 3, above max_kl 0.5" in caplog.text


@pytest.mark.parametrize(
    ("good", "bad", "changes", "message"),
    [
        (10, 10, {}, ""),
        (11, 9, {}, ""),
        (30, 10, {}, "make 3, expected 1 to 4/3: set undesirable_weight to 3"),
        (10, 40, {}, "make 0.25, expected 1 to 4/3: set desirable_weight to 4"),
        (30, 10, {"undesirable_weight": 3.0}, ""),
        (10, 10, {"undesirable_weight": 3.0}, "make 0.333, expected 1 to 4/3"),
        (20, 0, {}, "all 20 rows are desirable: KTO then only pulls the policy one way"),
        (0, 20, {}, "all 20 rows are undesirable"),
    ],
)
def test_kto_labels_out_of_balance_are_named_with_the_weight_that_mends_them(good, bad, changes, message, caplog):
    guards(loss_type="kto", **changes).check_labels([True] * good + [False] * bad, prefuse.KTO(**changes))
    assert message in caplog.text
    assert bool(caplog.text) == bool(message)


def test_what_a_guard_knows_survives_a_resume():
    guard, again = guards(), guards()
    feed(guard, [0.69, *[0.3] * 60])
    guard.on_log(1, {"rewards/accuracies": 1.0})
    guard.on_evaluation(1, {"rewards/accuracies": 0.8})
    again.restore(guard.state())
    assert again.state() == guard.state()
    assert len(again.losses) == 50
    again.on_evaluation(2, {"rewards/accuracies": 0.5})
    assert again.fired == ["over-fitting"]


# ---------------------------------------------------------------------------------------------------------
# In a run


def test_a_run_that_moves_too_far_is_warned_about_and_goes_on(files, tmp_path, caplog):
    changes = {"learning_rate": 0.05, "eval_fraction": 0.2, "eval_steps": 2, "max_steps": 6, "max_kl": 1e-3}
    train(config(files, tmp_path / "run", **changes), "train")
    assert caplog.text.count("guard, KL: ") == 1
    assert read_log(tmp_path / "run")[-1]["step"] == 6


def test_a_guard_that_may_stop_leaves_a_checkpoint_and_the_model(files, tmp_path, caplog, capsys):
    changes = {"learning_rate": 0.05, "eval_fraction": 0.2, "eval_steps": 2, "max_steps": 6, "max_kl": 1e-3}
    out = tmp_path / "run"
    train(config(files, out, guard_action="stop", **changes), "train")
    assert "a guard ends the run after step 2 (guard_action stop): KL: " in capsys.readouterr().out
    assert read_log(out)[-1]["step"] == 2
    after = weights(out / "checkpoint-2")
    assert all(torch.equal(after[name], value) for name, value in weights(out).items())


def test_labels_out_of_balance_are_said_before_the_first_step(files, tmp_path, caplog):
    changes = {"dataset_name": files["labelled"], "loss_type": "kto", "undesirable_weight": 4.0, "max_steps": 1}
    train(config(files, tmp_path / "run", **changes), "train")
    assert (
        "guard, KTO labels: 6 desirable rows of weight 1 against 6 undesirable ones of weight 4 make 0.25"
        in caplog.text
    )


def test_the_guards_page_names_every_setting_and_every_guard():
    import re
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    page = (root / "docs/guards.md").read_text(encoding="utf-8")
    named = {"guard_action", "max_skipped_steps", "max_loss_ratio", "max_chosen_drop", "max_accuracy_drop", "max_kl"}
    named |= {"max_score_drift", "max_length_preference"}
    assert named <= FIELDS.keys()
    assert all(f"`{name}`" in page or f"--{name}" in page for name in named)
    source = (root / "engine/run/guards.py").read_text(encoding="utf-8")
    names = set(re.findall(r'_act\(\s*"([^"]+)"', source))
    labels = {"KTO labels"}  # named after the loss
    assert names | labels == {
        "loss explosion", "over-fitting", "KL", "collapse of chosen", "score drift", "length", *labels,
    }  # fmt: skip
    assert all(f"`{name}`" in page for name in names | labels)
