"""Full disks and damaged files: found before anything is lost, said in one line; a good checkpoint stays."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError

from kill_resume import command, result
from prefuse.engine import cli
from prefuse.engine import train as train_module
from prefuse.engine.errors import UserError
from prefuse.engine.model import load as model_module
from prefuse.engine.report.log import MetricsLog
from prefuse.engine.run import checkpoint as checkpoint_module
from prefuse.engine.run import publish as publish_module
from prefuse.engine.run.checkpoint import latest_checkpoint
from prefuse.engine.run.files import whole_file
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, weights, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"model": save_model(folder / "model"), "pairs": write_rows(folder / "pairs.jsonl", PAIRS)}


def config(files, out, **changes):
    return settings(
        **{
            "model_name_or_path": files["model"], "dataset_name": files["pairs"], "output_dir": str(out),
            "max_steps": 6, "eval_fraction": 0.2, "eval_steps": 2, "save_steps": 4, **changes,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    train(config(files, out), "train")
    return result(out)


@pytest.fixture(scope="module")
def saved_once(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "run"
    train(config(files, out, save_steps=2), "train")
    return out


@pytest.fixture
def saved(saved_once, tmp_path):
    """With its model gone, so that it is not finished."""
    out = Path(shutil.copytree(saved_once, tmp_path / "run"))
    (out / "model.safetensors").unlink()
    return out


def test_too_little_space_is_found_before_anything_is_written(files, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    out, calls = tmp_path / "run", []

    def disk_usage(path):
        calls.append(path)
        return free if len(calls) <= 2 else free._replace(free=1 << 20)  # before training, checkpoint-2, checkpoint-4

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(UserError, match=r"checkpoint-4 takes about .* GB and the disk has 0.00105 GB free;"):
        train(config(files, out, save_steps=2, save_total_limit=1), "train")
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint-2"]
    assert latest_checkpoint(out) == out / "checkpoint-2"


def test_the_space_asked_for_is_what_a_checkpoint_takes(files, tmp_path, monkeypatch):
    asked, whole = [], []
    monkeypatch.setattr(checkpoint_module, "require_space", lambda folder, needed, what: asked.append(needed))
    monkeypatch.setattr(publish_module, "require_space", lambda folder, needed, what: whole.append(needed))
    train(config(files, tmp_path / "run", max_steps=4), "train")
    taken = sum(path.stat().st_size for path in (tmp_path / "run/checkpoint-4").iterdir())
    assert taken <= asked[0] <= taken + (2 << 20)
    model = (tmp_path / "run/model.safetensors").stat().st_size
    assert model <= whole[-1] <= model + (2 << 20)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=["python", "safetensors"],
)
def test_a_disk_that_fills_up_while_ranks_gather_ends_all_of_them_and_keeps_the_last(
    error, files, tmp_path, monkeypatch, capsys
):
    from safetensors import torch as safetensors_torch

    real, calls = safetensors_torch.save_file, []

    def full(tensors, path, **options):
        calls.append(Path(path).name)
        if len(calls) == 4:  # the second checkpoint's optimizer: its weights are there already
            raise error
        real(tensors, path, **options)

    monkeypatch.setattr(safetensors_torch, "save_file", full)
    out = tmp_path / "run"
    assert cli.main([str(x) for x in command(files, out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-2"]
    assert latest_checkpoint(out) == out / "checkpoint-2"
    assert calls[3] == "optimizer-00001.safetensors"


def test_a_disk_that_fills_up_under_the_last_files_leaves_a_checkpoint_to_end_from(
    files, tmp_path, monkeypatch, capsys
):
    def full(*args, **options):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    out = tmp_path / "run"
    argv = [str(x) for x in command(files, out, num_train_epochs=1.0)]
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "publish_model", refused(patch, train_module.publish_model, full))
        assert cli.main(argv) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (out / "model.safetensors").exists()
    assert not [path for path in out.iterdir() if path.name.startswith("model.")]
    assert latest_checkpoint(out) is not None
    assert cli.main([*argv, "--resume"]) == 0
    assert cli.main([str(x) for x in command(files, tmp_path / "straight", num_train_epochs=1.0)]) == 0
    assert result(out) == result(tmp_path / "straight")


@pytest.mark.parametrize("rest", ["room elsewhere", "no room"])
def test_a_disk_that_fills_up_under_the_model_of_a_run_without_checkpoints_keeps_the_weights(
    rest, files, tmp_path, monkeypatch, capsys
):
    """Beside the run folder, or in the first place with room; the words name it, and it is the model."""
    out, here = tmp_path / "run", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(tempfile, "tempdir", str(here))
    monkeypatch.setenv("HOME", str(here))
    argv = [str(x) for x in command(files, out, num_train_epochs=1.0, save_steps=0)]
    free = shutil.disk_usage(tmp_path)

    def full(path):
        """From the publishing on, of all disks but the working directory's."""
        room = not (out / "metrics.jsonl").exists() or (rest == "room elsewhere" and Path(path) == here)
        return free if room else free._replace(free=1 << 10)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", full)
        assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "the model takes about" in error
    assert not (out / "model.safetensors").exists()
    if rest == "no room":
        assert "found no place with room for them and are lost" in error
        return
    kept = Path(re.search(r"were kept in (\S+), a whole model", error)[1])
    assert kept.parent == here
    assert cli.main([str(x) for x in command(files, tmp_path / "straight", num_train_epochs=1.0, save_steps=0)]) == 0
    assert weights(kept).keys() == (expected := weights(tmp_path / "straight")).keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights(kept).items())
    assert (kept / "tokenizer.json").exists()


