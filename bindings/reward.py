"""From the scores of answers to the loss of a reward model, and its metrics under TRL's names.

S answers in G groups, cut by cu_groups (G + 1,); pairs (0, 1), (2, 3), ... unless groups are given.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prefuse.loss_inputs import check_devices
from prefuse.losses.rewards import BradleyTerry, RewardLoss, Scored, reads_scores


@dataclass(frozen=True)
class RewardOutput:
    """What a loss of scores gives back; everything but `loss` is detached."""

    loss: Tensor  # () float32, the one differentiable field: sum of `losses` / num_items
    losses: Tensor  # (G,), or (S,) for a loss per step, float32
    rewards: Tensor  # (S,) float32, the scores
    metrics: dict[str, Tensor]  # {TRL's name: (2,) [sum, count]}, to be added up and given to `reduce_metrics`


def reward_loss(
    scores: Tensor,  # (S,)
    loss: RewardLoss = BradleyTerry(),  # noqa: B008 (frozen)
    *,
    cu_groups: Tensor | None = None,  # (G + 1,)
    ranks: Tensor | None = None,  # (S,)
    margins: Tensor | None = None,  # (G,)
    labels: Tensor | None = None,  # (S,)
    weights: Tensor | None = None,  # (G,) or (S,)
    num_items: int | Tensor | None = None,
) -> RewardOutput:
    """Equals, for `BradleyTerry` with pairs (0, 1), (2, 3), ...::

        loss = -torch.nn.functional.logsigmoid(scores[0::2] - scores[1::2]).mean()

    Args:
        scores: (S,) floating point, one number for each answer (for `StepReward` each step); carries the gradient.
        loss: `BradleyTerry`, `PlackettLuce`, `AllPairs` or `StepReward`; equation and paper stand in its docstring.
        cu_groups: (G + 1,) integers, rising from 0 to S: the answers of one prompt. Default: pairs.
        ranks: (S,) less is better, within each group. Default: the order in which the answers stand.
        margins: (G,) floating point, for `BradleyTerry`.
        labels: (S,) bool, whether each step is right, or floating point, with what share it is, for `StepReward`.
        weights: what the loss of each item is multiplied by; the divisor stays the number of items.
        num_items: what the sum is divided by. Default: the items of this call (groups, or steps).

    Computed in float64. The metrics of pairs and groups are TRL's: accuracy (of groups, over their pairs of unequal
    rank; a tie of scores is wrong), margin, and min_reward, mean_reward, max_reward (the least and largest score of a
    call count once).

    Raises:
        TypeError, ValueError: what is no loss of scores, shapes that do not fit, or inputs that the loss does not take.
    """
    if isinstance(loss, type) or not reads_scores(loss):
        raise TypeError(f"loss must be one of scores, such as prefuse.BradleyTerry(), got {loss!r}")
    if scores.dim() != 1 or not scores.is_floating_point():
        raise ValueError(f"expected scores (S,), floating point, got {tuple(scores.shape)} of {scores.dtype}")
    _check_inputs(loss, len(scores), {"ranks": ranks, "margins": margins, "labels": labels}, cu_groups)
    given = {"ranks": ranks, "margins": margins, "labels": labels, "weights": weights, "cu_groups": cu_groups}
    check_devices(scores, given)
    if loss.per == "token":
        cu_groups = torch.arange(len(scores) + 1, device=scores.device)
    elif cu_groups is None:
        cu_groups = torch.arange(0, len(scores) + 1, 2, device=scores.device)
    items = len(cu_groups) - 1
    for name, x in ("margins", margins), ("weights", weights):
        if x is not None and x.shape != (items,):
            raise ValueError(f"expected {name} ({items},), one for each item, got {tuple(x.shape)}")
    if isinstance(num_items, int) and num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}")
    order = torch.arange(len(scores), device=scores.device) if ranks is None else ranks.detach()
    margins = None if margins is None else margins.detach().double()
    scored = Scored(scores.double(), cu_groups, order.double(), margins, labels)
    losses = loss.losses(scored)
    losses = losses if weights is None else losses * weights.detach().double()
    total = (losses.sum() / (max(items, 1) if num_items is None else num_items)).float()
    with torch.no_grad():
        metrics = _step_metrics(scored) if loss.per == "token" else _metrics(scored)
    return RewardOutput(total, losses.detach().float(), scores.detach().float(), metrics)


HOWS = ("min", "product", "last")


def combine_steps(scores: Tensor, cu_steps: Tensor, how: str = "min") -> Tensor:  # (M,), (S + 1,) -> (S,) float64
    """One number for each solution from the scores of its steps, Lightman et al. 2023 (arXiv 2305.20050), section 3.

        min:     the probability that the weakest step is right      product: that all are, step by step
        last:    that of the last step, as an outcome reward model has it

    A step is right with probability sigmoid(score). `cu_steps` says where the steps of each solution stand. Raises
    ValueError for another `how`, and for a solution without steps.
    """
    if how not in HOWS:
        raise ValueError(f"how must be one of {', '.join(HOWS)}, got {how!r}")
    if int(cu_steps[-1]) != len(scores) or bool((cu_steps.diff() < 1).any()):
        raise ValueError(f"cu_steps must cut the {len(scores)} scores into solutions of at least one step")
    logs = torch.nn.functional.logsigmoid(scores.double())
    if how == "last":
        return logs[cu_steps[1:].long() - 1].exp()
    reduce = "min" if how == "min" else "sum"
    return torch.segment_reduce(logs, reduce, offsets=cu_steps.long(), unsafe=True).exp()


def _check_inputs(loss: RewardLoss, count: int, given: dict[str, Tensor | None], cu_groups: Tensor | None) -> None:
    name = type(loss).__name__
    for what, x in given.items():
        if x is not None and what not in loss.takes:
            raise ValueError(f"{name} takes no {what}: leave it out, or give another loss")
        if x is not None and what != "margins" and x.shape != (count,):
            raise ValueError(f"expected {what} ({count},), one for each score, got {tuple(x.shape)}")
    if "labels" in loss.takes:
        _check_step_labels(name, given["labels"])
    if cu_groups is None and loss.per != "token" and count % 2:
        raise ValueError(f"{name} takes pairs unless cu_groups is given, got an odd number of scores: {count}")
    if cu_groups is None:
        return
    if loss.per == "token":
        raise ValueError(f"{name} takes no cu_groups: every step counts by itself")
    if cu_groups.dim() != 1 or cu_groups.is_floating_point() or len(cu_groups) == 0:
        raise ValueError("cu_groups must be integers (G + 1,), beginning with 0")
    sizes = cu_groups.diff()
    if int(cu_groups[0]) != 0 or int(cu_groups[-1]) != count or bool((sizes < 0).any()):
        raise ValueError(f"cu_groups must rise from 0 to S = {count}, got {cu_groups.tolist()[:8]} ...")
    if loss.per == "pair" and bool((sizes != 2).any()):
        raise ValueError(f"{name} takes pairs, got groups of {sorted(set(sizes.tolist()))} answers")


def _check_step_labels(name: str, labels: Tensor | None) -> None:
    if labels is None or not (labels.dtype == torch.bool or labels.is_floating_point()):
        raise ValueError(f"{name} needs labels (S,): bool, whether each step is right, or its share from 0 to 1")
    if labels.is_floating_point() and not bool(((labels >= 0) & (labels <= 1)).all()):
        raise ValueError(f"{name} needs labels from 0 to 1, got {labels.min().item():.4g} to {labels.max().item():.4g}")


def _metrics(scored: Scored) -> dict[str, Tensor]:
    """TRL's names -> [sum, count]."""
    scores, groups = scored.scores, scored.by_group()
    differences, pairs = groups.differences, groups.pairs
    of_groups = lambda x: (x.sum((1, 2)) / pairs.clamp_min(1.0)).sum()  # noqa: E731
    compared = (pairs > 0).double().sum()
    metrics = {
        "accuracy": torch.stack([of_groups((differences > 0).double()), compared]),
        "margin": torch.stack([of_groups(differences), compared]),
        "mean_reward": torch.stack([scores.sum(), scores.new_tensor(len(scores))]),
    }
    if len(scores):
        metrics |= {
            "min_reward": torch.stack([scores.min(), scores.new_tensor(1)]),
            "max_reward": torch.stack([scores.max(), scores.new_tensor(1)]),
        }
    return metrics


def _step_metrics(scored: Scored) -> dict[str, Tensor]:
    """Of steps: how many are told right from wrong, and the probability that they are given of being right."""
    right = (scored.scores > 0) == (scored.labels > 0.5)
    count = scored.scores.new_tensor(len(scored.scores))
    return {
        "accuracy": torch.stack([right.double().sum(), count]),
        "mean_reward": torch.stack([torch.sigmoid(scored.scores).sum(), count]),
        "labels/right": torch.stack([scored.labels.double().sum(), count]),
    }
