"""The oracle: `linear_logprobs` and `linear_kl` written from their definitions, materializing every logit, in float64.

Shares no code with the other implementations, so that one mistake cannot be in both.
Slow on purpose: it takes `8 * N * V` bytes for the logits and as much again for what autograd keeps.
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
) -> tuple[Tensor, dict[str, Tensor]]:  # (N,), {name: (N,)}, all float64
    """`log_softmax(logits)[targets]` and every optional output; ignored rows are exactly 0 in all of them."""
    keep = targets != ignore_index
    logits = _logits(keep, hidden, weight, bias, softcap, logit_scale, temperature)
    index = torch.where(keep, targets, 0)[:, None]
    log_probs = torch.log_softmax(logits, dim=-1)
    probs = log_probs.exp()
    # 0 * log 0 = 0, as the entropy has it.
    plogp = torch.where(probs > 0, probs * torch.where(probs > 0, log_probs, 0.0), 0.0)
    outputs = {
        "entropy": -plogp.sum(-1),
        "mean_logits": logits.mean(-1).detach(),
        "log_sum_sq_probs": torch.logsumexp(2 * log_probs.detach(), dim=-1),
        "is_top1": (logits.argmax(-1) == index[:, 0]).double(),
    }
    zero = torch.zeros((), dtype=torch.float64, device=hidden.device)
    logps = torch.where(keep, log_probs.gather(-1, index)[:, 0], zero)
    return logps, {name: torch.where(keep, value, zero) for name, value in outputs.items()}


def linear_kl(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    ref_hidden: Tensor,  # (N, ref D)
    ref_weight: Tensor,  # (V, ref D)
    ref_bias: Tensor | None,  # (V,)
    mask: Tensor | None,  # (N,)
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ref_softcap: float | None,
    ref_logit_scale: float,
    ref_temperature: float,
) -> Tensor:  # (N,) float64
    """`sum of p (log p - log r)`; masked rows are exactly 0. The reference is a constant."""
    keep = torch.ones_like(hidden[:, 0], dtype=torch.bool) if mask is None else mask
    log_p = torch.log_softmax(_logits(keep, hidden, weight, bias, softcap, logit_scale, temperature), -1)
    with torch.no_grad():
        ref_logits = _logits(keep, ref_hidden, ref_weight, ref_bias, ref_softcap, ref_logit_scale, ref_temperature)
        log_r = torch.log_softmax(ref_logits, -1)
    # 0 (log 0 - log r) = 0. The inner `where` keeps the -inf of such a token out of the gradient.
    possible = log_p > -torch.inf
    terms = log_p.exp() * (torch.where(possible, log_p, 0.0) - torch.where(possible, log_r, 0.0))
    zero = torch.zeros((), dtype=torch.float64, device=hidden.device)
    return torch.where(keep, terms.sum(-1), zero)


def _logits(
    keep: Tensor,  # (N,) bool
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> Tensor:  # (N, V) float64
    # Rows that are not kept leave the graph here, so that whatever they hold (NaN included) cannot reach a gradient.
    hidden = torch.where(keep[:, None], hidden, 0.0)
    logits = hidden.double() @ weight.to(hidden.dtype).double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature
