"""Liger's fused losses under Liger's names, computed by this library.

    loss, aux = prefuse.liger.LigerFusedLinearDPOLoss(beta=0.1)(lm_head, hidden, targets, ref_input=..., ref_weight=...)

Classes, arguments, defaults and returned tuples are liger_kernel 0.8.5's; nothing here needs liger_kernel, and
`prefuse.liger.patch()` puts them in its place. What differs is on purpose:

* logits stay float32, and only positions whose target counts reach the head;
* a reference that is given is used, whatever `use_ref_model` says, and `ref_logps=` takes its log-probabilities;
* every `loss_type` of TRL's DPOTrainer works, "ipo" too, and `label_smoothing` makes "sigmoid" conservative DPO;
* a completion without tokens has log-probability 0, a mean over no tokens is 0, and no loss is NaN for it;
* `kl` is one number or one for each row; an odd number of rows is an error for a paired loss;
* an option that its loss does not have is an error; `compiled` and `chunk_size` mean nothing; `workspace=` bytes may be
  kept for the backward (1 GiB; 0 keeps a tile and multiplies by the head once more).
"""

from __future__ import annotations

from torch import Tensor, nn

from prefuse.liger.cross_entropy import CrossEntropyOutput, LigerFusedLinearCrossEntropyLoss
from prefuse.liger.functions import (
    DPO_LOSS_TYPES,
    dpo_loss,
    liger_fused_linear_cpo,
    liger_fused_linear_dpo,
    liger_fused_linear_kto,
    liger_fused_linear_orpo,
    liger_fused_linear_simpo,
)

__all__ = [
    "CrossEntropyOutput",
    "LigerFusedLinearCPOLoss",
    "LigerFusedLinearCrossEntropyLoss",
    "LigerFusedLinearDPOLoss",
    "LigerFusedLinearKTOLoss",
    "LigerFusedLinearORPOLoss",
    "LigerFusedLinearSimPOLoss",
    "liger_fused_linear_cpo",
    "liger_fused_linear_dpo",
    "liger_fused_linear_kto",
    "liger_fused_linear_orpo",
    "liger_fused_linear_simpo",
]

# ---- preference losses ---------------------------------------------------------------------------


class LigerFusedLinearDPOLoss(nn.Module):
    """`liger_fused_linear_dpo` as a module."""

    _SUPPORTED_LOSS_TYPES = frozenset(DPO_LOSS_TYPES)

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
        *,
        workspace: int | None = None,
    ):
        super().__init__()
        dpo_loss(loss_type, beta, label_smoothing, discopop_tau)  # raises here, not at the first batch
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        self.workspace = workspace

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (B, T, H)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
        ref_input: Tensor | None = None,  # (B, T, H')
        ref_weight: Tensor | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        *,
        ref_logps: Tensor | None = None,  # (B,) or (B, T)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_dpo(
            _input,
            lin_weight,
            target,
            bias,
            ref_input,
            ref_weight,
            ref_bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            compute_nll_loss=self.compute_nll_loss,
            use_ref_model=self.use_ref_model,
            average_log_prob=self.average_log_prob,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            discopop_tau=self.discopop_tau,
            alpha=self.alpha,
            ref_logps=ref_logps,
            workspace=self.workspace,
        )


class LigerFusedLinearORPOLoss(nn.Module):
    """`liger_fused_linear_orpo` as a module."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
        *,
        workspace: int | None = None,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.workspace = workspace

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (B, T, H)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
        nll_target: Tensor | None = None,  # (B, T)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_orpo(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            compute_nll_loss=self.compute_nll_loss,
            nll_target=nll_target,
            workspace=self.workspace,
        )


class LigerFusedLinearSimPOLoss(nn.Module):
    """`liger_fused_linear_simpo` as a module; the SFT term is on unless `compute_nll_loss` is false, as in Liger."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        gamma: float = 0.5,
        chunk_size: int = 1,
        *,
        workspace: int | None = None,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.gamma = gamma
        self.chunk_size = chunk_size
        self.workspace = workspace

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (B, T, H)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_simpo(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            compute_nll_loss=self.compute_nll_loss,
            gamma=self.gamma,
            workspace=self.workspace,
        )


class LigerFusedLinearCPOLoss(nn.Module):
    """`liger_fused_linear_cpo` as a module."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        label_smoothing: float = 0.0,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        workspace: int | None = None,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.label_smoothing = label_smoothing
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.workspace = workspace

    def forward(
        self,
        lin_weight: Tensor,  # (V, H)
        _input: Tensor,  # (B, T, H)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_cpo(
            _input,
            lin_weight,
            target,
            bias,
            ignore_index=self.ignore_index,
            beta=self.beta,
            alpha=self.alpha,
            label_smoothing=self.label_smoothing,
            compute_nll_loss=self.compute_nll_loss,
            average_log_prob=self.average_log_prob,
            workspace=self.workspace,
        )


class LigerFusedLinearKTOLoss(nn.Module):
    """`liger_fused_linear_kto` as a module; `_input` comes before the weight, as in Liger."""

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compiled: bool = True,
        use_ref_model: bool = False,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        *,
        workspace: int | None = None,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.workspace = workspace

    def forward(
        self,
        _input: Tensor,  # (B, T, H)
        lin_weight: Tensor,  # (V, H)
        target: Tensor,  # (B, T)
        bias: Tensor | None = None,  # (V,)
        preference_labels: Tensor | None = None,  # (B,) bool
        ref_input: Tensor | None = None,  # (B, T, H')
        ref_weight: Tensor | None = None,  # (V, H')
        ref_bias: Tensor | None = None,  # (V,)
        kl: Tensor | float | None = None,  # () or (1,), or (B,)
        *,
        ref_logps: Tensor | None = None,  # (B,) or (B, T)
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return liger_fused_linear_kto(
            _input,
            lin_weight,
            target,
            preference_labels,
            bias,
            ref_input,
            ref_weight,
            ref_bias,
            kl,
            ignore_index=self.ignore_index,
            beta=self.beta,
            use_ref_model=self.use_ref_model,
            average_log_prob=self.average_log_prob,
            ref_logps=ref_logps,
            workspace=self.workspace,
        )
