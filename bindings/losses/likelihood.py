"""Losses of a pair's own likelihoods: without a reference, or with an SFT term; and mixtures of any losses of pairs.

    log pi(y | x) a sum over the n tokens of a completion; m = log pi(y | x) / n its mean

Numbers, shapes and the contract are those of `contract`. An SFT term here is the chosen completion's, pair by pair, so
that a loss does not depend on which pairs share a batch; `ChosenNLL(mean_length)` makes it a mean over tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefuse.losses.contract import (
    WITHOUT_REFERENCE,
    Defaults,
    Loss,
    Need,
    Sequences,
    check_beta,
    check_smoothing,
    check_weight,
    is_batchwise,
    needs_of,
    smoothed,
)


def token_means(seq: Sequences) -> Tensor:  # (S,)
    return seq.logps / seq.lengths


@dataclass(frozen=True)
class SimPO(Defaults):
    """Simple Preference Optimization, Meng et al. 2024 (arXiv 2405.14734), eq. 6; with smoothing as in cDPO.

        loss = -log sigmoid(x)      x = beta (m_chosen - m_rejected) - gamma

    Means per token, so beta is larger than elsewhere; the paper advises gamma / beta near 0.5.
    """

    beta: float = 2.0
    gamma: float = 1.0
    label_smoothing: float = 0.0
    needs: ClassVar[frozenset[Need]] = WITHOUT_REFERENCE

    def __post_init__(self):
        check_beta(self.beta)
        check_smoothing(self.label_smoothing)
        if not math.isfinite(self.gamma):
            raise ValueError(f"gamma must be finite, got {self.gamma}")

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        m = token_means(seq)
        return smoothed(self.beta * (m[0::2] - m[1::2]) - self.gamma, self.label_smoothing)

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.beta * token_means(seq)


@dataclass(frozen=True)
class CPO(Defaults):
    """Contrastive Preference Optimization, Xu et al. 2024 (arXiv 2401.08417), eq. 3 and its NLL term.

        loss = -log sigmoid(beta (log pi(chosen) - log pi(rejected))) + nll_weight NLL      NLL = -m_chosen

    `average_nll=True`, the mean per token, is what its authors' code and TRL use; False is the paper's sum.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    nll_weight: float = 1.0
    average_nll: bool = True
    needs: ClassVar[frozenset[Need]] = WITHOUT_REFERENCE

    def __post_init__(self):
        check_beta(self.beta)
        check_smoothing(self.label_smoothing)
        check_weight("nll_weight", self.nll_weight)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        nll = -(token_means(seq) if self.average_nll else seq.logps)[0::2]
        x = self.beta * (seq.logps[0::2] - seq.logps[1::2])
        return smoothed(x, self.label_smoothing) + self.nll_weight * nll

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.beta * seq.logps


@dataclass(frozen=True)
class ORPO(Defaults):
    """Odds Ratio Preference Optimization, Hong et al. 2024 (arXiv 2403.07691), eq. 6 and 7; beta is its lambda.

        loss = nll_weight NLL - beta log sigmoid(log odds(chosen) - log odds(rejected))

    with odds(y) = P / (1 - P), P = exp(m) the mean probability of a token and NLL = -m_chosen. An empty completion
    counts as one that is certain.
    """

    beta: float = 0.1
    nll_weight: float = 1.0
    needs: ClassVar[frozenset[Need]] = WITHOUT_REFERENCE

    def __post_init__(self):
        check_beta(self.beta)
        check_weight("nll_weight", self.nll_weight)

    @staticmethod
    def log_odds(m: Tensor) -> Tensor:
        """log(P / (1 - P)) of m = log P. Finite: m is taken as -1.2e-38, the smallest float32, if it is nearer to 0."""
        m = m.clamp(max=-torch.finfo(torch.float32).tiny)
        return m - torch.log(-torch.expm1(m))

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        m = token_means(seq)
        odds = self.log_odds(m)
        return -self.nll_weight * m[0::2] - self.beta * logsigmoid(odds[0::2] - odds[1::2])

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.beta * token_means(seq)


