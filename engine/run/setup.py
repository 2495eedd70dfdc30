"""What a training run is made of, put together once before its first step."""

import dataclasses
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import prefuse
from prefuse.engine.config.settings import Config, decides_weights
from prefuse.engine.config.yaml_file import write_yaml
from prefuse.engine.data.batches import Batch, Examples, collate, mismatched
from prefuse.engine.data.dataset import kind_of, read_training_data, write_skipped
from prefuse.engine.data.order import Plan, draw_mismatches, plan_epoch
from prefuse.engine.errors import UserError
from prefuse.engine.evaluate import HeldOut, hold
from prefuse.engine.model.adapters import adapters_off, base_state
from prefuse.engine.model.flops import peak_flops
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.load import (
    check_model,
    check_same_vocabulary,
    device_of,
    load_model,
    load_tokenizer,
    without_padding,
)
from prefuse.engine.report.log import MetricsLog, Window, say
from prefuse.engine.run.checkpoint import check_same, latest_checkpoint, load_checkpoint, read_state
from prefuse.engine.run.guards import Guards
from prefuse.engine.run.optimizer import make_optimizer
from prefuse.engine.run.ranks import Ranks, fingerprint, join, share
from prefuse.engine.run.reference_logps import reference_logps
from prefuse.losses.contract import Loss, needs_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Share:
    """What this rank does of one optimizer step."""

    step: int
    batches: list[Batch]
    mismatches: list[Batch]  # for a loss that needs z0: one for each batch
    counts: list[bool]  # of each batch; False: this rank goes through the motions beside another that has one more
    rows: list[list[list[str]]]  # the names of the examples, by rank and microbatch


@dataclass(frozen=True)
class TrainingSet:
    """The rows to train on in the order of each epoch, with what the reference says about them."""

    examples: Examples
    plans: list[list[list[list[list[int]]]]]  # by epoch, step, rank and microbatch: example indices
    total_steps: int
    ranks: Ranks
    ref_logps: list[Tensor] | None = None  # by example
    mismatches: list[Examples] | None = None  # by epoch, for a loss that needs z0
    mismatch_ref_logps: list[list[Tensor]] | None = None  # by epoch and example

    @property
    def steps_per_epoch(self) -> int:
        return len(self.plans[0])

    def steps_from(self, start: int) -> Iterator[Share]:
        """This rank's share of every optimizer step from `start` on."""
        for step in range(start, self.total_steps):
            epoch, index = divmod(step, self.steps_per_epoch)
            parts = self.plans[epoch][index]
            own, most = parts[self.ranks.rank], max(map(len, parts))
            counts = [number < len(own) for number in range(most)]
            own = own + next(part for part in parts if part)[:1] * (most - len(own))
            batches = [collate(self.examples, indices, self.ref_logps) for indices in own]
            mismatches = []
            if self.mismatches is not None:
                other, logps = self.mismatches[epoch], self.mismatch_ref_logps[epoch]
                mismatches = [collate(other, indices, logps) for indices in own]
            rows = [[[self.examples.rows[i] for i in indices] for indices in part] for part in parts]
            yield Share(step, batches, mismatches, counts, rows)


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
    guards: Guards
    ranks: Ranks
    evaluate_first: bool  # the evaluation after step `start` is still to be made


def prepare(config: Config, command: str) -> Run:
    """Read, load, check, and ask the reference; from here on nothing but training can fail."""
    ranks = join(config)
    loss = prefuse.SFT() if command == "sft" else config.loss()
    folder = Path(config.output_dir)
    again = config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    found = ranks.from_main(lambda: _open_folder(folder, again))
    checkpoint = None if found is None else folder / found
    device = device_of(config)
    if config.dtype == "bfloat16" and not config.use_peft:  # adapters are float32
        logger.warning(
            "dtype bfloat16: at a learning rate of %g most weights are too coarse to take an update and stay "
            "where they are; float32 weights with bf16 autocast do train", config.learning_rate,
        )  # fmt: skip

    def read() -> tuple:
        tokenizer = load_tokenizer(config.model_name_or_path)
        return tokenizer, *read_training_data(config, kind_of(loss), tokenizer)

    tokenizer, examples, held_examples, skipped = ranks.together(read)
    _check_same_rows(examples, held_examples, ranks)
    ranks.from_main(lambda: write_skipped(skipped, folder / "skipped.jsonl"))
    torch.manual_seed(config.seed + ranks.rank)
    lm = load_model(config.model_name_or_path, config, device, ranks, trains=True)
    check_model(lm, examples)
    guards = Guards(config, getattr(loss, "beta", None) if "reference" in needs_of(loss) else None)
    if "labels" in needs_of(loss):
        guards.check_labels(examples.labels)
    with adapters_off(lm.model):
        data, held = _meet_reference(lm, examples, held_examples, loss, config, ranks)
    settings = {k: v for k, v in dataclasses.asdict(config).items() if decides_weights(k)}
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks.size
    identity = {"command": command, "tokens": examples.fingerprint(), "items_per_step": per_step, **settings}
    if lm.adapters is not None:  # a checkpoint has them alone
        identity["the base model"] = fingerprint(base_state(lm.model), ranks)

    peak = peak_flops(lm)
    window = Window(peak and peak * ranks.size, "pair" if loss.per == "pair" else "sample")
    optimizer, state = make_optimizer(lm.model, config), {"step": 0, "lines": 0, "evaluate": True}
    if checkpoint is not None:
        state = ranks.together(lambda: read_state(checkpoint))
        check_same(state["identity"], identity)
        load_checkpoint(checkpoint, lm, optimizer, ranks)
        window.restore(state["window"], device)
        guards.restore(state["guards"])
        say(f"resuming after step {state['step']}, from {checkpoint}")
        if state["cut"] != _cut(config, ranks):
            say(f"  its steps were cut otherwise ({_said(state['cut'])}, now {_said(_cut(config, ranks))}): the same "
                "rows in the same order, but not to the last bit")  # fmt: skip

    def begin() -> None:
        write_yaml(dataclasses.replace(config, resume=False), folder / "config.yaml", command)

    ranks.from_main(begin)
    log = MetricsLog(folder / "metrics.jsonl", state["lines"], writes=ranks.main)
    return Run(
        config, loss, folder, tokenizer, lm, optimizer, data, held, identity, log, window, state["step"], guards, ranks,
        state["evaluate"],
    )  # fmt: skip


