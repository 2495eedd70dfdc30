"""The truth that tests compare with: the head and every loss, written from their definitions and papers.

    N tokens, D hidden, V vocabulary; S sequences, P pairs.

Imports nothing of the package. Eager and materializing; the losses are plain Python over numbers.
"""

import math

import torch
from torch import Tensor

OUTPUTS = ("entropy", "mean_logits", "log_sum_sq_probs", "is_top1")

# ---- the head ------------------------------------------------------------------------------------


def head(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None = None,  # (V,)
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, dict[str, Tensor]]:  # (N,), {name: (N,)}
    """Every number of one head, differentiable. In float64 it is the truth; in the dtype of the inputs, the yardstick:
    what plain PyTorch makes of them.
    """
    targets = targets.long()  # as a uint8, 156 == -100
    keep = targets != ignore_index
    # A row that does not count is replaced before anything is computed from it: 0 * NaN is NaN.
    hidden = torch.where(keep[:, None], hidden, 0.0)
    # The operation is defined in hidden's dtype, whatever the weight is kept in.
    logits = hidden.to(dtype) @ weight.to(hidden.dtype).to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature

    index = torch.where(keep, targets, 0)
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    outputs = {
        "entropy": -(p * torch.where(p > 0, log_p, 0.0)).sum(-1),  # 0 log 0 = 0
        "mean_logits": logits.mean(-1).detach(),
        "log_sum_sq_probs": p.square().sum(-1).log().detach(),
        "is_top1": (logits.argmax(-1) == index).to(dtype),
    }
    logps = log_p.gather(-1, index[:, None])[:, 0]
    return torch.where(keep, logps, 0.0), {name: torch.where(keep, x, 0.0) for name, x in outputs.items()}


# ---- the losses, from sequence sums --------------------------------------------------------------


def softplus(x: float) -> float:
    """log(1 + e^x) without overflow: -log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else math.exp(x)


def dpo(chosen: float, rejected: float, beta: float, smoothing: float = 0.0) -> float:
    """Rafailov et al. 2023, eq. 7, of the two log-ratios; smoothing: Mitchell 2023, eq. 3 (cDPO)."""
    margin = beta * chosen - beta * rejected
    return (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)


def ipo(chosen: float, rejected: float, tau: float) -> float:
    """Azar et al. 2023, eq. 17: h is the difference of the two log-ratios (or of their means per token)."""
    h = chosen - rejected
    return (h - 1 / (2 * tau)) ** 2


def kto(ratio: float, desirable: bool, z0: float, beta: float, weight_d: float = 1.0, weight_u: float = 1.0) -> float:
    """Ethayarajh et al. 2024, eq. 8: lambda_y - v(x, y), v a sigmoid of the distance to z0."""
    if desirable:
        return weight_d - weight_d * sigmoid(beta * (ratio - z0))
    return weight_u - weight_u * sigmoid(beta * (z0 - ratio))


def kto_reference_point(ratios: list[float]) -> float:
    """Section 4.1 of the same: the mean log-ratio of mismatched completions, clamped at 0."""
    return max(0.0, math.fsum(ratios) / len(ratios)) if ratios else 0.0


def sequence_sums(values: Tensor, lengths: list[int]) -> list[float]:
    """(N,) -> S sums, each correctly rounded."""
    numbers, sums, start = values.double().tolist(), [], 0
    for length in lengths:
        sums.append(math.fsum(numbers[start : start + length]))
        start += length
    return sums


# ---- how close is close --------------------------------------------------------------------------


def tolerance(truth: Tensor, yardstick: Tensor, dtype: torch.dtype, magnitude: float, length: int = 1) -> float:
    """Twice what plain PyTorch is off, plus the rounding of sums of `length` terms of `magnitude` kept in `dtype`.

    The second term is for a yardstick that happens to be exact. Rounding errors of a sum grow with the square root
    of its length.
    """
    finite = truth.isfinite()
    off = (yardstick.to(truth.dtype) - truth)[finite].abs()
    off = off[off.isfinite()]
    rounding = torch.finfo(dtype).eps * math.sqrt(length) * magnitude
    return 2.0 * ((off.max().item() if len(off) else 0.0) + rounding)


def assert_within(actual: Tensor, truth: Tensor, bound: float, what: str) -> None:
    """|actual - truth| <= bound; infinities equal; no NaN where the truth is a number."""
    actual, known = actual.detach().to(truth.dtype), ~truth.isnan()
    infinite = truth.isinf()
    assert torch.equal(actual[infinite], truth[infinite]), f"{what}: {actual[infinite]} for {truth[infinite]}"
    error = (actual - truth)[known & ~infinite].abs()
    assert not error.isnan().any(), f"{what}: NaN where the truth is a number"
    largest = error.max().item() if len(error) else 0.0
    assert largest <= bound, f"{what}: off by {largest:.3g}, allowed {bound:.3g}"


# ---- the divergence from the reference -----------------------------------------------------------


def logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # (N, V)
    """What enters the softmax of one model, made in `dtype` of the operands that `hidden`'s dtype holds."""
    z = hidden.to(dtype) @ weight.to(hidden.dtype).to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def kl(z: Tensor, ref_z: Tensor) -> Tensor:  # (N, V) twice -> (N,)
    """KL(p || r) = sum of p (log p - log r), with 0 log 0 = 0; r is a constant."""
    log_p, log_r = torch.log_softmax(z, -1), torch.log_softmax(ref_z.detach(), -1)
    # The inner `where` keeps what is not a number out of the gradient, which `where` multiplies by 0.
    possible = log_p.detach() > -math.inf
    log_p, log_r = torch.where(possible, log_p, -math.inf), torch.where(possible, log_r, 0.0)
    return (log_p.exp() * (torch.where(possible, log_p, 0.0) - log_r)).sum(-1)
