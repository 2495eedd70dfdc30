"""A signal ends a run with a checkpoint from which it goes on to the same end; a second one ends it at once."""

import os
import signal
import subprocess
import sys
import time

import pytest

from kill_resume import command, result
from prefuse.engine import cli
from prefuse.engine import train as train_module
from prefuse.engine.run.signals import Stopped, StopSignals
from prefuse.engine.train import train
from tiny_run import PAIRS, save_model, settings, write_rows


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


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize(
    ("number", "where"),
    [
        (signal.SIGTERM, "optimizer_step"),
        (signal.SIGINT, "evaluate"),
        (signal.SIGUSR1, "optimizer_step"),
        (signal.SIGHUP, "optimizer_step"),
    ],
)
def test_a_signal_saves_at_the_next_step_and_the_resumed_run_ends_alike(
    number, where, files, straight, tmp_path, monkeypatch
):
    """In step 3 of 6 (saved when it is done), or in the evaluation after step 2, which the resumed run makes first."""
    real, calls, handler = getattr(train_module, where), [], signal.getsignal(number)

    def signalled(*args, **kwargs):
        calls.append(None)
        if len(calls) == (3 if where == "optimizer_step" else 2):
            os.kill(os.getpid(), number)
            time.sleep(0.2)  # the thread that listens takes a moment
        return real(*args, **kwargs)

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

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        return real(*args, **kwargs)

    monkeypatch.setattr(train_module, "evaluate", signalled)
    with pytest.raises(Stopped, match="after step 0; no checkpoint was written, --resume starts from the first step"):
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
from prefuse.engine.run import signals
signals.ECHO_SECONDS = 0.3
with signals.StopSignals() as stop, stop.postponed():
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
