"""Launches the preference losses' kernels: one forward, one backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from prefuse.kernels.launch import on_its_device
from prefuse.kernels.preference import device
from prefuse.kernels.tiles.table import INTERPRETER, capability

# Tokens and sequences in one step of a program; under the interpreter few, so that small tests have many steps.
BLOCKS = {True: {"BLOCK": 16, "BLOCK_S": 4}, False: {"BLOCK": 1024, "BLOCK_S": 256}}
# Fused into one rounding, beta r_c - beta r_r of two equal log-ratios would not be 0.
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


def _blocks(device: torch.device) -> dict[str, int]:
    return BLOCKS[capability(device) == INTERPRETER]


@on_its_device
def forward(
    logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (N,) or (S,)
    cu_seqlens: Tensor,  # (S + 1,)
    counts: Tensor,  # (S,)
    labels: Tensor | None,  # (S,)
    z0: Tensor | None,  # ()
    mismatched: tuple[Tensor, Tensor, Tensor] | None,  # (kl_N,), (kl_N,) or (K,), (K + 1,)
    num_items: Tensor | None,  # ()
    z0_number: float,
    items: float,
    loss: str,
    beta: float,
    label_smoothing: float,
    average: bool,
    weights: tuple[float, float],
    per_token: bool,
    kl_per_token: bool,
    outputs: tuple[Tensor, ...],  # total, losses, sums, rewards, metrics, slopes: written whole
) -> None:
    sequences = len(cu_seqlens) - 1
    kl_logps, kl_ref_logps, kl_cu_seqlens = (x.contiguous() for x in mismatched or (logps, ref_logps, cu_seqlens))
    others = len(kl_cu_seqlens) - 1 if mismatched else 0
    arrived = torch.zeros(1, dtype=torch.int32, device=logps.device)
    ratios = torch.empty(sequences + others, dtype=torch.float64, device=logps.device)
    # Without any sequence one program still writes the sums.
    device.forward_kernel[(max(sequences + others, 1),)](
        logps.contiguous(), ref_logps.contiguous(), cu_seqlens.contiguous(), counts.contiguous(),
        counts if labels is None else labels.contiguous().view(torch.uint8), kl_logps, kl_ref_logps, kl_cu_seqlens,
        ratios if z0 is None else z0, ratios if num_items is None else num_items, arrived, ratios, *outputs,
        len(logps), sequences, len(kl_logps), others, z0_number, items, beta, label_smoothing, *weights,
        LOSS=loss, SMOOTHED=label_smoothing > 0, AVERAGE=average,
        Z0="mismatched" if mismatched else "number" if z0 is None else "tensor", ITEMS=num_items is not None,
        PER_TOKEN=per_token, KL_PER_TOKEN=kl_per_token, **_blocks(logps.device), **LAUNCH,
    )  # fmt: skip


@on_its_device
def backward(grad: Tensor, slopes: Tensor, cu_seqlens: Tensor, tokens: int) -> Tensor:
    """(), (S,), (S + 1,) -> (N,) float32"""
    sequences = len(slopes)
    out = torch.empty(tokens, dtype=torch.float32, device=slopes.device)
    if tokens == 0 or sequences == 0:
        return out.zero_()
    block = _blocks(out.device)["BLOCK"]
    device.backward_kernel[(triton.cdiv(tokens, block),)](
        grad.contiguous(), slopes, cu_seqlens.contiguous(), out, tokens, sequences, sequences.bit_length(),
        BLOCK=block, **LAUNCH,
    )  # fmt: skip
    return out
