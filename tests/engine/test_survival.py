"""What may happen to a run while nobody watches: signals, deaths, full disks. Nothing is lost, and it says so."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file

from kill_resume import LAUNCHERS_GRACE, Server, command, kill_trials, result
from prefuse.engine import cli
from prefuse.engine import train as train_module
from prefuse.engine.errors import UserError
from prefuse.engine.model import load as model_module
from prefuse.engine.report.log import MetricsLog
from prefuse.engine.run import checkpoint as checkpoint_module
from prefuse.engine.run import launch
from prefuse.engine.run.checkpoint import latest_checkpoint
from prefuse.engine.run.signals import Stopped, StopSignals
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, weights, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"model": save_model(folder / "model"), "pairs": write_rows(folder / "pairs.jsonl", PAIRS)}


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.close()


def config(files, out, **changes):
    return settings(
        **{
            "model_name_or_path": files["model"], "dataset_name": files["pairs"], "output_dir": str(out),
            "max_steps": 6, "eval_fraction": 0.2, "eval_steps": 2, "save_steps": 4, **changes,
        }
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Signals


@pytest.fixture(scope="module")
def straight(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight") / "run"
    train(config(files, out), "train")
    return result(out)


@pytest.mark.parametrize(
    ("number", "where"),
    [(signal.SIGTERM, "optimizer_step"), (signal.SIGINT, "evaluate"), (signal.SIGUSR1, "optimizer_step")],
)
def test_a_signal_saves_at_the_next_step_and_the_resumed_run_ends_alike(
    number, where, files, straight, tmp_path, monkeypatch
):
    """In step 3 of 6 (saved when it is done), or in the evaluation after step 2, which the resumed run makes first."""
    real, calls, handler = getattr(train_module, where), [], signal.getsignal(number)

    def signalled(*args):
        calls.append(None)
        if len(calls) == (3 if where == "optimizer_step" else 2):
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # the thread that listens takes a moment
        return real(*args)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(train_module, where, signalled)
        with pytest.raises(Stopped) as stop:
            train(config(files, out), "train")
    step = 3 if where == "optimizer_step" else 2
    assert stop.value.signal == number
    assert f"stopped by {number.name} after step {step}; checkpoint-{step} is whole" in str(stop.value)
    assert signal.getsignal(number) == handler
    assert not (out / "model.safetensors").exists()
    train(config(files, out, resume=True), "train")
    assert result(out) == straight


def test_a_signal_before_the_first_step_leaves_no_checkpoint(files, tmp_path, monkeypatch):
    real = train_module.evaluate

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return real(*args)

    monkeypatch.setattr(train_module, "evaluate", signalled)
    with pytest.raises(Stopped, match="no step was done yet"):
        train(config(files, tmp_path / "run"), "train")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_command_line_says_so_and_exits_as_a_signal_does(files, tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise Stopped(signal.SIGTERM, "stopped by SIGTERM after step 3")

    monkeypatch.setattr(cli, "run", stopped)
    assert cli.main([str(x) for x in command(files, tmp_path / "run")]) == 143
    assert "prefuse: stopped by SIGTERM after step 3" in capsys.readouterr().err


SECOND = """
import os, signal, sys, time
from prefuse.engine import signals
signals.ECHO_SECONDS = 0.3
with signals.StopSignals() as stop:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)  # what a launcher passes on
    time.sleep(0.4)
    print(stop.received, flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(30)
"""


def test_a_second_signal_ends_the_process_at_once_and_an_echo_does_not():
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SECOND], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stdout) == (128 + signal.SIGINT, f"{signal.SIGTERM:d}\n"), done.stderr
    assert time.monotonic() - began < 25 + 30


def test_outside_the_main_thread_signals_are_left_alone():
    import threading

    handler, seen = signal.getsignal(signal.SIGTERM), []

    def enter():
        with StopSignals() as signals:
            seen.append((signals.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(0, handler)]


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_two_ranks_agree_to_stop_when_one_is_told_and_go_on_alike(files, server, tmp_path):
    argv = lambda name: command(files, tmp_path / name, save_steps=3, save_total_limit=0)  # noqa: E731
    assert server.run(argv("straight"), 2, tmp_path / "log", noise=True) == [0, 0]
    pids = server.start(argv("told"), 2, tmp_path / "log", noise=True, slow=0.1)
    wait_for(tmp_path / "told/checkpoint-3/manifest.json")
    os.kill(pids[1], signal.SIGUSR1)
    codes = server.wait(pids, LAUNCHERS_GRACE)
    assert codes == [128 + signal.SIGTERM, 128 + signal.SIGUSR1]  # rank 0 knows only that some rank was told
    assert "--resume goes on from there" in (tmp_path / "log.0").read_text()
    assert not (tmp_path / "told/model.safetensors").exists()
    newest = latest_checkpoint(tmp_path / "told").name
    states = load_file(tmp_path / "told" / newest / "rng.safetensors")["cpu"]
    assert len(states) == 2
    assert not torch.equal(states[0], states[1])  # each rank's own, or the noise could not tell
    assert server.run([*argv("told"), "--resume"], 2, tmp_path / "log", noise=True) == [0, 0]
    assert f"from {tmp_path / 'told' / newest}" in (tmp_path / "log.0").read_text()
    assert result(tmp_path / "told") == result(tmp_path / "straight")


# ---------------------------------------------------------------------------------------------------------
# Deaths


def test_a_rank_left_alone_ends_with_a_message(files, server, tmp_path):
    pids = server.start(command(files, tmp_path / "run"), 2, tmp_path / "log", slow=0.1)
    wait_for(tmp_path / "run/checkpoint-2/manifest.json")
    os.kill(pids[1], signal.SIGKILL)
    assert server.wait(pids, LAUNCHERS_GRACE) == [75, -9]
    said = (tmp_path / "log.0").read_text()
    assert "prefuse: rank 0 lost another rank, which has died or is stuck" in said
    assert "--resume goes on from it" in said
    assert "Traceback" not in said


def test_an_error_on_one_rank_is_said_once_and_ends_all(files, server, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    assert server.run(command(files, tmp_path / "run"), 2, tmp_path / "log") == [2, 2]
    assert "prefuse: error: output_dir" in (tmp_path / "log.0").read_text()
    assert "error" not in (tmp_path / "log.1").read_text()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1, "ddp"), (2, "fsdp")),
        pytest.param((2, "ddp"), (1, "ddp"), marks=pytest.mark.slow),
        pytest.param((2, "fsdp"), (1, "ddp"), marks=pytest.mark.slow),
    ],
)
def test_another_number_of_ranks_goes_on_in_the_same_order(before, after, files, server, tmp_path):
    """Equal to rounding: a step has 4 items either way."""

    def argv(name, size, parallel):
        options = {"save_steps": 3, "num_train_epochs": 1.0, "learning_rate": 1e-3, "adam_epsilon": 1e-2}
        return command(files, tmp_path / name, parallel=parallel, per_device_train_batch_size=4 // size, **options)

    out = tmp_path / "run"
    assert server.run(argv("straight", *before), before[0], tmp_path / "log") == [0] * before[0]
    pids = server.start(argv("run", *before), before[0], tmp_path / "log", slow=0.1)
    wait_for(out / "checkpoint-3/manifest.json")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    server.wait(pids)
    assert server.run([*argv("run", *after), "--resume"], after[0], tmp_path / "log") == [0] * after[0]
    assert "its steps were cut otherwise" in (tmp_path / "log.0").read_text()
    for name, value in weights(tmp_path / "straight").items():
        torch.testing.assert_close(weights(out)[name], value, rtol=0, atol=2e-6 * value.abs().max().item())
    (_, log), (_, wanted) = result(out), result(tmp_path / "straight")
    assert [row["step"] for row in log] == [row["step"] for row in wanted]
    assert [row["loss"] for row in log if "loss" in row] == pytest.approx(
        [r["loss"] for r in wanted if "loss" in r], rel=1e-4
    )


def test_ranks_whose_weights_have_drifted_apart_save_nothing_of_it(files, server, tmp_path):
    argv = command(files, tmp_path / "run", num_train_epochs=1.0)
    assert server.run(argv, 2, tmp_path / "log", drift=True) == [1, 1]
    for rank in "01":
        said = (tmp_path / f"log.{rank}").read_text()
        assert "model.norm.weight is no longer the same on all ranks: nothing was saved of it" in said
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_ranks_share_a_reference_cache_and_mend_what_is_damaged_in_it(files, server, tmp_path):
    """An entry each for the rows, their mismatches, and the same held out. The second run finds one of them damaged,
    the third is of one rank."""
    fixed = {"num_train_epochs": 1.0, "reference_cache": tmp_path / "cache"}
    argv = lambda out, **more: command(files, tmp_path / out, **fixed | more)  # noqa: E731
    assert server.run(argv("one"), 2, tmp_path / "log") == [0, 0]
    entries = sorted((tmp_path / "cache").iterdir())
    assert len(entries) == 4
    for entry in entries:
        assert {path.name for path in entry.glob("logps*")} == {f"logps-0000{n}-of-00002.safetensors" for n in (1, 2)}
    (entries[0] / "logps-00002-of-00002.safetensors").write_bytes(b"damaged")  # the second rank reads it
    assert server.run(argv("two"), 2, tmp_path / "again") == [0, 0]
    said = (tmp_path / "again.0").read_text()
    damaged = f"the reference cache {entries[0]} is damaged (logps-00002-of-00002.safetensors does not have the hash"
    assert damaged in said
    assert said.count("log-probabilities of") == 1 + 3
    assert result(tmp_path / "two") == result(tmp_path / "one")
    assert server.run(argv("three", per_device_train_batch_size=4), 1, tmp_path / "alone") == [0]
    said = (tmp_path / "alone.0").read_text()
    assert said.count("log-probabilities of") == 1 + 4
    assert "computing it again" not in said


def test_another_number_of_items_in_a_step_is_not_resumed(files, server, tmp_path):
    argv = command(files, tmp_path / "run", num_train_epochs=1.0)
    assert server.run(argv, 1, tmp_path / "log") == [0]
    assert server.run([*argv, "--resume"], 2, tmp_path / "log") == [2, 2]
    assert "cannot resume: items_per_step was 2 and is now 4" in (tmp_path / "log.0").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "kills"), [("ddp", 10), ("fsdp", 4)])
def test_killed_at_random_moments_every_resumed_run_ends_alike(parallel, kills, files, tmp_path):
    assert kill_trials(files, tmp_path, kills, parallel, seed=7) == kills


# ---------------------------------------------------------------------------------------------------------
# The launcher


def launched(monkeypatch, tmp_path, program, nproc=2, max_restarts=0):
    """`launch`, with a small program in the place of a rank."""
    real = subprocess.Popen

    def popen(command, **options):
        return real([sys.executable, "-c", program, str(tmp_path)], **options)

    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    monkeypatch.setattr(launch, "GRACE_SECONDS", 1)
    return launch.launch([], nproc, max_restarts)


DIES_ONCE = """
import os, pathlib, signal, sys, time
folder, rank, attempt = pathlib.Path(sys.argv[1]), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
(folder / f"{attempt}.{rank}.{os.environ['WORLD_SIZE']}.{os.environ['LOCAL_RANK']}").touch()
if attempt == "0" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if attempt == "0":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
"""


def test_the_launcher_says_who_died_ends_the_others_and_starts_again(monkeypatch, tmp_path, capsys):
    assert launched(monkeypatch, tmp_path, DIES_ONCE, max_restarts=1) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"0.0.2.0", "0.1.2.1", "1.0.2.0", "1.1.2.1"}
    said = capsys.readouterr().err
    assert "prefuse: rank 1 of 2 was killed by SIGKILL (out of memory?); the others were ended" in said
    assert "starting again from the last checkpoint (1 of 1)" in said


def test_without_restarts_the_launcher_ends_as_the_rank_did(monkeypatch, tmp_path, capsys):
    assert launched(monkeypatch, tmp_path, DIES_ONCE) == 137
    assert "--resume goes on from it, --max_restarts does so by itself" in capsys.readouterr().err


def test_what_a_user_must_mend_is_not_started_again(monkeypatch, tmp_path, capsys):
    program = "import os, pathlib, sys; (pathlib.Path(sys.argv[1]) / str(os.getpid())).touch(); sys.exit(2)"
    assert launched(monkeypatch, tmp_path, program, max_restarts=3) == 2
    assert len(list(tmp_path.iterdir())) == 2
    assert capsys.readouterr().err == ""


def test_the_launcher_passes_a_signal_on_to_every_rank(monkeypatch, tmp_path):
    import threading

    program = (
        "import pathlib, signal, sys, os, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))\n"
        "(pathlib.Path(sys.argv[1]) / os.environ['RANK']).touch()\n"
        "time.sleep(60)"
    )

    def tell():
        for rank in "01":
            wait_for(tmp_path / rank)
        os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=tell)
    thread.start()
    assert launched(monkeypatch, tmp_path, program, max_restarts=3) == 138
    thread.join()


@pytest.mark.slow
def test_nproc_on_the_command_line_trains_and_restarts(files, tmp_path):
    """The whole way: the launcher, two ranks, a death in step 3, and a restart that goes on."""
    out = tmp_path / "run"
    code = (
        "import os, signal, sys\n"
        "from prefuse.engine import train\n"
        "real = train.optimizer_step\n"
        "def step(run, share, *rest):\n"
        "    if share.step == 2 and run.start == 0 and run.ranks.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(run, share, *rest)\n"
        "train.optimizer_step = step\n"
    )
    runner = tmp_path / "runner.py"
    runner.write_text(f"{code}from prefuse.engine.cli import main\nsys.exit(main())\n")
    start = (
        "import subprocess, sys\nfrom prefuse.engine import launch\nfrom prefuse.engine.cli import main\n"
        "real = subprocess.Popen\n"
        f"launch.subprocess.Popen = lambda c, **o: real([sys.executable, {str(runner)!r}, *c[3:]], **o)\n"
        "sys.exit(main())\n"
    )
    argv = [str(x) for x in command(files, out, nproc=2, max_restarts=1)]
    done = subprocess.run(
        [sys.executable, "-c", start, *argv], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rank 1 of 2 was killed by SIGKILL" in done.stderr
    assert "resuming after step 2" in done.stdout
    assert (out / "model.safetensors").exists()


# ---------------------------------------------------------------------------------------------------------
# Disks and files


@pytest.fixture(scope="module")
def saved_once(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("saved") / "run"
    train(config(files, out, save_steps=2), "train")
    return out


@pytest.fixture
def saved(saved_once, tmp_path):
    return Path(shutil.copytree(saved_once, tmp_path / "run"))


def test_too_little_space_is_found_before_anything_is_written(files, tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    out, calls = tmp_path / "run", []

    def disk_usage(path):
        calls.append(path)
        return free if len(calls) == 1 else free._replace(free=1 << 20)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(UserError, match=r"checkpoint-4 takes about .* GB and the disk has 0.00105 GB free;"):
        train(config(files, out, save_steps=2, save_total_limit=1), "train")
    assert sorted(path.name for path in out.glob("checkpoint*")) == ["checkpoint-2"]
    assert latest_checkpoint(out) == out / "checkpoint-2"


def test_the_space_asked_for_is_what_a_checkpoint_takes(files, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(checkpoint_module, "require_space", lambda folder, needed, what: asked.append(needed))
    train(config(files, tmp_path / "run", max_steps=4), "train")
    taken = sum(path.stat().st_size for path in (tmp_path / "run/checkpoint-4").iterdir())
    assert taken <= asked[0] <= taken + (2 << 20)


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
        if len(calls) == 3:  # the second checkpoint's optimizer: its weights are there already
            raise error
        real(tensors, path, **options)

    monkeypatch.setattr(safetensors_torch, "save_file", full)
    out = tmp_path / "run"
    assert cli.main([str(x) for x in command(files, out)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [path.name for path in out.glob("checkpoint*")] == ["checkpoint-2"]
    assert latest_checkpoint(out) == out / "checkpoint-2"
    assert calls[2] == "optimizer-00001.safetensors"


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


def refused(patch, publish, full):
    """`publish`, with a disk that is full by then."""
    from transformers import modeling_utils

    def inside(run):
        patch.setattr(modeling_utils, "safe_save_file", full)
        return publish(run)

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
