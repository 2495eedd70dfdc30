"""What `linear_logprobs` is made of in plain PyTorch: a head in vocabulary slices, and a tile of rows with its sums.

    N tokens, D hidden, V vocabulary; R rows and C columns of one tile; y a row's target.

`portable` has the passes, and the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from prefuse.kernels.gemm import accumulator_dtype, addmm_, mm, narrow, operand
from prefuse.kernels.options import HeadOptions
from prefuse.kernels.vocab import Whole

# Rows and columns of a tile. On a CPU: as fast as one large product, and small enough to stay in its cache.
TILE = {"cpu": (256, 2048), "cuda": (2048, 8192)}


class Forward(NamedTuple):
    """What the forward leaves for each row; `lse` and `q` are what the backward needs."""

    logps: Tensor  # (N,)
    lse: Tensor  # (N,) logsumexp of the whole row
    q: Tensor  # (N,) 1 - p_target, kept because 1 - exp(logp) cancels where p is near 1
    extra: Tensor  # (len(outputs), N) the optional outputs, in the order asked
    direction: Tensor  # mode "frozen": (N, D) d logp / d hidden, else (0, D)
    stash: Tensor  # mode "stash": what every row of W weighs in d logp / d hidden before `share`, else (0,)
    share: Tensor  # mode "stash": (N,) what a row's weights are multiplied by, else (0,)


class Head:
    """The weight in vocabulary slices, and the transform from matrix products to logits.

    Columns are counted from this rank's first: with a `shard`, other ranks hold those below 0 and above.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, options: HeadOptions, dtype: torch.dtype, shard: Whole | None = None
    ):
        self.weight, self.bias, self.options = weight, bias, options
        self.shard = shard or Whole()
        self.dtype = dtype  # the op computes in hidden's dtype
        self.acc = accumulator_dtype(dtype)
        self.rows, self.columns = TILE.get(weight.device.type, TILE["cuda"])

    def slices(self) -> Iterator[tuple[int, Tensor, Tensor | None]]:
        """Yields (first column, weight (C, D), bias (C,)) in the type this device multiplies."""
        for first in range(0, len(self.weight), self.columns):
            part = slice(first, first + self.columns)
            yield first, operand(self.weight[part], self.dtype), self._bias(part)

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
        """(R, D), (C, D), (C,) -> z (R, C), written into `out`."""
        return self._transform_(mm(hidden, weight.T, out=out), bias)

    def target_logits(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(R, D), (R,) -> z_y (R,): a dot product a row, in the accumulator's dtype. Of no use where it is not here."""
        rows = torch.where(self.holds(targets), targets, 0)
        w = operand(self.weight[rows], self.dtype).to(self.acc)
        return self._transform_((hidden.to(self.acc) * w).sum(-1), self._bias(rows))

    def holds(self, targets: Tensor) -> Tensor:
        """(R,) bool: whether this rank's weight has the target's row."""
        return (targets >= 0) & (targets < len(self.weight))

    def slope_(self, dz: Tensor, z: Tensor | None) -> Tensor:
        """dL/dz -> dL/dx in place, x the matrix product; `z` is overwritten, and needed under a softcap only."""
        o = self.options
        if o.softcap is not None:
            # dz/dx = slope * (1 - tanh^2),  tanh = z * temperature / softcap
            dz.mul_(z.mul_(o.temperature / o.softcap).square_().neg_().add_(1.0))
        return dz if o.slope == 1.0 else dz.mul_(o.slope)

    def _bias(self, index: slice | Tensor) -> Tensor | None:
        return None if self.bias is None else self.bias[index].to(self.acc)

    def _transform_(self, x: Tensor, bias: Tensor | None) -> Tensor:
        o = self.options
        if bias is not None:
            x.add_(bias)
        if o.softcap is not None:
            # z = softcap * tanh(logit_scale * x / softcap) / temperature
            return x.mul_(o.logit_scale / o.softcap).tanh_().mul_(o.softcap / o.temperature)
        return x if o.slope == 1.0 else x.mul_(o.slope)


class Targets:
    """Where the targets of a few rows stand, found once and not in every slice of the vocabulary."""

    def __init__(self, ids: Tensor, head: Head):  # (R,)
        self.ids, self.columns = ids, head.columns
        self.sorted, self.order = ids.sort(stable=True)
        firsts = torch.arange(0, len(head.weight) + head.columns, head.columns, device=ids.device)
        firsts = firsts.clamp_max_(len(head.weight))  # above are other ranks' columns
        self.cuts = torch.searchsorted(self.sorted, firsts).tolist()

    def inside(self, first: int) -> tuple[Tensor, Tensor]:
        """The rows whose target stands in the slice that begins at `first`, and its column there."""
        i = first // self.columns
        part = slice(self.cuts[i], self.cuts[i + 1])
        return self.order[part], self.sorted[part] - first


class RowTile:
    """The running sums of R rows while the vocabulary passes by."""

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

    def fold(self, z: Tensor, first: int, head: Head, weight: Tensor, stash: Tensor | None) -> None:
        """Adds the columns `first, first + 1, ...` of the logits; overwrites `z (R, C)`, fills `stash (R, C)`."""
        if self.plain is not None:
            self.plain += z.sum(-1, keepdim=True)
        if self.tops is not None:
            self._compare(z, first)
        z[self.targets.inside(first)] = -math.inf
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

    def finish(self, head: Head, z_target: Tensor, outputs: tuple[str, ...]) -> Forward:
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
        direction, share = logps.new_empty(0, self.hidden.shape[1]), logps.new_empty(0)
        if self.mode != "lean":
            share = self._share(q)
        if self.mode == "frozen":
            direction = self._direction(head, z_target, q, share)
            share = share[:0]
        return Forward(logps, lse, q, extra, direction, logps.new_empty(0), share)

    def _direction(self, head: Head, z_target: Tensor, q: Tensor, share: Tensor) -> Tensor:
        # d logp / d hidden = q (W[y] - mean of W under the other tokens), each with its slope
        here = head.holds(self.targets.ids)
        own = operand(head.weight[torch.where(here, self.targets.ids, 0)], head.dtype).to(q.dtype)
        own_slope = head.slope_(torch.ones_like(q), z_target.clone())
        return torch.where(here, q * own_slope, 0.0)[:, None] * own - share[:, None] * self.pulled

    def _share(self, q: Tensor) -> Tensor:
        # A mean over weights that sum to `rounded` is not shifted by their rounding.
        kept = torch.where(self.rounded > 0, self.exact / self.rounded, 1.0)[:, 0]
        return torch.where(self.total[:, 0] > 0, q / self.total[:, 0] * kept, 0.0)

    def _entropy(self, head: Head, z_target: Tensor, gap: Tensor, logps: Tensor, q: Tensor) -> Tensor:
        # H = -p log p - q log q + q * (entropy of the other tokens),  that entropy = log total - weighted / total
        total, weighted = self.total[:, 0], self.weighted[:, 0]
        others = torch.where(total > 0, total.log() - weighted / total, 0.0)
        log_q = -((-gap).clamp_min(0.0) + (-gap.abs()).exp().log1p())
        return _xlogx(logps) + _xlogx(log_q) + q * others

    def _mean_logits(self, head: Head, z_target: Tensor, gap: Tensor, logps: Tensor, q: Tensor) -> Tensor:
        return self.plain[:, 0] / head.shard.size(len(head.weight))

    def _log_sum_sq_probs(self, head: Head, z_target: Tensor, gap: Tensor, logps: Tensor, q: Tensor) -> Tensor:
        own = (z_target - self.shift[:, 0]).exp()
        return (self.squares[:, 0] + own.square()).log() - 2.0 * (self.total[:, 0] + own).log()

    def _is_top1(self, head: Head, z_target: Tensor, gap: Tensor, logps: Tensor, q: Tensor) -> Tensor:
        before, own, after = self.tops.unbind(-1)
        return ((own > before) & (own >= after)).to(logps.dtype)  # argmax: the first of equals


def row_tile(hidden: Tensor) -> int:
    return TILE.get(hidden.device.type, TILE["cuda"])[0]


def _xlogx(log_x: Tensor) -> Tensor:
    """-x log x from log x, with 0 log 0 = 0."""
    return torch.where(log_x > -math.inf, -log_x.exp() * log_x, 0.0)
