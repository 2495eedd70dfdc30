"""Rewards to advantages: by groups of answers to one prompt, by the whole batch, or token by token from values.

P prompts with K answers each, S answers, N completion tokens end to end.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from prefuse.losses.contract import check_weight
from prefuse.losses.sampled import Estimator, kl_of

EPSILON = 1e-4  # what TRL adds to a standard deviation that it divides by


def group_advantages(
    rewards: Tensor,  # (P, K)
    *,
    baseline: Literal["mean", "leave_one_out"] = "mean",
    scale: Literal["group", "batch", "none"] = "group",
) -> Tensor:  # (P, K) float64
    """How much better each answer is than the others to its prompt.

        "mean"           A = r - mean of the group      GRPO (arXiv 2402.03300); divided by std + 1e-4 with `scale`
        "leave_one_out"  A = r - mean of the others     RLOO (arXiv 2402.14740); = K / (K - 1) (r - mean)

    `scale`: by the standard deviation (of K - 1 degrees of freedom) of the "group", of the whole "batch", or "none" as
    Dr. GRPO advises (arXiv 2503.20783). These are TRL's numbers. An answer without a reward (NaN) counts in no mean and
    has advantage 0. A group whose rewards are all equal has advantages 0: it teaches nothing.
    """
    if rewards.dim() != 2:
        raise ValueError(f"expected rewards (P, K), K answers for each of P prompts, got {tuple(rewards.shape)}")
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f'baseline must be "mean" or "leave_one_out", got {baseline!r}')
    if scale not in ("group", "batch", "none"):
        raise ValueError(f'scale must be "group", "batch" or "none", got {scale!r}')
    r = rewards.detach().double()
    scored = ~r.isnan()
    count = scored.sum(1, keepdim=True)
    total = r.nan_to_num(0.0).sum(1, keepdim=True)
    if baseline == "mean":
        advantages = r - total / count.clamp_min(1)
    else:
        advantages = torch.where(count > 1, r - (total - r) / (count - 1).clamp_min(1), 0.0)
    if scale == "group":
        advantages = advantages / (_std(r, scored, 1) + EPSILON)
    elif scale == "batch":
        advantages = advantages / (_std(r.flatten(), scored.flatten(), 0) + EPSILON)
    return torch.where(scored, advantages, 0.0)


def batch_advantages(rewards: Tensor, *, scale: bool = False) -> Tensor:  # (S,) -> (S,) float64
    """r - mean over the batch, divided by its standard deviation + 1e-4 with `scale`: REINFORCE with a mean baseline.

    A reward that is NaN counts nowhere and has advantage 0.
    """
    r = rewards.detach().double()
    scored = ~r.isnan()
    advantages = r - r.nan_to_num(0.0).sum() / scored.sum().clamp_min(1)
    if scale:
        advantages = advantages / (_std(r.flatten(), scored.flatten(), 0) + EPSILON)
    return torch.where(scored, advantages, 0.0)


def token_rewards(
    scores: Tensor,  # (S,)
    logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    beta: float,
    estimator: Estimator = "k1",
) -> Tensor:  # (N,) float64
    """KL as a penalty in the reward: each token costs beta KL_t, and the answer's score comes with its last token.

        r_t = -beta KL_t + score [t is the last]

    `logps` are the sampling policy's. Summed over an answer it is RLOO's reward, score - beta KL(y), as TRL has it;
    token by token it is PPO's (Ziegler et al. 2019, arXiv 1909.08593). No gradient passes. Raises ValueError for an
    answer without tokens, which has nowhere to put its score.
    """
    check_weight("beta", beta)
    ends = cu_seqlens.long()
    if bool((ends.diff() < 1).any()):
        raise ValueError("an answer without tokens has no last token that could take its score: leave it out")
    rewards = -beta * kl_of(logps.detach().double() - ref_logps.detach().double(), estimator)
    return rewards.index_add(0, ends[1:] - 1, scores.detach().double())


def gae(
    rewards: Tensor,  # (N,)
    values: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Tensor, Tensor]:  # (N,), (N,) float64
    """Generalized advantage estimates and returns, Schulman et al. 2016 (arXiv 1506.02438), eq. 16.

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      R_t = A_t + V_t

    V is 0 behind an answer's last token. `lam=1` makes A the return less the value, `lam=0` the one-step error. No
    gradient passes.
    """
    for name, x in (("gamma", gamma), ("lam", lam)):
        if not 0 <= x <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {x}")
    if not rewards.shape == values.shape == (int(cu_seqlens[-1]),):
        shapes = f"{tuple(rewards.shape)} and {tuple(values.shape)}"
        raise ValueError(f"expected rewards and values ({int(cu_seqlens[-1])},), got {shapes}")
    r, v = rewards.detach().double(), values.detach().double()
    ends, lengths = cu_seqlens[1:].long(), cu_seqlens.diff().long()
    advantages = torch.zeros_like(r)
    later = next_value = r.new_zeros(len(lengths))
    for back in range(1, int(lengths.max()) + 1 if len(lengths) else 1):  # all answers at once, from their ends
        here = lengths >= back
        places = (ends - back)[here]
        delta = r[places] + gamma * next_value[here] - v[places]
        advantages[places] = delta + gamma * lam * later[here]
        later = later.masked_scatter(here, advantages[places])
        next_value = next_value.masked_scatter(here, v[places])
    return advantages, advantages + v


def whiten(advantages: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8), the mean put back unless `shift_mean`: what PPO's loops do to advantages."""
    x = advantages.detach().double()
    mean, variance = x.mean(), x.var(correction=1) if x.numel() > 1 else x.new_zeros(())
    return (x - mean) * torch.rsqrt(variance + 1e-8) + (0.0 if shift_mean else mean)


def _std(x: Tensor, scored: Tensor, dim: int) -> Tensor:
    """Over what is scored, K - 1 degrees of freedom; 0 where fewer than two are."""
    count = scored.sum(dim, keepdim=True)
    mean = torch.where(scored, x, 0.0).sum(dim, keepdim=True) / count.clamp_min(1)
    squares = torch.where(scored, x - mean, 0.0).square().sum(dim, keepdim=True)
    return (squares / (count - 1).clamp_min(1)).sqrt()
