"""The same DPO run by TRL's DPOTrainer and by prefuse: pairs per second, and what both models learned.

    prefuse bench train                             # lengths of chat data, and prompts four times the answers
    prefuse bench train --dataset_name pairs.json   # your own rows, too
    prefuse bench train --model_name_or_path FOLDER --dataset_name pairs.json      # your own model: see real.py

One small Llama, one set of token ids, one order of the rows, the same hyperparameters, float32 on a CPU and bfloat16
autocast on a GPU. TRL runs as it comes (the reference model in every step) and once more with its reference
log-probabilities computed before the training; prefuse computes them before, and that time counts. Loading and
tokenization count for nobody. The trainers take turns; each speed is the median over the rounds, each ratio the median
of the ratios of a round. Held-out rows are judged by code of neither: `model(...).logits`, one sequence at a time.

The last table is about sharing prompts alone: forward and backward of the trunk, without padding both times, once with
a run of the prompt for each side and once with one for both. The ideal is the ratio of the tokens.

Writes results/trainers-<device>-<threads>threads-torch<version>.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; transformers reads this as it is imported

import torch
from datasets import Dataset
from datasets import logging as datasets_logging
from datasets.utils.logging import disable_progress_bar
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

import prefuse.engine.report.log
import prefuse.engine.run.plan
import prefuse.engine.run.setup
from prefuse.attention import packed_hidden
from prefuse.bench.record import RESULTS, cpu_model, environment, markdown, slug, write_result
from prefuse.bench.rows import CHAT, LONG, SEED, Case, add_model_arguments, drawn_case, read_case, save_model
from prefuse.engine.config.settings import Config, validate
from prefuse.engine.config.tools import ToolParser
from prefuse.engine.data import Pair, load_examples
from prefuse.engine.run.signals import StopSignals
from prefuse.engine.train import train_loop
from prefuse.packing import Packed, fill, pack

SIDES = ("chosen", "rejected")


# ---- The run, by each trainer ----


@dataclasses.dataclass
class Prepared:
    """What both trainers are given."""

    folder: Path  # model/ and train.jsonl
    arguments: argparse.Namespace
    training: list[Pair]
    held_out: list[Pair]
    order: list[list[int]]  # by epoch: the rows as prefuse will take them

    @property
    def pairs(self) -> int:
        return sum(map(len, self.order))


@dataclasses.dataclass
class RunOutcome:
    seconds: dict[str, float]  # by phase
    losses: list[float]  # by log line
    model: torch.nn.Module


def prepare(case: Case, folder: Path, arguments: argparse.Namespace) -> Prepared:
    save_model(case, folder / "model", arguments)
    rows = {"train": case.rows[: arguments.rows], "held_out": case.rows[arguments.rows :]}
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    read = {
        name: load_examples(str(folder / f"{name}.jsonl"), "pair", case.tokenizer, arguments.max_length).examples
        for name in rows
    }
    lost = len(case.rows) - sum(map(len, read.values()))
    if lost:
        raise SystemExit(f"{lost} of {len(case.rows)} rows of {case.name} have no room: give a higher --max_length")
    return Prepared(folder, arguments, read["train"], read["held_out"], [])


def by_prefuse(given: Prepared) -> RunOutcome:
    """`prefuse train`, from its first question to the reference on."""
    arguments = given.arguments
    with tempfile.TemporaryDirectory(dir=given.folder) as output:
        config = Config(
            model_name_or_path=str(given.folder / "model"), dataset_name=str(given.folder / "train.jsonl"),
            output_dir=output, eval_fraction=0.0, max_length=arguments.max_length, loss_type="dpo", beta=arguments.beta,
            learning_rate=arguments.learning_rate, lr_scheduler_type="constant", warmup_ratio=0.0,
            per_device_train_batch_size=arguments.per_device_train_batch_size,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps,
            num_train_epochs=arguments.num_train_epochs, seed=SEED, save_steps=0, logging_steps=1,
            max_tokens_per_batch=arguments.max_tokens_per_batch, device=arguments.device,
        )  # fmt: skip
        with timed(prefuse.engine.run.plan, "reference_logps", arguments) as reference:
            run = prefuse.engine.run.setup.prepare(validate(config, "train"), "train")
        if not given.order:
            # A step's rows in the order of the file: which of them share a microbatch is chance, as in TRL.
            steps = run.data.steps
            taken = [
                sorted(i for part in steps.parts(n) for indices in part for i in indices) for n in range(steps.total)
            ]
            per_epoch = [taken[n : n + steps.per_epoch] for n in range(0, steps.total, steps.per_epoch)]
            given.order += [[i for step in epoch for i in step] for epoch in per_epoch]
        training = Stopwatch(arguments)
        with StopSignals() as signals:
            train_loop(run, run.data.steps_from(run.start), signals)
        seconds = {"reference": reference.seconds, "training": training.stop()}
        losses = [
            row["loss"]
            for row in map(json.loads, (run.folder / "metrics.jsonl").read_text().splitlines())
            if "loss" in row
        ]
    return RunOutcome(seconds, losses, run.lm.model)


class SameRows(DPOTrainer):
    """TRL's trainer on token ids, in a given order."""

    def __init__(self, *args: Any, order: list[list[int]], **kwargs: Any) -> None:
        self.order = iter(order)
        super().__init__(*args, **kwargs)

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        return dataset  # it is tokenized

    def _get_train_sampler(self, dataset: Dataset | None = None) -> SameRows:
        return self

    def __iter__(self) -> Iterator[int]:
        """An epoch."""
        return iter(next(self.order))

    def __len__(self) -> int:
        return len(self.train_dataset)


