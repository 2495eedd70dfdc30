"""`linear_logprobs` in Triton: the logits live in registers, tile by tile, and never reach memory in the forward.

    N tokens, D hidden, V vocabulary; a row's target is y. The kernels themselves stand in `device`.

Forward. `target_kernel` makes the targets' logits, `fold_kernel` folds one row block x one vocabulary segment into

    total = sum over v != y of exp(z_v - z_y)

and `finish_kernel` adds the segments in a fixed order: logp = -softplus(log total), q = sigmoid(log total) = 1 - p_y.
Rows whose target lies too far under another logit are folded once more against their running maximum; a program
without such a row returns at once, so the host need not read which rows they are.

Backward, a vocabulary slice at a time: `dlogits_kernel` recomputes the tiles and writes dz in the operands' dtype,
without the target's column; matrix products make `dhidden += dz @ W` and `dW = dz.T @ hidden` in float32; the target's
own term, which dominates and cancels, is added in float32 by `target_hidden_kernel` and `target_weight_kernel`.

With a frozen head no backward is needed. d logp / d hidden = q (W[y] - mean of W under the other tokens), so the
forward also stores e tile by tile ("pull"), one matrix product makes the mean, and dhidden is g times that direction.
In mode "stash" the forward keeps e of all tiles, N * V numbers, and the backward recomputes no tile.

No atomics: every number is the sum of the same terms in the same order, run after run.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefuse.kernels import cost
from prefuse.kernels.gemm import addmm_
from prefuse.kernels.gradients import Gradients, Needs, Sums
from prefuse.kernels.launch import (
    IGNORED,
    LN2,
    Operands,
    backward_slices,
    loadable,
    on_its_device,
    tile_args,
)
from prefuse.kernels.logprobs import device
from prefuse.kernels.logprobs.fold import HeadForward
from prefuse.kernels.logprobs.launch_fold import FoldLaunches, slice_width, stashed, target_logits
from prefuse.kernels.logprobs.portable import RowGrads, add_far_rows, stash_size
from prefuse.kernels.options import OUTPUTS, HeadOptions
from prefuse.kernels.tiles.table import INTERPRETER, fold_row_name
from prefuse.kernels.vocab import Whole

if TYPE_CHECKING:
    from prefuse.kernels.logprobs.sparse import ColumnStatistic

TL_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@on_its_device
def forward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    options: HeadOptions,
    outputs: tuple[str, ...] = (),
    mode: str = "lean",
    shard: Whole | None = None,
    statistic: ColumnStatistic | None = None,
) -> HeadForward:
    """One pass over the vocabulary, which keeps what `mode` says; then a second pass for row blocks with a far row.

    Adds each tile's e to `statistic`, if one is given (mode "lean", every row kept). That changes no bit of the result.
    """
    op = Operands(hidden, weight, bias, targets, options, shard)
    fold = FoldLaunches(op, outputs, pull=mode != "lean" or statistic is not None)
    numbers = stash_size(len(hidden), len(weight), hidden) if mode == "stash" else 0
    stash = hidden.new_empty(numbers)
    if mode == "lean" and statistic is None:
        pulled = fold.run()
    else:
        pulled = fold.pull(stash if mode == "stash" else None, statistic)
    fold.finish(pull=mode != "lean" or statistic is not None)
    fold.run(rescue=True)
    fold.finish(rescue=True)
    direction = _direction(op, fold, pulled) if mode == "frozen" else hidden.new_empty(0, hidden.shape[1])
    if "mean_logits" in outputs:
        fold.extra[OUTPUTS.index("mean_logits")] /= op.shard.size(len(weight))
    extra = fold.extra[[OUTPUTS.index(name) for name in outputs]] if outputs else fold.extra[:, : len(hidden)]
    scale = fold.scale if mode == "stash" else fold.scale.new_empty(0)
    return HeadForward(fold.logps, fold.lse, fold.q, extra, direction, stash, scale)


def _direction(op: Operands, fold: FoldLaunches, pulled: Tensor) -> Tensor:
    """(N, D) d logp / d hidden = q (W[y] - mean of W under the other tokens), with each one's slope."""
    ones = torch.ones_like(fold.q)
    row = RowGrads(ones, fold.lse, fold.q, None, None)
    c = _target_coefficients(op, torch.where(op.y == IGNORED, 0.0, ones) * op.options.slope, None, row)
    direction = _add_targets_to_hidden(op, c, pulled, fold.scale * op.options.slope)
    far = fold.far.nonzero()[:, 0]
    if len(far):  # their stored weights were clipped: recompute
        direction[far] = _backward(op[far], row[far], Needs(True, False, False)).hidden
    return op.shard.add_(direction).to(op.dtype)


