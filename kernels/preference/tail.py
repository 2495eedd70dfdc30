"""From log-probabilities to a preference loss in one Triton launch each way: the operators, and the autograd.

    N completion tokens, end to end; S sequences, divided by cu_seqlens (S + 1,); K mismatched ones, for KTO's z0.

The equations are those of DPO, IPO and KTO in `prefuse.losses`; here they are named by a string and take numbers, as
torch.library wants it. `device` has the kernels. Any other loss, and any other device, runs in torch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefuse.kernels.checks import refuse_double_backward

# What a loss logs, in the order of the rows of `Tail.metrics`.
SIDES = ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
METRICS = {
    "dpo": (*SIDES, "rewards/accuracies", "rewards/margins"),
    "ipo": (*SIDES, "rewards/accuracies", "rewards/margins"),
    "kto": (*SIDES, "kl"),
}


class Tail(NamedTuple):
    """What comes back; everything but `loss` is detached."""

    loss: Tensor  # () float32
    losses: Tensor  # (P,) for pairs, else (S,), float32
    logps: Tensor  # (S,) float64
    rewards: Tensor  # (S,) float32
    metrics: Tensor  # (len(METRICS[loss]), 2) float64: sum and count


def preference_tail(
    loss: str,
    logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (N,) or (S,)
    cu_seqlens: Tensor,  # (S + 1,)
    counts: Tensor,  # (S,)
    labels: Tensor | None,  # (S,)
    z0: Tensor | float | tuple[Tensor, Tensor, Tensor] | None,
    num_items: Tensor | float,
    per_token: bool,
    kl_per_token: bool,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    average: bool = False,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tail:
    """Equals `prefuse.preference_loss` with `impl="torch"`, to rounding in float64.

    `loss` is a key of METRICS and the keywords are its dataclass's fields. `per_token` says that `ref_logps` is (N,).
    `z0` may be mismatched completions (logps (N',), ref_logps (N',) with `kl_per_token` or (K,), cu_seqlens (K + 1,)).
    """
    mismatched = z0 if isinstance(z0, tuple) else (None, None, None)
    z0_at, z0_number = _tensor_or_number(None if isinstance(z0, tuple) else z0, logps.device)
    items_at, items = _tensor_or_number(num_items, logps.device)
    total, *rest, _ = _forward_op(
        logps, ref_logps, cu_seqlens, counts, labels, z0_at, *mismatched, items_at, z0_number, items, loss, beta,
        label_smoothing, average, desirable_weight, undesirable_weight, per_token, kl_per_token,
    )  # fmt: skip
    return Tail(total, *(x.detach() for x in rest))


def _tensor_or_number(x: Tensor | float | None, device: torch.device) -> tuple[Tensor | None, float]:
    """(tensor or None, number): the number is used if there is no tensor. A CPU tensor is copied without a wait."""
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True), 0.0
    return None, float(x or 0.0)


# ---------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("prefuse::preference_tail_forward", mutates_args=())
def _forward_op(
    logps: Tensor,
    ref_logps: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,
    labels: Tensor | None,
    z0: Tensor | None,
    kl_logps: Tensor | None,
    kl_ref_logps: Tensor | None,
    kl_cu_seqlens: Tensor | None,
    num_items: Tensor | None,
    z0_number: float,
    items: float,
    loss: str,
    beta: float,
    label_smoothing: float,
    average: bool,
    desirable_weight: float,
    undesirable_weight: float,
    per_token: bool,
    kl_per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from prefuse.kernels.preference import launch

    outputs = _empty_outputs(logps, counts, loss)
    launch.forward(
        logps, ref_logps, cu_seqlens, counts, labels, z0,
        None if kl_logps is None else (kl_logps, kl_ref_logps, kl_cu_seqlens), num_items, z0_number, items, loss, beta,
        label_smoothing, average, (desirable_weight, undesirable_weight), per_token, kl_per_token, outputs,
    )  # fmt: skip
    return outputs


@_forward_op.register_fake
def _(logps, ref_logps, cu_seqlens, counts, labels, z0, kl_logps, kl_ref_logps, kl_cu_seqlens, num_items, z0_number,
      items, loss, *numbers):  # fmt: skip
    return _empty_outputs(logps, counts, loss)


def _empty_outputs(logps: Tensor, counts: Tensor, loss: str) -> tuple[Tensor, ...]:
    """total, losses, sums, rewards, metrics, slopes = dtotal / dr_s"""
    sequences = counts.shape[0]

    def new(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logps.device)

    return (
        new(dtype=torch.float32), new(sequences if loss == "kto" else sequences // 2, dtype=torch.float32),
        new(sequences), new(sequences, dtype=torch.float32), new(len(METRICS[loss]), 2), new(sequences),
    )  # fmt: skip


@torch.library.custom_op("prefuse::preference_tail_backward", mutates_args=())
def _backward_op(grad: Tensor, slopes: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    from prefuse.kernels.preference import launch

    return launch.backward(grad, slopes, cu_seqlens, tokens)


@_backward_op.register_fake
def _(grad, slopes, cu_seqlens, tokens):
    return torch.empty(tokens, dtype=torch.float32, device=slopes.device)


def _save(ctx, inputs, output) -> None:
    logps, _, cu_seqlens, *_ = inputs
    ctx.set_materialize_grads(False)
    ctx.tokens = logps.shape[0]
    ctx.save_for_backward(output[-1], cu_seqlens)


def _backward(ctx, grad, *_):
    nothing = (None,) * 19
    return None if grad is None else _backward_op(grad, *ctx.saved_tensors, ctx.tokens), *nothing


_forward_op.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(refuse_double_backward("preference_loss", instead="torch"))
