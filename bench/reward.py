"""The same reward model trained by TRL's RewardTrainer and by prefuse: pairs per second, and what both learned.

    prefuse bench reward                          # prompts four times as long as their answers, one thread, CPU time

One small Llama with a score head, one set of token ids, one order of the rows, the same hyperparameters, float32 on a
CPU. TRL runs each side with its own prompt, padded to the longest row of the batch; prefuse runs a prompt once for both
sides, without padding. Loading and tokenization count for nobody. The trainers take turns; each speed is the median
over the rounds, each ratio the median of the ratios of a round. Held-out rows are judged by code of neither: one row at
a time through `AutoModelForSequenceClassification`.

The last line is about scoring: the tokens that run for K answers of one prompt, over those of K separate rows, and the
ratio of the times.

Writes results/reward-<device>-<threads>threads-torch<version>.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; transformers reads this as it is imported

import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

import prefuse.engine.run.setup
from prefuse.bench.record import RESULTS, cpu_model, environment, markdown, slug, write_result
from prefuse.bench.rows import LONG, SEED, Case, add_model_arguments, drawn_case, save_model
from prefuse.bench.train import SIDES, Prepared, RunOutcome, SameRows, Stopwatch, quiet
from prefuse.engine.config.settings import Config, validate
from prefuse.engine.config.tools import ToolParser
from prefuse.engine.data import load_examples
from prefuse.engine.run.signals import StopSignals
from prefuse.engine.train import train_loop
from prefuse.models.score import sequence_scores
from prefuse.packing import pack

K = 8


def prepare(case: Case, folder: Path, arguments: argparse.Namespace) -> Prepared:
    """model/: a score head beside the trunk, and a padding token that ends no answer, so that both score the same."""
    case.tokenizer.add_special_tokens({"pad_token": "<pad>"})
    save_model(case, folder / "lm", arguments)
    torch.manual_seed(SEED)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "lm", num_labels=1)
    model.config.pad_token_id = case.tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    case.tokenizer.save_pretrained(folder / "model")
    rows = {"train": case.rows[: arguments.rows], "held_out": case.rows[arguments.rows :]}
    read = {}
    for name, some in rows.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
        read[name] = load_examples(str(path), "pair", case.tokenizer, arguments.max_length).examples
    return Prepared(folder, arguments, read["train"], read["held_out"], [])


def by_prefuse(given: Prepared) -> RunOutcome:
    arguments = given.arguments
    with tempfile.TemporaryDirectory(dir=given.folder) as output:
        config = Config(
            model_name_or_path=str(given.folder / "model"), dataset_name=str(given.folder / "train.jsonl"),
            output_dir=output, eval_fraction=0.0, max_length=arguments.max_length,
            learning_rate=arguments.learning_rate, lr_scheduler_type="constant", warmup_ratio=0.0,
            per_device_train_batch_size=arguments.per_device_train_batch_size,
            num_train_epochs=arguments.num_train_epochs, seed=SEED, save_steps=0, logging_steps=1, device="cpu",
        )  # fmt: skip
        run = prefuse.engine.run.setup.prepare(validate(config, "reward"), "reward")
        if not given.order:
            steps = run.data.steps
            taken = [[i for part in steps.parts(n) for some in part for i in some] for n in range(steps.total)]
            given.order += [
                [i for step in taken[n : n + steps.per_epoch] for i in step]
                for n in range(0, steps.total, steps.per_epoch)
            ]
        training = Stopwatch(arguments)
        with StopSignals() as signals:
            train_loop(run, run.data.steps_from(run.start), signals)
        seconds = {"training": training.stop()}
        lines = (run.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return RunOutcome(seconds, [row["loss"] for row in map(json.loads, lines) if "loss" in row], run.lm.model)


class SameRewardRows(RewardTrainer):
    """TRL's trainer on token ids, in a given order."""

    def __init__(self, *args: Any, order: list[list[int]], **kwargs: Any) -> None:
        self.order = iter(order)
        super().__init__(*args, **kwargs)

    _get_train_sampler, __iter__, __len__ = SameRows._get_train_sampler, SameRows.__iter__, SameRows.__len__