def state_of(run: Run, step: int, evaluate: bool) -> dict:
    """What a checkpoint says besides tensors. `evaluate`: whether the evaluation after `step` is still to be made."""
    return {
        "step": step,
        "identity": run.identity,
        "cut": _cut(run.config, run.ranks),
        "window": run.window.state(),
        "guards": run.guards.state(),
        "lines": run.log.lines,
        "evaluate": evaluate,
    }


def _cut(config: Config, ranks: Ranks) -> list[int]:
    return [ranks.size, config.gradient_accumulation_steps, config.per_device_train_batch_size]


def _said(cut: list[int]) -> str:
    return "{} ranks x {} microbatches of {}".format(*cut)


def _open_folder(folder: Path, resume: bool) -> str | None:
    """Make the run folder, which must be new or empty; with `resume`, the name of the checkpoint to go on from."""
    if folder.is_dir() and any(folder.iterdir()):
        if not resume:
            raise UserError(
                f"output_dir {folder} exists and is not empty: give another folder, or --resume to go on with its run"
            )
        checkpoint = latest_checkpoint(folder)
        if checkpoint is None:
            say(f"{folder} has no whole checkpoint: starting from the first step")
        return checkpoint and checkpoint.name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file, expected a folder that is new or empty")
    folder.mkdir(parents=True, exist_ok=True)
    return None


def _check_same_rows(examples: Examples, held: Examples | None, ranks: Ranks) -> None:
    """Ranks read the data each for itself; they plan the same steps only if they read the same."""
    read = ranks.texts(examples.fingerprint() + (held.fingerprint() if held else ""))
    for rank, rows in enumerate(read):
        if rows != read[0]:
            raise UserError(
                f"rank {rank} read other rows than rank 0: the data changed while it was read, or the nodes have "
                "different copies of it; expected the same files everywhere"
            )


def _meet_reference(
    lm: LanguageModel, examples: Examples, held: Examples | None, loss: Loss, config: Config, ranks: Ranks
) -> tuple[TrainingSet, HeldOut | None]:
    """Plan the run and compute all that the reference will be asked for. It is the initial model, or a second one that
    is gone afterwards."""
    ref = lm
    if "reference" in needs_of(loss) and config.ref_model_name_or_path is not None:
        ref = load_model(config.ref_model_name_or_path, config, lm.device, ranks)
        check_model(ref, examples)
        check_same_vocabulary(lm, ref)
    examples = without_padding(examples, (lm,) if ref is lm else (lm, ref), config)
    held = held and dataclasses.replace(held, padding_free=examples.padding_free)

    cut, bins = (config.per_device_train_batch_size, config.gradient_accumulation_steps * ranks.size), None
    if examples.padding_free and config.z0_scope == "step":  # else a microbatch is what it says, so many examples
        bins = examples.bins(config.token_budget(config.per_device_train_batch_size, len(examples.sequences[0])))

    def plan(epoch: int) -> list:
        steps: Plan = plan_epoch(examples.lengths, *cut, config.seed, epoch, bins)
        return [share(microbatches, examples.lengths, ranks.size) for microbatches in steps]

    plans = [plan(0)]
    total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * len(plans[0]))
    plans += [plan(epoch) for epoch in range(1, math.ceil(total / len(plans[0])))]

    if "reference" not in needs_of(loss):
        return TrainingSet(examples, plans, total, ranks), held and hold(held, None, loss, config, ranks)
    say(f"reference log-probabilities of {len(examples)} examples ...")
    own = [[indices for step in plan for indices in step[ranks.rank]] for plan in plans]  # as the policy will meet them
    logps = reference_logps(ref, examples, own[0], config.reference_cache, ranks)
    mismatches = mismatch_logps = None
    if "z0" in needs_of(loss):
        draws = [draw_mismatches(examples.prompts, config.seed, epoch) for epoch in range(len(plans))]
        mismatches = [mismatched(examples, draw, config.max_length) for draw in draws]
        mismatch_logps = [
            reference_logps(ref, other, order, config.reference_cache, ranks)
            for other, order in zip(mismatches, own, strict=True)
        ]
    data = TrainingSet(examples, plans, total, ranks, logps, mismatches, mismatch_logps)
    return data, held and hold(held, ref, loss, config, ranks)