def by_trl(given: Prepared, precompute: bool) -> RunOutcome:
    arguments = given.arguments
    rows = [{"prompt_ids": x.prompt, "chosen_ids": x.chosen, "rejected_ids": x.rejected} for x in given.training]
    load = AutoModelForCausalLM.from_pretrained
    with tempfile.TemporaryDirectory(dir=given.folder) as output:
        config = DPOConfig(
            output_dir=output, max_length=arguments.max_length, beta=arguments.beta, loss_type="sigmoid",
            learning_rate=arguments.learning_rate, lr_scheduler_type="constant", warmup_steps=0,
            per_device_train_batch_size=arguments.per_device_train_batch_size,
            gradient_accumulation_steps=arguments.gradient_accumulation_steps, weight_decay=0.0, optim="adamw_torch",
            num_train_epochs=arguments.num_train_epochs, seed=SEED, save_strategy="no", logging_steps=1,
            report_to="none", disable_tqdm=True, precompute_ref_log_probs=precompute, gradient_checkpointing=False,
            bf16=arguments.device != "cpu", use_cpu=arguments.device == "cpu",
        )  # fmt: skip
        with timed(SameRows, "_precompute_ref_logps", arguments) as reference:
            trainer = SameRows(
                load(given.folder / "model", dtype=torch.float32),
                load(given.folder / "model", dtype=torch.float32),
                config,
                train_dataset=Dataset.from_list(rows),
                processing_class=PreTrainedTokenizerFast.from_pretrained(given.folder / "model"),
                order=copy.deepcopy(given.order),
            )
        training = Stopwatch(arguments)
        with contextlib.redirect_stdout(None):
            trainer.train()
        seconds = {"reference": reference.seconds, "training": training.stop()}
    assert next(trainer.order, None) is None, "TRL did not take all epochs' rows"
    return RunOutcome(seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.model)


class Stopwatch:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
        self.started, self.seconds = self._now(), 0.0

    def stop(self) -> float:
        self.seconds += self._now() - self.started
        return self.seconds

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.clock()


@contextlib.contextmanager
def timed(owner: Any, name: str, arguments: argparse.Namespace) -> Iterator[Stopwatch]:
    """A watch that runs while `owner.name` does."""
    watch, original = Stopwatch(arguments), getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        watch.started = watch._now()
        result = original(*args, **kwargs)
        watch.stop()
        return result

    setattr(owner, name, wrapped)
    try:
        yield watch
    finally:
        setattr(owner, name, original)


