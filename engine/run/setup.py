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
from prefuse.engine.config.settings import Config
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
from prefuse.engine.run.checkpoint import Checkpoints, Saved, checkpoint_bytes, load_newest, model_bytes
from prefuse.engine.run.files import require_space
from prefuse.engine.run.folder import RunFolder, open_folder
from prefuse.engine.run.guards import Guards
from prefuse.engine.run.health import largest_weight
from prefuse.engine.run.identity import (
    Identity,
    check_same,
    check_settings,
    checksums,
    libraries,
    row_digests,
    settings_of,
)
from prefuse.engine.run.optimizer import make_optimizer
from prefuse.engine.run.proof import checkpoints
from prefuse.engine.run.ranks import Ranks, join, share
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
    home: RunFolder
    tokenizer: object
    lm: LanguageModel
    optimizer: torch.optim.Optimizer
    data: TrainingSet
    held: HeldOut | None
    identity: Identity  # what a checkpoint must agree with to be resumed
    log: MetricsLog
    window: Window
    start: int  # optimizer steps already done
    guards: Guards
    ranks: Ranks
    evaluate_first: bool  # the evaluation after step `start` is still to be made
    checkpoints: Checkpoints
    largest: float  # of the weights it began with

    @property
    def folder(self) -> Path:
        return self.home.path


def open_run(config: Config, command: str, ranks: Ranks) -> RunFolder:
    """The run's folder, held by the main rank; for the others the same without a lock."""
    given = Path(config.output_dir)
    again = config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    home: list[RunFolder] = []

    def open_it() -> dict:
        models = {name: getattr(config, name) for name in ("model_name_or_path", "ref_model_name_or_path")}
        home.append(open_folder(given, again, models))
        try:
            check_settings(command, home[0].mark, config)
        except UserError:
            home[0].close()
            raise
        return home[0].mark

    mark = ranks.from_main(open_it)
    if not ranks.main:
        home.append(RunFolder(given, holds=False))
        home[0].mark = mark
    return home[0]


def is_finished(home: RunFolder, config: Config) -> bool:
    """Whether there is nothing left to do; more epochs or steps than it had are something."""
    if not home.finished:
        return False
    total, per_epoch = home.mark.get("total_steps", 0), home.mark.get("steps_per_epoch", 0)
    wanted = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    return wanted <= total


def prepare(config: Config, command: str, ranks: Ranks | None = None, home: RunFolder | None = None) -> Run:
    """Read, load, check, and ask the reference; from here on nothing but training can fail."""
    ranks = join(config) if ranks is None else ranks
    loss = prefuse.SFT() if command == "sft" else config.loss()
    home = open_run(config, command, ranks) if home is None else home
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
    ranks.from_main(lambda: write_skipped(skipped, home.path / "skipped.jsonl"))
    torch.manual_seed(config.seed + ranks.rank)
    lm = load_model(config.model_name_or_path, config, device, ranks, trains=True)
    check_model(lm, examples)
    guards = Guards(config, getattr(loss, "beta", None) if "reference" in needs_of(loss) else None)
    if "labels" in needs_of(loss):
        guards.check_labels(examples.labels)
    model = checksums(base_state(lm.model), ranks)
    with adapters_off(lm.model):
        data, held = _meet_reference(lm, examples, held_examples, loss, config, ranks)
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * ranks.size
    identity = Identity(
        command, per_step, data.total_steps, data.steps_per_epoch, settings_of(config), row_digests(examples), model,
        libraries(),
    )  # fmt: skip

    peak = peak_flops(lm)
    window = Window(peak and peak * ranks.size, "pair" if loss.per == "pair" else "sample")
    optimizer = make_optimizer(lm.model, config)
    largest = largest_weight(lm, ranks)
    state = {"step": 0, "lines": 0, "evaluate": True}
    if home.state != "set-up":
        changes: list[str] = []

        def agree(saved: Saved) -> None:
            changes[:] = check_same(saved.state["identity"], saved.rows, identity, examples.rows, saved.state["step"])

        saved = load_newest(home.path, lm, optimizer, ranks, agree)
        if saved is None:
            say(f"{home.path} has no whole checkpoint: starting from the first step")
        else:
            state = saved.state
            _go_on(saved, changes, window, guards, _cut(config, ranks), device)
    newest = state["step"] or None

    def begin() -> None:
        require_space(home.path, _space_needed(config, lm, data, home), "the run (its checkpoints and its model)")
        write_yaml(dataclasses.replace(config, resume=False), home.path / "config.yaml", command)
        about = {"command": command, "settings": identity.settings, "libraries": identity.libraries}
        home.write_mark(state="training", total_steps=data.total_steps, steps_per_epoch=data.steps_per_epoch, **about)

    ranks.from_main(begin)
    log = MetricsLog(home.path / "metrics.jsonl", state["lines"], writes=ranks.main)
    return Run(
        config, loss, home, tokenizer, lm, optimizer, data, held, identity, log, window, state["step"], guards, ranks,
        state["evaluate"], Checkpoints(config.save_total_limit, ranks, newest), largest,
    )  # fmt: skip


def _space_needed(config: Config, lm: LanguageModel, data: TrainingSet, home: RunFolder) -> int:
    """Bytes for the model and for as many checkpoints as will stand side by side, but for those that do already."""
    count = data.total_steps // config.save_steps if config.save_steps else 0
    if config.save_total_limit:
        count = min(count, config.save_total_limit + 1)  # an older one goes when the newest has proved to be good
    return model_bytes(lm) + max(0, count - len(checkpoints(home.path))) * checkpoint_bytes(lm)


def _go_on(
    saved: Saved, changes: list[str], window: Window, guards: Guards, cut: list[int], device: torch.device
) -> None:
    """From a checkpoint that is loaded."""
    state = saved.state
    window.restore(state["window"], device)
    guards.restore(state["guards"])
    say(f"resuming after step {state['step']}, from {saved.path}")
    if state["cut"] != cut:
        changes = [
            *changes,
            f"its steps were cut otherwise ({_said(state['cut'])}, now {_said(cut)}): the same rows in the same order, "
            "but not to the last bit",
        ]
    for line in changes:
        say(f"  {line}")


def state_of(run: Run, step: int, evaluate: bool) -> dict:
    """What a checkpoint says besides tensors. `evaluate`: whether the evaluation after `step` is still to be made."""
    return {
        "step": step,
        "identity": run.identity.state(),
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
