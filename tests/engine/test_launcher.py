"""`--nproc`: who died is said, signals are passed on, and what can go on is started again."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kill_resume import command
from prefuse.engine.run import launch
from tiny_run import PAIRS, save_model, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"model": save_model(folder / "model"), "pairs": write_rows(folder / "pairs.jsonl", PAIRS)}


def wait_for(path: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def launched(monkeypatch, tmp_path, program, nproc=2, max_restarts=0):
    """`launch`, with a small program in the place of a rank."""
    real = subprocess.Popen

    def popen(command, **options):
        return real([sys.executable, "-c", program, str(tmp_path)], **options)

    monkeypatch.setattr(launch.subprocess, "Popen", popen)
    monkeypatch.setattr(launch, "GRACE_SECONDS", 1)
    return launch.launch([], nproc, max_restarts, str(tmp_path))


DIES_ONCE = """
import os, pathlib, signal, sys, time
folder, rank, attempt = pathlib.Path(sys.argv[1]), os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]
(folder / f"{attempt}.{rank}.{os.environ['WORLD_SIZE']}.{os.environ['LOCAL_RANK']}").touch()
if attempt == "0" and rank == "1":
    while not (folder / f"0.0.{os.environ['WORLD_SIZE']}.0").exists():  # the other rank has begun
        time.sleep(0.01)
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


@pytest.mark.parametrize(("cause", "code"), [("os.kill(os.getpid(), 9)", 137), ("sys.exit(2)", 2)])
def test_the_rank_that_noticed_a_death_is_not_the_one_that_died(monkeypatch, tmp_path, cause, code):
    """A large process takes its time to die, and the other rank may end before it with the code of a lost rank."""
    program = f"import os, sys, time\nif os.environ['RANK'] == '0': sys.exit(75)\ntime.sleep(1); {cause}"
    assert launched(monkeypatch, tmp_path, program) == code


def test_a_lost_rank_is_named_where_no_other_failed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(launch, "CAUSE_SECONDS", 0.3)
    program = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(75)\ntime.sleep(60)"
    assert launched(monkeypatch, tmp_path, program) == 75
    assert "rank 1 of 2 ended with exit code 75" in capsys.readouterr().err


def test_without_restarts_the_launcher_ends_as_the_rank_did(monkeypatch, tmp_path, capsys):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/manifest.json").touch()
    assert launched(monkeypatch, tmp_path, DIES_ONCE) == 137
    assert "--resume goes on from it, --max_restarts does so by itself" in capsys.readouterr().err


def test_what_a_user_must_mend_is_not_started_again(monkeypatch, tmp_path, capsys):
    program = (
        "import os, pathlib, sys\n"
        "(pathlib.Path(sys.argv[1]) / os.environ['TORCHELASTIC_RESTART_COUNT']).touch(); sys.exit(2)"
    )
    assert launched(monkeypatch, tmp_path, program, max_restarts=3) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
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
    runner.write_text(f"{code}from prefuse.engine.cli import program\nprogram()\n")
    start = (
        "import subprocess, sys\nfrom prefuse.engine.run import launch\nfrom prefuse.engine.cli import main\n"
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
# Told to stop, orphaned, or put together wrongly


def test_one_rank_that_was_told_to_stop_is_no_death(monkeypatch, tmp_path, capsys):
    """It ends by itself, as all do, with 128 and the signal's number."""
    program = "import sys; sys.exit(143)"
    assert launched(monkeypatch, tmp_path, program, max_restarts=3) == 143
    assert capsys.readouterr().err == ""


def test_without_a_checkpoint_the_launcher_promises_none(monkeypatch, tmp_path, capsys):
    assert launched(monkeypatch, tmp_path, "import os; os.kill(os.getpid(), 9)") == 137
    assert "there is no checkpoint yet: --resume starts from the first step" in capsys.readouterr().err


def test_meeting_places_of_killed_launchers_are_cleared(monkeypatch, tmp_path):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, living = tmp_path / f"{launch.MEETING}4194399-x", tmp_path / f"{launch.MEETING}{os.getpid()}-x"
    dead.mkdir()
    living.mkdir()
    launch._clear_meeting_places()
    assert not dead.exists()
    assert living.exists()


RANK = """
import sys, time
from prefuse.engine.run import signals
signals.POLL_SECONDS = 0.1
print("ready", flush=True)
try:
    with signals.StopSignals() as stop, stop.postponed():
        for _ in range(300):
            time.sleep(0.1)
            if stop.received: stop.stop()
except signals.Stopped as end:
    open(sys.argv[1], "w").write(str(end))
"""
STARTS_A_RANK = """
import os, subprocess, sys, time
environment = os.environ | {"PREFUSE_LAUNCHER": str(os.getpid())}
child = subprocess.Popen(
    [sys.executable, "-c", sys.argv[1], sys.argv[2]], env=environment, stdout=subprocess.PIPE, start_new_session=True
)
child.stdout.readline()
print("ready", flush=True)
time.sleep(60)
"""


def test_a_rank_whose_launcher_is_killed_stops(tmp_path):
    words = [sys.executable, "-c", STARTS_A_RANK, RANK, str(tmp_path / "said")]
    parent = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "ready\n"
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_for(tmp_path / "said")
    time.sleep(0.1)
    assert (tmp_path / "said").read_text() == "stopped because its launcher is gone"


def test_a_hangup_is_a_signal_to_stop_unless_it_is_ignored():
    from prefuse.engine.run.signals import Stopped, StopSignals

    def hang_up():
        with StopSignals():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.2)

    with pytest.raises(Stopped, match="stopped by SIGHUP"):
        hang_up()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hang_up()
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("environment", "nproc", "message"),
    [
        ({"RANK": "1"}, 1, "WORLD_SIZE is missing; the environment has RANK=1"),
        ({"WORLD_SIZE": "2"}, 1, "RANK is missing; the environment has WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "x"}, 1, "WORLD_SIZE must be a whole number, got 'x'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, 1, "RANK must be a whole number, got '-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, 1, "a rank must be below the number of ranks"),
        ({"RANK": "0", "WORLD_SIZE": "0", "LOCAL_RANK": "0"}, 1, "a rank must be below the number of ranks"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "5"}, 1, "a rank must be below the number of ranks"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 1, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h"}, 1, "MASTER_PORT missing"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "1"},
            2,
            r"--nproc 2 starts processes by itself, .* drop --nproc under torchrun",
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 2, "--nproc 2 starts processes by itself"),
    ],
)
def test_a_launchers_environment_must_be_whole_and_agree_with_the_flags(environment, nproc, message, monkeypatch):
    from prefuse.engine.errors import UserError
    from prefuse.engine.run.ranks import launched as ranks_of

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("PREFUSE_RENDEZVOUS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        ranks_of(nproc)


def test_the_command_line_says_so_in_one_line(files, tmp_path, monkeypatch, capsys):
    from prefuse.engine import cli

    monkeypatch.setenv("RANK", "one")
    assert cli.main([str(x) for x in command(files, tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("prefuse: error: RANK must be a whole number, got 'one'")
    assert not (tmp_path / "run").exists()
