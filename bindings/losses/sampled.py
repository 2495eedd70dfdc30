"""What a policy loss may look at, what it must say of itself, and what the losses of `policy` share.

    A_t     the advantage of a token, the same for all tokens of an answer unless it is given token by token
    log w_t = log pi(y_t) - log pi_old(y_t)      pi_old: the policy that sampled
    n_s     completion tokens of answer s

N completion tokens, end to end, of S answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from prefuse.losses.contract import Per, check_weight

Reduction = Literal["token", "sequence", "sum"]
Estimator = Literal["k1", "k2", "k3", "exact"]
Level = Literal["token", "sequence"]
# What `policy_needs` may name, and what a call then brings.
POLICY_NEEDS = {
    "ref_logps": "ref_logps (N,), the reference's log-probability of each token",
    "kl": "kl (N,), the exact divergence of each token: from linear_kl",
    "entropy": "entropy (N,) with gradient: outputs=('entropy',) of linear_logprobs",
}


class Sampled(NamedTuple):
    """What a policy loss may look at: packed, end to end, float64. A token that is ignored holds 0 everywhere."""

    logps: Tensor  # (N,) of the policy, with gradient
    old_logps: Tensor  # (N,) of the policy that sampled
    advantages: Tensor  # (N,)
    cu_seqlens: Tensor  # (S + 1,)
    kept: Tensor  # (N,) 1, or 0 for an ignored token
    ref_logps: Tensor | None = None  # (N,)
    kl: Tensor | None = None  # (N,) exact, with gradient
    entropy: Tensor | None = None  # (N,) with gradient
    importance: Tensor | None = None  # (N,) pi_old over the sampler that really ran

    @property
    def log_ratios(self) -> Tensor:  # (N,)
        return self.logps - self.old_logps

    @property
    def lengths(self) -> Tensor:  # (S,) at least 1
        return self.sums(self.kept).clamp_min(1.0)

    def sums(self, x: Tensor) -> Tensor:  # (N,) -> (S,)
        return torch.segment_reduce(x * self.kept, "sum", offsets=self.cu_seqlens.long(), unsafe=True)

    def means(self, x: Tensor) -> Tensor:  # (N,) -> (S,)
        return self.sums(x) / self.lengths

    def spread(self, x: Tensor) -> Tensor:  # (S,) -> (N,)
        return x.repeat_interleave(self.cu_seqlens.diff().long(), output_size=len(self.logps))

    def log_weights(self, level: Level) -> Tensor:  # (N,) log w
        if level == "sequence":
            return self.spread(self.means(self.log_ratios))
        return self.log_ratios


class PolicyObjective(Protocol):
    """What `linear_policy_loss` asks of a loss; a dataclass of your own will do."""

    per: Literal["sequence", "token"]  # what it is a mean over
    policy_needs: frozenset[str]  # out of POLICY_NEEDS

    def policy_losses(self, seq: Sampled) -> Tensor: ...  # (S,), differentiable

    def policy_metrics(self, seq: Sampled) -> dict[str, Tensor]: ...  # {name: (2,) [sum, count]}


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """What the losses below share: the entropy bonus, the way from tokens to an answer, and TRL's clip metrics."""

    entropy_coef: float = 0.0
    reduction = "token"  # not annotated: fields of subclasses keep their own order

    def __post_init__(self):
        check_weight("entropy_coef", self.entropy_coef)
        if self.reduction not in ("token", "sequence", "sum"):
            raise ValueError(f'reduction must be "token", "sequence" or "sum", got {self.reduction!r}')

    @property
    def per(self) -> Per:
        return "token" if self.reduction == "token" else "sequence"

    @property
    def policy_needs(self) -> frozenset[str]:
        return frozenset({"entropy"} if self.entropy_coef else ())

    def reduce(self, seq: Sampled, x: Tensor) -> Tensor:  # (N,) -> (S,)
        return seq.means(x) if self.reduction == "sequence" else seq.sums(x)

    def total(self, seq: Sampled, policy: Tensor, penalty: Tensor | None = None) -> Tensor:  # (N,), (N,) -> (S,)
        """policy + beta KL - entropy_coef H, of each token, as the answer's number."""
        x = policy if seq.importance is None else policy * seq.importance
        x = x if penalty is None else x + self.beta * penalty
        return self.reduce(seq, x - self.entropy_coef * seq.entropy if self.entropy_coef else x)

    def policy_metrics(self, seq: Sampled) -> dict[str, Tensor]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Penalized(PolicyLoss):
    """A policy loss with the KL divergence from the reference as a term: beta KL_t, in nats.

    `kl_estimator`, with x = log pi(y_t) - log pi_ref(y_t) (Schulman 2020, see `prefuse.kl_estimate` for which of them
    has the gradient of the divergence):

        k1  x      k2  x^2 / 2      k3  exp(-x) - 1 + x      exact  the sum over the vocabulary, from `linear_kl`

    `use_bias_correction_kl` multiplies the estimate by w, as DeepSeek-V3.2 does (arXiv 2512.02556): k3's gradient then
    is that of KL(pi || pi_ref).
    """

    beta: float = 0.0
    kl_estimator: Estimator = "k3"
    use_bias_correction_kl: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_weight("beta", self.beta)
        if self.kl_estimator not in ("k1", "k2", "k3", "exact"):
            raise ValueError(f"kl_estimator must be k1, k2, k3 or exact, got {self.kl_estimator!r}")

    @property
    def policy_needs(self) -> frozenset[str]:
        source = {"kl" if self.kl_estimator == "exact" else "ref_logps"} if self.beta else set()
        return super().policy_needs | source

    def penalty(self, seq: Sampled, weights: Tensor | None = None) -> Tensor | None:  # (N,) the KL of each token
        if not self.beta:
            return None
        kl = seq.kl if self.kl_estimator == "exact" else kl_of(seq.logps - seq.ref_logps, self.kl_estimator)
        return kl * weights if self.use_bias_correction_kl and weights is not None else kl

    def kl_metrics(self, seq: Sampled, weights: Tensor | None = None) -> dict[str, Tensor]:
        kl = self.penalty(seq, weights)
        return {} if kl is None else {"kl": mean_of(kl, seq.kept)}