def by_trl(given: Prepared) -> RunOutcome:
    arguments = given.arguments
    rows = [{f"{side}_ids": x.prompt + getattr(x, side) for side in SIDES} for x in given.training]
    with tempfile.TemporaryDirectory(dir=given.folder) as output:
        config = RewardConfig(
            output_dir=output, max_length=arguments.max_length, learning_rate=arguments.learning_rate,
            lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, optim="adamw_torch",
            per_device_train_batch_size=arguments.per_device_train_batch_size,
            num_train_epochs=arguments.num_train_epochs, seed=SEED, save_strategy="no", logging_steps=1,
            report_to="none", disable_tqdm=True, gradient_checkpointing=False, bf16=False, use_cpu=True,
        )  # fmt: skip
        trainer = SameRewardRows(
            AutoModelForSequenceClassification.from_pretrained(given.folder / "model", dtype=torch.float32),
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(given.folder / "model"),
            order=copy.deepcopy(given.order),
        )
        training = Stopwatch(arguments)
        with contextlib.redirect_stdout(None):
            trainer.train()
        seconds = {"training": training.stop()}
    return RunOutcome(seconds, [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer.model)


TRAINERS: dict[str, Callable[[Prepared], RunOutcome]] = {
    "prefuse": by_prefuse,
    "TRL": by_trl,
}  # the first decides the order


@torch.no_grad()
def judge(model: torch.nn.Module, given: Prepared) -> dict[str, float]:
    """Of the held-out rows, one row at a time."""
    score = lambda ids: model(torch.tensor([ids])).logits[0, 0].double()  # noqa: E731
    scores = [[score(x.prompt + getattr(x, side)) for side in SIDES] for x in given.held_out]
    margins = torch.tensor([chosen - rejected for chosen, rejected in scores], dtype=torch.float64)
    loss = -torch.nn.functional.logsigmoid(margins).mean().item()
    return {"accuracy": (margins > 0).double().mean().item(), "loss": loss, "margin": margins.mean().item()}


@torch.no_grad()
def scoring(given: Prepared, model: torch.nn.Module, rounds: int) -> dict[str, float]:
    """K answers to each of a few prompts, together and as rows of their own."""
    groups = [(x.prompt, [y.chosen for y in given.training[n : n + K]]) for n, x in enumerate(given.training[:8])]
    together = [pack([group]) for group in groups]
    apart = [pack([(prompt, [answer])]) for prompt, answers in groups for answer in answers]

    def seconds(batches: list) -> tuple[float, list[float]]:
        watch = Stopwatch(given.arguments)
        scores = [score for batch in batches for score in sequence_scores(model, batch).tolist()]
        return watch.stop(), scores

    seconds(together)
    ratios, difference = [], 0.0
    for _ in range(rounds):
        (one, shared), (other, alone) = seconds(together), seconds(apart)
        ratios.append(one / other)
        difference = max(difference, *(abs(a - b) for a, b in zip(shared, alone, strict=True)))
    tokens = sum(batch.num_tokens for batch in together) / sum(batch.num_tokens for batch in apart)
    return {"answers": K, "tokens": tokens, "seconds": statistics.median(ratios), "largest_difference": difference}


def compare(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        given = prepare(case, Path(folder), arguments)
        rounds: list[dict[str, float]] = []
        outcomes: dict[str, RunOutcome] = {}
        for number in range(arguments.rounds):
            rounds.append({})
            for name in list(TRAINERS) if number % 2 == 0 or not outcomes else list(TRAINERS)[::-1]:
                outcomes[name] = TRAINERS[name](given)
                rounds[-1][name] = outcomes[name].seconds["training"]
                print(f"round {number + 1}, {name}: {rounds[-1][name]:.1f} s", flush=True)
        held = {name: judge(outcome.model.eval(), given) for name, outcome in outcomes.items()}
        scored = scoring(given, outcomes["prefuse"].model, max(3, arguments.rounds))
    tokens = [(len(x.prompt), len(x.chosen), len(x.rejected)) for x in given.training]
    return {
        "rows": {"training": len(given.training), "held_out": len(given.held_out)},
        "mean_tokens": dict(zip(("prompt", *SIDES), map(statistics.mean, zip(*tokens, strict=True)), strict=True)),
        "trainers": {
            name: {
                "pairs_per_second": given.pairs / statistics.median(one[name] for one in rounds),
                "prefuse_is_faster_by": statistics.median(one[name] / one["prefuse"] for one in rounds),
                "losses": outcome.losses,
                "held_out": held[name],
            }
            for name, outcome in outcomes.items()
        },
        "scoring": scored,
    }


def tables(found: dict[str, Any]) -> str:
    lengths = " + ".join(f"{value:.0f}" for value in found["mean_tokens"].values())
    rows = [
        [name, f"{x['pairs_per_second']:.2f}", f"{x['prefuse_is_faster_by']:.2f}",
         *(f"{value:.5f}" for value in x["held_out"].values())]
        for name, x in found["trainers"].items()
    ]  # fmt: skip
    scored = found["scoring"]
    head = ["trainer", "pairs/s", "prefuse is faster by", "held-out accuracy", "loss", "margin"]
    return (
        f"\n### {found['rows']['training']} pairs of {lengths} tokens (prompt + chosen + rejected), "
        f"{found['rows']['held_out']} held out\n\n{markdown(head, rows)}\n\n"
        f"Scoring {scored['answers']} answers of one prompt: {scored['tokens']:.2f} of the tokens of separate rows, "
        f"{scored['seconds']:.2f} of the time; scores differ by {scored['largest_difference']:.1g} at most.\n"
    )


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="pairs to train on")
    parser.add_argument("--held_out", type=int, default=256, help="pairs to judge by")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="cpu", help="wall: on a machine that is idle")
    add_model_arguments(parser)
    parser.set_defaults(hidden_size=128, num_hidden_layers=2, vocab_size=512, max_length=1024)
    parser.add_argument("--per_device_train_batch_size", type=int, default=8)
    parser.add_argument("--num_train_epochs", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    quiet()
    case = drawn_case("prompts four times as long as answers", LONG, arguments.rows + arguments.held_out,
                      arguments.vocab_size)  # fmt: skip
    result = {"environment": environment(), "settings": vars(arguments), **compare(case, arguments)}
    name = f"reward-{slug(cpu_model())}-{arguments.threads}threads-torch{torch.__version__.split('+')[0]}"
    write_result(RESULTS / f"{name}.json", "reward", result)
    (RESULTS / f"{name}.md").write_text(f"## {cpu_model()}, {arguments.threads} threads\n{tables(result)}")
    print(tables(result))


if __name__ == "__main__":
    main()
