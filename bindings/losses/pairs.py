"""Losses of a pair and its reference: DPO, IPO, and what TRL's DPOTrainer calls `loss_type` beside them.

    x = beta (r_chosen - r_rejected)      r_s = log pi(y_s | x_s) - log pi_ref(y_s | x_s), n_s its tokens

Numbers, shapes and the contract are those of `contract`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefuse.losses.contract import Defaults, Sequences, check_beta, check_smoothing, smoothed


@dataclass(frozen=True)
class PairLoss(Defaults):
    """What most losses over pairs share: their strength, their margin, and the reward they log."""

    beta: float = 0.1

    def __post_init__(self):
        check_beta(self.beta)

    def margin(self, seq: Sequences) -> Tensor:  # (P,)
        return self.beta * (seq.chosen - seq.rejected)

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.beta * seq.ratios


# ---- functions of the margin ---------------------------------------------------------------------


@dataclass(frozen=True)
class DPO(PairLoss):
    """Direct Preference Optimization, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; with smoothing, cDPO.

        loss = -(1 - e) log sigmoid(beta (r_chosen - r_rejected)) - e log sigmoid(-beta (r_chosen - r_rejected))

    `label_smoothing` e is the probability that a preference label is flipped (Mitchell 2023, "A note on DPO with noisy
    preferences"); 0 is the paper's loss.
    """

    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_smoothing(self.label_smoothing)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        return smoothed(self.margin(seq), self.label_smoothing)


@dataclass(frozen=True)
class IPO(PairLoss):
    """Identity Preference Optimization, Azar et al. 2023 (arXiv 2310.12036), eq. 17, with tau = beta.

        loss = (h_chosen - h_rejected - 1 / (2 beta))^2      h = r / n  (average), or h = r

    `average=True`, the per-token mean, is what its authors advise and TRL uses; `average=False` is the paper's sum.
    """

    average: bool = True

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        h = seq.ratios / seq.lengths if self.average else seq.ratios
        return (h[0::2] - h[1::2] - 1 / (2 * self.beta)).square()


@dataclass(frozen=True)
class DPONorm(PairLoss):
    """DPO of log-ratios per token, Lambert et al. 2024 (Tülu 3, arXiv 2411.15124); TRL's "sigmoid_norm".

        loss = -log sigmoid(beta (r_chosen / n_chosen - r_rejected / n_rejected))

    A mean per token is small where a sum is large: the paper's beta is 5.
    """

    beta: float = 5.0

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        h = seq.ratios / seq.lengths
        return -logsigmoid(self.beta * (h[0::2] - h[1::2]))


@dataclass(frozen=True)
class Hinge(PairLoss):
    """Hinge loss on log-ratios, Liu et al. 2023 (RSO, arXiv 2309.06657), "hinge-norm"; TRL's "hinge".

        loss = max(0, 1 - x)

    For the hinge without a reference see `SLiC`.
    """

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        return torch.relu(1 - self.margin(seq))


@dataclass(frozen=True)
class RobustDPO(PairLoss):
    """DPO corrected for flipped labels, Chowdhury et al. 2024 (rDPO, arXiv 2403.00409); TRL's "robust".

        loss = (-(1 - e) log sigmoid(x) + e log sigmoid(-x)) / (1 - 2e)

    If a share e of the labels is flipped, its mean is what DPO's would be with the right ones. It has no lower bound.
    """

    label_smoothing: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        check_smoothing(self.label_smoothing)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        x, e = self.margin(seq), self.label_smoothing
        return (-(1 - e) * logsigmoid(x) + e * logsigmoid(-x)) / (1 - 2 * e)


@dataclass(frozen=True)
class EXO(PairLoss):
    """Efficient Exact Optimization for pairs, Ji et al. 2024 (arXiv 2402.00856), eq. 16; TRL's "exo_pair".

        loss = KL(p || q)      p = (sigmoid(x), sigmoid(-x)),  q = (1 - e, e)

    The divergence runs from the policy to the smoothed labels, the other way round than in DPO.
    """

    label_smoothing: float = 1e-3

    def __post_init__(self):
        super().__post_init__()
        check_smoothing(self.label_smoothing, above_zero=True)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        x, e = self.margin(seq), self.label_smoothing
        first = torch.sigmoid(x) * (logsigmoid(x) - math.log1p(-e))
        return first + torch.sigmoid(-x) * (logsigmoid(-x) - math.log(e))


@dataclass(frozen=True)
class DiscoPOP(PairLoss):
    """Discovered Preference Optimization, Lu et al. 2024 (arXiv 2406.08414), the log-ratio modulated loss.

    loss = -(1 - m) log sigmoid(x) + m exp(-x)      m = sigmoid(x / tau)
    """

    tau: float = 0.05

    def __post_init__(self):
        super().__post_init__()
        if not self.tau > 0:
            raise ValueError(f"tau must be > 0, got {self.tau}")

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        x = self.margin(seq)
        # m exp(-x) as one exponential: far below 0 it is 0 times infinity
        return -torch.sigmoid(-x / self.tau) * logsigmoid(x) + torch.exp(logsigmoid(x / self.tau) - x)


@dataclass(frozen=True)
class AOT(PairLoss):
    """Alignment via Optimal Transport, Melnyk et al. 2024 (arXiv 2406.05882); TRL's "aot" and "aot_unpaired".

        paired:    d = sort(log pi(chosen) - log pi(rejected)) - sort(the same of pi_ref)
        unpaired:  d = sort(r_chosen) - sort(r_rejected)
        loss = -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)

    Distributions are compared, not pairs, so the sorting is over all pairs of a call, and how a step is cut into
    microbatches changes it. `losses` are in the order of the sorting.
    """

    label_smoothing: float = 0.0
    paired: bool = True
    batchwise: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        check_smoothing(self.label_smoothing)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        # AOT asks whether the first distribution lies above the second, quantile by quantile.
        above, below = seq.chosen, seq.rejected
        if self.paired:
            ref_logps = (seq.logps - seq.ratios).detach()
            above, below = seq.logps[0::2] - seq.logps[1::2], ref_logps[0::2] - ref_logps[1::2]
        return smoothed(self.beta * (above.sort().values - below.sort().values), self.label_smoothing)


# ---- each side by itself -------------------------------------------------------------------------


@dataclass(frozen=True)
class NCA(PairLoss):
    """Noise Contrastive Alignment for pairs, Chen et al. 2024 (arXiv 2402.05369); TRL's "nca_pair".

        loss = -log sigmoid(beta r_chosen) - 1/2 log sigmoid(-beta r_chosen) - 1/2 log sigmoid(-beta r_rejected)

    Each reward is held near 0, where DPO lets both sink.
    """

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        chosen, rejected = self.beta * seq.chosen, self.beta * seq.rejected
        return -logsigmoid(chosen) - 0.5 * logsigmoid(-chosen) - 0.5 * logsigmoid(-rejected)


@dataclass(frozen=True)
class BCO(PairLoss):
    """Binary Classifier Optimization for pairs, Jung et al. 2024 (arXiv 2404.04656); TRL's "bco_pair".

        loss = -log sigmoid(beta r_chosen - shift) - log sigmoid(-(beta r_rejected - shift))

    `shift` is the paper's delta, the mean reward of both sides, which the caller keeps; TRL and Liger have 0.
    """

    shift: float = 0.0

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        return -logsigmoid(self.beta * seq.chosen - self.shift) - logsigmoid(self.shift - self.beta * seq.rejected)


@dataclass(frozen=True)
class SPPO(PairLoss):
    """Self-Play Preference Optimization with hard labels, Wu et al. 2024 (arXiv 2405.00675); TRL's "sppo_hard".

        loss = (r_chosen - 1 / (2 beta))^2 + (r_rejected + 1 / (2 beta))^2

    The paper's eq. 4.7 with the winner's probability 1 and the loser's 0; its eta is 1 / beta.
    """

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        half = 1 / (2 * self.beta)
        return (seq.chosen - half).square() + (seq.rejected + half).square()


@dataclass(frozen=True)
class APO(PairLoss):
    """Anchored Preference Optimization, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7 and 8, both plus 1.

        zero:  loss = 1 - sigmoid(beta r_chosen) + sigmoid(beta r_rejected)
        down:  loss = sigmoid(beta r_chosen) + 1 - sigmoid(x)

    `anchor="zero"` raises the chosen and lowers the rejected: for chosen completions better than the policy's own.
    "down" lowers both, the rejected more: for chosen completions that are worse. TRL's "apo_zero" and "apo_down".
    """

    anchor: Literal["zero", "down"] = "zero"

    def __post_init__(self):
        super().__post_init__()
        if self.anchor not in ("zero", "down"):
            raise ValueError(f'anchor must be "zero" or "down", got {self.anchor!r}')

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        chosen, rejected = self.beta * seq.chosen, self.beta * seq.rejected
        # 1 - sigmoid(x) = sigmoid(-x), which does not cancel
        if self.anchor == "zero":
            return torch.sigmoid(-chosen) + torch.sigmoid(rejected)
        return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)
