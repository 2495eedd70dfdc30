"""Liger's functional losses, `liger_fused_linear_dpo` and the like: packed, then computed like any loss here.

    B rows of T positions, H hidden size, V vocabulary. Paired losses: the first half of the rows is chosen, the second
    rejected, row i and row B / 2 + i a pair. `target[b, t]` is predicted by `_input[b, t]`: shifting is the caller's.

`compiled` and `chunk_size` are Liger's, and mean nothing here: no loss depends on how a batch is cut. `workspace` is
`linear_preference_loss`'s: bytes that may be kept for the backward. `losses` lists what differs from Liger.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from prefuse.kernels import HeadOptions
from prefuse.kernels.logprobs.linear_logprobs import logprobs_within
from prefuse.liger.rows import KeptRows, keep_rows, kept_reference_logps, logit_sums, take_rows
from prefuse.losses.contract import Defaults, Loss, Need, Sequences, is_batchwise, needs_of
from prefuse.losses.likelihood import CPO, ORPO, ChosenNLL, Mixture, SimPO
from prefuse.losses.names import fields_of, loss_named
from prefuse.losses.unpaired import KTO
from prefuse.preference import WORKSPACE, PreferenceOutput, linear_preference_loss, preference_loss

DPO_LOSS_TYPES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop",
)  # fmt: skip


# ---- losses of means -----------------------------------------------------------------------------


def _of_means(seq: Sequences) -> Sequences:
    """Every log-probability divided by its number of tokens: what Liger calls `average_log_prob`."""
    n = seq.lengths
    return seq._replace(ratios=seq.ratios / n, logps=seq.logps / n, lengths=torch.ones_like(n))


@dataclass(frozen=True)
class _Averaged(Defaults):
    """A loss over pairs, of means per token."""

    loss: Loss

    @property
    def needs(self) -> frozenset[Need]:
        return needs_of(self.loss)

    @property
    def batchwise(self) -> bool:
        return is_batchwise(self.loss)

    def losses(self, seq: Sequences) -> Tensor:
        return self.loss.losses(_of_means(seq))

    def rewards(self, seq: Sequences) -> Tensor:
        return self.loss.rewards(_of_means(seq))


@dataclass(frozen=True)
class _RowwiseKTO(KTO):
    """KTO with a reference point for each row, or of means per token."""

    kl: Tensor | None = None  # (B,); None: the z0 of the call
    average: bool = False

    @property
    def batchwise(self) -> bool:  # `kl` belongs to all rows, not to a group of them
        return self.kl is not None

    def losses(self, seq: Sequences) -> Tensor:  # (S,)
        seq = _of_means(seq) if self.average else seq
        return super().losses(seq if self.kl is None else seq._replace(z0=self.kl))

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return super().rewards(_of_means(seq) if self.average else seq)


# ---- paired losses -------------------------------------------------------------------------------


def _paired(
    loss: Loss,
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    *,
    average: bool,  # whether log-probabilities are means per token; ORPO's and SimPO's always are
    alpha: float | None,  # weight of the SFT term; None for none
    workspace: int | None,
    nll_target: Tensor | None = None,
    **reference,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The loss, and what Liger returns beside it for every paired loss."""
    packed = keep_rows(_input, target, ignore_index, paired=True)
    pairs = max(len(target) // 2, 1)
    ref_logps = kept_reference_logps(packed, target, **reference) if "reference" in needs_of(loss) else None
    loss = _Averaged(loss) if average else loss

    # The mean over the chosen tokens of the batch: its divisor is known before any log-probability.
    tokens = packed.counts[0::2].sum()
    if alpha is not None and nll_target is None:
        loss = Mixture((loss, ChosenNLL(tokens.clamp_min(1).double() / pairs)), (1.0, alpha))
    arguments = (packed.targets, packed.cu_seqlens, ref_logps, loss)
    if alpha is None or nll_target is None:
        out = linear_preference_loss(take_rows(_input, packed.rows), weight, *arguments, bias=bias, workspace=workspace)
        total, nll = out.loss, -out.logps[0::2].sum() / tokens.clamp_min(1)
    else:
        out, nll = _with_other_nll(
            _input, weight, target, nll_target, bias, ignore_index, packed, ref_logps, loss, workspace
        )
        total = out.loss + alpha * nll.float()

    logps = out.logps / packed.counts.clamp_min(1) if average else out.logps
    chosen = torch.arange(len(target), device=target.device) < len(target) // 2
    sums = logit_sums(_input, weight, bias, (chosen, ~chosen))
    logits = [x / (pairs * max(target.shape[1], 1) * len(weight)) for x in sums]
    nll = nll.detach().float() if alpha is not None else torch.zeros_like(total)
    return total, (logps[0::2].float(), logps[1::2].float(), *logits, nll, out.rewards[0::2], out.rewards[1::2])


def _with_other_nll(
    _input: Tensor, weight: Tensor, target: Tensor, nll_target: Tensor, bias: Tensor | None, ignore_index: int,
    packed: KeptRows, ref_logps: Tensor | None, loss: Loss, workspace: int | None,
) -> tuple[PreferenceOutput, Tensor]:  # fmt: skip
    """The preference loss and the negative log-likelihood of other targets of the chosen rows, in one pass.

    Positions where both have the same target run once.
    """
    if nll_target.shape != target.shape:
        raise ValueError(f"expected nll_target {tuple(target.shape)} as target, got {tuple(nll_target.shape)}")
    chosen = torch.arange(len(target), device=target.device)[:, None] < len(target) // 2
    counts = chosen & (nll_target != ignore_index)
    shared = counts & (nll_target == target)
    more = (counts & ~shared).flatten().nonzero()[:, 0]
    rows = torch.cat([packed.rows, more])
    targets = torch.cat([packed.targets, nll_target.flatten()[more]])
    workspace = WORKSPACE if workspace is None else workspace
    logps = logprobs_within(workspace, take_rows(_input, rows), weight, targets, bias, HeadOptions(), (), "auto")
    own, others = logps.split([len(packed.rows), len(more)])
    out = preference_loss(own, ref_logps, packed.cu_seqlens, loss)
    twice = torch.where(shared.flatten()[packed.rows], own, 0.0)
    return out, -(twice.double().sum() + others.double().sum()) / counts.sum().clamp_min(1)


def dpo_loss(loss_type: str, beta: float, label_smoothing: float, discopop_tau: float) -> Loss:
    """The loss that Liger's arguments name; ValueError for one that it does not have."""
    if loss_type not in DPO_LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {', '.join(DPO_LOSS_TYPES)}, got {loss_type!r}")
    given = {"label_smoothing": label_smoothing} if label_smoothing or loss_type == "exo_pair" else {}
    given |= {"label_smoothing": 0.0} if loss_type == "robust" and not label_smoothing else {}
    given |= {"tau": discopop_tau} if loss_type == "discopop" else {}
    if "label_smoothing" in given and "label_smoothing" not in fields_of(loss_type):
        raise ValueError(f"loss_type {loss_type!r} has no label smoothing, got label_smoothing={label_smoothing}")
    return loss_named(loss_type, beta=beta, **given)


def liger_fused_linear_dpo(
    _input: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (B, T)
    bias: Tensor | None = None,  # (V,)
    ref_input: Tensor | None = None,  # (B, T, H')
    ref_weight: Tensor | None = None,  # (V, H')
    ref_bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    discopop_tau: float = 0.05,
    alpha: float = 1.0,
    *,
    ref_logps: Tensor | None = None,  # (B,) sums over tokens, or (B, T)
    workspace: int | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Equals, with `c` the chosen half and `r` the rejected half of the rows, and a mean over pairs::

        logps = (torch.log_softmax(_input @ weight.T + bias, -1).gather(-1, target) * (target != ignore_index)).sum(-1)
        loss = -logsigmoid(beta * ((logps[c] - ref_logps[c]) - (logps[r] - ref_logps[r]))).mean()

    for "sigmoid"; the other `loss_type`s are those of TRL's DPOTrainer (`prefuse.loss_named`). With `compute_nll_loss`
    plus `alpha` times the negative log-likelihood of the chosen rows, a mean over their tokens.

    Returns:
        loss, (chosen_logps, rejected_logps (B / 2,), chosen_logits_mean, rejected_logits_mean, nll_loss (),
        chosen_rewards, rejected_rewards (B / 2,)); only the loss carries a gradient.
    """
    return _paired(
        dpo_loss(loss_type, beta, label_smoothing, discopop_tau), _input, weight, target, bias, ignore_index,
        average=average_log_prob, alpha=alpha if compute_nll_loss else None, workspace=workspace,
        use_ref_model=use_ref_model, ref_input=ref_input, ref_weight=ref_weight, ref_bias=ref_bias, ref_logps=ref_logps,
    )  # fmt: skip


def liger_fused_linear_orpo(
    _input: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (B, T)
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = True,
    nll_target: Tensor | None = None,  # (B, T)
    compiled: bool = True,
    chunk_size: int = 1,
    *,
    workspace: int | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Equals `prefuse.ORPO(beta)`, its SFT term a mean over the chosen tokens of the batch, or over `nll_target`'s.

    Returns `liger_fused_linear_dpo`'s tuple and two more: the means of log sigmoid(log-odds) and of the log-odds.
    """
    total, aux = _paired(
        ORPO(beta, nll_weight=0.0), _input, weight, target, bias, ignore_index,
        average=True, alpha=1.0 if compute_nll_loss else None, workspace=workspace, nll_target=nll_target,
    )  # fmt: skip
    log_odds = ORPO.log_odds(aux[0].double()) - ORPO.log_odds(aux[1].double())
    means = [x.sum().float() / max(len(x), 1) for x in (logsigmoid(log_odds), log_odds)]
    return total, (*aux, *means)


def liger_fused_linear_simpo(
    _input: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (B, T)
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    beta: float = 0.1,
    alpha: float = 1.0,
    label_smoothing: float = 0.0,
    compute_nll_loss: bool = False,
    compiled: bool = True,
    gamma: float = 0.5,
    chunk_size: int = 1,
    *,
    workspace: int | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Equals `prefuse.SimPO(beta, gamma, label_smoothing)`, with `compute_nll_loss` plus `alpha` times the negative
    log-likelihood of the chosen rows. Returns what `liger_fused_linear_dpo` does.
    """
    return _paired(
        SimPO(beta, gamma, label_smoothing), _input, weight, target, bias, ignore_index,
        average=True, alpha=alpha if compute_nll_loss else None, workspace=workspace,
    )  # fmt: skip


def liger_fused_linear_cpo(
    _input: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (B, T)
    bias: Tensor | None = None,  # (V,)
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
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Equals `prefuse.CPO(beta, label_smoothing)`, its SFT term `alpha` times a mean over the chosen tokens of the
    batch. Returns what `liger_fused_linear_dpo` does.
    """
    return _paired(
        CPO(beta, label_smoothing, nll_weight=0.0), _input, weight, target, bias, ignore_index,
        average=average_log_prob, alpha=alpha if compute_nll_loss else None, workspace=workspace,
    )  # fmt: skip


# ---- KTO -----------------------------------------------------------------------------------------


def liger_fused_linear_kto(
    _input: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    target: Tensor,  # (B, T)
    preference_labels: Tensor,  # (B,)
    bias: Tensor | None = None,  # (V,)
    ref_input: Tensor | None = None,  # (B, T, H')
    ref_weight: Tensor | None = None,  # (V, H')
    ref_bias: Tensor | None = None,  # (V,)
    kl: Tensor | float | None = None,  # () or (1,), or (B,)
    ignore_index: int = -100,
    beta: float = 0.1,
    compiled: bool = True,
    use_ref_model: bool = True,
    average_log_prob: bool = False,
    chunk_size: int = 1,
    *,
    ref_logps: Tensor | None = None,  # (B,) sums over tokens, or (B, T)
    workspace: int | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Equals `prefuse.KTO(beta)` with z0 = `kl`, a mean over rows::

        losses = 1 - torch.sigmoid(beta * (logps - ref_logps - kl) * torch.where(preference_labels, 1, -1))

    `kl` is taken as it is, without a clamp, and lets no gradient through; None is 0, (B,) one number for each row.

    Returns:
        loss, (chosen_logps_sum, rejected_logps_sum, chosen_logits_sum, rejected_logits_sum, chosen_rewards_sum,
        rejected_rewards_sum), each () and a sum over the rows of that label; only the loss carries a gradient.
    """
    if preference_labels is None:
        raise ValueError("expected preference_labels (B,) bool, true for the desirable rows, got None")
    packed = keep_rows(_input, target, ignore_index, paired=False)
    ref = kept_reference_logps(packed, target, use_ref_model, ref_input, ref_weight, ref_bias, ref_logps)
    z0, by_row = _reference_point(kl, target)
    loss = KTO(beta)
    if by_row is not None or average_log_prob:
        loss = _RowwiseKTO(beta, kl=by_row, average=average_log_prob)
    out = linear_preference_loss(
        take_rows(_input, packed.rows), weight, packed.targets, packed.cu_seqlens, ref, loss, preference_labels, z0,
        bias=bias, workspace=workspace,
    )  # fmt: skip
    logps = out.logps / packed.counts.clamp_min(1) if average_log_prob else out.logps
    sides = (preference_labels, ~preference_labels)
    sums = [(x * side).sum().float() for x in (logps, out.rewards) for side in sides]
    return out.loss, (*sums[:2], *logit_sums(_input, weight, bias, sides), *sums[2:])


def _reference_point(kl: Tensor | float | None, target: Tensor) -> tuple[Tensor | float, Tensor | None]:
    """One number for all rows, and one for each row or None."""
    if kl is None:
        return 0.0, None
    kl = torch.as_tensor(kl, dtype=torch.float64, device=target.device).detach()
    if kl.numel() == 1:
        return kl.reshape(()), None
    if kl.shape != target.shape[:1]:
        raise ValueError(f"expected kl as one number or {(len(target),)}, one for each row, got {tuple(kl.shape)}")
    return 0.0, kl
