"""Losses of reward models: functions of the scores of answers, and of nothing else.

    s_i     the score of answer i, one number from the model
    G groups, each the answers to one prompt; a pair is a group of two, the better one first

A group says which of its answers is better: by its order, or by `ranks` (1 is best; answers of one rank are not
compared). Like the losses over log-probabilities they are frozen dataclasses, say what they are a mean over (`per`) and
what a call may bring; `prefuse.reward_loss` runs them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefuse.losses.contract import WITHOUT_REFERENCE, Defaults, check_smoothing, check_weight, smoothed


class Scored(NamedTuple):
    """What a loss of scores may look at."""

    scores: Tensor  # (S,) float64, with gradient
    cu_groups: Tensor  # (G + 1,) where the answers of each group stand among the S
    ranks: Tensor  # (S,) float64, less is better
    margins: Tensor | None = None  # (G,) float64: by how much the better answer of a pair is to be better
    labels: Tensor | None = None  # (S,) of steps: bool, or the share with which each is right

    @property
    def chosen(self) -> Tensor:  # (G,)
        return self.scores[0::2]

    @property
    def rejected(self) -> Tensor:  # (G,)
        return self.scores[1::2]

    def by_group(self) -> Groups:
        """The same with a row for each group, K the most answers that one has."""
        starts, sizes = self.cu_groups[:-1].long(), self.cu_groups.diff()
        width = int(sizes.max()) if len(sizes) else 0
        columns = torch.arange(width, device=self.scores.device)
        there = columns < sizes[:, None]  # (G, K)
        places = torch.where(there, starts[:, None] + columns, 0)
        ranks = self.ranks[places]
        better = there[:, :, None] & there[:, None] & (ranks[:, :, None] < ranks[:, None])
        return Groups(torch.where(there, self.scores[places], 0.0), there, better)


class Groups(NamedTuple):
    scores: Tensor  # (G, K) float64, 0 where there is no answer
    there: Tensor  # (G, K) bool
    better: Tensor  # (G, K, K) bool: [g, i, j] answer i of group g is better than its answer j

    @property
    def differences(self) -> Tensor:  # (G, K, K) s_i - s_j where i is better, else 0
        return torch.where(self.better, self.scores[:, :, None] - self.scores[:, None], 0.0)

    @property
    def pairs(self) -> Tensor:  # (G,) float64: how many
        return self.better.sum((1, 2)).double()


class RewardLoss(Defaults):
    """A loss whose numbers are scores."""

    reads: ClassVar[str] = "scores"
    needs: ClassVar[frozenset] = WITHOUT_REFERENCE
    takes: ClassVar[frozenset[str]] = frozenset()  # of "margins", "ranks", "labels": what a call may bring

    def losses(self, scored: Scored) -> Tensor:  # (items,)
        raise NotImplementedError


def check_center(coefficient: float | None) -> None:
    if coefficient is not None:
        check_weight("center_rewards_coefficient", coefficient)


@dataclass(frozen=True)
class BradleyTerry(RewardLoss):
    """Bradley and Terry 1952, as Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), eq. 1, has it for pairs.

        loss = -(1 - e) log sigmoid(d) - e log sigmoid(-d) + c (s_chosen + s_rejected)^2
        d    = s_chosen - s_rejected - margin

    `margins`, one for each pair, are those of Touvron et al. 2023 (Llama 2, arXiv 2307.09288), eq. 2.
    `center_rewards_coefficient` c keeps the scores around 0, which the difference alone leaves free (Eisenstein et al.
    2023, arXiv 2312.09244, eq. 4); TRL has it under this name. `label_smoothing` e is the probability that a preference
    is flipped.
    """

    center_rewards_coefficient: float | None = None
    label_smoothing: float = 0.0
    takes: ClassVar[frozenset[str]] = frozenset({"margins"})

    def __post_init__(self):
        check_center(self.center_rewards_coefficient)
        check_smoothing(self.label_smoothing)

    def losses(self, scored: Scored) -> Tensor:  # (G,)
        d = scored.chosen - scored.rejected
        d = d if scored.margins is None else d - scored.margins
        losses = smoothed(d, self.label_smoothing)
        if self.center_rewards_coefficient:
            losses = losses + self.center_rewards_coefficient * (scored.chosen + scored.rejected).square()
        return losses


@dataclass(frozen=True)
class PlackettLuce(RewardLoss):
    """The likelihood of a whole ranking, Plackett 1975; Rafailov et al. 2023 (arXiv 2305.18290), appendix A.3, eq. 18.

        loss = sum over i of (log(exp s_i + sum over j worse than i of exp s_j) - s_i)

    With two answers it is Bradley-Terry's. Answers of one rank do not compete with each other. As in `BradleyTerry`,
    `center_rewards_coefficient` weighs a squared sum: twice the mean of the group's scores.
    """

    center_rewards_coefficient: float | None = None
    per: ClassVar[str] = "group"
    takes: ClassVar[frozenset[str]] = frozenset({"ranks"})

    def __post_init__(self):
        check_center(self.center_rewards_coefficient)

    def losses(self, scored: Scored) -> Tensor:  # (G,)
        groups = scored.by_group()
        scores = groups.scores
        rivals = groups.better | torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
        exponents = scores[:, None].expand_as(rivals).masked_fill(~rivals, -math.inf)
        places = torch.logsumexp(exponents, -1) - scores  # (G, K); 0 where there is no answer
        return places.sum(1) + _center(self, groups)


@dataclass(frozen=True)
class AllPairs(RewardLoss):
    """Each answer against each that is worse, Ouyang et al. 2022 (InstructGPT, arXiv 2203.02155), eq. 1.

        loss = mean over i better than j of -(1 - e) log sigmoid(s_i - s_j) - e log sigmoid(s_j - s_i)

    The mean is over the pairs of one prompt, so a prompt with more answers does not count for more. A group whose
    answers all tie has the loss 0.
    """

    center_rewards_coefficient: float | None = None
    label_smoothing: float = 0.0
    per: ClassVar[str] = "group"
    takes: ClassVar[frozenset[str]] = frozenset({"ranks"})

    def __post_init__(self):
        check_center(self.center_rewards_coefficient)
        check_smoothing(self.label_smoothing)

    def losses(self, scored: Scored) -> Tensor:  # (G,)
        groups = scored.by_group()
        of_pairs = smoothed(groups.differences, self.label_smoothing)
        total = torch.where(groups.better, of_pairs, 0.0).sum((1, 2))
        return total / groups.pairs.clamp_min(1.0) + _center(self, groups)


def _center(loss: PlackettLuce | AllPairs, groups: Groups) -> Tensor | float:  # (G,)
    """c (2 mean of the group's scores)^2, which for a pair is c (s_chosen + s_rejected)^2."""
    if not loss.center_rewards_coefficient:
        return 0.0
    means = groups.scores.sum(1) / groups.there.sum(1).clamp_min(1)
    return loss.center_rewards_coefficient * (2 * means).square()


@dataclass(frozen=True)
class StepReward(RewardLoss):
    """Process supervision, Lightman et al. 2023 (arXiv 2305.20050), appendix E: is each step of a solution right?

        loss = -log sigmoid(s) for a right step, -log sigmoid(-s) for a wrong one
        loss = -y log sigmoid(s) - (1 - y) log sigmoid(-s) for one that is right with probability y

    `s` is the score at the token that ends the step; of a head with two labels, the difference of its two logits, so
    that this is their cross-entropy. A mean over steps, as TRL's PRM trainer has it. The second line is for the soft
    labels of Wang et al. 2024 (Math-Shepherd, arXiv 2312.08935), eq. 5.
    """

    per: ClassVar[str] = "token"
    takes: ClassVar[frozenset[str]] = frozenset({"labels"})

    def losses(self, scored: Scored) -> Tensor:  # (S,)
        if scored.labels.is_floating_point():
            y = scored.labels.double()
            return -y * logsigmoid(scored.scores) - (1 - y) * logsigmoid(-scored.scores)
        return -logsigmoid(torch.where(scored.labels, scored.scores, -scored.scores))


def reads_scores(loss: object) -> bool:
    """Whether a loss is one of scores, made by a head of one number, rather than of log-probabilities."""
    return getattr(loss, "reads", "logps") == "scores"
