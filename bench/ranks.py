"""The same run on one process, on two, and on two that share the weights (FSDP2): held-out metrics and rates.

    prefuse bench ranks --dataset_name pairs.json --loss_type dpo
    prefuse bench ranks --dataset_name labelled.json --loss_type kto

A small Llama with random weights, a byte-level BPE learned from the rows, `prefuse train` from the command line. The
three runs make the same updates but for the rounding of sums, so their last held-out metrics are equal to TOLERANCE;
the exit status is 1 if they are not, or if a step has no line in the log. Prints a table and writes
results/ranks-<data>-<loss>.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from prefuse.bench.record import RESULTS, environment, markdown, slug, write_result
from prefuse.bench.rows import SEED, add_model_arguments, read_case, save_model
from prefuse.engine.config.tools import ToolParser

WAYS = {"1 process": [], "2, ddp": ["--nproc", "2"], "2, fsdp": ["--nproc", "2", "--parallel", "fsdp"]}
TOLERANCE = 1e-4  # of max(1, |value|), after all updates: Adam turns the rounding of small gradients into steps
RATES = ("tokens_per_second", "pairs_per_second", "samples_per_second", "mfu", "tokens_saved")


def train(way: list[str], items: int, folder: Path, arguments: argparse.Namespace) -> list[dict]:
    """Lines of metrics.jsonl of a run with `items` rows in a step."""
    processes = 2 if way else 1
    output = folder / "-".join(["run", *way])
    settings = {
        "model_name_or_path": folder / "model", "dataset_name": arguments.dataset_name, "output_dir": output,
        "loss_type": arguments.loss_type, "beta": 0.1, "learning_rate": arguments.learning_rate, "seed": SEED,
        "max_length": arguments.max_length, "per_device_train_batch_size": items // processes, "logging_steps": 1,
        "max_steps": arguments.max_steps, "eval_fraction": 0.1, "device": arguments.device, "save_steps": 0,
    }  # fmt: skip
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "prefuse.engine", "train", *flags, *way], cwd=folder, check=True)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", type=lambda text: Path(text).resolve(), required=True)
    parser.add_argument("--loss_type", default="dpo")
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--items", type=int, default=8, help="pairs or sequences of an optimizer step")
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--device", default="auto")
    add_model_arguments(parser)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(read_case(arguments.dataset_name, 0, arguments.vocab_size), folder / "model", arguments)
        logs = {way: train(flags, arguments.items, folder, arguments) for way, flags in WAYS.items()}

    last = {
        way: {key: value for line in log for key, value in line.items() if key.startswith("eval_")}
        for way, log in logs.items()
    }
    steps = {way: [line for line in log if "loss" in line] for way, log in logs.items()}
    first, *others = WAYS
    failures = [
        f"{way}: {key} is {last[way][key]}, and {value} on {first}"
        for way in others
        for key, value in last[first].items()
        if abs(last[way][key] - value) > TOLERANCE * max(1.0, abs(value))
    ]
    failures += [f"{way}: {len(lines)} lines" for way, lines in steps.items() if len(lines) != arguments.max_steps]
    rows = [[key, *(f"{last[way][key]:.6f}" for way in WAYS)] for key in last[first]]
    rates = [rate for rate in RATES if rate in steps[first][-1]]
    rows += [[f"{rate}, last step", *(f"{steps[way][-1][rate]:.4g}" for way in WAYS)] for rate in rates]
    print(markdown([f"{arguments.dataset_name.name}, {arguments.loss_type}", *WAYS], rows))
    given = {name: getattr(arguments, name) for name in ("loss_type", "max_steps", "items", "learning_rate", "device")}
    rated = {way: {rate: steps[way][-1][rate] for rate in rates} for way in WAYS}
    found = {"settings": given | {"data": arguments.dataset_name.name}, "held_out": last, "rates": rated}
    path = RESULTS / f"ranks-{slug(arguments.dataset_name.stem)}-{arguments.loss_type}.json"
    write_result(path, "ranks", {"environment": environment(), **found}, seed=SEED)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
