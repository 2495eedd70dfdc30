"""Liger's `LigerFusedLinearCrossEntropyLoss`, computed by this library.

N tokens, H hidden size, V vocabulary; z the logits, never stored.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prefuse.kernels import HeadOptions
from prefuse.kernels.logprobs.linear_logprobs import logprobs_within
from prefuse.preference import WORKSPACE


@dataclass
class CrossEntropyOutput:
    """What `LigerFusedLinearCrossEntropyLoss` returns when it is asked for more than the loss."""

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """Equals `nn.CrossEntropyLoss(ce_weight, ignore_index=..., label_smoothing=..., reduction=...)` of the logits
    `softcap * tanh((_input @ lin_weight.T + bias) / softcap)`, without these ever existing.

    `lse_square_scale` adds that much of logsumexp(z)^2 to each loss (z-loss). `use_token_scaling` multiplies each by
    the probability of its token, detached. A mean over no tokens is 0. `accum_dtype` means nothing: sums are float32.
    `workspace`: bytes that may be kept for the backward, as in `linear_preference_loss`.

    Label smoothing and z-loss take one more gradient of the weight's size. Refused are label smoothing beside `softcap`
    or `ce_weight`, and predicted tokens.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,  # (V,)
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        *,
        workspace: int = WORKSPACE,
    ):
        super().__init__()
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')
        if not 0.0 <= label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
        for name, asked in {
            "return_predicted_tokens": return_predicted_tokens,
            "label_smoothing with softcap": label_smoothing and softcap is not None,
            "label_smoothing with ce_weight": label_smoothing and ce_weight is not None,
        }.items():
            if asked:
                raise ValueError(
                    f"{name} is not computed here: use liger_kernel's own LigerFusedLinearCrossEntropyLoss "
                    "(after prefuse.liger.unpatch(), if it was patched)"
                )
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens
        self.workspace = workspace

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (N, H)
        target: Tensor,  # (N,)
        bias: Tensor | None = None,  # (V,)
    ) -> Tensor | CrossEntropyOutput:
        if _input.dim() != 2 or target.shape != _input.shape[:1]:
            raise ValueError(
                f"expected _input (N, H) and target (N,), got {tuple(_input.shape)} and {tuple(target.shape)}"
            )
        rows = (target != self.ignore_index).nonzero()[:, 0]
        head = (_input.index_select(0, rows), lin_weight, target[rows], bias)
        outputs = ("is_top1",) if self.return_token_accuracy else ()
        made = logprobs_within(self.workspace, *head, HeadOptions(self.softcap), outputs, "auto")
        logps, is_right = (made[0], made[1]["is_top1"]) if outputs else (made, torch.zeros_like(made))

        # What a mean divides by: tokens, or the weights of their targets; the z-loss is never weighted.
        losses, z_losses = -logps, torch.zeros_like(logps)
        tokens = divisor = torch.tensor(max(len(rows), 1), device=logps.device)
        if self.label_smoothing or self.lse_square_scale:
            logits, mean_logits = _logits(*head, self.softcap)
            # (1 - e) (lse - z_y) + e (lse - mean z)
            losses = losses + self.label_smoothing * (logits - mean_logits)
            z_losses = self.lse_square_scale * (logits - logps).square()
        if self.ce_weight is not None:
            weights = self.ce_weight.to(logps.device)[target[rows]]
            losses, divisor = weights * losses, weights.sum()
            divisor = torch.where(divisor > 0, divisor, 1.0)
        if self.use_token_scaling:
            p = logps.detach().exp()
            losses, z_losses = p * losses, p * z_losses

        if self.reduction == "none":
            z_loss, accuracy = (_spread(x, rows, len(target)) for x in (z_losses, is_right))
            loss = _spread(losses + z_losses, rows, len(target))
        else:
            mean = self.reduction == "mean"
            z_loss = z_losses.sum() / (tokens if mean else 1)
            loss = losses.sum() / (divisor if mean else 1) + z_loss
            accuracy = is_right.sum() / tokens
        if not (self.return_z_loss or self.return_token_accuracy):
            return loss
        return _output_class()(
            loss=loss,
            z_loss=z_loss.detach() if self.return_z_loss else None,
            token_accuracy=accuracy if self.return_token_accuracy else None,
        )


def _output_class() -> type:
    """Liger's own class once it is imported, for those who ask by `isinstance`."""
    theirs = sys.modules.get("liger_kernel.transformers.functional")
    return getattr(theirs, "CrossEntropyOutput", CrossEntropyOutput)


def _spread(x: Tensor, rows: Tensor, length: int) -> Tensor:
    """(len(rows),) -> (length,), zero elsewhere."""
    return x.new_zeros(length).index_copy(0, rows, x)


def _logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """(N,) twice: the target's logit, and the mean of all V before a softcap. Differentiable."""
    hidden = hidden.float()
    # Not as matrix products, which autocast would round.
    of_target = (hidden * nn.functional.embedding(targets, weight).float()).sum(-1)
    mean = (hidden * weight.mean(0, dtype=torch.float32)).sum(-1)
    if bias is not None:
        of_target, mean = of_target + bias[targets].float(), mean + bias.mean(dtype=torch.float32)
    return of_target if softcap is None else softcap * torch.tanh(of_target / softcap), mean