TRAINERS: dict[str, Callable[[Prepared], RunOutcome]] = {
    "prefuse": by_prefuse,  # first: it decides the order of the rows
    "TRL": lambda given: by_trl(given, precompute=False),
    "TRL, reference before": lambda given: by_trl(given, precompute=True),
}


# ---- What was learned: DPO's own definitions, from full logits ----


@torch.no_grad()
def judge(model: torch.nn.Module, reference: torch.nn.Module, pairs: list[Pair], beta: float) -> dict[str, float]:
    rewards = torch.tensor(
        [[log_ratio(model, reference, pair.prompt, getattr(pair, side)) for side in SIDES] for pair in pairs],
        dtype=torch.float64,
    ).mul(beta)  # (P, 2)
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "loss": -torch.nn.functional.logsigmoid(margins).mean().item(),
        "rewards/accuracies": (margins > 0).double().mean().item(),
        "rewards/margins": margins.mean().item(),
        "rewards/chosen": rewards[:, 0].mean().item(),
        "rewards/rejected": rewards[:, 1].mean().item(),
    }


def log_ratio(model: torch.nn.Module, reference: torch.nn.Module, prompt: list[int], completion: list[int]) -> float:
    ids = torch.tensor([prompt + completion], device=model.device)
    targets = ids[:, len(prompt) :, None]

    def logp(judged: torch.nn.Module) -> Tensor:
        logits = judged(input_ids=ids).logits[:, len(prompt) - 1 : -1].double()
        return logits.log_softmax(-1).gather(-1, targets).sum()

    return (logp(model) - logp(reference)).item()


# ---- The trunk alone ----


def trunk_ratio(given: Prepared, rounds: int) -> dict[str, float]:
    """Seconds of forward and backward for one step's rows, a prompt run for each side over one run for both."""
    model = AutoModelForCausalLM.from_pretrained(given.folder / "model", dtype=torch.float32)
    model.to(given.arguments.device)
    pairs = given.training[:16]
    groups = {
        "apart": [(pair.prompt, [getattr(pair, side)]) for pair in pairs for side in SIDES],
        "shared": [(pair.prompt, [pair.chosen, pair.rejected]) for pair in pairs],
    }
    budget = 2 * given.arguments.max_length
    batches = {name: [batch.to(model.device) for batch in flat(some, budget)] for name, some in groups.items()}

    def step(name: str) -> float:
        watch = Stopwatch(given.arguments)
        for batch in batches[name]:
            with torch.autocast("cuda", torch.bfloat16, enabled=model.device.type == "cuda"):
                packed_hidden(model, batch).sum().backward()
        model.zero_grad()
        return watch.stop()

    for name in batches:
        step(name)
    times = [{name: step(name) for name in batches} for _ in range(rounds)]
    tokens = {name: sum(batch.num_tokens for batch in some) for name, some in batches.items()}
    measured = statistics.median(time["apart"] / time["shared"] for time in times)
    ideal = tokens["apart"] / tokens["shared"]
    return {"measured": measured, "ideal": ideal, "share": measured / ideal}


def flat(groups: list[tuple[list[int], list[list[int]]]], budget: int) -> list[Packed]:
    lengths = [len(prompt) + sum(map(len, sides)) for prompt, sides in groups]
    return [pack([groups[i] for i in indices]) for indices in fill(lengths, budget)]


# ---- Report ----


