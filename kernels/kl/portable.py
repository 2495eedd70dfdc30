"""`linear_kl` in plain PyTorch: both heads' tiles of logits side by side, no `(N, V)` tensor, any device.

    N tokens, D hidden (its own for each model), V vocabulary; R rows and C columns of one tile.
    p, r: probabilities of policy and reference; z, ref_z: their logits; x = log(r / p)

`sum of p (log p - log r)` loses its digits when the two are close: each term is as large as x, their sum as x^2.
Two identities keep them. Since p and r both sum to 1,

    KL(p || r) = sum of p (e^x - 1 - x)

whose terms are never negative, and which an error e of x's normalizer changes by e^2 / 2 only. And KL is additive over
any partition of the vocabulary: with p_t, r_t the two masses of a tile and KL_t that of its own normalized softmaxes,

    KL(p || r) = KL of the masses + sum of p_t KL_t

so that a tile needs nothing from the other tiles, one pass is enough, and folding adds numbers of one sign.

Backward: dKL/dz_v = p_v (mean - (d_v - anchor)), where d = ref_z - z and mean = sum of p (d - anchor). The anchor is d
of the policy's most likely token: where that has nearly all of p, its d and the mean of d agree in most digits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prefuse.kernels.gemm import accumulator_dtype
from prefuse.kernels.gradients import Gradients, Needs, zero_gradients
from prefuse.kernels.options import HeadOptions
from prefuse.kernels.slices import SlicedHead, aligned, backward_slices, kept_rows, row_tiles

# Stands for -inf where a difference of two of them must not be NaN.
LOWEST = -1e30
# From here on e^x - 1 - x is e^x to the last bit of a float64, and p e^x is taken as r: e^x may be infinite.
FAR = 40.0


class KLSide(NamedTuple):
    """One of the two models."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    options: HeadOptions

    def rows(self, index: Tensor) -> KLSide:
        return self._replace(hidden=self.hidden[index])

    def head(self) -> SlicedHead:
        return SlicedHead(self.weight, self.bias, self.options, self.hidden.dtype)


class KLForward(NamedTuple):
    """What the forward leaves for each row, (N,) each; the last three are what the backward needs."""

    kl: Tensor
    lse: Tensor  # logsumexp of the policy's logits
    anchor: Tensor  # d of the policy's most likely token, in nats (this file) or base 2 (`launch`)
    mean: Tensor  # sum of p (d - anchor)


class ColumnSums(NamedTuple):
    """The sums of a set of columns, (R, 1) each; both softmaxes are normalized over these columns alone."""

    top: Tensor  # largest logit of the policy
    total: Tensor  # sum of exp(z - top)
    ref_top: Tensor
    ref_total: Tensor
    kl: Tensor
    anchor: Tensor
    mean: Tensor


def forward(policy: KLSide, reference: KLSide, mask: Tensor | None) -> KLForward:  # mask (N,) bool: the kept rows
    """One pass over the vocabulary. Other rows are 0 everywhere."""
    rows = kept_rows(mask)
    if rows is None:
        return _forward_kept(policy, reference)
    result = empty_forward(policy.hidden)
    if len(rows):
        kept = _forward_kept(policy.rows(rows), reference.rows(rows))
        for x, values in zip(result, kept, strict=True):
            x[rows] = values
    return result


def empty_forward(hidden: Tensor) -> KLForward:
    return KLForward(*(hidden.new_zeros(len(hidden), dtype=accumulator_dtype(hidden.dtype)) for _ in range(4)))


