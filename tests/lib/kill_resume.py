"""Kill runs in every part of them, resume, and compare with one that was never stopped, bit for bit.

    python tests/lib/kill_resume.py --kills 100 [--parallel fsdp] [--seed 1]

A kill is SIGKILL, SIGTERM, SIGINT or SIGHUP, sent to one rank, to the launcher (`--nproc 2`) or to all of them, or to a
run of one process, while it trains, evaluates, writes a checkpoint, publishes its model or fills the reference cache.
All processes must then end by themselves. Every kill is followed by a resume to the end, which must leave nothing
behind but what a straight run leaves. Noise of each rank's own generator is in every loss, so a random state that is
lost shows as well.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

LIB = Path(__file__).parent
LAUNCHERS_GRACE = 15


class Server:
    """tests/lib/survival_worker.py: starts ranks by fork."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(LIB), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(LIB / "survival_worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"
        self.stores = Path(tempfile.mkdtemp(prefix="stores-"))
        self.count = 0

    def _ask(self, order: dict) -> list[int]:
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, argv: list, size: int, log: Path, **options) -> list[int]:
        """The process ids of `size` ranks that run `prefuse *argv`; they write to LOG.0, LOG.1, ..."""
        self.count += 1
        store = str(self.stores / str(self.count))
        return self._ask({"argv": [str(x) for x in argv], "size": size, "log": str(log), "store": store, **options})

    def launch(self, argv: list, log: Path, tmp: Path, **options) -> int:
        """The process id of `prefuse *argv` as a user starts it; it writes to LOG.launcher, its ranks to LOG.0, ..."""
        order = {"argv": [str(x) for x in argv], "launch": True, "log": str(log), "tmp": str(tmp), **options}
        return self._ask(order)[0]

    def wait(self, pids: list[int], grace: float | None = None) -> list[int]:
        """Their exit codes. After `grace` seconds they are killed, as a launcher does to those left over."""
        timers = [threading.Timer(grace, os.kill, (pid, signal.SIGKILL)) for pid in pids] if grace else []
        for timer in timers:
            timer.start()
        codes = self._ask({"wait": pids})
        for timer in timers:
            timer.cancel()
        return codes

    def run(self, *args, **options) -> list[int]:
        return self.wait(self.start(*args, **options))

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.stores)


def command(files: dict[str, str], out: Path, **changes) -> list:
    settings = {
        "model_name_or_path": files["model"], "dataset_name": files["pairs"], "output_dir": out, "loss_type": "kto",
        "max_length": 64, "learning_rate": 0.01, "per_device_train_batch_size": 2, "eval_fraction": 0.2,
        "device": "cpu", "impl": "torch", "num_train_epochs": 3.0, "save_steps": 2, "save_total_limit": 1,
        "logging_steps": 3, "eval_steps": 4, "ddp_timeout": 60,
    }  # fmt: skip
    return ["train", *(word for name, value in (settings | changes).items() for word in (f"--{name}", value))]


def result(out: Path) -> tuple[dict, list]:
    """The final weights' bytes and the metrics, without the clock."""
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for row in log:
        for rate in ("tokens_per_second", "samples_per_second", "pairs_per_second", "tokens_saved", "mfu"):
            row.pop(rate, None)
    return (out / "model.safetensors").read_bytes(), log


SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TARGETS = ("rank", "launcher", "all")
PHASES = {"training": 5, "evaluating": 3, "saving": 2, "publishing": 1, "caching": 3}  # how often a run comes there
END_SECONDS = 2 * LAUNCHERS_GRACE + 30  # for all processes, on a busy machine


@dataclass
class Trial:
    size: int
    signal: signal.Signals
    target: str
    phase: str
    nth: int
    wait: float  # seconds after the phase has begun

    def __str__(self) -> str:
        who = f"{self.target} of {self.size}" if self.size > 1 else "the process"
        return f"{self.signal.name} to {who} while {self.phase} ({self.nth}, {self.wait:.2f} s)"


def trials(kills: int, seed: int) -> list[Trial]:
    """Every signal, target and phase about as often, in all combinations if there are enough of them."""
    draw = random.Random(seed)
    every = list(itertools.product(SIGNALS, TARGETS, PHASES))
    chosen = []
    while len(chosen) < kills:
        draw.shuffle(every)
        chosen += every
    return [
        Trial(draw.choice((1, 2, 2, 2)), number, target, phase, draw.randint(1, PHASES[phase]), draw.uniform(0, 0.35))
        for number, target, phase in chosen[:kills]
    ]


