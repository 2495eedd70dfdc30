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
    runner.write_text(f"{code}from prefuse.engine.cli import main\nsys.exit(main())\n")
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
