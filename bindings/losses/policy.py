"""Losses over sampled tokens: what the policy itself has written is worth more or less than was expected.

    A_t     the advantage of a token, the same for all tokens of an answer unless it is given token by token
    log w_t = log pi(y_t) - log pi_old(y_t)      pi_old: the policy that sampled
    w       exp of log w_t, or of its mean over the answer with importance_sampling_level="sequence" (GSPO)
    n_s     completion tokens of answer s

Each returns a number per answer; the step's loss is their sum divided by `num_items`: answers, or tokens where `per` is
"token". What is added to the policy's term stands in the same sum over tokens: `beta` times the KL divergence from the
reference, and minus `entropy_coef` times the entropy of the token's distribution.

Advantages are made by `advantages`; `prefuse.linear_policy_loss` takes these losses straight from hidden states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from prefuse.losses.contract import Defaults, Need, Sequences, capped_exp, check_weight
from prefuse.losses.sampled import (
    Level,
    Penalized,
    PolicyLoss,
    Reduction,
    Sampled,
    at_level,
    check_clip,
    check_level,
    clip_metrics,
    mean_of,
)

GRPO_LOSSES: dict[str, Reduction] = {
    "grpo": "sequence", "sapo": "sequence", "bnpo": "token", "dapo": "token", "cispo": "token", "dr_grpo": "sum",
    "luspo": "sum",
}  # fmt: skip


@dataclass(frozen=True)
class GRPO(Penalized):
    """Group Relative Policy Optimization, Shao et al. 2024 (arXiv 2402.03300), eq. 3, and its kin by `loss_type`.

        l_t = -min(min(w, delta) A, clip(w, 1 - epsilon, 1 + epsilon_high) A) + beta KL_t - entropy_coef H_t

        grpo     (1 / S) sum over s of (1 / n_s) sum over t of l_t        the paper's: short answers weigh more
        dapo     sum over all t of l_t / tokens of the step               Yu et al. 2025 (arXiv 2503.14476), eq. 8
        bnpo     the same; TRL's is a mean by microbatch and rank, which here do not matter
        dr_grpo  (1 / S) sum over s of sum over t of l_t / max_completion_length    Liu et al. 2025 (arXiv 2503.20783)
        luspo    (1 / S) sum over s of sum over t of l_t, with the ratio of the whole answer      (arXiv 2602.05261)
        cispo    l_t = -stop(min(w, epsilon_high)) A log pi(y_t), reduced as dapo      MiniMax-M1 (arXiv 2506.13585)
        sapo     l_t = -(4 / tau) sigmoid(tau (w - 1)) A, reduced as grpo, tau by the sign of A      (arXiv 2511.20347)

    `importance_sampling_level="sequence"` is GSPO (Zheng et al. 2025, arXiv 2507.18071): w is one ratio for the answer,
    exp of the mean log-ratio of its tokens. `epsilon_high` is DAPO's clip-higher (epsilon unless given; for cispo the
    bound of w itself), `delta` the upper bound of the unclipped side (INTELLECT-2, arXiv 2505.07291). Names, defaults
    and formulas are TRL's. The advantages are those of `prefuse.group_advantages`.
    """

    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"] = "dapo"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: Level = "token"
    max_completion_length: int | None = None
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    def __post_init__(self):
        if self.loss_type not in GRPO_LOSSES:
            raise ValueError(f"loss_type must be one of {', '.join(GRPO_LOSSES)}, got {self.loss_type!r}")
        super().__post_init__()
        check_clip(self.epsilon, self.epsilon_high)
        check_level(self.importance_sampling_level)
        if self.delta is not None and not self.delta > 1:
            raise ValueError(f"delta bounds the ratio from above and must be > 1, got {self.delta}")
        if (self.loss_type == "dr_grpo") != (self.max_completion_length is not None):
            raise ValueError(
                f"max_completion_length is what dr_grpo divides by, and nothing else does: got "
                f"{self.max_completion_length} with loss_type {self.loss_type!r}"
            )
        for name in ("sapo_temperature_pos", "sapo_temperature_neg"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")

    @property
    def reduction(self) -> Reduction:
        return GRPO_LOSSES[self.loss_type]

    def weights(self, seq: Sampled) -> Tensor:  # (N,) w
        return capped_exp(seq.log_weights(self.importance_sampling_level))

    @property
    def upper(self) -> float:  # the bound of w in cispo, the distance of the upper bound from 1 elsewhere
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def policy_losses(self, seq: Sampled) -> Tensor:  # (S,)
        w, a = self.weights(seq), seq.advantages
        if self.loss_type == "cispo":
            policy = -w.clamp(max=self.upper).detach() * a * seq.logps
        elif self.loss_type == "sapo":
            tau = torch.where(a > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)
            policy = -torch.sigmoid(tau * (w - 1)) * (4 / tau) * a
        else:
            bounded = w if self.delta is None else w.clamp(max=self.delta)
            policy = -torch.minimum(bounded * a, w.clamp(1 - self.epsilon, 1 + self.upper) * a)
        losses = self.total(seq, policy, self.penalty(seq, w))
        return losses / self.max_completion_length if self.loss_type == "dr_grpo" else losses

    def policy_metrics(self, seq: Sampled) -> dict[str, Tensor]:
        w, level = self.weights(seq), self.importance_sampling_level
        metrics = self.kl_metrics(seq, w)
        if self.loss_type == "cispo":
            clipped = ((w > self.upper) & (seq.advantages > 0)).double()
            return metrics | {"cispo_clip_ratio": mean_of(*at_level(seq, clipped, level))}
        if self.loss_type == "sapo":
            return metrics
        w = w if self.delta is None else w.clamp(max=self.delta)
        return metrics | clip_metrics(seq, w, self.epsilon, self.upper, level)


@dataclass(frozen=True)
class RLOO(PolicyLoss):
    """REINFORCE with a leave-one-out baseline, Ahmadian et al. 2024 (arXiv 2402.14740), with TRL's clipped ratio.

        loss = -min(w A, clip(w, 1 - epsilon, 1 + epsilon_high) A)      w = pi(y | x) / pi_old(y | x), of the answer

    A is the reward less the mean reward of the other answers (`group_advantages(..., baseline="leave_one_out")`), the
    reward itself less beta times the KL of the answer (`token_rewards`). In the first step w is 1, and the gradient
    that of -A log pi(y | x), the paper's. The entropy bonus is a mean over the answer's tokens.
    """

    epsilon: float = 0.2
    epsilon_high: float | None = None
    reduction: ClassVar[Reduction] = "sequence"

    def __post_init__(self):
        super().__post_init__()
        check_clip(self.epsilon, self.epsilon_high)

    def weights(self, seq: Sampled) -> Tensor:  # (N,) one for the answer
        return capped_exp(seq.spread(seq.sums(seq.log_ratios)))

    @property
    def upper(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def policy_losses(self, seq: Sampled) -> Tensor:  # (S,)
        # One number for the answer, so it is its own mean over tokens.
        w, a = self.weights(seq), seq.spread(seq.means(seq.advantages))
        return self.total(seq, -torch.minimum(w * a, w.clamp(1 - self.epsilon, 1 + self.upper) * a))

    def policy_metrics(self, seq: Sampled) -> dict[str, Tensor]:
        return clip_metrics(seq, self.weights(seq), self.epsilon, self.upper, "sequence")


@dataclass(frozen=True)
class Reinforce(Penalized):
    """REINFORCE with a baseline, Williams 1992 (doi 10.1007/BF00992696), eq. 4, as a loss.

        l_t = -A_t log pi(y_t) + beta KL_t - entropy_coef H_t      A_t = reward - baseline

    `reduction="sum"` is the paper's: the sum over an answer's tokens, a mean over answers. "sequence" takes the mean
    over the answer's tokens, "token" the mean over all tokens. It has no ratio: for tokens that the present policy has
    sampled, one update for each sample. The baseline is in the advantages: `group_advantages` or `batch_advantages`.
    """

    reduction: Reduction = "sum"

    def policy_losses(self, seq: Sampled) -> Tensor:  # (S,)
        return self.total(seq, -seq.advantages * seq.logps, self.penalty(seq, capped_exp(seq.log_ratios)))

    def policy_metrics(self, seq: Sampled) -> dict[str, Tensor]:
        return self.kl_metrics(seq, capped_exp(seq.log_ratios))


@dataclass(frozen=True)
class PPOClip(PolicyLoss, Defaults):
    """The clipped objective of PPO, Schulman et al. 2017 (arXiv 1707.06347), eq. 7.

        l_t = -min(w_t A_t, clip(w_t, 1 - clip, 1 + clip_high) A_t) - entropy_coef H_t      w_t = pi(y_t) / pi_old(y_t)

    Online (`linear_policy_loss`) the advantages come from a value head: `prefuse.gae`. `reduction="token"` is the usual
    mean over all tokens; "sequence" a mean over answers of their means.

    Offline (`preference_loss`, `--loss_type ppo_clip`) it is the KTO paper's strong baseline (arXiv 2402.01306, section
    3.2): rewards of +1 for a desirable and -1 for another completion are the advantages, the reference is the policy
    that sampled, and `ref_logps` come token by token. The reward that is logged is log pi(y | x) / pi_ref(y | x).
    """

    clip: float = 0.2
    clip_high: float | None = None
    reduction: Reduction = "sequence"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference", "labels"})

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must be in (0, 1), got {self.clip}")
        check_clip(self.clip, self.clip_high)

    @property
    def upper(self) -> float:
        return self.clip if self.clip_high is None else self.clip_high

    def policy_losses(self, seq: Sampled) -> Tensor:  # (S,)
        w, a = capped_exp(seq.log_ratios), seq.advantages
        return self.total(seq, -torch.minimum(w * a, w.clamp(1 - self.clip, 1 + self.upper) * a))

    def policy_metrics(self, seq: Sampled) -> dict[str, Tensor]:
        return clip_metrics(seq, capped_exp(seq.log_ratios), self.clip, self.upper, "token")

    def losses(self, seq: Sequences) -> Tensor:  # (S,)
        if self.entropy_coef:
            raise ValueError("entropy_coef needs the distributions of the tokens: it is for linear_policy_loss")
        tokens = seq.tokens
        advantages = torch.where(seq.labels, 1.0, -1.0).double()[tokens.owners]
        ratios = tokens.ratios
        return self.policy_losses(
            Sampled(ratios, torch.zeros_like(ratios), advantages, tokens.cu_seqlens, tokens.counted)
        )

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return seq.ratios


def clipped_value_loss(
    values: Tensor,  # (N,)
    old_values: Tensor,  # (N,)
    returns: Tensor,  # (N,)
    cliprange_value: float = 0.2,
) -> Tensor:  # (N,) float64
    """The value head's loss of each token, as PPO's implementations have it (Schulman et al. 2017 leave the clip out).

        1/2 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2)

    `old_values` are those of the head that saw the samples, `returns` come from `gae`; both are constants.
    """
    check_weight("cliprange_value", cliprange_value)
    v, old, target = values.double(), old_values.detach().double(), returns.detach().double()
    held = torch.clamp(v, old - cliprange_value, old + cliprange_value)
    return torch.maximum((v - target).square(), (held - target).square()) / 2
