"""Checkpoints: a resumed run ends where the uninterrupted one does, bit for bit; a damaged one is never used."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from prefuse.engine import train as train_module
from prefuse.engine.errors import UserError
from prefuse.engine.run.checkpoint import latest_checkpoint
from prefuse.engine.run.files import published_folder
from prefuse.engine.run.folder import clear_leftovers
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, weights, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return {"model_name_or_path": save_model(folder / "model"), "dataset_name": write_rows(folder / "p.jsonl", PAIRS)}


def interrupt_at(monkeypatch, step):
    """The run gets a Ctrl-C in its optimizer step number `step`, counted from 1."""
    real, calls = train_module.optimizer_step, []

    def optimizer_step(*args):
        calls.append(None)
        if len(calls) == step:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(train_module, "optimizer_step", optimizer_step)


# 12 pairs in steps of 5: three steps an epoch, the last of 2 pairs; step 4 is in the second epoch. KTO has 24 rows
# in steps of 5, so 5 steps an epoch, and draws new mismatches in the second.
@pytest.mark.parametrize(("loss_type", "steps"), [("dpo", 6), ("kto", 7)])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(loss_type, steps, base, tmp_path, monkeypatch, capsys):
    run = {
        **base, "loss_type": loss_type, "max_steps": steps, "save_steps": 3, "logging_steps": 2,
        "per_device_train_batch_size": 5, "eval_fraction": 0.0, "weight_decay": 0.1, "save_total_limit": 1,
    }  # fmt: skip
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    train(settings(**run, output_dir=str(straight)), "train")
    with monkeypatch.context() as patch:
        interrupt_at(patch, steps - 1)
        with pytest.raises(KeyboardInterrupt):
            train(settings(**run, output_dir=str(broken)), "train")
    assert not (broken / "model.safetensors").exists()
    train(settings(**run, output_dir=str(broken), resume=True), "train")
    assert f"resuming after step 3, from {broken / 'checkpoint-3'}" in capsys.readouterr().out

    resumed = weights(broken)
    for name, value in weights(straight).items():
        assert torch.equal(resumed[name], value), name
    drop_clock = lambda row: {k: v for k, v in row.items() if not k.endswith(("_per_second", "mfu"))}  # noqa: E731
    assert [drop_clock(row) for row in read_log(broken)] == [drop_clock(row) for row in read_log(straight)]


@pytest.fixture(scope="module")
def finished_once(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    train(settings(**base, output_dir=str(out), max_steps=6, save_steps=2), "train")
    return out


@pytest.fixture
def finished(finished_once, tmp_path):
    """A run folder to damage."""
    return Path(shutil.copytree(finished_once, tmp_path / "run"))


def test_only_the_newest_checkpoints_are_kept_and_each_is_a_model(finished):
    assert sorted(path.name for path in finished.glob("checkpoint*")) == ["checkpoint-4", "checkpoint-6"]
    names = {path.name for path in (finished / "checkpoint-6").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "optimizer-00001.safetensors"} <= names
    assert set(json.loads((finished / "checkpoint-6/manifest.json").read_text())) == names - {"manifest.json"}
    assert not any(path.suffix in (".pt", ".bin", ".pkl", ".pth") for path in finished.rglob("*"))
    assert all(torch.equal(weights(finished)[k], v) for k, v in weights(finished / "checkpoint-6").items())


@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer-00001.safetensors", "rng.safetensors", "trainer_state.json"]
)
def test_a_damaged_checkpoint_is_passed_over(finished, file, caplog):
    path = finished / "checkpoint-6" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert latest_checkpoint(finished) == finished / "checkpoint-4"
    assert (
        f"checkpoint-6 is damaged ({file} does not have the hash that was written down): trying an older" in caplog.text
    )


@pytest.mark.parametrize("file", ["model.safetensors", "manifest.json"])
def test_a_checkpoint_that_lacks_a_file_is_passed_over(finished, file, caplog):
    (finished / "checkpoint-6" / file).unlink()
    assert latest_checkpoint(finished) == finished / "checkpoint-4"
    assert f"checkpoint-6 is damaged ({file} is missing)" in caplog.text


@pytest.mark.parametrize("text", ["{", "[]", '{"model.safetensors": 3}'])
def test_a_manifest_that_makes_no_sense_is_passed_over(finished, text):
    (finished / "checkpoint-6/manifest.json").write_text(text)
    assert latest_checkpoint(finished) == finished / "checkpoint-4"


def test_a_checkpoint_half_written_is_not_seen_and_is_cleared_away(finished):
    shutil.copytree(finished / "checkpoint-6", finished / "checkpoint-8.tmp")
    assert latest_checkpoint(finished) == finished / "checkpoint-6"
    clear_leftovers(finished)
    assert not (finished / "checkpoint-8.tmp").exists()
    with published_folder(finished / "checkpoint-8") as aside:
        assert list(aside.iterdir()) == []


def test_a_folder_is_published_whole_or_not_at_all(tmp_path):
    def interrupted():
        with published_folder(tmp_path / "out") as aside:
            (aside / "half").write_text("x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_the_last_checkpoint(base, tmp_path, monkeypatch):
    from prefuse.engine.run import checkpoint

    real, calls = checkpoint.save_model, []

    def full_disk(*args):
        calls.append(None)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(checkpoint, "save_model", full_disk)
    out = tmp_path / "run"
    with pytest.raises(UserError, match=r"No space left.*the weights after step 4 were kept in"):
        train(settings(**base, output_dir=str(out), max_steps=6, save_steps=2, save_total_limit=1), "train")
    assert latest_checkpoint(out) == out / "checkpoint-2"
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"learning_rate": 0.5},
            "cannot resume: learning_rate was 0.01 and is now 0.5; set it back",
        ),
        ({"max_steps": 4}, "cannot resume: the run had 6 steps and now has 4: it can only be longer"),
        ({"seed": 1}, "cannot resume: seed was 42 and is now 1"),
    ],
)
def test_a_resumed_run_must_be_the_same_run(finished, base, change, message):
    (finished / "model.safetensors").unlink()
    config = settings(**base | {"output_dir": str(finished), "max_steps": 6, "save_steps": 2, "resume": True} | change)
    before = (finished / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=message):
        train(config, "train")
    assert (finished / "metrics.jsonl").read_text() == before


def test_resume_without_a_checkpoint_starts_from_the_first_step(base, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.yaml").write_text("# prefuse train --config config.yaml\n")
    (out / "metrics.jsonl").write_text('{"step": 1}\n{"st')  # what a run killed early leaves
    train(settings(**base, output_dir=str(out), max_steps=1, resume=True), "train")
    assert "has no whole checkpoint: starting from the first step" in capsys.readouterr().out
    assert [row["step"] for row in read_log(out)] == [1]
    assert "loss" in read_log(out)[0]