def compare(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        given = prepare(case, Path(folder), arguments)
        rounds: list[dict[str, dict[str, float]]] = []
        outcomes: dict[str, RunOutcome] = {}
        for number in range(arguments.rounds):
            names = list(TRAINERS) if number % 2 == 0 else ["prefuse", *reversed(list(TRAINERS)[1:])]
            rounds.append({})
            for name in names:
                outcomes[name] = TRAINERS[name](given)
                rounds[-1][name] = outcomes[name].seconds
                seconds = ", ".join(f"{phase} {t:.1f} s" for phase, t in outcomes[name].seconds.items())
                print(f"{case.name}, round {number + 1}, {name}: {seconds}", flush=True)
        reference = AutoModelForCausalLM.from_pretrained(given.folder / "model", dtype=torch.float32)
        reference.to(given.arguments.device)
        held = {name: judge(o.model.eval(), reference, given.held_out, arguments.beta) for name, o in outcomes.items()}
        trunk = trunk_ratio(given, max(3, arguments.rounds))
    totals = [{name: sum(seconds.values()) for name, seconds in one.items()} for one in rounds]
    tokens = [(len(x.prompt), len(x.chosen), len(x.rejected)) for x in given.training]
    return {
        "rows": {"training": len(given.training), "held_out": len(given.held_out)},
        "mean_tokens": dict(zip(("prompt", *SIDES), map(statistics.mean, zip(*tokens, strict=True)), strict=True)),
        "trainers": {
            name: {
                "seconds": {phase: statistics.median(r[name][phase] for r in rounds) for phase in rounds[0][name]},
                "pairs_per_second": given.pairs / statistics.median(total[name] for total in totals),
                "prefuse_is_faster_by": statistics.median(total[name] / total["prefuse"] for total in totals),
                "losses": outcome.losses,
                "held_out": held[name],
            }
            for name, outcome in outcomes.items()
        },
        "trunk": trunk,
    }


def tables(result: dict[str, Any]) -> str:
    text = ""
    for case, found in result["cases"].items():
        lengths = " + ".join(f"{value:.0f}" for value in found["mean_tokens"].values())
        text += f"\n### {case}: {found['rows']['training']} pairs of {lengths} tokens (prompt + chosen + rejected)\n\n"
        rows = [
            [name, f"{x['pairs_per_second']:.2f}", f"{x['prefuse_is_faster_by']:.2f}",
             *(f"{x['held_out'][metric]:.5f}" for metric in next(iter(found["trainers"].values()))["held_out"])]
            for name, x in found["trainers"].items()
        ]  # fmt: skip
        held = ["held-out loss", "accuracy", "margin", "chosen", "rejected"]
        text += markdown(["trainer", "pairs/s", "prefuse is faster by", *held], rows) + "\n"
        trunk = found["trunk"]
        text += (
            f"\nPrompts shared, trunk alone: {trunk['measured']:.2f} times faster where the tokens are "
            f"{trunk['ideal']:.2f} times fewer: {trunk['share']:.0%} of the ideal.\n"
        )
    return text


def main() -> None:
    if any(word.startswith("--model_name_or_path") for word in sys.argv):
        from prefuse.bench import real

        return real.main()
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", type=Path, help="JSON or JSONL file of pairs, in a form that prefuse reads")
    parser.add_argument("--rows", type=int, default=32, help="pairs to train on")
    parser.add_argument("--held_out", type=int, default=32, help="pairs to judge by")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine that is busy")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_model_arguments(parser)
    parser.add_argument("--max_tokens_per_batch", type=int, help="of prefuse; default: as its own")
    parser.add_argument("--per_device_train_batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--num_train_epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=3e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet()

    count = arguments.rows + arguments.held_out
    cases = [
        drawn_case("lengths of chat data", CHAT, count, arguments.vocab_size),
        drawn_case("prompts four times as long as answers", LONG, count, arguments.vocab_size),
    ]
    if arguments.dataset_name is not None:
        cases.append(read_case(arguments.dataset_name, count, arguments.vocab_size))
    settings = vars(arguments) | {"dataset_name": arguments.dataset_name and arguments.dataset_name.name}
    result = {"environment": environment(), "settings": settings, "cases": {}}
    device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else cpu_model()
    name = f"trainers-{slug(device)}-{arguments.threads}threads-torch{torch.__version__.split('+')[0]}"
    for case in cases:
        result["cases"][case.name] = compare(case, arguments)
        write_result(RESULTS / f"{name}.json", "train", result)
        (RESULTS / f"{name}.md").write_text(f"## {device}, {arguments.threads} threads\n" + tables(result))
    print(tables(result))


def quiet() -> None:
    """The tables are what is wanted on the screen."""
    prefuse.engine.report.log.console.quiet = True
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets_logging.set_verbosity_error()
    disable_progress_bar()
    for name in ("trl", "prefuse"):
        logging.getLogger(name).setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
