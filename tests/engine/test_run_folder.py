"""Who owns a run folder: one living run; nothing that is not ours is touched; a finished run stays as it is."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefuse.engine import train as train_module
from prefuse.engine.errors import UserError
from prefuse.engine.run import folder as folder_module
from prefuse.engine.run.files import clear_dead, process_start
from prefuse.engine.run.folder import LOCK, MARK, RunFolder, open_folder
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, weights, write_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    return {"model_name_or_path": save_model(folder / "model"), "dataset_name": write_rows(folder / "p.jsonl", PAIRS)}


def config(base, out, command="train", **changes):
    return settings(command, **base | {"output_dir": str(out), "max_steps": 2, "save_steps": 1} | changes)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HOLDS = """
import sys, time
from pathlib import Path
from prefuse.engine.run.folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.write_mark(state="training", command="train")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that works in tmp_path/run."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )  # fmt: skip
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_a_living_run_works_in_is_refused_by_the_number_of_its_process(resume, holder, base, tmp_path):
    before = everything(tmp_path / "run")
    with pytest.raises(UserError, match=rf"run is in use by pid {holder.pid} since .*: wait for that run, stop it"):
        train(config(base, tmp_path / "run", resume=resume), "train")
    assert everything(tmp_path / "run") == before


@pytest.mark.slow
def test_the_lock_of_a_killed_run_is_taken_over(holder, base, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / LOCK).exists()
    train(config(base, tmp_path / "run", resume=True), "train")
    assert not (tmp_path / "run" / LOCK).exists()
    assert (tmp_path / "run/model.safetensors").exists()


@pytest.mark.parametrize(
    ("holder", "lives"),
    [
        ({"pid": os.getpid(), "process_start": process_start(os.getpid())}, True),
        ({"pid": os.getpid(), "process_start": 1}, False),  # another process had this number
        ({"pid": 2**22 + 1}, False),
        ({"pid": 7, "host": "elsewhere"}, True),
        ({}, False),
    ],
)
def test_where_the_file_system_has_no_locks_the_holders_process_is_looked_for(holder, lives, tmp_path, monkeypatch):
    import socket

    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(folder_module.fcntl, "flock", no_locks)
    (tmp_path / LOCK).write_text(json.dumps({"host": socket.gethostname()} | holder if holder else {}))
    if lives:
        with pytest.raises(UserError, match=f"in use by pid {holder['pid']}"):
            RunFolder(tmp_path)
    else:
        RunFolder(tmp_path).close()


def test_a_forked_child_does_not_hold_what_its_parent_held(tmp_path):
    folder = RunFolder(tmp_path / "run")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, b"x")
        os.read(reader, 0)
        signal.pause()
    os.read(reader, 1)
    folder.close()
    RunFolder(tmp_path / "run").close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)


# ---------------------------------------------------------------------------------------------------------
# What is not ours


def foreign_trainer(folder: Path) -> None:
    """What transformers' trainer leaves."""
    for step in (400, 500):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"global_step": step}))
        (folder / f"checkpoint-{step}/model.safetensors").write_bytes(b"theirs")
    (folder / "model.safetensors").write_bytes(b"theirs")


def test_the_folder_of_another_trainer_is_neither_resumed_nor_touched(base, tmp_path):
    out = tmp_path / "run"
    foreign_trainer(out)
    before = everything(out)
    with pytest.raises(UserError, match=r"is not the folder of a run: .* nothing in it is touched"):
        train(config(base, out, resume=True), "train")
    assert everything(out) == before


