"""The steps of a run: which rows each takes, who works on them, and what the reference says about these rows.

A step is cut into microbatches when it is asked for, and the reference is asked about rows of planned steps alone: a
short run on a long file starts as soon as one on a short file.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import Batch, Examples, collate, mismatched
from prefuse.engine.data.order import Epoch, mismatches_of_epoch, plan_epoch
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.load import check_model, check_same_vocabulary, load_model, without_padding
from prefuse.engine.report.log import say
from prefuse.engine.run.following import Following
from prefuse.engine.run.held_out import HeldOut, hold
from prefuse.engine.run.identity import checksums
from prefuse.engine.run.ranks import Ranks, share
from prefuse.engine.run.reference_logps import Logps, reference_logps
from prefuse.following import FollowingReference
from prefuse.losses.contract import Loss, is_batchwise, needs_of

Parts = list[list[list[int]]]  # of one step, by rank and microbatch: example indices


@dataclass(frozen=True)
class Share:
    """What this rank does of one optimizer step."""

    step: int
    batches: list[Batch]
    mismatches: list[Batch]  # for a loss that needs z0: one for each batch
    counts: list[bool]  # of each batch; False: run only because another rank has one more; its numbers are dropped
    rows: list[list[list[str]]]  # the names of the examples, by rank and microbatch
    metrics: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # {name: (2,)} of all ranks, to be logged


class Steps:
    """The optimizer steps of a run, of all its epochs; each is cut and shared among the ranks when it is asked for."""

    def __init__(self, examples: Examples, config: Config, ranks: Ranks, batchwise: bool = False):
        self.lengths, self.size, self.seed = examples.lengths, ranks.size, config.seed
        self.cut = (config.per_device_train_batch_size, config.gradient_accumulation_steps * ranks.size)
        self.bins = None
        # Where the loss looks at a microbatch as a whole, microbatches have a fixed number of examples.
        if examples.padding_free and config.z0_scope == "step" and not batchwise:
            self.bins = examples.bins(config.token_budget(config.per_device_train_batch_size, examples.sides))
        self.per_epoch = math.ceil(len(examples) / math.prod(self.cut))
        self.total = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * self.per_epoch)
        self.epochs = math.ceil(self.total / self.per_epoch)
        self._epoch = lru_cache(maxsize=1)(self._plan)

    def _plan(self, epoch: int) -> Epoch:
        return plan_epoch(self.lengths, *self.cut, self.seed, epoch, self.bins)

    def parts(self, step: int) -> Parts:
        epoch, index = divmod(step, self.per_epoch)
        return share(self._epoch(epoch)[index], self.lengths, self.size)

    def microbatches_of(self, rank: int, epoch: int) -> list[list[int]]:
        """Of all steps of an epoch that are planned, those that `rank` works on, in order."""
        start = epoch * self.per_epoch
        steps = range(start, min(start + self.per_epoch, self.total))
        return [indices for step in steps for indices in self.parts(step)[rank]]


@dataclass(frozen=True)
class TrainingSet:
    """The rows to train on in the order of each epoch, with what the reference says about them."""

    examples: Examples
    steps: Steps
    ranks: Ranks
    ref_logps: Logps | None = None  # of the rows of planned steps
    mismatches: list[Examples] | None = None  # for a loss that needs z0, by epoch
    mismatch_ref_logps: list[Logps] | None = None  # by epoch, of the rows of its planned steps
    reference: dict[str, int] | None = None  # checksums of a second model's tensors
    following: Following | None = None  # a reference that is asked about each batch anew

    @property
    def total_steps(self) -> int:
        return self.steps.total

    @property
    def steps_per_epoch(self) -> int:
        return self.steps.per_epoch

    def after_step(self) -> None:
        """After each update; other stories have something to do here."""

    def state(self) -> dict:
        """What a checkpoint keeps of it."""
        return {}

    def restore(self, state: dict) -> None:
        """What `state` gave."""

    def first_share(self) -> "Share | None":
        return next(self.steps_from(0))

    def steps_from(self, start: int) -> Iterator[Share]:
        """This rank's share of every optimizer step from `start` on."""
        for step in range(start, self.total_steps):
            parts = self.steps.parts(step)
            own, most = parts[self.ranks.rank], max(map(len, parts))
            counts = [number < len(own) for number in range(most)]
            own = own + next(part for part in parts if part)[:1] * (most - len(own))
            batches = [collate(self.examples, indices, self.ref_logps) for indices in own]
            mismatches = []
            if self.mismatches is not None:
                epoch = step // self.steps_per_epoch
                other, logps = self.mismatches[epoch], self.mismatch_ref_logps and self.mismatch_ref_logps[epoch]
                mismatches = [collate(other, indices, logps) for indices in own]
            rows = [[[self.examples.rows[i] for i in indices] for indices in part] for part in parts]
            yield Share(step, batches, mismatches, counts, rows)


def meet_reference(
    lm: LanguageModel, examples: Examples, held: Examples | None, loss: Loss, config: Config, ranks: Ranks
) -> tuple[TrainingSet, HeldOut | None]:
    """Plans the run, and computes all numbers of the reference that it needs. The reference is the initial model, or a
    second model, which is freed afterwards unless it follows the policy."""
    needs = needs_of(loss)
    has_reference, ref, second = "reference" in needs, lm, None
    if has_reference and (config.ref_model_name_or_path is not None or config.sync_ref_model):
        ref = load_model(config.ref_model_name_or_path or config.model_name_or_path, config, lm.device, ranks)
        check_model(ref, examples)
        if config.ref_model_name_or_path is not None:
            check_same_vocabulary(lm, ref, config)
            second = checksums(ref.model.state_dict(), ranks)
    examples = without_padding(examples, (lm,) if ref is lm else (lm, ref), config)
    held = held and dataclasses.replace(held, padding_free=examples.padding_free)
    steps = Steps(examples, config, ranks, is_batchwise(loss))
    mismatches = None
    if "z0" in needs:
        draws = [mismatches_of_epoch(examples.prompts, config.seed, epoch) for epoch in range(steps.epochs)]
        mismatches = [mismatched(examples, draw, config.max_length) for draw in draws]
    logps = mismatch_logps = following = None
    if has_reference and config.sync_ref_model:
        following = Following(ref, FollowingReference(config.ref_model_mixup_alpha, config.ref_model_sync_steps))
    elif has_reference:
        say(f"reference log-probabilities of {_planned(steps, len(examples))} examples ...")
        first = steps.microbatches_of(ranks.rank, 0)  # as the policy will meet them
        logps = reference_logps(ref, examples, first, config.reference_cache, ranks)
        mismatch_logps = mismatches and [
            reference_logps(ref, other, steps.microbatches_of(ranks.rank, epoch), config.reference_cache, ranks)
            for epoch, other in enumerate(mismatches)
        ]
    data = TrainingSet(examples, steps, ranks, logps, mismatches, mismatch_logps, second, following)
    return data, held and hold(held, ref if has_reference else None, loss, config, ranks)


def _planned(steps: Steps, count: int) -> int:
    """How many of the examples some step takes."""
    return min(count, steps.total * math.prod(steps.cut))