@dataclass(frozen=True)
class SLiC(Defaults):
    """Sequence Likelihood Calibration, Zhao et al. 2023 (SLiC-HF, arXiv 2305.10425), with the chosen as SFT target.

        loss = max(0, delta - log pi(chosen) + log pi(rejected)) - nll_weight log pi(chosen)

    Sums, as in the paper. For the hinge on log-ratios see `Hinge`.
    """

    delta: float = 1.0
    nll_weight: float = 0.1
    needs: ClassVar[frozenset[Need]] = WITHOUT_REFERENCE

    def __post_init__(self):
        check_weight("delta", self.delta)
        check_weight("nll_weight", self.nll_weight)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        chosen, rejected = seq.logps[0::2], seq.logps[1::2]
        return torch.relu(self.delta - chosen + rejected) - self.nll_weight * chosen

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return seq.logps


@dataclass(frozen=True)
class RPO(Defaults):
    """DPO with an SFT term, Pang et al. 2024 (Iterative RPO, arXiv 2404.19733), eq. 1 divided by their alpha.

        loss = -log sigmoid(beta (r_chosen - r_rejected)) + nll_weight NLL      NLL = -m_chosen

    `nll_weight` is what TRL called `rpo_alpha`, and one over the paper's alpha.
    """

    beta: float = 0.1
    nll_weight: float = 1.0

    def __post_init__(self):
        check_beta(self.beta)
        check_weight("nll_weight", self.nll_weight)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        return -logsigmoid(self.beta * (seq.chosen - seq.rejected)) - self.nll_weight * token_means(seq)[0::2]

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.beta * seq.ratios


@dataclass(frozen=True)
class ChosenNLL(Defaults):
    """The SFT term by itself, to be mixed with others: the negative log-likelihood of the chosen completion.

        loss = -log pi(chosen) / n_chosen

    With `mean_length`, the tokens of the chosen completions of all pairs divided by the number of pairs, that is the
    divisor instead of n_chosen. The mean over pairs is then the mean over tokens, as TRL's "sft" and Liger have it.
    """

    mean_length: float | Tensor | None = None  # ()
    needs: ClassVar[frozenset[Need]] = WITHOUT_REFERENCE

    def __post_init__(self):
        if not isinstance(self.mean_length, Tensor | None) and not self.mean_length > 0:
            raise ValueError(f"mean_length must be > 0, or None for each completion's own, got {self.mean_length}")

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        return -seq.logps[0::2] / (seq.lengths[0::2] if self.mean_length is None else self.mean_length)

    def rewards(self, seq: Sequences) -> Tensor:  # (S,) there is no preference, so no reward
        return torch.zeros_like(seq.logps)


@dataclass(frozen=True)
class Mixture(Defaults):
    """A weighted sum of losses over pairs, as TRL's `loss_type` and `loss_weights` lists, or MPO (arXiv 2411.10442).

        loss = sum over k of weights[k] loss_k

    Rewards are those of the first part. A part without reference may stand beside parts with one.
    """

    parts: tuple[Loss, ...]
    weights: tuple[float, ...] | None = None  # None: 1 each

    def __post_init__(self):
        if not self.parts or any(getattr(part, "per", None) != "pair" for part in self.parts):
            raise ValueError(f"parts must be one or more losses over pairs, got {self.parts}")
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise ValueError(f"expected {len(self.parts)} weights, one per part, got {len(self.weights)}")
        for weight in self.weights or ():
            check_weight("a weight", weight)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*map(needs_of, self.parts))

    @property
    def batchwise(self) -> bool:
        return any(map(is_batchwise, self.parts))

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        weights = self.weights or (1.0,) * len(self.parts)
        pairs = zip(weights, self.parts, strict=True)
        return sum(weight * part.losses(_as_seen_by(part, seq)) for weight, part in pairs)

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.parts[0].rewards(_as_seen_by(self.parts[0], seq))


def _as_seen_by(part: Loss, seq: Sequences) -> Sequences:
    """A loss without reference finds the log-probabilities in `ratios`, as it does alone."""
    return seq if "reference" in needs_of(part) else seq._replace(ratios=seq.logps)
