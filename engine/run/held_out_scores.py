"""Held-out rows under a reward model: accuracy, scale, calibration, and how much it goes by length.

Every score of every held-out row is gathered, so that all of these are of the whole set, not means over batches.

E examples (pairs); their answers stand end to end, in the order of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from prefuse.engine.data.batches import collate
from prefuse.engine.data.ranked import Rankings
from prefuse.engine.data.steps import Solutions
from prefuse.engine.model.forward import LanguageModel, completion_states
from prefuse.engine.model.sharding import where_weights_are
from prefuse.engine.run.files import json_text, write_whole
from prefuse.engine.run.ranks import ALONE, Ranks
from prefuse.losses.rewards import RewardLoss, Scored
from prefuse.reward import RewardOutput, reward_loss
from prefuse.score_quality import expected_calibration_error, score_quality

if TYPE_CHECKING:
    from prefuse.engine.run.held_out import HeldOut


@torch.no_grad()
def evaluate_scores(
    lm: LanguageModel,
    held: HeldOut,
    loss: RewardLoss,
    ranks: Ranks = ALONE,
    between: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """loss, TRL's metrics and `score_quality` over all held-out rows; each rank takes some of the batches."""
    examples = held.examples
    ranked = isinstance(examples, Rankings)
    steps = isinstance(examples, Solutions)
    starts = examples.offsets if ranked or steps else np.arange(0, len(examples) + 1) * examples.sides
    scores = torch.zeros(int(starts[-1]), dtype=torch.float64)
    for number, counts in ranks.in_step(range(len(held.batches))[ranks.rank :: ranks.size], 0, always=True):
        between()
        indices = held.batches[number]
        found = _scores(lm, collate(examples, indices).to(lm.device)).double().cpu()
        if counts:
            own = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in indices])
            scores[torch.from_numpy(own)] = found
    scores = ranks.sum_(scores)
    if steps:
        labels = torch.from_numpy(examples.right)
        quality = {"ece": expected_calibration_error(torch.where(labels > 0.5, scores, -scores))}
        return _means(reward_loss(scores, loss, labels=labels)) | quality
    lengths = torch.from_numpy(examples.completions.lengths.astype(np.float64))
    places = torch.from_numpy(examples.ranks) if ranked else torch.arange(len(scores))  # less is better
    cu_groups = torch.from_numpy(starts)
    numbers = {} if ranked else {"weights": examples.weights, "margins": examples.margins}
    given = {name: torch.from_numpy(np.array(of_rows)) for name, of_rows in numbers.items() if of_rows is not None}
    out = reward_loss(scores, loss, cu_groups=cu_groups, ranks=places if ranked else None, **given)
    if held.scores_file is not None and ranks.main:
        write_scores(held.scores_file, examples.rows, scores.tolist(), examples.completions.lengths.tolist(), starts)
    pairs = pairs_by_rank(cu_groups, places)
    quality = score_quality(scores[pairs], lengths[pairs])
    return _means(out) | quality | {"std_reward": scores.std(correction=0).item()}


def _means(out: RewardOutput) -> dict[str, float]:
    return {"loss": out.loss.item()} | {name: (x[0] / x[1]).item() for name, x in out.metrics.items() if x[1]}


def pairs_by_rank(cu_groups: torch.Tensor, ranks: torch.Tensor) -> torch.Tensor:  # (E + 1,), (A,) -> (2 P,)
    """The answers of each better one with each worse one of its row, adjacent."""
    better = Scored(torch.zeros(len(ranks), dtype=torch.float64), cu_groups, ranks.double()).by_group().better
    groups, first, second = better.nonzero(as_tuple=True)
    return torch.stack([cu_groups[groups] + first, cu_groups[groups] + second], 1).flatten()


@where_weights_are
def _scores(lm: LanguageModel, batch) -> torch.Tensor:  # (S,)
    return lm.scores_of_states(completion_states(lm, batch))


def write_scores(path: Path, rows: list[str], scores: list[float], lengths: list[int], starts) -> None:
    """One line a row: its name, its answers' scores (chosen first) and their lengths in tokens."""
    lines = [
        json_text({"row": rows[i], "scores": scores[a:b], "lengths": lengths[a:b]})
        for i, (a, b) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True))
    ]
    write_whole(path, "".join(line + "\n" for line in lines))
