"""A server that forks ranks of runs: the libraries are imported once, so a start costs a fraction of a second.

Each line on stdin is JSON: {"argv": [...], "size": k, "store": path, "log": path, and "noise", "slow" and "drift" if
wanted, and "days": what each rank's calendar shows}. It starts k ranks with the `prefuse` command line `argv` and
answers with their process ids; with "launch" it starts one process instead, the command as a user gives it, whose
`--nproc` then forks ranks too and writes their process ids to LOG.pids. {"wait": [pids]} answers with exit codes
(negative: killed by that signal).

"phase", with "nth" and "marker": when a rank comes to that part of a run for the nth time, it makes the file `marker`
and takes its time, so that it can be killed there.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

PAUSE = 0.15  # seconds before and after the part of a run that was asked for


def launch(order: dict) -> int:
    """The command as a user gives it, in a process of its own."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    _log_to(f"{order['log']}.launcher")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "PREFUSE_RENDEZVOUS"):
        os.environ.pop(name, None)
    tempfile.tempdir = order["tmp"]
    from prefuse.engine.run import launch

    launch.subprocess = Forks(order)
    code = 1
    try:
        prepare(order)  # of a run of one process
        code = run(order["argv"])
    finally:
        _end(code)


class Forks:
    """In the place of `subprocess`: ranks are forks, which have their imports already."""

    def __init__(self, order: dict):
        self.order = order

    def Popen(self, command: list[str], env: dict[str, str], start_new_session: bool) -> "Fork":
        pid = os.fork()
        if pid == 0:
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(env)
            _log_to(f"{self.order['log']}.{env['RANK']}")
            code = 1
            try:
                code = run(command[3:])
            finally:
                _end(code)
        with open(f"{self.order['log']}.pids", "a") as file:
            file.write(f"{pid}\n")
        return Fork(pid)


class Fork:
    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _log_to(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)


def _end(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def prepare(order: dict) -> None:
    if order.get("noise"):
        add_noise()
    if order.get("slow"):
        slow_down(order["slow"])
    if order.get("phase"):
        linger(order["phase"], order["nth"], Path(order["marker"]))


def linger(phase: str, nth: int, marker: Path) -> None:
    """When a part of a run begins for the nth time: a mark, a pause, the part, and a pause."""
    from prefuse.engine import train
    from prefuse.engine.run import checkpoint, reference_logps

    owner, name = {
        "training": (train, "optimizer_step"),
        "evaluating": (train, "evaluate"),
        "saving": (checkpoint, "save_model"),
        "publishing": (train, "save_model"),
        "caching": (reference_logps, "sha256_of"),
    }[phase]
    real, calls = getattr(owner, name), []

    def lingering(*args, **options):
        calls.append(None)
        here = len(calls) == nth
        if here:
            marker.touch()
            time.sleep(PAUSE)
        result = real(*args, **options)
        if here:
            time.sleep(PAUSE)
        return result

    setattr(owner, name, lingering)


def start(rank: int, order: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    _log_to(f"{order['log']}.{rank}")
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["size"])}
    os.environ["PREFUSE_RENDEZVOUS"] = f"file://{order['store']}"
    if order["size"] == 1:
        del os.environ["RANK"], os.environ["LOCAL_RANK"], os.environ["WORLD_SIZE"]
    code = 1
    try:
        prepare(order)
        if order.get("drift") and rank == 1:
            drift()
        if order.get("days"):
            live_on(order["days"][rank])
        code = run(order["argv"])
    finally:
        _end(code)


def run(argv: list[str]) -> int:
    import traceback

    from prefuse.engine.cli import main

    try:
        return main(argv)
    except BaseException:
        traceback.print_exc()
        return 1


def add_noise() -> None:
    """Every loss is multiplied by a random number of its rank: a resumed run must draw the next one of that rank."""
    import dataclasses

    import torch

    from prefuse.engine import train

    real = train.fused_loss

    def noisy(*args):
        out = real(*args)
        return dataclasses.replace(out, loss=out.loss * (1 + torch.rand(())))

    train.fused_loss = noisy


def slow_down(seconds: float) -> None:
    from prefuse.engine import train

    real = train.optimizer_step

    def slow(*args):
        time.sleep(seconds)
        return real(*args)

    train.optimizer_step = slow


def drift() -> None:
    """One weight of this rank goes its own way, as after a gradient that was not summed."""
    import torch

    from prefuse.engine import train

    real = train.optimizer_step

    def drifting(run, *args):
        result = real(run, *args)
        with torch.no_grad():
            run.lm.model.model.norm.weight[3] += 1e-3
        return result

    train.optimizer_step = drifting


def live_on(day: str) -> None:
    """Today is that day."""
    import datetime

    class Date(datetime.date):
        @classmethod
        def today(cls):
            return cls.fromisoformat(day)

    datetime.date = Date


def main() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  (what a fork then has already)

    import prefuse.engine.train  # noqa: F401

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in order["wait"]]
            print(json.dumps(codes), flush=True)
        elif "launch" in order:
            print(json.dumps([launch(order)]), flush=True)
        else:
            print(json.dumps([start(rank, order) for rank in range(order["size"])]), flush=True)


if __name__ == "__main__":
    main()
