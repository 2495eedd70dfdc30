"""Kill a run on two ranks at random moments, resume it, and compare with one that was never stopped, bit for bit.

    python tests/lib/kill_resume.py --kills 100 [--parallel fsdp] [--seed 1]

A kill is SIGKILL, for all ranks or for one alone; then the other must end by itself. Every kill is followed by a resume
to the end. Noise of each rank's own generator is in every loss, so a random state that is lost shows as well.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
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


def kill_trials(files: dict[str, str], folder: Path, kills: int, parallel: str, seed: int) -> int:
    """How many of `kills` resumed runs ended as the straight one did."""
    server, draw, equal, trial = Server(), random.Random(seed), 0, 0
    argv = lambda out: command(files, out, parallel=parallel)  # noqa: E731
    for straight in (folder / "first", folder / "straight"):  # the first is slower than those that follow
        began = time.monotonic()
        assert server.run(argv(straight), 2, folder / "straight.log", noise=True) == [0, 0]
        length = time.monotonic() - began
    wanted = result(straight)
    assert result(folder / "first") == wanted
    while trial < kills:
        out, log = folder / f"trial-{trial}", folder / f"trial-{trial}.log"
        pids = server.start(argv(out), 2, log, noise=True)
        moment = draw.uniform(0, length)
        time.sleep(moment)
        killed = draw.choice([pids, pids[:1], pids[1:]])
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        codes = server.wait(pids, LAUNCHERS_GRACE)  # a rank left alone ends by itself, once it has met the others
        alone = time.monotonic() - began
        if codes == [0, 0]:  # it had ended before
            shutil.rmtree(out)
            continue
        steps = sorted(path.name for path in out.glob("checkpoint-*")) if out.exists() else []
        again = server.run([*argv(out), "--resume"], 2, log, noise=True)
        same = again == [0, 0] and result(out) == wanted
        equal += same
        trial += 1
        print(
            f"kill {trial} at {moment:.2f} s: {'both' if len(killed) == 2 else f'rank {pids.index(killed[0])}'}, exit "
            f"codes {codes} after {alone:.1f} s, {', '.join(steps) or 'no checkpoint'}: "
            f"{'equal' if same else f'NOT EQUAL, exit codes {again}'}",
            flush=True,
        )
        if same:
            shutil.rmtree(out)
            for path in folder.glob(f"{log.name}.*"):
                path.unlink()
    server.close()
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from tiny_run import PAIRS, save_model, write_rows

    folder = Path(tempfile.mkdtemp(prefix="kill-resume-"))
    files = {"model": save_model(folder / "model"), "pairs": write_rows(folder / "pairs.jsonl", PAIRS)}
    equal = kill_trials(files, folder, options.kills, options.parallel, options.seed)
    print(f"{equal} of {options.kills} resumed runs equal the one that was never stopped, bit for bit")
    if equal == options.kills:
        shutil.rmtree(folder)
    else:
        print(f"the others are in {folder}")
    return int(equal != options.kills)


if __name__ == "__main__":
    sys.exit(main())