@on_its_device
def backward(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    row: RowGrads,
    options: HeadOptions,
    needs: Needs,
    shard: Whole | None = None,
) -> Gradients:
    """dhidden (N, D), dweight (V, D), dbias (V,): accumulated in float32, each row of dweight written once."""
    op = Operands(hidden, weight, bias, targets, options, shard)
    return _over_ranks(op, _backward(op, row, needs))


def _over_ranks(op: Operands, grads: Gradients) -> Gradients:
    """dhidden summed over the ranks that share the head, in hidden's dtype."""
    return grads if grads.hidden is None else grads._replace(hidden=op.shard.add_(grads.hidden).to(op.dtype))


def _backward(op: Operands, row: RowGrads, needs: Needs) -> Gradients:
    """`backward`; dhidden is this rank's part, in float32."""
    grad = torch.where(op.kept, row.grad, 0.0) * op.options.slope
    entropy_grad = None
    if row.grad_entropy is not None:
        entropy_grad = torch.where(op.kept, row.grad_entropy, 0.0) * op.options.slope
    c = _target_coefficients(op, grad, entropy_grad, row)
    y_sorted, order = torch.sort(op.y, stable=True)

    def targets(dw: Tensor | None, db: Tensor | None, first: int) -> None:
        if dw is not None:
            _add_targets_to_weight(op, dw, first, order, y_sorted, c)
        if db is not None:
            _add_targets_to_bias(db, first, op.y, c)

    def dlogits(part: tuple[Tensor, Tensor], first: int, rows: slice, dz: Tensor) -> None:
        _dlogits(op, *part, first, rows, row, grad, entropy_grad, dz)

    dhidden = _add_targets_to_hidden(op, c) if needs.hidden else None
    # Zeroed where ignored, for 0 * NaN is NaN.
    clean = torch.where(op.kept[:, None], op.hidden, 0.0).contiguous()
    return backward_slices(clean, op.weight, op.bias, needs, dhidden, op.part, dlogits, targets)


@on_its_device
def backward_stashed(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    targets: Tensor,  # (N,)
    row: RowGrads,
    stash: Tensor,
    scale: Tensor,  # (N,)
    options: HeadOptions,
    needs: Needs,
    into: Sums | None = None,
    shard: Whole | None = None,
) -> Gradients:
    """`backward` from a forward's stash P (N, V): dhidden = c W[y] - a (P @ W), dweight = P.T @ (-a hidden) + targets.

    The weights of rows that the stash could not hold are 0 in it: these rows go through `backward`. With `into`,
    dweight and dbias are added to it.
    """
    op = Operands(hidden, weight, bias, targets, options, shard)
    (n, d), v = hidden.shape, len(weight)
    grad = torch.where(op.kept, row.grad, 0.0) * options.slope
    near = scale > 0
    a = grad * scale
    c = torch.where(near, _target_coefficients(op, grad, None, row), 0.0)
    scaled = (
        (torch.where(op.kept[:, None], hidden, 0.0).float() * -a[:, None]).to(hidden.dtype) if needs.weight else None
    )

    pulled = hidden.new_zeros(n, d, dtype=torch.float32) if needs.hidden else None
    dweight, dbias = into or Sums.empty(weight, bias, needs)
    y_sorted, order = torch.sort(op.y, stable=True)
    width = slice_width(v, op.config(fold_row_name(False, True, op.softcap), op.part(0, 1)[0]))
    for first in range(0, v, width):
        w, _ = op.part(first, min(first + width, v))
        weights = stashed(stash, first, len(w), n)
        columns = slice(first, first + len(w))
        if needs.hidden:
            addmm_(pulled, weights, w)
        if needs.weight:
            dw = into.dweight[columns] if into else hidden.new_zeros(len(w), d, dtype=torch.float32)
            _add_targets_to_weight(op, dw, first, order, y_sorted, c)
            addmm_(dw, weights.T, scaled)
            if not into:
                dweight[columns] = dw
        if needs.bias:
            db = hidden.new_zeros(len(w), dtype=torch.float32)
            _add_targets_to_bias(db, first, op.y, c)
            for rows in torch.arange(n, device=hidden.device).split(1024):
                db -= (weights[rows].float() * a[rows, None]).sum(0)
            dbias[columns] = dbias[columns] + db if into else db
    dhidden = _add_targets_to_hidden(op, c, pulled, a) if needs.hidden else None

    far = (~near & (row.q > 0) & op.kept).nonzero()[:, 0]
    grads = Gradients(dhidden, dweight, dbias)
    if len(far):
        add_far_rows(far, _backward(op[far], row[far], needs), grads)
    return _over_ranks(op, grads)