def _forward_kept(policy: KLSide, reference: KLSide) -> KLForward:
    head, ref_head = policy.head(), reference.head()
    # Products of one shape, whatever N is: a BLAS may give a row other bits when the number of rows changes.
    tiles = row_tiles(policy.hidden, head.rows)
    ref_tiles = row_tiles(reference.hidden, head.rows)
    folded: list[ColumnSums | None] = [None] * len(tiles)
    # Two tiles of logits, and two for the terms.
    buffer = policy.hidden.new_empty(4, head.rows * head.columns, dtype=head.acc)
    for _, w, b, ref_w, ref_b in _slices(head, ref_head):
        z, ref_z, x, spare = (part[: head.rows * len(w)].view(head.rows, len(w)) for part in buffer)
        for i, (h, ref_h) in enumerate(zip(tiles, ref_tiles, strict=True)):
            head.logits(h, w, b, out=z)
            ref_head.logits(ref_h, ref_w, ref_b, out=ref_z)
            tile = _fold(z, ref_z, x, spare)
            folded[i] = tile if folded[i] is None else _merge(folded[i], tile)
    parts = [_finish(fold) for fold in folded]
    return KLForward(*(torch.cat(column)[: len(policy.hidden)] for column in zip(*parts, strict=True)))


def _fold(z: Tensor, ref_z: Tensor, x: Tensor, spare: Tensor) -> ColumnSums:
    """The logits (R, C) of one tile -> its `ColumnSums`; all four are overwritten."""
    top, at = z.max(-1, keepdim=True)
    top, ref_top = top.clamp_min(LOWEST), ref_z.amax(-1, keepdim=True).clamp_min(LOWEST)
    torch.sub(ref_z, z, out=x)
    anchor = x.gather(-1, at)
    p, r = z.sub_(top).exp_(), ref_z.sub_(ref_top).exp_()
    total, ref_total = p.sum(-1, keepdim=True), r.sum(-1, keepdim=True)
    p.div_(_or_one(total))
    r.div_(_or_one(ref_total))
    # x = d - (log-sum-exp of the reference - that of the policy), the difference taken before it is rounded
    shift = (ref_top - top) + (_or_one(ref_total) / _or_one(total)).log()
    # Where p is 0, x may be anything, NaN included; the term is then r.
    x.sub_(shift).masked_fill_(p == 0, 2 * FAR)
    mean = torch.sub(x, anchor - shift, out=spare).mul_(p).sum(-1, keepdim=True)
    terms = _terms(p, r, x, spare)
    anchor = torch.where(total == 0, 0.0, anchor)
    return ColumnSums(top, total, ref_top, ref_total, terms.sum(-1, keepdim=True), anchor, mean)


