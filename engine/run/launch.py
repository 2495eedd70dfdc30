"""`--nproc k`: the processes of one machine, started, watched and, after a death, started again.

    prefuse train --nproc 8 --max_restarts 3 ...

The same as `torchrun --nproc-per-node 8 --max-restarts 3 -m prefuse.engine train ...`, with its environment variables,
but it says which rank died of what, passes on SIGUSR1 too, and does not start again what a user must mend. Across
machines torchrun (or Slurm) does the launching.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from prefuse.engine.run.files import may_write
from prefuse.engine.run.signals import LAUNCHER, SIGNALS

POLL_SECONDS = 0.05
MEETING = "prefuse-ranks-"  # folders in which ranks find each other, with the launcher's process id
GRACE_SECONDS = 15  # for the other ranks, once one is dead
CAUSE_SECONDS = 3  # a large process needs so long to die, and another rank may have noticed and ended before that
MENDED_BY_HAND = 2  # the exit code of a UserError
LOST_A_RANK = 75  # the exit code of a rank that noticed that another is gone: seldom the cause


def launch(argv: Sequence[str], nproc: int, max_restarts: int, output_dir: str | None = None) -> int:
    """The exit code of the run: 0, or that of the rank that failed first."""
    received: list[int] = []
    workers: list[subprocess.Popen] = []

    def forward(number: int, frame: object) -> None:
        received.append(number)
        for worker in workers:
            _signal(worker, number)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # not so under nohup
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        for attempt in range(max_restarts + 1):
            rank, code = _run(argv, nproc, attempt, workers, received)
            if code < 0:  # killed; a rank that was told to stop ends by itself, with 128 and the signal's number
                code = 128 - code
            elif received or code in (0, MENDED_BY_HAND) or code > 128:
                return code
            if received:
                return code
            whose = f"rank {rank} of {nproc}" if nproc > 1 else "the run"
            _say(f"{whose} {_death(code)}" + ("; the others were ended" if nproc > 1 else ""))
            if attempt < max_restarts:
                _say(f"starting again from the last checkpoint ({attempt + 1} of {max_restarts})")
        _say(what_is_there(output_dir) + ("" if max_restarts else ", --max_restarts does so by itself"))
        return code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(
    argv: Sequence[str], nproc: int, attempt: int, workers: list[subprocess.Popen], received: list[int]
) -> tuple[int, int]:
    """Runs all ranks until they end: (rank, exit code) of the first that failed, or (0, 0). Negative: a signal's."""
    _clear_meeting_places()
    with tempfile.TemporaryDirectory(prefix=f"{MEETING}{os.getpid()}-") as folder:
        workers[:] = [_start(argv, rank, nproc, attempt, Path(folder)) for rank in range(nproc)]
        if received:  # while they were started
            for worker in workers:
                _signal(worker, received[0])
        failed, lost = None, None
        deadline = float("inf")
        while any(worker.poll() is None for worker in workers):
            time.sleep(POLL_SECONDS)
            if failed is None:
                failed = _failure(workers)
                if failed is not None and failed[1] == LOST_A_RANK:
                    lost = lost or time.monotonic()
                    failed = failed if time.monotonic() > lost + CAUSE_SECONDS else None
                if failed is not None and not received:
                    deadline = time.monotonic() + GRACE_SECONDS
                    for worker in workers:
                        _signal(worker, signal.SIGTERM)
            if time.monotonic() > deadline:
                for worker in workers:
                    _signal(worker, signal.SIGKILL)
        return failed or _failure(workers) or (0, 0)


def _failure(workers: Sequence[subprocess.Popen]) -> tuple[int, int] | None:
    """(rank, exit code) of one that failed: of one that lost another rank only where no rank failed otherwise."""
    failed = [(rank, worker.returncode) for rank, worker in enumerate(workers) if worker.poll()]
    return min(failed, key=lambda rank_and_code: rank_and_code[1] == LOST_A_RANK, default=None)


def _clear_meeting_places() -> None:
    """Removes the folders that killed launchers have left."""
    for path in Path(tempfile.gettempdir()).glob(f"{MEETING}*"):
        match = re.match(rf"{MEETING}(\d+)-", path.name)
        if match and not may_write(int(match[1]), path):
            shutil.rmtree(path, ignore_errors=True)


def what_is_there(output_dir: str | None) -> str:
    if output_dir is not None and any(Path(output_dir).glob("checkpoint-*/manifest.json")):
        return "the last checkpoint is whole: --resume goes on from it"
    return "there is no checkpoint yet: --resume starts from the first step"


def _start(argv: Sequence[str], rank: int, nproc: int, attempt: int, folder: Path) -> subprocess.Popen:
    threads = max(1, len(os.sched_getaffinity(0)) // nproc)
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "PREFUSE_RENDEZVOUS": f"file://{folder}/store",
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
        LAUNCHER: str(os.getpid()),
    }  # fmt: skip
    # In a session of its own: Ctrl-C in the terminal reaches it once, through the launcher.
    return subprocess.Popen([sys.executable, "-m", "prefuse.engine", *argv], env=environment, start_new_session=True)


def _signal(worker: subprocess.Popen, number: int) -> None:
    if worker.poll() is None:
        worker.send_signal(number)


def _death(code: int) -> str:
    if code > 128:
        name = signal.Signals(code - 128).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"was killed by {name}{hint}"
    return f"ended with exit code {code}"


def _say(message: str) -> None:
    print(f"prefuse: {message}", file=sys.stderr, flush=True)
