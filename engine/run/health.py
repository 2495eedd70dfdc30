"""Whether a run has blown up: weights, losses and evaluations that are no numbers, or absurd.

A blown-up run writes no model, keeps its last good checkpoint, and ends with an error that names it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from prefuse.engine.errors import Diverged, OtherRankFailed, UserError
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.sharding import where_weights_are
from prefuse.engine.run.ranks import ALONE, Ranks
from prefuse.models.probes import probe_ids
from prefuse.models.trunk import trunk_hidden

if TYPE_CHECKING:
    from prefuse.engine.run.setup import Run

EXPLODED = 1e4  # times the largest weight at the start, or 1


@torch.no_grad()
def largest_weight(lm: LanguageModel, ranks: Ranks = ALONE) -> float:
    """The largest absolute value among the trained weights; infinity if one is no number."""
    largest = 0.0
    for p in lm.model.parameters():
        if p.requires_grad and p.numel():
            local = p.to_local() if hasattr(p, "to_local") else p
            if local.numel():
                value = local.abs().amax().item()
                largest = max(largest, value if math.isfinite(value) else math.inf)
    return ranks.gather(torch.tensor([largest], dtype=torch.float64)).max().item()


def fault_of_weights(run: Run) -> str | None:
    """Why the weights as they are must not become a checkpoint or a model."""
    largest = largest_weight(run.lm, run.ranks)
    if not math.isfinite(largest):
        return "the weights are not finite"
    if largest > EXPLODED * max(1.0, run.largest):
        return f"the largest weight is {largest:.3g}, where it was {run.largest:.3g} at the start"
    return None


def check_evaluation(step: int, means: dict[str, float]) -> None:
    """The means of the held-out rows, without a prefix."""
    wrong = [name for name in ("loss", "kl_to_ref") if not math.isfinite(means.get(name, 0.0))]
    if wrong:
        raise Diverged(f"held-out {wrong[0]} is {means[wrong[0]]} after step {step}")


def check_end(run: Run, step: int, evaluated: bool) -> None:
    """Before the model is published. `evaluated`: held-out rows have just been found sound."""
    if run.guards.skipped and run.guards.first_loss is None:
        raise Diverged(
            f"none of {step} steps made an update, since no loss or gradient was finite: the weights are those "
            "that the run began with"
        )
    fault = fault_of_weights(run)
    if fault is None and not evaluated:
        fault = _fault_of_states(run)
    if fault is not None:
        raise Diverged(f"{fault} after step {step}")


@torch.no_grad()
def _fault_of_states(run: Run) -> str | None:
    """Of a few tokens, by the weights as they are after the last update."""
    with run.lm.autocast():
        states = where_weights_are(lambda lm: trunk_hidden(lm.model, probe_ids(lm.model)[None]))(run.lm)
    finite = bool(states.isfinite().all())
    return "the hidden states of a few tokens are not finite" if run.ranks.any(not finite) else None


def say_what_is_left(run: Run, error: Diverged) -> UserError:
    """The error with what is good and what to do, said by one rank."""
    run.checkpoints.diverged(run.folder)
    if not run.ranks.main:
        return OtherRankFailed(str(error))
    good = run.checkpoints.good
    where = run.config.model_name_or_path
    left = "there is no good checkpoint"
    if good is not None:
        where = str(run.folder / f"checkpoint-{good}")
        left = f"the last good checkpoint is {where}"
    return UserError(
        f"the run has diverged: {error}. No model was written; {left}. Start a new run from {where} "
        "(model_name_or_path) in another output_dir with a lower learning_rate, or look at the rows named above"
    )
