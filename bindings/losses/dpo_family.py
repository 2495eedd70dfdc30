"""DPO with another divergence, another measure of length, a margin from scores, or a strength that follows the batch.

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

from prefuse.losses.contract import (
    EXPONENT,
    Need,
    Sequences,
    capped_exp,
    check_share,
    check_smoothing,
    check_weight,
    smoothed,
)
from prefuse.losses.pairs import PairLoss

Divergence = Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


@dataclass(frozen=True)
class FDPO(PairLoss):
    """DPO under an f-divergence from the reference, Wang et al. 2023 (f-DPO, arXiv 2309.16240), eq. 8.

        loss = -log sigmoid(beta (f'(u_chosen) - f'(u_rejected)))      u = exp(r) = pi / pi_ref

        reverse_kl        f'(u) = log u                            this is DPO
        forward_kl        f'(u) = 1 - 1 / u
        js_divergence     f'(u) = log(2 u / (1 + u))
        alpha_divergence  f'(u) = (u^(alpha - 1) - 1) / (alpha - 1)    towards reverse_kl at 1, forward_kl at 0

    alpha is `f_alpha_divergence_coef`; names and formulas are TRL's. An exponential above e^80 is held there.
    Smoothing is cDPO's.
    """

    f_divergence_type: Divergence = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_smoothing(self.label_smoothing)
        if self.f_divergence_type not in DIVERGENCES:
            known = ", ".join(DIVERGENCES)
            raise ValueError(f"f_divergence_type must be one of {known}, got {self.f_divergence_type!r}")
        if not math.isfinite(self.f_alpha_divergence_coef):
            raise ValueError(f"f_alpha_divergence_coef must be finite, got {self.f_alpha_divergence_coef}")

    def derivative(self, ratios: Tensor) -> Tensor:
        """f'(exp(r))"""
        if self.f_divergence_type == "forward_kl":
            return 1 - capped_exp(-ratios)
        if self.f_divergence_type == "js_divergence":
            return math.log(2) + logsigmoid(ratios)
        order = self.f_alpha_divergence_coef - 1
        if self.f_divergence_type == "alpha_divergence" and order != 0:
            return torch.expm1((order * ratios).clamp(max=EXPONENT)) / order
        return ratios

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        score = self.derivative(seq.ratios)
        return smoothed(self.beta * (score[0::2] - score[1::2]), self.label_smoothing)


@dataclass(frozen=True)
class LDDPO(PairLoss):
    """Length-desensitized DPO, Liu et al. 2024 (LD-DPO, arXiv 2409.06411), eq. 9; TRL's `ld_alpha`.

        loss = -log sigmoid(beta (r'_chosen - r'_rejected))
        r' = sum over t <= l of rho_t + ld_alpha (sum over t > l of rho_t)      l = min(n_chosen, n_rejected)

    rho_t is a token's log-ratio. What the longer completion has beyond the length of the shorter one counts `ld_alpha`:
    1 is DPO, 0 leaves it out. Needs `ref_logps` token by token.
    """

    ld_alpha: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_smoothing(self.label_smoothing)
        if not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1], got {self.ld_alpha}")

    def shortened(self, seq: Sequences) -> Tensor:  # (S,) r'
        tokens = seq.tokens
        counts = tokens.sums(tokens.counted)
        shared = torch.minimum(counts[0::2], counts[1::2]).repeat_interleave(2)
        weights = torch.where(tokens.positions < shared[tokens.owners], 1.0, self.ld_alpha)
        return tokens.sums(weights * tokens.ratios)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        r = self.shortened(seq)
        return smoothed(self.beta * (r[0::2] - r[1::2]), self.label_smoothing)

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.beta * self.shortened(seq)


@dataclass(frozen=True)
class BetaDPO(PairLoss):
    """DPO whose strength follows the quality of the batch, Wu et al. 2024 (beta-DPO, arXiv 2407.08639), eq. 7.

        loss = -log sigmoid(b (r_chosen - r_rejected))
        b = beta (1 + alpha (mean over the batch of x - baseline))      without gradient, at least beta / 100

    `baseline` is the paper's M_0, which the caller keeps: `after(mean margin)` moves it by the paper's momentum. With
    `level="pair"` each pair has a strength of its own, from its own margin.
    """

    alpha: float = 0.6
    baseline: float = 0.0
    level: Literal["batch", "pair"] = "batch"

    def __post_init__(self):
        super().__post_init__()
        check_weight("alpha", self.alpha)
        if self.level not in ("batch", "pair"):
            raise ValueError(f'level must be "batch" or "pair", got {self.level!r}')

    @property
    def batchwise(self) -> bool:
        return self.level == "batch"

    def strength(self, seq: Sequences) -> Tensor:  # () or (P,)
        x = self.margin(seq).detach()
        quality = x.mean() if self.level == "batch" and len(x) else x
        return (self.beta * (1 + self.alpha * (quality - self.baseline))).clamp(min=self.beta / 100)

    def after(self, mean_margin: float, momentum: float = 0.9) -> BetaDPO:
        """The loss of the next step, its baseline moved towards the mean of `rewards/margins`."""
        baseline = momentum * self.baseline + (1 - momentum) * mean_margin
        return BetaDPO(self.beta, self.alpha, baseline, self.level)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        return -logsigmoid(self.strength(seq) * (seq.chosen - seq.rejected))


@dataclass(frozen=True)
class ODPO(PairLoss):
    """DPO with an offset, Amini et al. 2024 (ODPO, arXiv 2402.10571), eq. 8: how much better, not only which.

        loss = -log sigmoid(x - scale margin)

    `margins` (P,) say by how much the chosen side should win: a difference of scores, a rating's step (as the margin
    of Llama 2's reward model, arXiv 2307.09288, eq. 2), or a logarithm of it, as in the paper. Smoothing is cDPO's.
    """

    scale: float = 1.0
    label_smoothing: float = 0.0
    needs: ClassVar[frozenset[Need]] = frozenset({"reference", "margins"})

    def __post_init__(self):
        super().__post_init__()
        check_smoothing(self.label_smoothing)
        check_weight("scale", self.scale)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        return smoothed(self.margin(seq) - self.scale * seq.margins, self.label_smoothing)


@dataclass(frozen=True)
class MODPO(PairLoss):
    """Multi-objective DPO, Zhou et al. 2023 (MODPO, arXiv 2310.03708), eq. 9.

        loss = -log sigmoid((x - margin) / weight)      margin = sum over j != k of w_j (s_j(chosen) - s_j(rejected))

    Pairs are of objective k, whose weight is `weight`; the others speak by their scores s_j, in `margins` (P,), which
    `objective_margins` makes.
    """

    weight: float = 0.5
    needs: ClassVar[frozenset[Need]] = frozenset({"reference", "margins"})

    def __post_init__(self):
        super().__post_init__()
        check_share("weight", self.weight)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        return -logsigmoid((self.margin(seq) - seq.margins) / self.weight)