def test_an_image_and_every_small_file_is_whole_or_absent(tmp_path):
    target = tmp_path / "curves.png"
    target.write_bytes(b"before")

    def fill():
        with whole_file(target) as aside:
            aside.write_bytes(b"half")
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fill()
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert target.read_bytes() == b"before"


def test_a_plot_that_cannot_be_written_costs_nothing_else(files, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_module, "plot_curves", full)
    assert cli.main([str(x) for x in command(files, tmp_path / "run", num_train_epochs=1.0)]) == 0
    assert "curves.png was not written" in caplog.text
    assert json.loads((tmp_path / "run/run.json").read_text())["state"] == "finished"


def refused(patch, publish, full):
    """`publish`, with a disk that is full by then."""
    from transformers import modeling_utils

    def inside(*run):
        patch.setattr(modeling_utils, "safe_save_file", full)
        return publish(*run)

    return inside


def test_metrics_that_cannot_be_written_end_the_run_in_one_line(files, tmp_path, monkeypatch, capsys):
    real, written = MetricsLog.write, []

    def full(log, step, *args):
        written.append(step)
        if step == 3:
            raise OSError(28, "No space left on device", str(log.path))
        real(log, step, *args)

    monkeypatch.setattr(MetricsLog, "write", full)
    out = tmp_path / "run"
    argv = [str(x) for x in command(files, out, num_train_epochs=1.0, eval_fraction=0.0, logging_steps=1)]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "prefuse: error: [Errno 28] No space left on device" in error
    assert "Traceback" not in error
    assert latest_checkpoint(out) == out / "checkpoint-2"
    monkeypatch.setattr(MetricsLog, "write", real)
    assert cli.main([*argv, "--resume"]) == 0
    assert [row["step"] for row in read_log(out)] == list(range(1, len(read_log(out)) + 1))


