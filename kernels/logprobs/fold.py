"""The sums that the portable forward keeps for a tile of rows over all slices of the vocabulary, and their results.

    D hidden, V vocabulary; R rows and C columns of one tile; y a row's target.

`portable` has the passes, and the formulas.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from prefuse.kernels.gemm import addmm_, narrow, operand
from prefuse.kernels.slices import SlicedHead, Targets


class HeadForward(NamedTuple):
    """What the forward leaves for each row; `lse` and `q` are what the backward needs."""

    logps: Tensor  # (N,)
    lse: Tensor  # (N,) logsumexp of the whole row
    q: Tensor  # (N,) 1 - p_target, kept because 1 - exp(logp) cancels where p is near 1
    extra: Tensor  # (len(outputs), N) the optional outputs, in the order asked
    direction: Tensor  # mode "frozen": (N, D) d logp / d hidden, else (0, D)
    stash: Tensor  # mode "stash": unnormalised weights P (N, V) of the rows of W in -d logp / d hidden, else (0,)
    scale: Tensor  # mode "stash": (N,) what normalises a row of P, else (0,); 0 where P cannot hold the row


class RowTile:
    """The running sums of R rows over the slices of the vocabulary."""

    SUMS = ("total", "exact", "rounded", "weighted", "squares", "plain")

    def __init__(self, hidden: Tensor, targets: Targets, shift: Tensor, outputs: tuple[str, ...], mode: str):
        self.hidden, self.targets, self.shift = hidden, targets, shift[:, None]
        zeros = torch.zeros_like(self.shift)
        self.total = zeros.clone()
        self.mode = mode
        self.pulled = torch.zeros_like(hidden, dtype=shift.dtype) if mode == "frozen" else None
        self.exact, self.rounded = zeros.clone(), zeros.clone()  # the weights of `pulled`, before and after rounding
        self.weighted = zeros.clone() if "entropy" in outputs else None  # sum of (z - shift) exp(z - shift)
        self.squares = zeros.clone() if "log_sum_sq_probs" in outputs else None  # sum of exp(z - shift)^2
        self.plain = zeros.clone() if "mean_logits" in outputs else None  # sum of z, target included
        # Largest logit before the target, from the target, after it; all from the same product, so ties are ties.
        self.tops = zeros.new_full((len(hidden), 3), -math.inf) if "is_top1" in outputs else None

    def fold(self, z: Tensor, first: int, head: SlicedHead, weight: Tensor, stash: Tensor | None) -> None:
        """Adds the columns `first, first + 1, ...` of the logits; overwrites `z (R, C)`, fills `stash (R, C)`."""
        if self.plain is not None:
            self.plain += z.sum(-1, keepdim=True)
        if self.tops is not None:
            self._compare(z, first)
        self.targets.fill_(z, first, -math.inf)
        tanh_source = z.clone() if self.mode != "lean" and head.options.softcap is not None else None
        z.sub_(self.shift)
        # 0 * -inf = 0 here: a logit of -inf has no probability.
        gaps = z.clamp_min(-1e4) if self.weighted is not None else None
        e = z.exp_()
        self.total += e.sum(-1, keepdim=True)
        if gaps is not None:
            self.weighted += gaps.mul_(e).sum(-1, keepdim=True)
        if self.squares is not None:
            self.squares += e.square().sum(-1, keepdim=True)
        if self.mode != "lean":
            if tanh_source is not None:
                tanh_source.nan_to_num_(neginf=0.0)
            pull = head.slope_(e, tanh_source)
            stored = narrow(pull, head.dtype)
            if stored is not pull:
                self.exact += pull.sum(-1, keepdim=True)
                self.rounded += stored.sum(-1, keepdim=True, dtype=head.acc)
            if self.mode == "frozen":
                addmm_(self.pulled, stored, weight)
            elif stash is not z:
                stash.copy_(stored)

    def _compare(self, z: Tensor, first: int) -> None:
        columns = torch.arange(first, first + z.shape[1], device=z.device)
        ids = self.targets.ids[:, None]
        sides = (columns < ids, columns == ids, columns > ids)
        largest = [torch.where(side, z, -math.inf).amax(-1) for side in sides]
        self.tops = torch.maximum(self.tops, torch.stack(largest, -1))

    def finish(self, head: SlicedHead, z_target: Tensor, outputs: tuple[str, ...]) -> HeadForward:
        """The sums -> what the forward returns for these rows."""
        shift, total = self.shift[:, 0], self.total[:, 0]
        log_total = total.log()
        gap = (shift - z_target) + log_total
        tail = (-gap.abs()).exp().log1p()  # softplus(|gap|) - |gap|
        logps = -(gap.clamp_min(0.0) + tail)
        lse = torch.maximum(shift + log_total, z_target) + tail
        q = 1.0 / (1.0 + (-gap).exp())
        extra = [getattr(self, f"_{name}")(head, z_target, gap, logps, q) for name in outputs]
        extra = torch.stack(extra) if extra else logps.new_empty(0, len(logps))
        direction, scale = logps.new_empty(0, self.hidden.shape[1]), logps.new_empty(0)
        if self.mode != "lean":
            scale = self._scale(q)
        if self.mode == "frozen":
            direction = self._direction(head, z_target, q, scale)
            scale = scale[:0]
        return HeadForward(logps, lse, q, extra, direction, logps.new_empty(0), scale)

    def _direction(self, head: SlicedHead, z_target: Tensor, q: Tensor, scale: Tensor) -> Tensor:
        # d logp / d hidden = q (W[y] - mean of W under the other tokens), each with its slope
        here = head.holds(self.targets.ids)
        own = operand(head.weight[torch.where(here, self.targets.ids, 0)], head.dtype).to(q.dtype)
        own_slope = head.slope_(torch.ones_like(q), z_target.clone())
        return torch.where(here, q * own_slope, 0.0)[:, None] * own - scale[:, None] * self.pulled

    def _scale(self, q: Tensor) -> Tensor:
        # Dividing by `rounded`, the sum of the stored weights, keeps their rounding from biasing the mean.
        kept = torch.where(self.rounded > 0, self.exact / self.rounded, 1.0)[:, 0]
        return torch.where(self.total[:, 0] > 0, q / self.total[:, 0] * kept, 0.0)

    def _entropy(self, head: SlicedHead, z_target: Tensor, gap: Tensor, logps: Tensor, q: Tensor) -> Tensor:
        # H = -p log p - q log q + q * (entropy of the other tokens),  that entropy = log total - weighted / total
        total, weighted = self.total[:, 0], self.weighted[:, 0]
        others = torch.where(total > 0, total.log() - weighted / total, 0.0)
        log_q = -((-gap).clamp_min(0.0) + (-gap.abs()).exp().log1p())
        return _xlogx(logps) + _xlogx(log_q) + q * others

    def _mean_logits(self, head: SlicedHead, z_target: Tensor, gap: Tensor, logps: Tensor, q: Tensor) -> Tensor:
        return self.plain[:, 0] / head.shard.size(len(head.weight))

    def _log_sum_sq_probs(self, head: SlicedHead, z_target: Tensor, gap: Tensor, logps: Tensor, q: Tensor) -> Tensor:
        own = (z_target - self.shift[:, 0]).exp()
        return (self.squares[:, 0] + own.square()).log() - 2.0 * (self.total[:, 0] + own).log()

    def _is_top1(self, head: SlicedHead, z_target: Tensor, gap: Tensor, logps: Tensor, q: Tensor) -> Tensor:
        before, own, after = self.tops.unbind(-1)
        return ((own > before) & (own >= after)).to(logps.dtype)  # argmax: the first of equals


def _xlogx(log_x: Tensor) -> Tensor:
    """-x log x from log x, with 0 log 0 = 0."""
    return torch.where(log_x > -math.inf, -log_x.exp() * log_x, 0.0)
