"""A run that blows up ends with an error, writes no model, and keeps the last checkpoint that is known to be good."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefuse.engine import cli
from prefuse.engine import train as train_module
from prefuse.engine.errors import UserError
from prefuse.engine.train import train
from tiny_run import LABELLED, PAIRS, read_log, save_model, settings, weights, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return {"model_name_or_path": save_model(folder / "model"), "dataset_name": write_rows(folder / "p.jsonl", PAIRS)}


def config(base, out, **changes):
    return settings(**base | {"output_dir": str(out), "save_steps": 1, "save_total_limit": 2} | changes)


def blow_up(monkeypatch, step, what):
    """After optimizer step number `step` the weights are no use."""
    real = train_module.optimizer_step

    def optimizer_step(run, share, *rest):
        result = real(run, share, *rest)
        if share.step + 1 >= step:
            with torch.no_grad():
                weight = run.lm.model.model.layers[0].mlp.down_proj.weight
                {"NaN": lambda: weight[0].fill_(float("nan")), "huge": lambda: weight.mul_(1e29)}[what]()
        return result

    monkeypatch.setattr(train_module, "optimizer_step", optimizer_step)


def spoil_losses(monkeypatch, first):
    """From optimizer step `first` on every loss is NaN, as with weights that only look sound."""
    real, step = train_module.fused_loss, []

    def fused_loss(lm, batch, *args):
        out = real(lm, batch, *args)
        if torch.is_grad_enabled():
            step.append(None)
            if len(step) >= first:
                return dataclasses.replace(out, loss=out.loss * float("nan"))
        return out

    monkeypatch.setattr(train_module, "fused_loss", fused_loss)


@pytest.mark.parametrize(("what", "eval_fraction"), [("NaN", 0.0), ("huge", 0.0), ("NaN", 0.2)])
def test_weights_that_blow_up_end_the_run_and_cost_no_good_checkpoint(what, eval_fraction, base, tmp_path, monkeypatch):
    out = tmp_path / "run"
    blow_up(monkeypatch, 4, what)
    with pytest.raises(UserError, match=r"the run has diverged: .* No model was written; the last good checkpoint is "):
        train(config(base, out, max_steps=9, eval_fraction=eval_fraction), "train")
    assert not (out / "model.safetensors").exists()
    good = sorted(out.glob("checkpoint-?"))
    assert [path.name for path in good] == ["checkpoint-2", "checkpoint-3"]
    assert all(value.isfinite().all() for path in good for value in weights(path).values())


def test_a_checkpoint_that_the_next_steps_find_no_use_is_set_aside(base, tmp_path, monkeypatch):
    """Its weights look sound; every loss after it is NaN. A resumed run goes back behind it."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil_losses(patch, 5)
        with pytest.raises(UserError, match=r"the 4th such step in a row: .* last good checkpoint is .*checkpoint-3"):
            train(config(base, out, max_steps=12), "train")
    names = {path.name for path in out.glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-3", "checkpoint-4.diverged"}
    train(config(base, out, max_steps=12, resume=True), "train")
    assert (out / "model.safetensors").exists()


def test_a_blown_up_run_exits_2_with_one_line_and_valid_json(base, tmp_path, capsys):
    out = tmp_path / "run"
    flags = {**base, "output_dir": out, "learning_rate": 1e30, "max_steps": 4, "save_steps": 0, "max_length": 64}
    flags |= {"device": "cpu", "eval_fraction": 0.2, "impl": "torch"}
    assert cli.main(["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]) == 2
    error = capsys.readouterr().err
    assert "prefuse: error: the run has diverged: held-out loss is " in error
    assert "there is no good checkpoint. Start a new run from " in error
    assert "Traceback" not in error
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_run_without_one_update_publishes_nothing(base, tmp_path, monkeypatch):
    spoil_losses(monkeypatch, 1)
    out = tmp_path / "run"
    with pytest.raises(UserError, match="none of 3 steps made an update"):
        train(config(base, out, max_steps=3, save_steps=0), "train")
    assert not (out / "model.safetensors").exists()


def test_one_bad_row_in_the_last_step_is_no_divergence(base, tmp_path, monkeypatch):
    real, calls = train_module.fused_loss, []

    def fused_loss(*args):
        out = real(*args)
        calls.append(None)
        return dataclasses.replace(out, loss=out.loss * float("nan")) if len(calls) == 3 else out

    monkeypatch.setattr(train_module, "fused_loss", fused_loss)
    train(config(base, tmp_path / "run", max_steps=3), "train")
    assert read_log(tmp_path / "run")[-1]["skipped_steps"] == 1
    assert (tmp_path / "run/model.safetensors").exists()


def test_kto_checks_its_end_too(base, tmp_path, monkeypatch):
    rows = write_rows(tmp_path / "l.jsonl", LABELLED)
    train(config(base, tmp_path / "sound", dataset_name=rows, loss_type="kto", max_steps=2), "train")
    blow_up(monkeypatch, 2, "NaN")
    with pytest.raises(UserError, match="the weights are not finite after step 2"):
        train(config(base, tmp_path / "run", dataset_name=rows, loss_type="kto", max_steps=2, save_steps=0), "train")


def test_loaded_weights_that_are_no_numbers_are_named(base, tmp_path):
    model = Path(save_model(tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.input_layernorm.weight"][3] = math.inf
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"are not finite .* in 1 tensors \(model.layers.1.input_layernorm.weight\)"):
        train(config(base, tmp_path / "run", model_name_or_path=str(model)), "train")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_is_good_only_when_a_step_has_found_it_so(tmp_path):
    from prefuse.engine.run.checkpoint import Checkpoints
    from prefuse.engine.run.ranks import ALONE

    for step in range(1, 5):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/manifest.json").write_text('{"trainer_state.json": ""}')
    kept = Checkpoints(2, ALONE, newest=3)
    kept.saved(4)
    assert (kept.newest, kept.good) == (4, 3)
    assert len(list(tmp_path.iterdir())) == 4
    kept.proven(tmp_path)
    assert kept.good == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4"]
