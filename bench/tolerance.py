"""DPO on a trained model with the exact head, with `gradient_tolerance`, and with dlogits rounded to bfloat16.

    prefuse bench tolerance --model_name_or_path FOLDER --dataset_name pairs.json --train lora --steps 6

Same rows, order, seed and hyperparameters, float32, by the engine. What the tolerance changes is set beside what
rounding changes, as every bfloat16 trainer rounds: losses and margins of each step, held-out loss, accuracy and margin
after the last, and how far the trained weights are from the exact run's, relative to how far that has moved.

Writes results/tolerance-<model>-<train>-<device>.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; transformers reads this as it is imported

import torch
from torch import Tensor

import prefuse.engine.report.log
from prefuse.bench.record import RESULTS, cpu_model, environment, markdown, slug, write_result, write_text
from prefuse.engine.config.settings import Config, validate
from prefuse.engine.config.tools import ToolParser
from prefuse.engine.run.setup import prepare
from prefuse.engine.run.signals import StopSignals
from prefuse.engine.train import train_loop

SEED = 0
TOLERANCE = 2**-9
VARIANTS = {"exact": 0.0, "tolerance 2^-9": TOLERANCE, "dlogits rounded to bfloat16": 0.0}
HELD_OUT = ("eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")


@contextlib.contextmanager
def rounded_dlogits(rounds: bool) -> Iterator[None]:
    """The weights of the head's gradient products, rounded as they are where the device multiplies bfloat16."""

    def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.bfloat16().to(x.dtype)

    with contextlib.ExitStack() as stack:
        for module in ("prefuse.kernels.logprobs.fold", "prefuse.kernels.slices") if rounds else ():
            stack.enter_context(mock.patch(f"{module}.narrow", narrow))
        yield


def write_rows(arguments: argparse.Namespace, folder: Path) -> None:
    """The shortest rows of the file, so that a step is quick: those to train on, and those held out."""
    text = Path(arguments.dataset_name).read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    rows = [row for row in rows if len(json.dumps(row)) <= arguments.characters]
    count = arguments.steps * arguments.batch_size
    if len(rows) < count + arguments.held_out:
        raise SystemExit(f"{len(rows)} rows have at most {arguments.characters} characters: raise --characters")
    parts = {"train": rows[:count], "held_out": rows[count : count + arguments.held_out]}
    for name, some in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")


def trained(arguments: argparse.Namespace, folder: Path, variant: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a run logged, and its trained weights: (found, {name: before and after})."""
    lora = {"use_peft": True, "lora_r": 16, "lora_alpha": 32} if arguments.train == "lora" else {}
    config = Config(
        model_name_or_path=arguments.model_name_or_path, dataset_name=str(folder / "train.jsonl"), beta=0.1,
        eval_dataset=str(folder / "held_out.jsonl"), output_dir=str(folder / slug(variant)), loss_type="dpo",
        learning_rate=arguments.learning_rate, lr_scheduler_type="constant", warmup_ratio=0.0, seed=SEED,
        per_device_train_batch_size=arguments.batch_size, max_steps=arguments.steps, eval_steps=arguments.steps,
        save_steps=0, logging_steps=1, device="cpu", dataset_cache="none", max_length=1024,
        gradient_tolerance=VARIANTS[variant], reference_cache=str(folder / "reference"), **lora,
    )  # fmt: skip
    with rounded_dlogits("rounded" in variant), StopSignals() as signals:
        run = prepare(validate(config, "train"), "train")
        before = {name: p.detach().clone() for name, p in run.lm.model.named_parameters() if p.requires_grad}
        train_loop(run, run.data.steps_from(run.start), signals)
    log = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "rewards/margins", "grad_norm", "head/skipped_mass")
    steps = [{name: row[name] for name in names if name in row} for row in log if "loss" in row]
    found = {"steps": steps, "held_out": {name: log[-1][name] for name in HELD_OUT}}
    after = dict(run.lm.model.named_parameters())
    return found, {name: after[name].detach() - x for name, x in before.items()}


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    variants, exact = {}, None
    with tempfile.TemporaryDirectory() as folder:
        write_rows(arguments, Path(folder))
        for name in VARIANTS:
            found, moved = trained(arguments, Path(folder), name)
            exact = exact or moved
            size = sum(x.double().square().sum() for x in exact.values()).sqrt()
            away = sum((moved[name].double() - x).square().sum() for name, x in exact.items()).sqrt()
            variants[name] = found | {"away_from_exact": (away / size).item()}
            print(f"{name}: {json.dumps(variants[name])}", flush=True)
    return variants


def report(result: dict[str, Any]) -> str:
    settings, rows = result["settings"], []
    for name, found in result["variants"].items():
        steps = found["steps"]
        skipped = [step["head/skipped_mass"] for step in steps if "head/skipped_mass" in step]
        rows.append([
            name, " ".join(f"{step['loss']:.5f}" for step in steps), f"{steps[-1]['rewards/margins']:.5f}",
            *(f"{found['held_out'][key]:.5f}" for key in HELD_OUT), f"{found['away_from_exact']:.1e}",
            f"{max(skipped):.1e}" if skipped else "0",
        ])  # fmt: skip
    kind = "LoRA" if settings["train"] == "lora" else "all weights"
    title = f"## {settings['name']}, {kind}: {settings['steps']} steps of {settings['batch_size']} pairs, "
    title += f"learning rate {settings['learning_rate']:g}, {settings['held_out']} pairs held out"
    header = [
        "head's gradient",
        "losses",
        "last margin",
        "held-out loss",
        "accuracy",
        "margin",
        "weights off",
        "skipped",
    ]
    return "\n".join([title, "", markdown(header, rows), ""])


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="folder of a trained model")
    parser.add_argument(
        "--dataset_name", required=True, help="JSON or JSONL file of pairs, in a form that prefuse reads"
    )
    parser.add_argument("--train", choices=["lora", "full"], default="lora")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=2, help="pairs a step")
    parser.add_argument("--held_out", type=int, default=8, help="pairs")
    parser.add_argument("--characters", type=int, default=1500, help="longer rows are left out")
    parser.add_argument("--learning_rate", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="what to call the model (default: its folder)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prefuse.engine.report.log.console.quiet = True
    name = arguments.name or Path(arguments.model_name_or_path).name
    settings = vars(arguments) | {"name": name, "dataset_name": Path(arguments.dataset_name).name}
    del settings["model_name_or_path"]
    result = {"environment": environment(), "settings": settings, "variants": compare(arguments)}
    path = RESULTS / f"tolerance-{slug(name)}-{arguments.train}-{slug(cpu_model())}.json"
    write_result(path, "tolerance", result)
    write_text(path.with_suffix(".md"), report(result))
    print(report(result))


if __name__ == "__main__":
    main()