class Folder:
    """The files of one trial."""

    def __init__(self, path: Path, files: dict[str, str], size: int, parallel: str):
        self.path, self.tmp, self.cache, self.out = path, path / "tmp", path / "cache", path / "run"
        self.tmp.mkdir(parents=True)
        self.log, self.marker = path / "log", path / "marker"
        self.argv = command(
            files, self.out, parallel=parallel, nproc=size, per_device_train_batch_size=4 // size, max_steps=5,
            reference_cache=self.cache, eval_steps=3,
        )  # fmt: skip

    def ranks(self) -> list[int]:
        pids = self.path / "log.pids"
        return [int(line) for line in pids.read_text().split()] if pids.exists() else []

    def left_over(self) -> list[str]:
        """What stands in the folders of a run that has ended, but would not after a straight one."""
        found = [path for path in self.out.rglob("*") if path.suffix in (".tmp", ".old") or path.name == "run.lock"]
        found += [path for path in self.out.iterdir() if re.fullmatch(r"checkpoint-\d+\..*", path.name)]
        found += list(self.cache.glob("*.tmp")) + list(self.tmp.iterdir())
        return [str(path.relative_to(self.path)) for path in found]


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (OSError, IndexError):
        return False


def _until(holds, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def kill(server: Server, trial: Trial, folder: Folder) -> tuple[str, int]:
    """What went wrong, and the exit code of the process that the user started."""
    about = {"noise": True, "phase": trial.phase, "nth": trial.nth, "marker": str(folder.marker)}
    pid = server.launch(folder.argv, folder.log, folder.tmp, **about)
    if not _until(lambda: folder.marker.exists() or not _lives(pid), 120):
        return "it did not come there", 0
    time.sleep(trial.wait)
    ranks = folder.ranks()
    told = {"rank": ranks[-1:] or [pid], "launcher": [pid], "all": [pid, *ranks]}[trial.target]
    for each in told:
        with contextlib.suppress(ProcessLookupError):
            os.kill(each, trial.signal)
    ended = _until(lambda: not any(map(_lives, [pid, *ranks])), END_SECONDS)
    orphans = [each for each in (pid, *ranks) if _lives(each)]
    for each in orphans:
        os.kill(each, signal.SIGKILL)
    (code,) = server.wait([pid])
    return ("" if ended else f"{len(orphans)} processes went on"), code


def kill_trials(files: dict[str, str], folder: Path, kills: int, parallel: str, seed: int) -> int:
    """How many of `kills` runs ended by themselves, and when resumed as a straight one does, with nothing left over."""
    server, good = Server(), 0
    wanted = {}
    for size in (1, 2):
        straight = Folder(folder / f"straight-{size}", files, size, parallel)
        pid = server.launch(straight.argv, straight.log, straight.tmp, noise=True)
        assert server.wait([pid]) == [0], straight.path
        wanted[size] = result(straight.out)
        assert straight.left_over() == []
    for number, trial in enumerate(trials(kills, seed)):
        here = Folder(folder / f"trial-{number}", files, trial.size, parallel)
        fault, code = kill(server, trial, here)
        steps = sorted(path.name for path in here.out.glob("checkpoint-*")) if here.out.exists() else []
        again = server.wait([server.launch([*here.argv, "--resume"], here.path / "again", here.tmp, noise=True)])
        faults = [fault] if fault else []
        if again != [0]:
            faults.append(f"the resumed run ended with {again}")
        elif result(here.out) != wanted[trial.size]:
            faults.append("the resumed run ended otherwise")
        elif here.left_over():
            faults.append(f"left over: {', '.join(here.left_over())}")
        print(
            f"{number + 1}: {trial}: exit code {code}, {', '.join(steps) or 'no checkpoint'}: "
            f"{'; '.join(faults) or 'equal'}",
            flush=True,
        )
        good += not faults
        if not faults:
            shutil.rmtree(here.path)
    server.close()
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from tiny_run import PAIRS, save_model, write_rows

    folder = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    files = {"model": save_model(folder / "model"), "pairs": write_rows(folder / "pairs.jsonl", PAIRS)}
    good = kill_trials(files, folder, options.kills, options.parallel, options.seed)
    print(f"{good} of {options.kills} killed runs ended, resumed and equal the one that was never stopped, bit for bit")
    if good == options.kills:
        shutil.rmtree(folder)
    else:
        print(f"the others are in {folder}")
    return int(good != options.kills)


if __name__ == "__main__":
    sys.exit(main())
