"""What a training run is made of, put together once before its first step."""

import contextlib
import dataclasses
import logging
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

import prefuse
from prefuse.engine.config.settings import Config
from prefuse.engine.config.yaml_file import write_yaml
from prefuse.engine.data.batches import Examples
from prefuse.engine.data.dataset import read_training_data, with_label_weights, write_skipped
from prefuse.engine.data.ranked import rankings_of
from prefuse.engine.data.records import Skipped
from prefuse.engine.data.steps import read_steps
from prefuse.engine.data.stops import stop_tokens
from prefuse.engine.errors import UserError
from prefuse.engine.model.adapters import adapters_off, base_of, base_state
from prefuse.engine.model.flops import peak_flops
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.limits import check_mismatches, check_rows
from prefuse.engine.model.load import check_model, device_of, load_model, load_tokenizer
from prefuse.engine.model.reward_model import load_reward_model, load_step_model, pad_apart
from prefuse.engine.model.tokenizer import stop_at
from prefuse.engine.report.clock import clock
from prefuse.engine.report.log import MetricsLog, Window, say
from prefuse.engine.report.trackers import Trackers, wanted_trackers
from prefuse.engine.run.about import write_about
from prefuse.engine.run.best import Best
from prefuse.engine.run.checkpoint import Checkpoints, Saved, checkpoint_bytes, load_newest, model_bytes
from prefuse.engine.run.files import require_space
from prefuse.engine.run.folder import RunFolder, open_folder
from prefuse.engine.run.following import Following
from prefuse.engine.run.guards import Guards
from prefuse.engine.run.health import largest_weight
from prefuse.engine.run.held_out import HeldOut
from prefuse.engine.run.identity import (
    Identity,
    check_same,
    check_settings,
    checksums,
    deciding_settings,
    libraries,
    row_digests,
)
from prefuse.engine.run.optimizer import make_optimizer
from prefuse.engine.run.plan import TrainingSet, meet_reference
from prefuse.engine.run.proof import checkpoints
from prefuse.engine.run.ranks import Ranks, join
from prefuse.losses.contract import Loss, needs_of
from prefuse.losses.rewards import reads_scores

logger = logging.getLogger(__name__)


@dataclass
class Run:
    config: Config
    loss: Loss  # of the next step: some change from step to step
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
    best: Best

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
    """Whether the run has finished, and the settings ask for no more epochs or steps than it made."""
    if not home.finished:
        return False
    total, per_epoch = home.mark.get("total_steps", 0), home.mark.get("steps_per_epoch", 0)
    wanted = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    return wanted <= total


class FileRows:
    """What `sft` and `train` learn from: the rows of files. Another story brings its own (engine/online.py)."""

    def loss(self, config: Config, command: str) -> Loss:
        return loss_of(config, command)

    def read(
        self, config: Config, loss: Loss, home: RunFolder, ranks: Ranks
    ) -> tuple[object, Examples, Examples | None]:
        """The tokenizer, the rows to train on, and those held out."""
        return _read_rows(config, loss, home, ranks)

    def guards(self, config: Config, loss: Loss, examples: Examples) -> Guards:
        guards = Guards(config, getattr(loss, "beta", None) if "reference" in needs_of(loss) else None)
        if "labels" in needs_of(loss):
            guards.check_labels(examples.labels, loss)
        return guards

    def plan(
        self, lm: LanguageModel, examples: Examples, held: Examples | None, loss: Loss, config: Config, ranks: Ranks,
        home: RunFolder, guards: Guards,
    ) -> tuple[TrainingSet, HeldOut | None]:  # fmt: skip
        """The steps of the run, with all that the reference will be asked for."""
        _check_rows_fit(lm, examples, held, loss, config)
        with contextlib.nullcontext() if _goes_on(config) else adapters_off(lm.model):
            return meet_reference(lm, examples, held, loss, config, ranks)


