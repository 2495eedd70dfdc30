"""Weights and margins of rows, made from what is known of them: they go into `weights=` and `margins=`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def wpo_weights(
    logps: Tensor,  # (N,)
    log_sum_sq_probs: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
) -> Tensor:  # (P,) float64
    """How likely the policy itself is to write each pair, Zhou et al. 2024 (WPO, arXiv 2406.11827), eq. 2 and 5.

        w(y) = exp(mean over t of (log pi(y_t) - log sum over v of pi(v)^2))      weight = w(chosen) w(rejected)

    `log_sum_sq_probs` is what `linear_logprobs(..., outputs=("log_sum_sq_probs",))` gives beside `logps`. No gradient
    passes; TRL's `use_weighting` has the same numbers. For `preference_loss(..., weights=...)`.
    """
    aligned = logps.detach().double() - log_sum_sq_probs.detach().double()
    sums = torch.segment_reduce(aligned, "sum", offsets=cu_seqlens.long(), unsafe=True)
    means = sums / cu_seqlens.diff().clamp(min=1)
    return torch.exp(means[0::2] + means[1::2])


def objective_margins(
    scores: Tensor,  # (S, K)
    weights: Sequence[float],  # (K,)
    objective: int,
    pairs: bool = True,
) -> Tensor:  # (P,) for pairs, else (S,), float64
    """What the objectives beside number `objective` say, for `MODPO` (of pairs) and `MOKTO` (of single sequences).

        sum over j != objective of weights[j] (scores[chosen, j] - scores[rejected, j])      or of scores[s, j]

    Raises ValueError for shapes that do not fit.
    """
    if scores.dim() != 2 or len(weights) != scores.shape[1] or not 0 <= objective < scores.shape[1]:
        raise ValueError(
            f"expected scores (S, K), K weights and an objective in [0, K), got {tuple(scores.shape)}, {len(weights)} "
            f"weights and {objective}"
        )
    others = torch.tensor([0.0 if j == objective else w for j, w in enumerate(weights)], dtype=torch.float64)
    total = scores.double() @ others.to(scores.device)
    return total[0::2] - total[1::2] if pairs else total