def backward_measured(
    hidden: Tensor,  # (N, D) every row kept
    weight: Tensor,  # (K, D)
    bias: Tensor | None,  # (K,)
    targets: Tensor,  # (N,)
    row: RowGrads,
    logps: Tensor,  # (N,)
    options: HeadOptions,
    needs: Needs,
) -> tuple[Tensor, Gradients]:
    """`backward` over K columns of a head whose `row` and `logps` are known, dweight and dbias in float32; and (N,)
    what these columns weigh in each row's softmax, the target left out."""
    part = forward(hidden, weight, bias, targets, options, (), "stash")
    # The columns' own softmax: p_iv of the whole = p_iv here * (p_iy of the whole / p_iy here).
    ratio = (logps - part.logps).exp()
    sums = Sums.zeros(weight, bias, needs, torch.float32)
    grads = backward_stashed(
        hidden, weight, bias, targets, row, part.stash, part.scale * ratio, options, needs, sums
    )  # fmt: skip
    return part.q * ratio, grads


def _target_coefficients(op: Operands, grad: Tensor, grad_entropy: Tensor | None, row: RowGrads) -> Tensor:
    """(N,) dL/d(product) of each row's own target, with the slope: g q, and the entropy's term. 0 if it is not here."""
    c = torch.where(op.here, grad * row.q, 0.0)
    if grad_entropy is None and not op.softcap:
        return c
    z_y = target_logits(op) * LN2
    if grad_entropy is not None:
        # dz_y = g q - g_H p_y (log p_y + H)
        logp = torch.where(op.here, z_y - row.lse, -math.inf)
        own = logp.exp() * (logp.clamp_min(-1e4) + row.entropy)
        c = c - grad_entropy * own
    if op.softcap:
        c = c * (1 - (z_y * op.options.temperature / op.options.softcap).square())
    return torch.where(op.here, c, 0.0)


def _add_targets_to_hidden(
    op: Operands, c: Tensor, pulled: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """(N, D) float32: c_i W[y_i], minus scale_i pulled_i (in place) where there is a pull."""
    n, d = op.hidden.shape
    dhidden = op.hidden.new_empty(n, d, dtype=torch.float32) if pulled is None else pulled
    block_n, block_d = (16, 32) if op.chip == INTERPRETER else (16, 128)
    device.target_hidden_kernel[(triton.cdiv(n, block_n), triton.cdiv(d, block_d))](
        op.weight, op.y, c, c if scale is None else scale, dhidden, n, len(op.weight), d, *op.weight.stride(),
        PULL=pulled is not None, DTYPE=TL_DTYPE[op.dtype], BLOCK_N=block_n, BLOCK_D=block_d,
    )  # fmt: skip
    return dhidden


def _add_targets_to_weight(op: Operands, dw: Tensor, first: int, order: Tensor, y_sorted: Tensor, c: Tensor) -> None:
    n, d = op.hidden.shape
    block_d = min(triton.next_power_of_2(d), 64 if op.chip == INTERPRETER else 1024)
    device.target_weight_kernel[(n, triton.cdiv(d, block_d))](
        op.hidden, order, y_sorted, c, dw, n, len(dw), d, first, *op.hidden.stride(), BLOCK_D=block_d
    )


def _add_targets_to_bias(db: Tensor, first: int, y: Tensor, c: Tensor) -> None:
    """db[v] += sum of c over the rows whose target is v: a one-hot product, for `index_add_` is atomic on CUDA."""
    inside = (y >= first) & (y < first + len(db))
    for rows in torch.arange(len(y), device=y.device).split(1024):
        one_hot = (y[rows, None] - first) == torch.arange(len(db), device=y.device)
        db += (one_hot * torch.where(inside[rows], c[rows], 0.0)[:, None]).sum(0)


def _dlogits(
    op: Operands, w: Tensor, b: Tensor, first: int, rows: slice, row: RowGrads, grad: Tensor,
    entropy_grad: Tensor | None, dz: Tensor,
) -> None:  # fmt: skip
    """dL/d(products) of these rows, without the targets' own, into `dz (rows, C)` in the operands' dtype."""
    h, (n, c) = op.hidden[rows], dz.shape
    config = op.config("dlogits", w, h)
    has_entropy = entropy_grad is not None
    cost.report_cost("dlogits", 2 * h.numel() * c, cost.size(h, w), cost.size(dz))
    device.dlogits_kernel[(triton.cdiv(n, config.block_n) * triton.cdiv(c, config.block_v),)](
        loadable(h, config.block_n, config.block_d, config), loadable(w, config.block_v, config.block_d, config),
        b, op.y[rows], row.lse[rows], grad[rows], entropy_grad[rows] if has_entropy else grad,
        row.entropy[rows] if has_entropy else grad, loadable(dz, config.block_n, config.block_v, config),
        n, c, h.shape[1], first, *h.stride(), *w.stride(), dz.stride(0), op.k_in, op.k_out, **op.flags(),
        ENTROPY=has_entropy, **tile_args(config),
    )  # fmt: skip