def kl_of(x: Tensor, estimator: Estimator) -> Tensor:
    """Of log-ratios, as `prefuse.kl_estimate` has them."""
    if estimator == "k1":
        return x
    return x.square() / 2 if estimator == "k2" else torch.expm1(-x) + x


# ---- what several of them check and report -------------------------------------------------------


def check_clip(low: float, high: float | None) -> None:
    if not low >= 0 or (high is not None and not high >= 0):
        raise ValueError(f"clip bounds must be >= 0, got {low} below and {high} above")


def check_level(level: Level) -> None:
    if level not in ("token", "sequence"):
        raise ValueError(f'importance_sampling_level must be "token" or "sequence", got {level!r}')


def mean_of(x: Tensor, counted: Tensor) -> Tensor:  # (2,) [sum, count]
    return torch.stack([(x.detach() * counted).sum(), counted.sum()])


def at_level(seq: Sampled, x: Tensor, level: Level) -> tuple[Tensor, Tensor]:
    """Tokens with what each counts; where one ratio holds for an answer, answers."""
    if level == "sequence":
        return seq.means(x), torch.ones_like(seq.lengths)
    return x, seq.kept


def clip_metrics(seq: Sampled, w: Tensor, low: float, high: float, level: Level) -> dict[str, Tensor]:
    """TRL's names: the share of tokens (or answers) whose ratio is cut off, and its extremes over the answers."""
    below = ((w < 1 - low) & (seq.advantages < 0)).double()
    above = ((w > 1 + high) & (seq.advantages > 0)).double()
    metrics = {
        "clip_ratio/low_mean": mean_of(*at_level(seq, below, level)),
        "clip_ratio/high_mean": mean_of(*at_level(seq, above, level)),
        "clip_ratio/region_mean": mean_of(*at_level(seq, below + above, level)),
    }
    if len(seq.lengths):
        extremes = {"clip_ratio/low_min": seq.means(below).amin(), "clip_ratio/high_max": seq.means(above).amax()}
        metrics |= {name: torch.stack([x, torch.ones_like(x)]) for name, x in extremes.items()}
    return metrics
