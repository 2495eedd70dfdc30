"""The oracle: `linear_logprobs` written from its definition, materializing every logit, in float64.

Shares no code with the other implementations, so that an error here and an error there are two errors.
Slow and hungry on purpose: `8 * N * V` bytes for the logits and as much again for what autograd keeps.
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
    # Ignored rows leave the graph here, so that whatever they hold (NaN included) cannot reach a gradient.
    keep = targets != ignore_index
    hidden = torch.where(keep[:, None], hidden, 0.0)
    logits = hidden.double() @ weight.to(hidden.dtype).double().T  # (N, V)
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature

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