def prepare(
    config: Config, command: str, ranks: Ranks | None = None, home: RunFolder | None = None,
    rows: FileRows = FileRows(),  # noqa: B008 (without state)
) -> Run:  # fmt: skip
    """Reads, loads and checks everything and computes the reference's numbers, so that later only training can fail."""
    ranks = join(config) if ranks is None else ranks
    loss = rows.loss(config, command)
    wanted_trackers(config)
    home = open_run(config, command, ranks) if home is None else home
    device = device_of(config)
    _warn_of_coarse_weights(config)
    tokenizer, examples, held_examples = rows.read(config, loss, home, ranks)
    loss = with_label_weights(loss, config, examples)
    torch.manual_seed(config.seed + ranks.rank)
    lm = _loader(loss)(config.model_name_or_path, config, device, ranks, trains=True)
    if lm.scores and (said := pad_apart(lm.model, tokenizer, filter(None, (examples, held_examples)))):
        say(said)
    check_model(lm, examples)
    stop_at(lm.model, stop_tokens(examples, tokenizer))
    best = Best(config)
    guards = rows.guards(config, loss, examples)
    model = checksums(lm.model.state_dict() if _goes_on(config) else base_state(lm.model), ranks)
    data, held = rows.plan(lm, examples, held_examples, loss, config, ranks, home, guards)
    identity = Identity(
        command, math.prod(_cut(config, ranks)), data.total_steps, data.steps_per_epoch, deciding_settings(config),
        row_digests(examples), model, libraries(), data.reference,
    )  # fmt: skip
    peak = peak_flops(lm)
    window = Window(peak and peak * ranks.size, "pair" if loss.per == "pair" else "sample")
    optimizer = make_optimizer(lm.model, config)
    largest = largest_weight(lm, ranks)
    state = {"step": 0, "lines": 0, "evaluate": True}
    if home.state != "set-up":
        saved, changes = _load_newest(home, lm, optimizer, identity, examples, ranks, following_of(data))
        if saved is not None:
            state = saved.state
            loss = dataclasses.replace(loss, **state.get("loss", {}))
            _go_on(saved, changes, window, guards, _cut(config, ranks), device)
            best.restore(state.get("best"))
            data.restore(state.get("data", {}))
    newest = state["step"] or None

    def begin() -> None:
        _look_for_space(config, lm, data, home)
        write_yaml(dataclasses.replace(config, resume=False), home.path / "config.yaml", command)
        about = {"command": command, "settings": identity.settings, "libraries": identity.libraries}
        write_about(home.path, command, tokenizer, examples, held_examples, device)
        home.write_mark(state="training", total_steps=data.total_steps, steps_per_epoch=data.steps_per_epoch, **about)

    ranks.from_main(begin)
    log = _open_log(config, home, state["lines"], identity, ranks)
    kept = Checkpoints(config.save_total_limit, ranks, newest, best if config.load_best_model_at_end else None)
    return Run(
        config, loss, home, tokenizer, lm, optimizer, data, held, identity, log, window, state["step"], guards, ranks,
        state["evaluate"], kept, largest, best,
    )  # fmt: skip


def _warn_of_coarse_weights(config: Config) -> None:
    if config.dtype == "bfloat16" and not config.use_peft:  # adapters are float32
        logger.warning(
            "dtype bfloat16: at a learning rate of %g most weights are too coarse to take an update and stay "
            "where they are; float32 weights with bf16 autocast do train", config.learning_rate,
        )  # fmt: skip


def loss_of(config: Config, command: str) -> Loss:
    """What the command trains with."""
    if command == "reward":
        return config.scores_loss()
    return prefuse.SFT() if command == "sft" else config.loss()


def _open_log(config: Config, home: RunFolder, lines: int, identity: Identity, ranks: Ranks) -> MetricsLog:
    """metrics.jsonl behind its first `lines`, and where report_to wants the metrics too."""
    trackers = Trackers(config, identity.settings) if ranks.main and config.report_to else None
    return MetricsLog(home.path / "metrics.jsonl", lines, writes=ranks.main, trackers=trackers)


def following_of(data: object) -> Following | None:
    """A reference that moves with the policy; stories that bring their own rows have none."""
    return getattr(data, "following", None)


def _goes_on(config: Config) -> bool:
    """Whether the run goes on from trained adapters, which as they are then are its reference."""
    return base_of(Path(config.model_name_or_path)) is not None


def _loader(loss: Loss) -> Callable[..., LanguageModel]:
    if not reads_scores(loss):
        return load_model
    return load_step_model if loss.per == "token" else load_reward_model


def _check_rows_fit(lm: LanguageModel, examples: Examples, held: Examples | None, loss: Loss, config: Config) -> None:
    """Beside what `check_model` has looked at: held-out rows, and completions after prompts of other rows."""
    if held is not None:
        check_rows(lm, held)
    for rows in (examples, held):
        if "z0" in needs_of(loss) and rows is not None:
            check_mismatches(lm, rows, config.max_length)


def _look_for_space(config: Config, lm: LanguageModel, data: TrainingSet, home: RunFolder) -> None:
    """Before the first step. A run that is stopped writes a checkpoint, whatever save_steps says."""
    require_space(home.path, _space_needed(config, lm, data, home), "the run (its checkpoints and its model)")
    if not config.save_steps and shutil.disk_usage(home.path).free < checkpoint_bytes(lm):
        logger.warning(
            "%s has room for the model but not for a checkpoint: a run that is stopped early could not go on", home.path
        )


def _space_needed(config: Config, lm: LanguageModel, data: TrainingSet, home: RunFolder) -> int:
    """Bytes for the model and for as many checkpoints as will stand side by side, but for those that do already."""
    count = {"no": 0, "epoch": data.total_steps // data.steps_per_epoch}.get(config.save_strategy)
    if count is None:
        count = data.total_steps // config.save_steps if config.save_steps else 0
    if config.save_total_limit:
        count = min(count, config.save_total_limit + 1)  # an older one goes when the newest has proved to be good
    count += config.load_best_model_at_end
    each = checkpoint_bytes(lm, following_of(data))
    return model_bytes(lm) + max(0, count - len(checkpoints(home.path))) * each


def read_rows(config: Config, loss: Loss) -> tuple[object, Examples, Examples | None, list[Skipped]]:
    """The tokenizer, the rows to train on, those held out, and those that are skipped."""
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    if reads_scores(loss) and loss.per == "token":
        return tokenizer, *read_steps(config, tokenizer)
    if loss.per != "group":
        return tokenizer, *read_training_data(config, loss, tokenizer)
    all_pairs = dataclasses.replace(config, pairs="all")
    examples, held, skipped = read_training_data(all_pairs, loss, tokenizer)
    return tokenizer, rankings_of(examples), held and rankings_of(held), skipped


def _read_rows(config: Config, loss: Loss, home: RunFolder, ranks: Ranks) -> tuple[object, Examples, Examples | None]:
    """The same for all ranks; the skipped rows are named in the run folder."""
    with clock.part("data"):
        tokenizer, examples, held_examples, skipped = ranks.together(lambda: read_rows(config, loss))
    _check_same_rows(examples, held_examples, ranks)
    ranks.from_main(lambda: write_skipped(skipped, home.path / "skipped.jsonl"))
    return tokenizer, examples, held_examples


def _load_newest(
    home: RunFolder, lm: LanguageModel, optimizer: torch.optim.Optimizer, identity: Identity, examples: Examples,
    ranks: Ranks, following: Following | None,
) -> tuple[Saved | None, list[str]]:  # fmt: skip
    """The newest whole checkpoint, loaded, and what has changed since; None where the run begins again."""
    changes: list[str] = []

    def agree(saved: Saved) -> None:
        changes[:] = check_same(saved.state["identity"], saved.rows, identity, examples.rows, saved.state["step"])

    saved = load_newest(home.path, lm, optimizer, ranks, agree, following)
    if saved is None and home.finished:
        raise UserError(
            f"the run in {home.path} is finished and has no whole checkpoint to go on from: start a new run from "
            "it (model_name_or_path) in another output_dir"
        )
    if saved is None:
        say(f"{home.path} has no whole checkpoint: starting from the first step")
    return saved, changes


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
        "best": run.best.state(),
        "data": run.data.state(),
        "lines": run.log.lines,
        "evaluate": evaluate,
        "loss": {"baseline": run.loss.baseline} if hasattr(run.loss, "after") else {},
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
