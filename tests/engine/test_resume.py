"""What a resumed run must have in common with the run before it, what may differ, and how a run is made longer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prefuse.engine.errors import UserError
from prefuse.engine.run.identity import checksums, deciding_settings
from prefuse.engine.run.optimizer import learning_rate
from prefuse.engine.run.ranks import ALONE
from prefuse.engine.train import train
from tiny_run import LABELLED, PAIRS, read_log, save_model, settings, weights, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return {
        "model_name_or_path": save_model(folder / "model"),
        "dataset_name": write_rows(folder / "p.jsonl", PAIRS),
        "max_steps": 4,
        "save_steps": 2,
    }


@pytest.fixture(scope="module")
def finished_once(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    train(settings(**base, output_dir=str(out)), "train")
    return out


@pytest.fixture
def stopped(finished_once, tmp_path):
    """A run whose model was not written yet."""
    out = Path(shutil.copytree(finished_once, tmp_path / "run"))
    (out / "model.safetensors").unlink()
    return out


def resumed(base, out, **changes):
    return train(settings(**base | {"output_dir": str(out), "resume": True} | changes), "train")


def changed(pairs, **rows):
    pairs = [dict(pair) for pair in pairs]
    for index, answer in rows.items():
        pairs[int(index.removeprefix("row"))]["chosen"] = answer
    return pairs


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            changed(PAIRS, row7="it is red"),
            r"the training rows are not the same: 1 of 12 differ in tokens or label, first at p.jsonl:8",
        ),
        (
            PAIRS[:-1],
            r"the training rows are not the same: there were 12 and are now 11, the first 11 are the same",
        ),
        ([*PAIRS, PAIRS[0] | {"chosen": "x"}], r"there were 12 and are now 13, first at p.jsonl:13"),
        (
            [PAIRS[1], PAIRS[0], *PAIRS[2:]],
            r"the training rows are not in the same order: 2 of 12 stand elsewhere, first at p.jsonl:1",
        ),
    ],
    ids=["one", "fewer", "more", "order"],
)
def test_changed_rows_are_named_by_the_first_of_them(rows, message, stopped, base, tmp_path):
    data = write_rows(tmp_path / "p.jsonl", rows)
    with pytest.raises(UserError, match=f"cannot resume: .*{message}") as refused:
        resumed(base, stopped, dataset_name=data)
    assert not any(len(word) == 64 for word in str(refused.value).split())


def test_a_label_that_was_turned_is_a_changed_row(base, tmp_path):
    kto = base | {"loss_type": "kto", "dataset_name": write_rows(tmp_path / "l.jsonl", LABELLED)}
    out = tmp_path / "run"
    train(settings(**kto, output_dir=str(out)), "train")
    (out / "model.safetensors").unlink()
    turned = [LABELLED[0] | {"label": not LABELLED[0]["label"]}, *LABELLED[1:]]
    with pytest.raises(UserError, match=r"1 of 12 differ in tokens or label, first at l.jsonl:1"):
        resumed(kto, out, dataset_name=write_rows(tmp_path / "l.jsonl", turned))


def test_rows_and_model_elsewhere_are_the_same_run(stopped, finished_once, base, tmp_path):
    model = shutil.copytree(base["model_name_or_path"], tmp_path / "elsewhere")
    data = write_rows(tmp_path / "renamed.jsonl", PAIRS)
    resumed(base, stopped, dataset_name=data, model_name_or_path=str(model))
    assert all(torch.equal(value, weights(finished_once)[name]) for name, value in weights(stopped).items())


def test_another_model_to_start_from_is_another_reference(stopped, base, tmp_path):
    """The checkpoint has the weights; the reference is what stands in the folder."""
    model = Path(shutil.copytree(base["model_name_or_path"], tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    row = tensors["model.layers.1.mlp.down_proj.weight"][3]
    row[[0, 1]] = row[[1, 0]]  # the same numbers elsewhere
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError,
        match=r"the model that the run starts from is not the same: 1 of 21 tensors differ, first "
        r"model\.layers\.1\.mlp\.down_proj\.weight",
    ):
        resumed(base, stopped, model_name_or_path=str(model))


def test_a_second_reference_model_is_compared_by_what_is_in_it(base, tmp_path):
    reference, out = Path(save_model(tmp_path / "reference", seed=1)), tmp_path / "run"
    run = base | {"ref_model_name_or_path": str(reference)}
    train(settings(**run, output_dir=str(out)), "train")
    (out / "model.safetensors").unlink()
    moved = str(shutil.move(reference, tmp_path / "moved"))
    resumed(run, out, ref_model_name_or_path=moved)
    (out / "model.safetensors").unlink()
    save_model(tmp_path / "another", seed=2)
    with pytest.raises(UserError, match="the reference model is not the same: 16 of 21 tensors differ"):
        resumed(run, out, ref_model_name_or_path=str(tmp_path / "another"))
    with pytest.raises(UserError, match="there was a second model as the reference"):
        resumed(base, out)


def test_every_changed_setting_is_named_at_once(stopped, base):
    with pytest.raises(UserError, match=r"beta was not set and is now 0.3; lr_scheduler_type was linear and is now"):
        resumed(base, stopped, beta=0.3, lr_scheduler_type="cosine")


def test_what_changes_the_last_digits_alone_is_said(stopped, base, capsys):
    resumed(base, stopped, padding_free=False)
    assert "padding_free was not set and is now false: equal to rounding" in capsys.readouterr().out


def test_another_version_of_a_library_is_said(stopped, base, capsys):
    checkpoint = stopped / "checkpoint-4"
    edit_state(checkpoint, lambda state: state["identity"]["libraries"].update(torch="1.0"))
    resumed(base, stopped)
    assert "torch was 1.0 and is now " in (said := capsys.readouterr().out)
    assert "resuming after step 4" in said


def edit_state(checkpoint: Path, edit) -> None:
    """With the hashes put right again, as a careful hand would."""
    from prefuse.engine.run.files import sha256_of

    state = json.loads((checkpoint / "trainer_state.json").read_text())
    edit(state)
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["trainer_state.json"] = sha256_of(checkpoint / "trainer_state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_checksums_know_the_bits_and_their_places():
    x = torch.arange(70_000, dtype=torch.float32)
    turned = x.flip(0)
    minus = torch.cat([-x[:1], x[1:]])  # -0.0
    sums = checksums({"x": x, "turned": turned, "minus": minus, "half": x.bfloat16(), "same": x.clone()}, ALONE)
    assert sums["x"] == sums["same"]
    assert len(set(sums.values())) == 4


def test_settings_that_decide_the_weights_are_compared_and_places_are_not():
    known = deciding_settings(settings(model_name_or_path="m", dataset_name="d", output_dir="o"))
    assert {"beta", "learning_rate", "seed", "loss_type", "adam_beta1", "max_grad_norm", "bf16"} <= known.keys()
    assert not {"output_dir", "dataset_name", "model_name_or_path", "save_steps", "nproc", "resume"} & known.keys()


# ---------------------------------------------------------------------------------------------------------
# Longer


@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_a_longer_run_goes_on_and_says_its_schedule(state, stopped, finished_once, base, tmp_path, capsys):
    out = stopped
    if state == "finished":
        out = Path(shutil.copytree(finished_once, tmp_path / "again"))
    resumed(base, out, max_steps=6)
    assert (
        "the run is extended from 4 to 6 steps: from step 5 on, the learning rate is that of a run of the new length"
        in capsys.readouterr().out
    )
    log = [row for row in read_log(out) if "learning_rate" in row]
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5, 6]
    longer = settings(**base | {"max_steps": 6, "output_dir": "o"})
    assert [row["learning_rate"] for row in log[4:]] == [learning_rate(step, 6, longer) for step in (4, 5)]
    assert json.loads((out / "run.json").read_text())["total_steps"] == 6


def test_with_a_constant_rate_a_longer_run_is_the_run_that_was_that_long_from_the_start(base, tmp_path):
    constant = base | {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    train(settings(**constant | {"max_steps": 7}, output_dir=str(tmp_path / "straight")), "train")
    train(settings(**constant, output_dir=str(tmp_path / "longer")), "train")
    resumed(constant, tmp_path / "longer", max_steps=7)
    for name, value in weights(tmp_path / "straight").items():
        assert torch.equal(weights(tmp_path / "longer")[name], value)


def test_more_epochs_are_more_steps(base, tmp_path, capsys):
    epochs = {k: v for k, v in base.items() if k != "max_steps"}
    out = tmp_path / "run"
    train(settings(**epochs, num_train_epochs=1.0, output_dir=str(out)), "train")
    resumed(epochs, out, num_train_epochs=1.0)
    assert "is finished (3 steps)" in capsys.readouterr().out
    resumed(epochs, out, num_train_epochs=2.0)
    assert "extended from 3 to 6 steps: from step 3 on" in capsys.readouterr().out  # the last checkpoint is of step 2
    resumed(epochs, out, max_steps=6)
    assert "is finished (6 steps)" in capsys.readouterr().out


def test_a_finished_run_without_a_checkpoint_cannot_be_made_longer(base, tmp_path):
    out = tmp_path / "run"
    train(settings(**base | {"save_steps": 0}, output_dir=str(out)), "train")
    with pytest.raises(UserError, match="is finished and has no whole checkpoint to go on from: start a new run from"):
        resumed(base, out, max_steps=6)
    assert (out / "model.safetensors").exists()
