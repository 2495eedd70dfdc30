"""Kill online runs at any moment, resume, and compare with one that was never stopped, bit for bit.

    python tests/lib/kill_online.py --kills 3 [--seed 1]        # three kills of each algorithm

SIGKILL to every rank of a run of one process or two, after a random part of the time that a straight run takes: while
it samples, scores, asks the reference, learns, evaluates or saves. A run that is killed again while it resumes is
resumed again. Equal are the weights, the log without its clocks, and the answers that each round kept.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from kill_resume import Server, result
from online_runs import PROMPTS, write_rule
from tiny_run import save_model, write_rows

ALGORITHMS = {
    "grpo": {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.05}, "rloo": {"num_iterations": 2},
    "reinforce": {}, "ppo": {"num_iterations": 2}, "online_dpo": {"pairs": "all"}, "iterative_dpo": {},
    "kto": {"num_iterations": 2}, "best_of_n": {"steps_per_generation": 2},
}  # fmt: skip


def command(folder: Path, files: dict[str, str], algorithm: str) -> list:
    settings = {
        "model_name_or_path": files["model"], "dataset_name": files["prompts"], "output_dir": folder / "run",
        "scorer": f"{files['rules']}:vowels", "algorithm": algorithm, "num_generations": 4, "max_completion_length": 8,
        "per_device_train_batch_size": 8, "max_steps": 6, "save_steps": 1, "eval_fraction": 0.25, "eval_steps": 2,
        "learning_rate": 0.01, "score_cache": folder / "scores", "device": "cpu", "impl": "torch",
        "ddp_timeout": 60, **ALGORITHMS[algorithm],
    }  # fmt: skip
    return ["online", *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]


def what_is_left(folder: Path) -> tuple[bytes, list, list]:
    """(weights, log without clocks, rounds)"""
    weights, log = result(folder / "run")
    log = [{k: v for k, v in row.items() if "seconds" not in k and "time" not in k} for row in log]
    rounds = [path.read_text() for path in sorted((folder / "run").glob("samples/*.jsonl"))]
    return weights, log, rounds


def kill(server: Server, argv: list, size: int, log: Path, after: float) -> None:
    pids = server.start(argv, size, log)
    time.sleep(after)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):  # it was done before
            os.kill(pid, signal.SIGKILL)
    server.wait(pids)


def trial(server: Server, folder: Path, files: dict[str, str], algorithm: str, size: int, moments: list[float]) -> str:
    """What went wrong, or nothing. `moments`: seconds until each kill."""
    folder.mkdir()

    def argv() -> list:
        begun = (folder / "run" / "config.yaml").exists()
        return [*command(folder, files, algorithm), *(["--resume"] if begun else [])]

    for after in moments:
        kill(server, argv(), size, folder / "log", after)
    codes = server.run(argv(), size, folder / "again")
    return "" if codes == [0] * size else f"the last run ended with {codes}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=list(ALGORITHMS))
    options = parser.parse_args()
    top, draw, server = Path(tempfile.mkdtemp(prefix="kill-online-")), random.Random(options.seed), Server()
    files = {
        "model": save_model(top / "model"), "prompts": write_rows(top / "prompts.jsonl", PROMPTS),
        "rules": write_rule(top),
    }  # fmt: skip
    good = total = 0
    for algorithm in options.algorithms:
        wanted, seconds = {}, {}
        for size in (1, 2):
            folder, begin = top / f"{algorithm}-{size}", time.monotonic()
            fault = trial(server, folder, files, algorithm, size, [])
            assert not fault, f"{fault}: {folder}"
            seconds[size], wanted[size] = time.monotonic() - begin, what_is_left(folder)
        for number in range(options.kills):
            size, folder = draw.choice((1, 2)), top / f"{algorithm}-trial-{number}"
            moments = [draw.uniform(0.05, 1) * seconds[size] for _ in range(draw.choice((1, 1, 2)))]
            fault = trial(server, folder, files, algorithm, size, moments)
            if not fault and what_is_left(folder) != wanted[size]:
                fault = "the resumed run ended otherwise"
            at = ", ".join(f"{100 * moment / seconds[size]:.0f}%" for moment in moments)
            print(f"{algorithm}, {size} ranks, killed at {at} of its time: {fault or 'equal'}", flush=True)
            good, total = good + (not fault), total + 1
            if not fault:
                shutil.rmtree(folder)
    server.close()
    print(f"{good} of {total} killed runs equal the one that was never stopped, bit for bit")
    if good == total:
        shutil.rmtree(top)
    else:
        print(f"the others are in {top}")
    return int(good != total)


if __name__ == "__main__":
    sys.exit(main())
