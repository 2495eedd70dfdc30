"""Liger's padded rows as packed tokens, and what else is read off them: the reference, and sums of logits.

B rows of T positions, H hidden size, V vocabulary, N tokens that are not ignored.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prefuse.kernels import linear_logprobs
from prefuse.tokens import keep_tokens


class KeptRows(NamedTuple):
    rows: Tensor  # (N,) where the labelled tokens stand among B * T positions
    targets: Tensor  # (N,)
    counts: Tensor  # (B,) in the order of the sequences
    cu_seqlens: Tensor  # (B + 1,)
    order: Tensor  # (B,) the row of each sequence


def keep_rows(_input: Tensor, target: Tensor, ignore_index: int, paired: bool) -> KeptRows:
    """The labelled tokens, end to end; for a paired loss, rows that are a pair become neighbours."""
    if _input.dim() != 3 or target.shape != _input.shape[:2]:
        raise ValueError(
            f"expected _input (B, T, H) and target (B, T), got {tuple(_input.shape)} and {tuple(target.shape)}"
        )
    batch, length = target.shape
    order = torch.arange(batch, device=target.device)
    if paired:
        if batch % 2:
            raise ValueError(
                f"expected as many chosen rows as rejected ones, got {batch} rows: stack the chosen half, then the "
                "rejected half"
            )
        order = order.view(2, -1).T.flatten()
    ordered = target[order]
    tokens = keep_tokens(ordered, ordered != ignore_index)
    rows = order[tokens.places // max(length, 1)] * length + tokens.places % max(length, 1)
    return KeptRows(rows, tokens.targets, tokens.lengths, tokens.cu_seqlens, order)


def take_rows(x: Tensor, rows: Tensor) -> Tensor:  # (B, T, H), (N,) -> (N, H)
    return x.flatten(0, 1).index_select(0, rows)


def kept_reference_logps(
    packed: KeptRows,
    target: Tensor,  # (B, T)
    use_ref_model: bool,
    ref_input: Tensor | None,  # (B, T, H')
    ref_weight: Tensor | None,  # (V, H')
    ref_bias: Tensor | None,  # (V,)
    ref_logps: Tensor | None,  # (B,) or (B, T)
) -> Tensor:  # (N,) or (B,)
    """The reference's log-probabilities, as `preference_loss` takes them; zeros for none, a uniform reference."""
    if ref_logps is not None:
        if ref_input is not None:
            raise ValueError("got ref_logps and ref_input: give the reference once, as one of them")
        if ref_logps.shape == target.shape:
            return ref_logps.flatten()[packed.rows]
        if ref_logps.shape == target.shape[:1]:
            return ref_logps[packed.order].double()
        raise ValueError(
            f"expected ref_logps {(len(target),)}, sums over tokens, or {tuple(target.shape)}, "
            f"got {tuple(ref_logps.shape)}"
        )
    if ref_input is None:
        if use_ref_model:
            raise ValueError(
                "use_ref_model is true, but there is no reference: give ref_input and ref_weight, or ref_logps; for a "
                "uniform reference set use_ref_model=False"
            )
        return torch.zeros(len(target), dtype=torch.float64, device=target.device)
    if ref_weight is None:
        raise ValueError("ref_input needs ref_weight, the reference's head")
    if ref_input.shape[:-1] != target.shape:
        raise ValueError(f"expected ref_input {(*target.shape, '...')}, got {tuple(ref_input.shape)}")
    with torch.no_grad():
        return linear_logprobs(take_rows(ref_input, packed.rows), ref_weight, packed.targets, bias=ref_bias)


@torch.no_grad()
def logit_sums(
    _input: Tensor,  # (B, T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    sides: tuple[Tensor, Tensor],  # (B,) bool each
) -> list[Tensor]:  # () float32 each
    """The sum of all logits of some rows, prompt and padding too, as Liger logs it: without making the logits.

    sum over i, v of z_iv = (sum over i of h_i) @ (sum over v of w_v) + rows sum over v of b_v
    """
    columns = weight.sum(0, dtype=torch.float64)
    offset = 0.0 if bias is None else bias.sum(dtype=torch.float64)
    by_row = _input.sum(1, dtype=torch.float64) @ columns + _input.shape[1] * offset  # (B,)
    return [(by_row * side).sum().float() for side in sides]
