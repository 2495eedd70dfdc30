"""`linear_kl` in Triton: what launches the kernels of `device`. `portable` has the math.

    N tokens, D hidden (its own for each model), V vocabulary.

Forward: `kl_fold_kernel` folds one row block x one vocabulary segment, two products per tile, into seven numbers a row,
and `kl_finish_kernel` merges the segments in their order. Backward, a vocabulary slice at a time: `kl_dlogits_kernel`
recomputes both tiles and writes dz in the operands' dtype, matrix products make `dhidden += dz @ W` and
`dW = dz.T @ hidden` in float32. No atomics: every number is the sum of the same terms in the same order.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from prefuse.kernels import cost, launch
from prefuse.kernels.gradients import Gradients, Needs
from prefuse.kernels.kl import device
from prefuse.kernels.kl.portable import KLForward, KLSide
from prefuse.kernels.launch import Operands, backward_slices, loadable, on_its_device, tile_args
from prefuse.kernels.tiles.table import INTERPRETER, Tile, segments


def launch_args(config: Tile) -> dict:
    """`tile_args` without fused multiply-add, under which ref_acc * k - z is not exactly 0 for equal models."""
    return tile_args(config) | {"enable_fp_fusion": False}


class Heads:
    """Both models' tensors and constants as the kernels want them."""

    def __init__(self, policy: KLSide, reference: KLSide, mask: Tensor | None):
        hidden = policy.hidden
        # Every kept row has the target 0, which nothing reads.
        targets = hidden.new_zeros(len(hidden), dtype=torch.int64)
        if mask is not None:
            targets.masked_fill_(~mask, policy.options.ignore_index)
        self.sides = [Operands(*side[:3], targets, side.options) for side in (policy, reference)]
        self.policy, self.y = self.sides[0], self.sides[0].y
        operands = [x for side in self.sides for x in (side.hidden, side.part(0, 1)[0])]
        plain = not any(self.flags().values())
        # Fold and dlogits share one row of the table, so that the backward recomputes the bits of the forward's logits.
        self.config = self.policy.config_for("kl plain" if plain else "kl", *operands)
        # Under the interpreter `descriptors` decides, so that tests run both ways of folding.
        self.halves = self.config.halves or (self.policy.chip == INTERPRETER and self.config.descriptors)
        self.segments = segments(hidden.device, self.tiles)

    @property
    def tiles(self) -> int:
        return triton.cdiv(len(self.policy.weight), self.config.block_v)

    def operands(self, parts: list[tuple[Tensor, Tensor]], rows: slice = slice(None)) -> list:
        """h, w, bias of both, for these weights and biases."""
        c, arguments = self.config, []
        for side, (w, b) in zip(self.sides, parts, strict=True):
            h = side.hidden[rows]
            arguments += [loadable(h, c.block_n, c.block_d, c), loadable(w, c.block_v, c.block_d, c), b]
        return arguments

    def strides(self, parts: list[tuple[Tensor, Tensor]]) -> list[int]:
        return [s for side, (w, _) in zip(self.sides, parts, strict=True) for s in (*side.hidden.stride(), *w.stride())]

    def constants(self) -> list[float]:
        return [k for side in self.sides for k in (side.k_in, side.k_out)]

    def depths(self) -> list[int]:
        return [side.hidden.shape[1] for side in self.sides]

    def flags(self) -> dict[str, bool]:
        own, other = (side.flags() for side in self.sides)
        return own | {f"REF_{name}": value for name, value in other.items()}

    def parts(self, first: int, last: int) -> list[tuple[Tensor, Tensor]]:
        """Weight rows and bias of the columns `first ... last - 1`, of each."""
        return [side.part(first, last) for side in self.sides]

    def report(self, kind: str, n: int, weights: list[tuple[Tensor, Tensor]], result: Tensor) -> None:
        """Both products of n rows with these weights."""
        flops = sum(2 * n * w.numel() for w, _ in weights)
        read = sum(n * side.hidden.shape[1] * side.hidden.element_size() for side in self.sides)
        cost.report_cost(kind, flops, read + cost.size(*(w for w, _ in weights)), cost.size(result))

    def group(self) -> int:
        """Segments at once: all, or as many as the cast of a weight of another dtype may hold."""
        width = triton.cdiv(self.tiles, self.segments) * self.config.block_v
        casts = [s.hidden.shape[1] * s.hidden.element_size() for s in self.sides if s.weight.dtype != s.dtype]
        return max(1, launch.CAST_BYTES // (width * sum(casts))) if casts else self.segments


@on_its_device
def forward(policy: KLSide, reference: KLSide, mask: Tensor | None) -> KLForward:
    """One pass over the vocabulary. Rows that are not kept are 0, with lse = inf."""
    heads, n, v = Heads(policy, reference, mask), len(policy.hidden), len(policy.weight)
    config, tiles = heads.config, heads.tiles
    parts = policy.hidden.new_empty(device.PLANES, heads.segments, n, dtype=torch.float32)
    step = heads.group()
    for s0 in range(0, heads.segments, step):
        s1 = min(s0 + step, heads.segments)
        first, last = s0 * tiles // heads.segments * config.block_v, s1 * tiles // heads.segments * config.block_v
        weights = heads.parts(first, min(last, v))
        part = parts[:, s0:]
        heads.report("kl fold", n, weights, part[:, : s1 - s0])
        device.kl_fold_kernel[(triton.cdiv(n, config.block_n) * (s1 - s0),)](
            *heads.operands(weights), part, n, v, *heads.depths(), first, s0, s1 - s0, *part.stride()[:2],
            *heads.strides(weights), *heads.constants(), **heads.flags(), SEGMENTS=heads.segments, HALVES=heads.halves,
            **launch_args(config),
        )  # fmt: skip
    rows = KLForward(*(policy.hidden.new_empty(n, dtype=torch.float32) for _ in range(4)))
    device.kl_finish_kernel[(triton.cdiv(n, 128),)](parts, heads.y, *rows, n, SEGMENTS=heads.segments, BLOCK=128)
    return rows


@on_its_device
def backward(
    grad: Tensor,  # (N,) dL/dKL
    policy: KLSide,
    reference: KLSide,
    mask: Tensor | None,  # (N,)
    saved: KLForward,
    needs: Needs,  # of the policy's tensors
) -> Gradients:
    """dhidden (N, D), dweight (V, D), dbias (V,): accumulated in float32, each row of dweight written once."""
    heads, hidden = Heads(policy, reference, mask), policy.hidden
    kept = heads.y >= 0
    grad = torch.where(kept, grad.float(), 0.0) * policy.options.slope
    dhidden = hidden.new_zeros(hidden.shape, dtype=torch.float32) if needs.hidden else None
    # Zeroed where masked, for 0 * NaN is NaN.
    clean = torch.where(kept[:, None], hidden, 0.0)

    def slice_of(first: int, last: int) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        weights = heads.parts(first, last)
        return weights[0][0], weights

    def dlogits(part: tuple, first: int, rows: slice, dz: Tensor) -> None:
        _dlogits(heads, part[1], rows, grad, saved, dz)

    grads = backward_slices(clean, policy.weight, policy.bias, needs, dhidden, slice_of, dlogits)
    return grads if dhidden is None else grads._replace(hidden=dhidden.to(hidden.dtype))


def _dlogits(
    heads: Heads, weights: list[tuple[Tensor, Tensor]], rows: slice, grad: Tensor, saved: KLForward, dz: Tensor
) -> None:
    """dL/d(products of the policy) of these rows into `dz (rows, C)`, in the operands' dtype."""
    config, (n, c) = heads.config, dz.shape
    heads.report("kl dlogits", n, weights, dz)
    device.kl_dlogits_kernel[(triton.cdiv(n, config.block_n) * triton.cdiv(c, config.block_v),)](
        *heads.operands(weights, rows), heads.y[rows], saved.lse[rows], saved.anchor[rows], saved.mean[rows],
        grad[rows], loadable(dz, config.block_n, config.block_v, config), n, c, *heads.depths(),
        *heads.strides(weights), dz.stride(0), *heads.constants(), **heads.flags(), **launch_args(config),
    )  # fmt: skip