def test_another_trainers_checkpoints_inside_a_run_of_ours_stay(base, tmp_path):
    out = tmp_path / "run"
    train(config(base, out), "train")
    (out / "model.safetensors").unlink()
    foreign_trainer(out)
    (out / "model.safetensors").unlink()
    theirs = {name: data for name, data in everything(out).items() if name.startswith(("checkpoint-4", "checkpoint-5"))}
    train(config(base, out, resume=True, max_steps=4, save_total_limit=1), "train")
    assert theirs.items() <= everything(out).items()
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-400", "checkpoint-500"}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("role", ["model_name_or_path", "ref_model_name_or_path"])
@pytest.mark.parametrize("through", ["itself", "a link", "a link in the model"])
def test_a_model_is_never_an_output_folder(through, role, resume, base, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(base["model_name_or_path"], model)
    before = everything(model)
    (tmp_path / "link").symlink_to(model)
    out = {"itself": model, "a link": tmp_path / "link", "a link in the model": model}[through]
    named = tmp_path / "link" if through == "a link in the model" else model
    with pytest.raises(UserError, match=f"is the model folder of {role}: a run never writes there"):
        train(config(base, out, resume=resume, **{role: str(named)}), "train")
    assert everything(model) == before


def test_a_run_that_starts_from_its_own_checkpoint_is_refused(base, tmp_path):
    out = tmp_path / "run"
    train(config(base, out), "train")
    with pytest.raises(UserError, match=r"lies inside output_dir .*, which a run writes to"):
        train(config(base, out, resume=True, model_name_or_path=str(out / "checkpoint-2")), "train")


# ---------------------------------------------------------------------------------------------------------
# Finished, refused, interrupted


@pytest.mark.parametrize("save_steps", [0, 1])
def test_a_finished_run_is_finished(save_steps, base, tmp_path, capsys):
    out = tmp_path / "run"
    metrics = train(config(base, out, save_steps=save_steps), "train")
    before = everything(out)
    again = train(config(base, out, save_steps=save_steps, resume=True), "train")
    assert "is finished (2 steps): there is nothing to resume" in capsys.readouterr().out
    assert everything(out) == before
    assert again["loss"] == metrics["loss"]


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize(
    ("command", "change", "message"),
    [
        ("sft", {"learning_rate": 1e-2}, "the command was train and is now sft"),
        ("train", {"beta": 0.5}, "beta was not set and is now 0.5"),
        ("train", {"seed": 3, "max_length": 63}, "max_length was 64 and is now 63; seed was 42 and is now 3"),
    ],
)
def test_a_finished_run_is_not_trained_anew_by_another_command_or_settings(command, change, message, base, tmp_path):
    out = tmp_path / "run"
    train(config(base, out, save_steps=0), "train")
    before = everything(out)
    with pytest.raises(UserError, match=message):
        train(config(base, out, command, save_steps=0, resume=True, **change), command)
    assert everything(out) == before


def test_a_refused_start_leaves_nothing_that_stops_the_corrected_one(base, tmp_path):
    rows = write_rows(tmp_path / "p.jsonl", [*PAIRS, {"prompt": "a", "chosen": "", "rejected": "b"}])
    out = tmp_path / "run"
    with pytest.raises(UserError, match="does not exist"):
        train(config(base, out, dataset_name=rows, ref_model_name_or_path="/none/here"), "train")
    assert not out.exists()
    train(config(base, out, dataset_name=rows), "train")
    assert (out / "skipped.jsonl").exists()


def test_a_start_that_was_killed_leaves_nothing_that_stops_the_next(base, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / "skipped.jsonl").write_text("")
    (out / LOCK).write_text('{"pid": 1}')
    train(config(base, out), "train")
    assert json.loads((out / MARK).read_text())["state"] == "finished"


def test_a_stop_in_set_up_says_so_and_leaves_no_folder(base, tmp_path, monkeypatch):
    from prefuse.engine.run.signals import Stopped

    def interrupted(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(train_module, "prepare", interrupted)
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM before the first step: nothing was trained$"):
        train(config(base, tmp_path / "run"), "train")
    assert not (tmp_path / "run").exists()


def test_what_was_there_before_a_refused_resume_stays(base, tmp_path):
    out = tmp_path / "run"
    train(config(base, out), "train")
    (out / "model.safetensors").unlink()
    before = everything(out)
    with pytest.raises(UserError, match="no such file"):
        train(config(base, out, resume=True, dataset_name=str(tmp_path / "none.jsonl")), "train")
    assert everything(out) == before


# ---------------------------------------------------------------------------------------------------------
# Moved and linked


@pytest.mark.parametrize("through", ["moved", "link turned"])
def test_a_run_whose_folder_is_moved_goes_on_where_it_is_now(through, base, tmp_path, monkeypatch, caplog):
    real, calls = train_module.optimizer_step, []
    given = tmp_path / "run"
    if through == "link turned":
        (tmp_path / "real").mkdir()
        (tmp_path / "other").mkdir()
        given.symlink_to(tmp_path / "real")

    def moving(*args):
        calls.append(None)
        if len(calls) == 2 and through == "moved":
            given.rename(tmp_path / "real")
        elif len(calls) == 2:
            given.unlink()
            given.symlink_to(tmp_path / "other")
        return real(*args)

    monkeypatch.setattr(train_module, "optimizer_step", moving)
    train(config(base, given, max_steps=3), "train")
    now = tmp_path / "real"
    assert f"is now {now}: the run goes on there" in caplog.text
    assert [row["step"] for row in read_log(now)] == [1, 2, 3]
    assert {"checkpoint-2", "checkpoint-3", "model.safetensors", "curves.png"} <= {path.name for path in now.iterdir()}
    assert all(value.isfinite().all() for value in weights(now).values())
    assert not given.exists() or not list(given.iterdir())


def test_leftovers_of_a_killed_save_are_cleared_and_what_it_replaced_comes_back(base, tmp_path):
    out = tmp_path / "run"
    train(config(base, out), "train")
    shutil.copytree(out / "checkpoint-2", out / "checkpoint-2.tmp")
    (out / "checkpoint-2").rename(out / "checkpoint-2.old")
    (out / "model.abc.tmp").mkdir()
    open_folder(out, True, {}).close()
    assert {path.name for path in out.glob("*checkpoint*")} == {"checkpoint-1", "checkpoint-2"}
    assert not list(out.glob("*.tmp"))


@pytest.mark.skipif(sys.platform != "linux", reason="it asks /proc")
def test_what_a_killed_writer_left_goes_also_where_its_process_waits_for_its_parent_or_its_number_is_taken(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    assert Path(f"/proc/{ended.pid}").exists()
    later = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    before = time.time() - 60  # older than the process that has the number now
    host = socket.gethostname()
    for name, pid, written in (("dead", ended.pid, None), ("taken", later.pid, before), ("mine", os.getpid(), None)):
        folder = tmp_path / f"{name}.{pid}-{host}-0123abcd.tmp"
        folder.mkdir()
        if written is not None:
            os.utime(folder, (written, written))
    (tmp_path / "elsewhere.1-another-host-0123abcd.tmp").mkdir()
    clear_dead(tmp_path)
    assert sorted(path.name.split(".")[0] for path in tmp_path.iterdir()) == ["elsewhere", "mine"]
    ended.wait()
    later.communicate(b"")
