"""A few DPO steps of a real model by TRL, by prefuse's doors to TRL and by the engine: CPU seconds, memory, losses.

    prefuse bench train --model_name_or_path FOLDER --dataset_name pairs.json --train lora --steps 2

Every variant trains the same rows as token ids, in the same order, with the same hyperparameters, in float32, its
reference's pass counted. Each runs in a process of its own, by turns in every round: CPU seconds are those of training
(and of the reference, where that comes first), and peak memory is the process's most resident bytes while it trains,
the model included. The engine also says where its seconds went.

Writes results/real-<model>-<train>-<device>-<threads>threads.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; transformers reads this as it is imported

import torch

from prefuse.bench.record import (
    RESULTS,
    again,
    cpu_model,
    environment,
    markdown,
    read_result,
    slug,
    write_result,
    write_text,
)
from prefuse.engine.config.tools import ToolParser

SEED = 0
TOLERANCE = 2**-9
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# The door, and whether it skips.
VARIANTS = {
    "TRL": ("trl", 0.0),
    "prefuse.trl.enable()": ("enable", 0.0),
    "prefuse.trl.enable(), tolerance": ("enable", TOLERANCE),
    "prefuse.trl.DPOTrainer": ("trainer", 0.0),
    "prefuse.trl.DPOTrainer, tolerance": ("trainer", TOLERANCE),
    "engine": ("engine", 0.0),
    "engine, tolerance": ("engine", TOLERANCE),
}


# ---- One variant, in its own process ----


@dataclasses.dataclass
class Rows:
    """The pairs as token ids, in the order in which all variants take them."""

    examples: list  # of prefuse.engine.data.Pair
    order: list[int]

    def columns(self) -> list[dict[str, list[int]]]:
        pairs = [self.examples[i] for i in self.order]
        return [{"prompt_ids": x.prompt, "chosen_ids": x.chosen, "rejected_ids": x.rejected} for x in pairs]


def read_rows(arguments: argparse.Namespace, path: Path) -> Rows:
    """The first rows of the file that make the steps, written to `path` for the engine; its order is everybody's."""
    from prefuse.engine.data import load_examples
    from prefuse.engine.data.order import plan_epoch
    from prefuse.engine.model.load import load_tokenizer

    size, count = arguments.batch_size, arguments.batch_size * arguments.steps
    text = Path(arguments.dataset_name).read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    rows = rows[arguments.skip : arguments.skip + count]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    examples = load_examples(str(path), "pair", tokenizer, arguments.max_length).examples
    if len(examples) != count:
        raise SystemExit(f"{len(examples)} of {count} rows fit --max_length {arguments.max_length}: raise it")
    epoch = plan_epoch([len(x.prompt) + len(x.chosen) + len(x.rejected) for x in examples], size, 1, SEED, 0)
    steps = [sorted(i for part in epoch[step] for i in part) for step in range(len(epoch))]
    return Rows(list(examples), [i for step in steps for i in step])


class Measured:
    """CPU seconds and the most resident memory of a block."""

    def __enter__(self) -> Measured:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: loading does not count
        self.faults, self.began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt, time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.process_time() - self.began
        self.faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - self.faults
        self.peak_mib = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def by_engine(arguments: argparse.Namespace, rows: Rows, folder: Path, tolerance: float) -> dict[str, Any]:
    import prefuse.engine.report.clock
    import prefuse.engine.report.log
    from prefuse.engine.config.settings import Config, validate
    from prefuse.engine.run.setup import prepare
    from prefuse.engine.run.signals import StopSignals
    from prefuse.engine.train import train_loop

    prefuse.engine.report.log.console.quiet = True
    prefuse.engine.report.clock.time = types.SimpleNamespace(perf_counter=time.process_time)  # of a busy machine
    lora = {"use_peft": True, "lora_target_modules": LAYERS, "lora_r": 16, "lora_alpha": 32}
    config = Config(
        model_name_or_path=arguments.model_name_or_path, dataset_name=str(folder / "rows.jsonl"), beta=0.1,
        output_dir=str(folder / "run"), eval_fraction=0.0, max_length=arguments.max_length, loss_type="dpo",
        learning_rate=arguments.learning_rate, lr_scheduler_type="constant", warmup_ratio=0.0, seed=SEED,
        per_device_train_batch_size=arguments.batch_size, save_steps=0, logging_steps=1, device="cpu",
        dataset_cache="none", optim=arguments.optim, gradient_tolerance=tolerance,
        **(lora if arguments.train == "lora" else {}),
    )  # fmt: skip
    run = prepare(validate(config, "train"), "train")
    clock = prefuse.engine.report.clock.clock
    reference = clock.seconds["reference"]
    clock.restart(torch.device("cpu"))
    with Measured() as measured, StopSignals() as signals:
        train_loop(run, run.data.steps_from(run.start), signals)
    parts = {name: seconds for name, seconds, _ in clock.shares()} | {"reference": reference}
    log = map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
    logged = [row for row in log if "loss" in row]
    return {"seconds": measured.seconds + reference, "parts": parts, **outcome(measured, logged)}


