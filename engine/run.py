"""What a training run is made of, put together once before its first step."""

import dataclasses
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import prefuse
from prefuse.engine.batches import Batch, Examples, collate, mismatched
from prefuse.engine.checkpoint import check_same, latest_checkpoint, load_checkpoint, read_state
from prefuse.engine.config import Config, write_yaml
from prefuse.engine.dataset import KIND_OF, read_training_data, write_skipped
from prefuse.engine.errors import UserError
from prefuse.engine.eval import HeldOut, hold
from prefuse.engine.flops import peak_flops
from prefuse.engine.forward import LanguageModel
from prefuse.engine.model import (
    check_model,
    check_same_vocabulary,
    device_of,
    load_model,
    load_tokenizer,
    without_padding,
)
from prefuse.engine.optimizer import make_optimizer
from prefuse.engine.order import Plan, draw_mismatches, plan_epoch
from prefuse.engine.reference import reference_logps
from prefuse.engine.report import MetricsLog, Window, say
from prefuse.losses import Loss

logger = logging.getLogger(__name__)

# A resumed run may differ in these: they do not change the weights it ends with. (Its rows are compared by token.)
FREE_ON_RESUME = {
    "dataset_name", "dataset_train_split", "dataset_test_split",
    "output_dir", "resume", "save_steps", "save_total_limit", "logging_steps", "eval_steps", "eval_dataset", "device",
    "per_device_eval_batch_size", "reference_cache", "output_file", "num_prompts", "max_new_tokens", "temperature",
}  # fmt: skip


@dataclass(frozen=True)
class TrainingSet:
    """The rows to train on in the order of each epoch, with what the reference says about them."""

    examples: Examples
    plans: list[Plan]  # by epoch
    total_steps: int
    ref_logps: list[Tensor] | None = None  # by example
    mismatches: list[Examples] | None = None  # KTO, by epoch
    mismatch_ref_logps: list[list[Tensor]] | None = None  # by epoch and example

    @property
    def steps_per_epoch(self) -> int:
        return len(self.plans[0])

    def steps_from(self, start: int) -> Iterator[tuple[int, list[Batch], list[Batch]]]:
        """(step, its microbatches, KTO's mismatches for each) for every optimizer step from `start` on."""
        for step in range(start, self.total_steps):
            epoch, index = divmod(step, self.steps_per_epoch)
            microbatches = self.plans[epoch][index]
            batches = [collate(self.examples, indices, self.ref_logps) for indices in microbatches]
            mismatches = []
            if self.mismatches is not None:
                other, logps = self.mismatches[epoch], self.mismatch_ref_logps[epoch]
                mismatches = [collate(other, indices, logps) for indices in microbatches]
            yield step, batches, mismatches


@dataclass(frozen=True)
class Run:
    config: Config
    loss: Loss
    folder: Path
    tokenizer: object
    lm: LanguageModel
    optimizer: torch.optim.Optimizer
    data: TrainingSet
    held: HeldOut | None
    identity: dict  # what a checkpoint must agree with to be resumed
    log: MetricsLog
    window: Window
    start: int  # optimizer steps already done


def prepare(config: Config, command: str) -> Run:
    """Read, load, check, and ask the reference; from here on nothing but training can fail."""
    loss = prefuse.SFT() if command == "sft" else config.loss()
    folder = Path(config.output_dir)
    checkpoint = _open_folder(folder, config.resume)
    device = device_of(config)
    if config.dtype == "bfloat16":
        logger.warning(
            "dtype bfloat16: at a learning rate of %g most weights are too coarse to take an update and stay "
            "where they are; float32 weights with bf16 autocast do train", config.learning_rate,
        )  # fmt: skip

    tokenizer = load_tokenizer(config.model_name_or_path)
    kind = KIND_OF["sft" if command == "sft" else config.loss_type]
    examples, held_examples, skipped = read_training_data(config, kind, tokenizer)
    write_skipped(skipped, folder / "skipped.jsonl")
    lm = load_model(config.model_name_or_path, config, device)
    check_model(lm, examples)
    data, held = _meet_reference(lm, examples, held_examples, loss, config)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE_ON_RESUME}
    identity = {"command": command, "tokens": examples.fingerprint(), **settings}

    optimizer, window, start = make_optimizer(lm.model, config), Window(peak_flops(lm)), 0
    if checkpoint is not None:
        state = read_state(checkpoint)
        check_same(state["identity"], identity)
        load_checkpoint(checkpoint, lm, optimizer)
        window.restore(state["window"], device)
        start = state["step"]
        say(f"resuming after step {start}, from {checkpoint}")
    write_yaml(dataclasses.replace(config, resume=False), folder / "config.yaml", command)
    log = MetricsLog(folder / "metrics.jsonl", resumed_at=start if checkpoint else None)
    return Run(config, loss, folder, tokenizer, lm, optimizer, data, held, identity, log, window, start)


def _open_folder(folder: Path, resume: bool) -> Path | None:
    """Make the run folder, which must be new or empty; with `resume`, the checkpoint to go on from."""
    if folder.is_dir() and any(folder.iterdir()):
        if not resume:
            raise UserError(
                f"output_dir {folder} exists and is not empty: give another folder, or --resume to go on with its run"
            )
        checkpoint = latest_checkpoint(folder)
        if checkpoint is None:
            say(f"{folder} has no whole checkpoint: starting from the first step")
        return checkpoint
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file, expected a folder that is new or empty")
    folder.mkdir(parents=True, exist_ok=True)
    return None


def _meet_reference(
    lm: LanguageModel, examples: Examples, held: Examples | None, loss: Loss, config: Config
) -> tuple[TrainingSet, HeldOut | None]:
    """Plan the run and compute all that the reference will be asked for. It is the initial model, or a second one that
    is gone afterwards."""
    ref = lm
    if loss.uses_reference and config.ref_model_name_or_path is not None:
        ref = load_model(config.ref_model_name_or_path, config, lm.device)
        check_model(ref, examples)
        check_same_vocabulary(lm, ref)
    examples = without_padding(examples, (lm,) if ref is lm else (lm, ref), config)
    held = held and dataclasses.replace(held, padding_free=examples.padding_free)

    cut, bins = (config.per_device_train_batch_size, config.gradient_accumulation_steps), None
    if examples.padding_free and config.z0_scope == "step":  # else a microbatch is what it says, so many examples
        bins = examples.bins(config.token_budget(config.per_device_train_batch_size, len(examples.sequences[0])))
    plans = [plan_epoch(examples.lengths, *cut, config.seed, 0, bins)]
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * len(plans[0]))
    for epoch in range(1, math.ceil(total / len(plans[0]))):
        plans.append(plan_epoch(examples.lengths, *cut, config.seed, epoch, bins))

    if not loss.uses_reference:
        return TrainingSet(examples, plans, total), held and hold(held, None, loss, config)
    say(f"reference log-probabilities of {len(examples)} examples ...")
    batches = [[indices for step in plan for indices in step] for plan in plans]  # as the policy will meet them
    logps = reference_logps(ref, examples, batches[0], config.reference_cache)
    mismatches = mismatch_logps = None
    if isinstance(loss, prefuse.KTO):
        draws = [draw_mismatches(examples.prompts, config.seed, epoch) for epoch in range(len(plans))]
        mismatches = [mismatched(examples, draw, config.max_length) for draw in draws]
        mismatch_logps = [
            reference_logps(ref, other, order, config.reference_cache)
            for other, order in zip(mismatches, batches, strict=True)
        ]
    data = TrainingSet(examples, plans, total, logps, mismatches, mismatch_logps)
    return data, held and hold(held, ref, loss, config)
