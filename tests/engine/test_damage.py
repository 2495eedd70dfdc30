"""Damaged checkpoints: whatever the damage, the one before it is taken, with a word; never a wrong model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from prefuse.engine.run.files import is_number, sha256_of
from prefuse.engine.train import train
from tiny_run import PAIRS, save_model, settings, weights, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return {"model_name_or_path": save_model(folder / "model"), "dataset_name": write_rows(folder / "p.jsonl", PAIRS)}


@pytest.fixture(scope="module")
def finished_once(base, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "run"
    train(settings(**base, output_dir=str(out), max_steps=4, save_steps=2), "train")
    return out


@pytest.fixture
def stopped(finished_once, tmp_path):
    out = Path(shutil.copytree(finished_once, tmp_path / "run"))
    (out / "model.safetensors").unlink()
    return out


def sign(checkpoint: Path) -> None:
    """Hashes as they should be for what is there now: then only sense can tell."""
    hashes = {
        path.relative_to(checkpoint).as_posix(): sha256_of(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in ("manifest.json", "trainer_state.json")
    }
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        state["files"] = hashes
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    except (ValueError, TypeError, RecursionError):
        pass
    hashes["trainer_state.json"] = sha256_of(checkpoint / "trainer_state.json")
    (checkpoint / "manifest.json").write_text(json.dumps(hashes))


def with_tensors(name, edit):
    def damage(checkpoint: Path, other: Path) -> None:
        path = checkpoint / name
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
        tensors = load_file(path)
        edit(tensors)
        save_file(tensors, path, metadata=about)

    return damage


def with_state(edit):
    def damage(checkpoint: Path, other: Path) -> None:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        edit(state)
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))

    return damage


def put(**values):
    return lambda mapping: mapping.update(values)


def drop(*names):
    return lambda mapping: [mapping.pop(name) for name in names]


NORM = "model.norm.weight"
EXP = f"exp_avg_sq.{NORM}"
OPTIMIZER = "optimizer-00001.safetensors"
DAMAGES = {  # each with its hashes put right
    "weights NaN": with_tensors("model.safetensors", lambda t: t[NORM].__setitem__(0, float("nan"))),
    "weights of another shape": with_tensors("model.safetensors", lambda t: put(**{NORM: torch.ones(31)})(t)),
    "weights lacking": with_tensors("model.safetensors", drop(NORM)),
    "weights of an older step": lambda c, o: shutil.copy(o / OPTIMIZER, c / "model.safetensors"),
    "optimizer NaN": with_tensors(OPTIMIZER, lambda t: t[EXP].__setitem__(0, float("inf"))),
    "optimizer negative": with_tensors(OPTIMIZER, lambda t: t[EXP].__setitem__(0, -1.0)),
    "optimizer of another shape": with_tensors(OPTIMIZER, lambda t: put(**{EXP: torch.ones(7)})(t)),
    "optimizer of another model": with_tensors(OPTIMIZER, lambda t: put(**{"exp_avg.nothing": torch.ones(7)})(t)),
    "optimizer lacking a state": with_tensors(OPTIMIZER, drop(EXP)),
    "optimizer without states": with_tensors(OPTIMIZER, lambda t: t.clear()),
    "optimizer file gone": lambda c, o: (c / OPTIMIZER).unlink(),
    "optimizer of a later step": with_tensors(OPTIMIZER, put(**{f"step.{NORM}": torch.tensor(9.0)})),
    "random states of no length": with_tensors("rng.safetensors", put(cpu=torch.zeros(1, 0, dtype=torch.uint8))),
    "random states of floats": with_tensors("rng.safetensors", lambda t: put(cpu=t["cpu"].float())(t)),
    "random states gone": with_tensors("rng.safetensors", drop("cpu")),
    "rows gone": with_tensors("rows.safetensors", lambda t: (t.clear(), put(x=torch.ones(1))(t))),
    "another checkpoint's place": lambda c, o: (shutil.rmtree(c), shutil.copytree(o, c)),
    "step is text": with_state(put(step="4")),
    "step is true": with_state(put(step=True)),
    "step of another": with_state(put(step=2)),
    "lines below 0": with_state(put(lines=-1)),
    "cut too short": with_state(put(cut=[1, 2])),
    "window of text": with_state(put(window={"loss": ["a", 1]})),
    "window of a number": with_state(put(window={"loss": 3})),
    "guards empty": with_state(put(guards={})),
    "guards of text": with_state(lambda s: s["guards"].update(losses=["x"])),
    "guards without count": with_state(lambda s: s["guards"].update(skipped=None)),
    "identity empty": with_state(put(identity={})),
    "identity a list": with_state(put(identity=[])),
    "state a list": lambda c, o: (c / "trainer_state.json").write_text("[]"),
    "state half": lambda c, o: (c / "trainer_state.json").write_text('{"step": 4, "identity"'),
    "state deep": lambda c, o: (c / "trainer_state.json").write_text("[" * 100_000),
    "config.json of text": lambda c, o: (c / "config.json").write_text("hello"),
    "config.json of wrong types": lambda c, o: (c / "config.json").write_text('{"hidden_size": "x"}'),
}
QUICK = {"weights NaN", "optimizer lacking a state", "rows gone", "step of another", "state deep", "identity empty"}
QUICK |= {"swapped with its hash", "a file less in the list"}


def cases(damages):
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in damages]


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("damage", cases(DAMAGES))
def test_a_checkpoint_that_makes_no_sense_falls_back_to_the_one_before(damage, stopped, base, finished_once, caplog):
    newest, other = stopped / "checkpoint-4", stopped / "checkpoint-2"
    DAMAGES[damage](newest, other)
    if damage != "another checkpoint's place":
        sign(newest)
    train(settings(**base, output_dir=str(stopped), max_steps=4, save_steps=2, resume=True), "train")
    assert f"{newest} is damaged (" in caplog.text
    assert (stopped / "checkpoint-4.damaged").exists()
    assert all(torch.equal(value, weights(finished_once)[name]) for name, value in weights(stopped).items())


UNSIGNED = {
    "swapped": lambda c, o: shutil.copy(o / "model.safetensors", c / "model.safetensors"),
    "swapped with its hash": lambda c, o: (
        shutil.copy(o / "model.safetensors", c / "model.safetensors"),
        edit_manifest(c, put(**{"model.safetensors": sha256_of(o / "model.safetensors")})),
    ),
    "cut": lambda c, o: (c / OPTIMIZER).write_bytes((c / OPTIMIZER).read_bytes()[:-10]),
    "a file less in the list": lambda c, o: edit_manifest(c, drop(OPTIMIZER)),
    "a file outside": lambda c, o: edit_manifest(c, put(**{"../../p": "0"})),
    "a number as hash": lambda c, o: edit_manifest(c, put(**{"config.json": 3})),
    "the list gone": lambda c, o: (c / "manifest.json").unlink(),
    "a folder in a file's place": lambda c, o: ((c / OPTIMIZER).unlink(), (c / OPTIMIZER).mkdir()),
}


def edit_manifest(checkpoint: Path, edit) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    edit(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("damage", cases(UNSIGNED))
def test_a_checkpoint_that_is_not_what_was_written_falls_back(damage, stopped, base, finished_once, caplog):
    UNSIGNED[damage](stopped / "checkpoint-4", stopped / "checkpoint-2")
    train(settings(**base, output_dir=str(stopped), max_steps=4, save_steps=2, resume=True), "train")
    assert f"{stopped / 'checkpoint-4'} is damaged (" in caplog.text
    assert all(torch.equal(value, weights(finished_once)[name]) for name, value in weights(stopped).items())


def test_where_all_are_damaged_the_run_starts_anew_and_ends_alike(stopped, base, finished_once, capsys):
    for step in (2, 4):
        DAMAGES["weights NaN"](stopped / f"checkpoint-{step}", None)
        sign(stopped / f"checkpoint-{step}")
    train(settings(**base, output_dir=str(stopped), max_steps=4, save_steps=2, resume=True), "train")
    assert "has no whole checkpoint: starting from the first step" in capsys.readouterr().out
    assert all(torch.equal(value, weights(finished_once)[name]) for name, value in weights(stopped).items())


@pytest.mark.parametrize(
    ("text", "number"),
    [("0", True), ("-1.5e300", True), ("NaN", False), ("-Infinity", False), ("true", False), ('"1"', False),
     ("null", False), ("1" * 400, False)],
)  # fmt: skip
def test_a_number_of_a_file_is_one_that_a_float_can_be(text, number):
    """A whole number of 400 digits is JSON too, and no float can be it."""
    assert is_number(json.loads(text)) is number