def by_trl(arguments: argparse.Namespace, rows: Rows, folder: Path, door: str, tolerance: float) -> dict[str, Any]:
    """TRL's trainer, as it is or behind the switch; or prefuse's."""
    import trl
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import prefuse.trl

    logging.set_verbosity_error()
    disable_progress_bars()
    Trainer = prefuse.trl.DPOTrainer if door == "trainer" else trl.DPOTrainer

    class SameRows(Trainer):
        """On token ids, in their order."""

        def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
            return dataset

        def _get_train_sampler(self, dataset: Dataset | None = None) -> range:
            return range(len(self.train_dataset))

    lora, more = arguments.train == "lora", {}
    if lora:
        import peft

        more["peft_config"] = peft.LoraConfig(**LORA, target_modules=LAYERS, task_type="CAUSAL_LM")
    if door == "trainer":
        more["gradient_tolerance"] = tolerance
    if door == "enable":
        prefuse.trl.enable(gradient_tolerance=tolerance)
    load, path = AutoModelForCausalLM.from_pretrained, arguments.model_name_or_path
    config = trl.DPOConfig(
        output_dir=str(folder / "out"), max_length=arguments.max_length, beta=0.1, loss_type="sigmoid",
        learning_rate=arguments.learning_rate, lr_scheduler_type="constant", warmup_steps=0, num_train_epochs=1,
        per_device_train_batch_size=arguments.batch_size, weight_decay=0.0, optim=arguments.optim, seed=SEED,
        save_strategy="no", logging_steps=1, report_to="none", disable_tqdm=True, gradient_checkpointing=False,
        bf16=False, use_cpu=True,
    )  # fmt: skip
    torch.manual_seed(SEED)
    reference = None if lora else load(path, dtype=torch.float32)
    trainer = SameRows(
        load(path, dtype=torch.float32), reference, config, train_dataset=Dataset.from_list(rows.columns()),
        processing_class=AutoTokenizer.from_pretrained(path), **more,
    )  # fmt: skip
    with contextlib.redirect_stdout(None), Measured() as measured:
        trainer.train()
    return {"seconds": measured.seconds, **outcome(measured, [x for x in trainer.state.log_history if "loss" in x])}


def outcome(measured: Measured, logged: list[dict[str, float]]) -> dict[str, Any]:
    names = ("loss", "rewards/margins", "grad_norm", "head/skipped_mass")
    return {
        "peak_mib": measured.peak_mib,
        "page_faults": measured.faults,
        "steps": [{name: row[name] for name in names if name in row} for row in logged],
    }


def run_one(arguments: argparse.Namespace) -> None:
    """In a process of its own: prints what was found as the last line."""
    torch.set_num_threads(arguments.threads)
    door, tolerance = VARIANTS[arguments.variant]
    with tempfile.TemporaryDirectory() as folder:
        rows = read_rows(arguments, Path(folder) / "rows.jsonl")
        if door == "engine":
            found = by_engine(arguments, rows, Path(folder), tolerance)
        else:
            found = by_trl(arguments, rows, Path(folder), door, tolerance)
    sizes = [(len(x.prompt), len(x.chosen), len(x.rejected)) for x in rows.examples]
    mean_tokens = dict(
        zip(("prompt", "chosen", "rejected"), map(statistics.mean, zip(*sizes, strict=True)), strict=True)
    )
    print(json.dumps(found | {"mean_tokens": mean_tokens}))