@pytest.mark.parametrize("fault", ["missing", "cut", "index"])
def test_a_model_in_many_files_with_one_that_is_not_whole_is_one_line(fault, files, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(files["model"], folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    {
        "missing": lambda: shards[1].unlink(),
        "cut": lambda: shards[1].write_bytes(shards[1].read_bytes()[:-100]),
        "index": lambda: (folder / "model.safetensors.index.json").write_text('{"weight_map'),
    }[fault]()
    assert cli.main([str(x) for x in command(files | {"model": str(folder)}, tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"prefuse: error: cannot load a causal LM from {folder}" in error
    assert "Traceback" not in error


def test_an_output_folder_that_cannot_be_written_is_one_line(files, capsys):
    assert cli.main([str(x) for x in command(files, Path("/proc/prefuse"))]) == 2
    assert "prefuse: error: " in (error := capsys.readouterr().err)
    assert "/proc/prefuse" in error
    assert "Traceback" not in error


def test_rows_that_change_on_the_disk_do_not_reach_a_running_run(files, straight, tmp_path, monkeypatch):
    rows = tmp_path / "pairs.jsonl"
    shutil.copy(files["pairs"], rows)
    real = train_module.optimizer_step

    def changing(*args):
        rows.write_text("not even JSON")
        return real(*args)

    monkeypatch.setattr(train_module, "optimizer_step", changing)
    train(config(files, tmp_path / "run", dataset_name=str(rows)), "train")
    assert result(tmp_path / "run") == straight


def test_a_checkpoint_in_many_files_resumes_alike_and_is_refused_without_one_of_them(
    files, straight, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(model_module, "SHARD_SIZE", "40KB")
    monkeypatch.setattr(checkpoint_module, "FILE_BYTES", 40_000)
    out = tmp_path / "run"
    train(config(files, out, save_steps=2), "train")
    names = {path.name for path in (out / "checkpoint-4").iterdir()}
    assert "optimizer-00002.safetensors" in names
    assert "model.safetensors.index.json" in names
    shards = sorted(name for name in names if name.startswith("model-"))
    assert len(shards) > 1
    (out / "checkpoint-6" / shards[1]).unlink()
    (out / "model.safetensors.index.json").unlink()  # so that the run is not finished
    train(config(files, out, resume=True), "train")
    assert f"checkpoint-6 is damaged ({shards[1]} is missing): trying an older one" in caplog.text
    monkeypatch.undo()
    assert result_of_many(out) == straight[1]


def result_of_many(out: Path) -> list:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for rate in ("tokens_per_second", "samples_per_second", "pairs_per_second", "tokens_saved", "mfu"):
            row.pop(rate, None)
    return rows


@pytest.mark.parametrize("listed", [{}, {"config.json": "x"}])
def test_a_manifest_that_lists_too_little_is_no_proof(listed, saved, caplog):
    (saved / "checkpoint-6/manifest.json").write_text(json.dumps(listed))
    assert latest_checkpoint(saved) == saved / "checkpoint-4"
    assert "manifest.json does not list" in caplog.text


def test_a_damaged_newest_checkpoint_never_costs_the_good_ones(files, saved):
    """It is set aside: else it would be the one that save_total_limit keeps."""
    (saved / "checkpoint-6/rng.safetensors").write_bytes(b"")
    shutil.copytree(saved / "checkpoint-6", saved / "checkpoint-7")
    train(config(files, saved, save_steps=1, save_total_limit=1, resume=True), "train")
    assert sorted(path.name for path in saved.glob("checkpoint-*")) == [
        "checkpoint-6", "checkpoint-6.damaged", "checkpoint-7.damaged",
    ]  # fmt: skip
    assert latest_checkpoint(saved) == saved / "checkpoint-6"


def test_replacing_a_checkpoint_never_leaves_none(files, saved, monkeypatch):
    """Between the old one's going and the new one's coming there is a moment; the old one then has another name."""
    real = Path.rename

    def rename(self, target):
        if self.name.endswith(".tmp"):
            assert (saved / "checkpoint-6.old/manifest.json").exists()
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    with checkpoint_module.published_folder(saved / "checkpoint-6") as aside:
        (aside / "x").write_text("new")
    assert [path.name for path in (saved / "checkpoint-6").iterdir()] == ["x"]
    assert not list(saved.glob("*.old"))
