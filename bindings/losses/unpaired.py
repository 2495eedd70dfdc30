"""Losses over single sequences: rows that are desirable or not, rows with a score, and plain demonstrations.

    r_s = log pi(y_s | x_s) - log pi_ref(y_s | x_s)      n_s its tokens

Numbers, shapes and the contract are those of `contract`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefuse.losses.contract import (
    WITHOUT_REFERENCE,
    Defaults,
    Need,
    Per,
    Sequences,
    check_beta,
    check_share,
)


@dataclass(frozen=True)
class KTO(Defaults):
    """Kahneman-Tversky Optimization, Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8.

        desirable:    loss = w_d (1 - sigmoid(x))
        undesirable:  loss = w_u (1 - sigmoid(-x))      x = beta (r - z0)

    z0 is the batch's estimate of KL(pi || pi_ref), from mismatched completions: see `kto_reference_point`. The paper
    advises w_d n_desirable / (w_u n_undesirable) in [1, 4/3]: see `kto_weights`.

    The paper's ablations (its section 4.3 and table 2):

    * `reference_point`: a constant in place of z0, for example 0; the call then takes no z0.
    * `value`: "logistic" is w (1 - sigmoid(+-x)), "concave" w (-log sigmoid(+-x)), "linear" (risk-neutral) w (-+x).
    * `reference_free`: r is log pi(y | x) alone. Give `kto_reference_point` no reference then, either.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    reference_point: float | None = None
    value: Literal["logistic", "concave", "linear"] = "logistic"
    reference_free: bool = False
    per: ClassVar[Per] = "sequence"

    def __post_init__(self):
        check_beta(self.beta)
        for name in ("desirable_weight", "undesirable_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        if self.reference_point is not None and not math.isfinite(self.reference_point):
            raise ValueError(
                f"reference_point must be finite, or None for the z0 of the call; got {self.reference_point}"
            )
        if self.value not in ("logistic", "concave", "linear"):
            raise ValueError(f'value must be "logistic", "concave" or "linear", got {self.value!r}')

    @property
    def needs(self) -> frozenset[Need]:
        needs = {"reference", "labels", "z0"}
        needs -= {"reference"} if self.reference_free else set()
        return frozenset(needs - {"z0"} if self.reference_point is not None else needs)

    def losses(self, seq: Sequences) -> Tensor:  # (S,)
        x = self.beta * (seq.ratios - (seq.z0 if self.reference_point is None else self.reference_point))
        return torch.where(
            seq.labels, self.desirable_weight * self.regret(x), self.undesirable_weight * self.regret(-x)
        )

    def regret(self, x: Tensor) -> Tensor:
        """The loss, before its weight, of a desirable completion that is x above the reference point."""
        if self.value == "concave":
            return -logsigmoid(x)
        if self.value == "linear":
            return -x
        return torch.sigmoid(-x)  # 1 - sigmoid(x), which would cancel

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.beta * seq.ratios


def kto_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """(desirable_weight, undesirable_weight) that meet the KTO paper's eq. 9 for these numbers of rows:

        w_d n_desirable / (w_u n_undesirable) in [1, 4/3]

    Both weights are 1 if that holds without them. Else the kind with too few rows gets the weight that reaches the
    nearer bound, and the other kind 1. Raises ValueError unless there are rows of both kinds.
    """
    if desirable < 1 or undesirable < 1:
        raise ValueError(f"expected rows of both kinds, got {desirable} desirable and {undesirable} undesirable ones")
    if desirable < undesirable:
        return undesirable / desirable, 1.0
    return 1.0, max(1.0, desirable / (4 / 3 * undesirable))


@dataclass(frozen=True)
class MOKTO(KTO):
    """KTO with MODPO's margin (arXiv 2310.03708): labels speak for one objective, scores for the others.

        x = (beta (r - z0) - margin) / weight      margin = sum over j != k of w_j s_j

    `margins` (S,) hold the weighted scores of the other objectives, best centred so that 0 is neither good nor bad;
    `objective_margins` makes them. All else is KTO's.
    """

    weight: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check_share("weight", self.weight)

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {"margins"}

    def losses(self, seq: Sequences) -> Tensor:  # (S,)
        # beta (r' - z0) = (beta (r - z0) - margin) / weight for this r'
        z0 = seq.z0 if self.reference_point is None else self.reference_point
        shifted = z0 + (self.beta * (seq.ratios - z0) - seq.margins) / (self.weight * self.beta)
        return super().losses(seq._replace(ratios=shifted))


@dataclass(frozen=True)
class UNA(Defaults):
    """Unified alignment, Wang et al. 2024 (UNA, arXiv 2408.15339): the implicit reward is fitted to the explicit one.

        "bce":  loss = -t log sigmoid(beta r) - (1 - t) log sigmoid(-beta r)
        "mse":  loss = (sigmoid(beta r) - t)^2

    t in [0, 1] is what is known of a completion. `feedback="labels"`: 1 or 0 by its label. "scores": its score, which
    the caller brings to [0, 1]. "pairs": 1 for the chosen and 0 for the rejected side, and the sum of both is a pair's.
    """

    beta: float = 0.1
    feedback: Literal["labels", "scores", "pairs"] = "labels"
    distance: Literal["bce", "mse"] = "bce"

    def __post_init__(self):
        check_beta(self.beta)
        if self.feedback not in ("labels", "scores", "pairs"):
            raise ValueError(f'feedback must be "labels", "scores" or "pairs", got {self.feedback!r}')
        if self.distance not in ("bce", "mse"):
            raise ValueError(f'distance must be "bce" or "mse", got {self.distance!r}')

    @property
    def per(self) -> Per:
        return "pair" if self.feedback == "pairs" else "sequence"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference"} | ({self.feedback} - {"pairs"}))

    def targets(self, seq: Sequences) -> Tensor:  # (S,)
        if self.feedback == "pairs":
            return 1 - torch.arange(len(seq.ratios), device=seq.ratios.device).double() % 2
        return seq.scores if self.feedback == "scores" else seq.labels.double()

    def losses(self, seq: Sequences) -> Tensor:  # (P,) for pairs, else (S,)
        x, t = self.beta * seq.ratios, self.targets(seq)
        if self.distance == "bce":
            losses = -t * logsigmoid(x) - (1 - t) * logsigmoid(-x)
        else:
            losses = (torch.sigmoid(x) - t).square()
        return losses[0::2] + losses[1::2] if self.feedback == "pairs" else losses

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.beta * seq.ratios


@dataclass(frozen=True)
class SFT(Defaults):
    """Supervised fine-tuning: the negative log-likelihood of the completion, a mean over tokens.

    loss = -log pi(y | x)
    """

    per: ClassVar[Per] = "token"
    needs: ClassVar[frozenset[Need]] = WITHOUT_REFERENCE

    def losses(self, seq: Sequences) -> Tensor:  # (S,)
        return -seq.ratios

    def rewards(self, seq: Sequences) -> Tensor:  # (S,) there is no preference, so no reward
        return torch.zeros_like(seq.ratios)


@dataclass(frozen=True)
class ConditionalSFT(SFT):
    """SFT on good and bad rows alike, each behind a control token, Korbak et al. 2023 (arXiv 2302.08582); CSFT.

        loss = -log pi(y | c, x)      c says whether y is desirable

    The control tokens stand in the prompt: `prefuse.tokens.with_control` puts them there by the row's label, and
    generation asks for the good one. Labels are needed for the metrics of each kind alone.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"labels"})