# ---- All variants ----


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every variant in turn; what is known so far is on disk after each, and is added to by the next call."""
    name = arguments.name or Path(arguments.model_name_or_path).name
    settings = {
        "model": name, "train": arguments.train, "dataset": Path(arguments.dataset_name).name, "skip": arguments.skip,
        "steps": arguments.steps, "batch_size": arguments.batch_size, "max_length": arguments.max_length,
        "learning_rate": arguments.learning_rate, "optim": arguments.optim, "threads": arguments.threads,
        "tolerance": TOLERANCE,
    }  # fmt: skip
    file = RESULTS / f"real-{slug(name)}-{arguments.train}-{slug(cpu_model())}-{arguments.threads}threads.json"
    result = {"environment": environment(), "settings": settings, "variants": {}}
    before = read_result(file) if file.is_file() else None
    if before is not None and before.settings == settings:  # other variants, or more rounds, of the same comparison
        result["variants"] = before.details["variants"]
    given = [word for word in sys.argv[1:] if word not in ("--variants", *VARIANTS)]
    for number in range(arguments.rounds):
        for variant in arguments.variants[:: 1 if number % 2 == 0 else -1]:
            line = in_a_process([*again("train"), *given, "--variant", variant])
            found = json.loads(line)
            result["variants"].setdefault(variant, []).append(found)
            pairs = arguments.steps * arguments.batch_size
            print(f"{name}, {arguments.train}, round {number + 1}, {variant}: {found['seconds']:.1f} CPU s, "
                  f"{pairs / found['seconds']:.3f} pairs/s, {found['peak_mib']:.0f} MiB", flush=True)  # fmt: skip
            write_result(file, "real", result)
            write_text(file.with_suffix(".md"), report(result))
    return result


def in_a_process(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[-1]} failed:\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1]


def report(result: dict[str, Any]) -> str:
    settings, rows, parts = result["settings"], [], []
    pairs = settings["steps"] * settings["batch_size"]
    middle = {
        name: {key: statistics.median(x[key] for x in found) for key in ("seconds", "peak_mib", "page_faults")}
        for name, found in result["variants"].items()
    }
    base = middle.get("TRL")
    for name in filter(result["variants"].get, VARIANTS):
        found = result["variants"][name]
        x, steps = middle[name], found[0]["steps"]
        ratios = (
            [f"{base['seconds'] / x['seconds']:.2f}", f"{x['peak_mib'] / base['peak_mib']:.2f}"] if base else ["", ""]
        )
        skipped = [step["head/skipped_mass"] for step in steps if "head/skipped_mass" in step]
        rows.append([
            name, f"{x['seconds'] / settings['steps']:.1f}", f"{pairs / x['seconds']:.3f}", ratios[0],
            f"{x['peak_mib']:.0f}", ratios[1], " ".join(f"{step['loss']:.6f}" for step in steps),
            f"{max(skipped):.1e}" if skipped else "",
        ])  # fmt: skip
        if "parts" in found[0]:
            shares = {part: statistics.median(x["parts"].get(part, 0.0) for x in found) for part in found[0]["parts"]}
            parts.append(f"{name}: " + ", ".join(f"{part} {s:.1f} s" for part, s in shares.items()) + ".")
    tokens = next(iter(result["variants"].values()))[0]["mean_tokens"]
    lengths = " + ".join(f"{value:.0f}" for value in tokens.values())
    kind = "LoRA" if settings["train"] == "lora" else "all weights"
    title = (
        f"## {settings['model']}, {kind}: {settings['steps']} step(s) of {settings['batch_size']} pairs, {lengths} "
        f"tokens (prompt + chosen + rejected), {settings['threads']} thread(s), {cpu_model()}"
    )
    header = [
        "trainer", "CPU s per step", "pairs per CPU s", "times TRL", "peak MiB", "of TRL's", "losses", "skipped mass"
    ]  # fmt: skip
    return "\n".join([title, "", markdown(header, rows), "", *parts, ""])


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True, help="folder of a model with safetensors weights")
    parser.add_argument(
        "--dataset_name", required=True, help="JSON or JSONL file of pairs, in a form that prefuse reads"
    )
    parser.add_argument("--train", choices=["lora", "full"], default="lora")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--batch_size", type=int, default=4, help="pairs a step")
    parser.add_argument("--skip", type=int, default=0, help="rows of the file to pass over")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--optim", default="adamw_torch_fused", help="of all trainers (default: that of transformers)")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="what to call the model (default: its folder)")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--variant", choices=list(VARIANTS), help="this one alone, in this process; prints JSON")
    arguments = parser.parse_args()
    if arguments.variant:
        run_one(arguments)
    else:
        print(report(measure(arguments)))


if __name__ == "__main__":
    main()