def _terms(p: Tensor, r: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """p (e^x - 1 - x), where r = p e^x."""
    # expm1's rounding is as small as a change of x in its last bit, and x has that much error from the logits anyway.
    near = torch.expm1(x, out=out).sub_(x).mul_(p)
    return torch.where(x > FAR, r, near, out=out) if out is not None else torch.where(x > FAR, r, near)


def _merge(a: ColumnSums, b: ColumnSums) -> ColumnSums:
    """Two sets of columns -> their union."""
    top, ref_top = torch.maximum(a.top, b.top), torch.maximum(a.ref_top, b.ref_top)
    totals = [f.total * (f.top - top).exp() for f in (a, b)]
    ref_totals = [f.ref_total * (f.ref_top - ref_top).exp() for f in (a, b)]
    total, ref_total = sum(totals), sum(ref_totals)
    anchor = torch.where(a.top >= b.top, a.anchor, b.anchor)
    kl, mean = torch.zeros_like(total), torch.zeros_like(total)
    for f, part, ref_part in zip((a, b), totals, ref_totals, strict=True):
        p, r = part / _or_one(total), ref_part / _or_one(ref_total)
        # x = log(r / p), in which neither r nor p may underflow; of equal sides exactly 0
        ratio = (f.ref_total * total) / _or_one(ref_total * f.total)
        x = (f.ref_top - ref_top) - (f.top - top) + ratio.log()
        x = x.masked_fill(p == 0, 2 * FAR)
        kl = kl + _terms(p, r, x) + torch.where(p == 0, 0.0, p * f.kl)
        mean = mean + torch.where(p == 0, 0.0, p * (f.mean + (f.anchor - anchor)))
    return ColumnSums(top, total, ref_top, ref_total, kl, anchor, mean)


def _finish(fold: ColumnSums) -> KLForward:
    fold = ColumnSums(*(x[:, 0] for x in fold))
    # A policy all of whose logits are -inf is no distribution.
    kl = torch.where(fold.total == 0, torch.nan, fold.kl)
    return KLForward(kl, fold.top + fold.total.log(), fold.anchor, fold.mean)


def backward(
    grad: Tensor,  # (N,) dL/dKL
    policy: KLSide,
    reference: KLSide,
    mask: Tensor | None,  # (N,)
    saved: KLForward,
    needs: Needs,  # of the policy's tensors
) -> Gradients:
    """dhidden (N, D), dweight (V, D), dbias (V,): accumulated in float32, each row of dweight written once."""
    rows = kept_rows(mask)
    if rows is None:
        return _backward_kept(grad, policy, reference, saved, needs)
    if len(rows) == 0:
        return zero_gradients(*policy[:3], needs)
    kept = KLForward(*(x[rows] for x in saved))
    grads = _backward_kept(grad[rows], policy.rows(rows), reference.rows(rows), kept, needs)
    if needs.hidden:
        whole = policy.hidden.new_zeros(policy.hidden.shape).index_copy_(0, rows, grads.hidden)
        grads = grads._replace(hidden=whole)
    return grads


def _backward_kept(grad: Tensor, policy: KLSide, reference: KLSide, saved: KLForward, needs: Needs) -> Gradients:
    head, ref_head, n = policy.head(), reference.head(), len(policy.hidden)
    # The forward's tiles, so that d has the same bits as in the forward, where the anchor was taken from it.
    tiles = row_tiles(policy.hidden, head.rows)
    ref_tiles = row_tiles(reference.hidden, head.rows)
    row = [grad.to(head.acc), *saved[1:]]
    ref_buffer = policy.hidden.new_empty(head.rows * head.columns, dtype=head.acc)

    def dlogits(dz: Tensor, i: int, part: tuple) -> None:
        _, w, b, ref_w, ref_b = part
        z = head.logits(tiles[i], w, b, out=dz)
        ref_z = ref_buffer[: head.rows * len(w)].view(head.rows, len(w))
        ref_head.logits(ref_tiles[i], ref_w, ref_b, out=ref_z)
        at = slice(i * head.rows, min((i + 1) * head.rows, n))
        size = at.stop - at.start
        _dlogits_(z[:size], ref_z[:size], head, *(x[at, None] for x in row))

    grads = backward_slices(head, policy.hidden, needs, _slices(head, ref_head), dlogits)
    return grads if grads.hidden is None else grads._replace(hidden=grads.hidden.to(head.dtype))


def _dlogits_(
    z: Tensor,  # (R, C)
    ref_z: Tensor,  # (R, C)
    head: SlicedHead,
    grad: Tensor,  # (R, 1), and so are the rest
    lse: Tensor,
    anchor: Tensor,
    mean: Tensor,
) -> Tensor:
    """Logits of both -> dL/dx of the policy's in the place of `z`, x being the matrix product."""
    logits = z.clone() if head.options.softcap is not None else None
    # dz_v = g p_v (mean - (d_v - anchor)),  d = ref_z - z
    factor = ref_z.sub_(z).sub_(anchor).sub_(mean)
    p = z.sub_(lse).exp_()
    factor.masked_fill_(p == 0, 0.0)
    return head.slope_(p.mul_(factor.mul_(-grad)), logits)


def _slices(head: SlicedHead, ref_head: SlicedHead) -> Iterator[tuple]:
    """Yields (first column, weight and bias of the policy, weight and bias of the reference)."""
    for (first, w, b), (_, ref_w, ref_b) in zip(head.slices(), ref_head.slices(), strict=True):
        yield first, aligned(w), b, aligned(ref_w), ref_b


def _or_one(total: Tensor) -> Tensor:
    """A divisor: 1 where every exponential of a tile is 0. (A NaN stays.)"""
    return torch.where(total == 0, 1.0, total)
