"""Kill runs of `prefuse online` and `prefuse reward` at any moment, resume, and compare with one never stopped.

    python tests/lib/kill_anywhere.py --kills 3 [--seed 1]        # three kills of each kind of run

SIGKILL to every rank of a run of one process or two, after a random part of the time that a straight run takes: while
it reads, samples, scores, asks the reference, learns, evaluates or saves. A run that is killed again while it resumes
is resumed again. Equal, bit for bit, are the weights, the log without its clocks, and what each round kept.
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
from tiny_run import PAIRS, save_model, write_rows

ALGORITHMS = {
    "grpo": {"num_iterations": 2, "steps_per_generation": 2, "beta": 0.05}, "rloo": {"num_iterations": 2},
    "reinforce": {}, "ppo": {"num_iterations": 2}, "online_dpo": {"pairs": "all"}, "iterative_dpo": {},
    "kto": {"num_iterations": 2}, "best_of_n": {"steps_per_generation": 2},
}  # fmt: skip
REWARDS = {
    "one head": {}, "three heads": {"reward_heads": 3},
    "the best": {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False},
}  # fmt: skip
KINDS = {f"online {name}": ("online", settings | {"algorithm": name}) for name, settings in ALGORITHMS.items()}
KINDS |= {f"reward, {name}": ("reward", settings) for name, settings in REWARDS.items()}


def command(folder: Path, files: dict[str, str], kind: str) -> list:
    name, own = KINDS[kind]
    settings = {
        "model_name_or_path": files["model"], "output_dir": folder / "run", "learning_rate": 0.01,
        "eval_fraction": 0.25, "eval_steps": 2, "device": "cpu", "impl": "torch", "ddp_timeout": 60,
    }  # fmt: skip
    settings |= {
        "online": {
            "dataset_name": files["prompts"], "scorer": f"{files['rules']}:vowels", "num_generations": 4,
            "max_completion_length": 8, "per_device_train_batch_size": 8, "max_steps": 6, "save_steps": 1,
            "score_cache": folder / "scores",
        },
        "reward": {
            "dataset_name": files["pairs"], "max_length": 64, "per_device_train_batch_size": 2, "num_train_epochs": 2.0,
            "save_steps": 2, "save_total_limit": 1, "logging_steps": 3,
        },
    }[name]  # fmt: skip
    return [name, *(str(word) for key, value in (settings | own).items() for word in (f"--{key}", value))]


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


def trial(server: Server, folder: Path, files: dict[str, str], kind: str, size: int, moments: list[float]) -> str:
    """What went wrong, or nothing. `moments`: seconds until each kill."""
    folder.mkdir()

    def argv() -> list:
        begun = (folder / "run" / "config.yaml").exists()
        return [*command(folder, files, kind), *(["--resume"] if begun else [])]

    for after in moments:
        kill(server, argv(), size, folder / "log", after)
    codes = server.run(argv(), size, folder / "again")
    return "" if codes == [0] * size else f"the last run ended with {codes}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    top, draw, server = Path(tempfile.mkdtemp(prefix="kill-anywhere-")), random.Random(options.seed), Server()
    files = {
        "model": save_model(top / "model"), "prompts": write_rows(top / "prompts.jsonl", PROMPTS),
        "pairs": write_rows(top / "pairs.jsonl", PAIRS), "rules": write_rule(top),
    }  # fmt: skip
    good = total = 0
    for place, kind in enumerate(options.kinds):
        wanted, seconds = {}, {}
        for size in (1, 2):
            folder, begin = top / f"{place}-{size}", time.monotonic()
            fault = trial(server, folder, files, kind, size, [])
            assert not fault, f"{fault}: {folder}"
            seconds[size], wanted[size] = time.monotonic() - begin, what_is_left(folder)
        for number in range(options.kills):
            size, folder = draw.choice((1, 2)), top / f"{place}-trial-{number}"
            moments = [draw.uniform(0.05, 1) * seconds[size] for _ in range(draw.choice((1, 1, 2)))]
            fault = trial(server, folder, files, kind, size, moments)
            if not fault and what_is_left(folder) != wanted[size]:
                fault = "the resumed run ended otherwise"
            at = ", ".join(f"{100 * moment / seconds[size]:.0f}%" for moment in moments)
            print(f"{kind}, {size} ranks, killed at {at} of its time: {fault or 'equal'}", flush=True)
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
