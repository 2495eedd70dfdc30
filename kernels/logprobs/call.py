"""The arguments of one call of `linear_logprobs`, checked once, and which implementation they go to.

N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prefuse.kernels import checks
from prefuse.kernels.gemm import accumulator_dtype
from prefuse.kernels.gradients import Needs
from prefuse.kernels.logprobs import portable
from prefuse.kernels.logprobs.portable import stash_size
from prefuse.kernels.options import HeadOptions

refuse_double_backward = checks.refuse_double_backward("linear_logprobs", instead="reference")


class HeadCall(NamedTuple):
    """The arguments of one call, checked: what `prepare_call` returns and everything behind the door takes."""

    hidden: Tensor  # (N, D) in the dtype to compute in
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    targets: Tensor  # (N,) int64
    options: HeadOptions
    impl: str  # "triton", "torch" or "reference"
    vocab_group: dist.ProcessGroup | None = None
    gradient_tolerance: float = 0.0

    @property
    def needs(self) -> Needs:
        return Needs.of(self.hidden, self.weight, self.bias)


def prepare_call(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: HeadOptions,
    outputs: tuple[str, ...], impl: str, vocab_group: dist.ProcessGroup | None = None, gradient_tolerance: float = 0.0,
) -> HeadCall:  # fmt: skip
    """Checks every argument, once per call; TypeError, ValueError or RuntimeError names the first that is wrong."""
    checks.check_head_tensors(hidden, weight, bias, targets=targets)
    checks.check_token_ids(targets)
    checks.check_one_per_row("targets", targets, hidden)
    targets = targets.long()  # before any comparison: -100 wraps around in a uint8 tensor
    checks.check_options(options, outputs)
    checks.check_impl(impl)
    impl = checks.resolve(impl, hidden)
    hidden = checks.in_compute_dtype(hidden)
    _check_tolerance(gradient_tolerance, hidden, impl, vocab_group)
    return HeadCall(hidden, weight, bias, targets, options, impl, vocab_group, float(gradient_tolerance))


def _check_tolerance(tolerance: float, hidden: Tensor, impl: str, vocab_group: dist.ProcessGroup | None) -> None:
    checks.check_tolerance(tolerance, impl)
    if tolerance == 0.0:
        return
    if vocab_group is not None:
        raise ValueError("gradient_tolerance takes a whole head: leave out vocab_group, or set it to 0.0")
    if hidden.dtype == torch.float16:
        raise ValueError("gradient_tolerance has no float16, whose range is too small: use bfloat16 or float32")


def fits(call: HeadCall, workspace: int) -> bool:
    """Whether the weights of all rows may be kept for the backward."""
    n, v = len(call.hidden), len(call.weight)
    return stash_size(n, v, call.hidden) * stash_dtype(call.impl, call.hidden).itemsize <= workspace


def stash_dtype(impl: str, hidden: Tensor) -> torch.dtype:
    """What the products of `impl` take: half types wherever the device multiplies them."""
    return hidden.dtype if impl == "triton" or hidden.is_cuda else accumulator_dtype(hidden.dtype)


def implementation(impl: str):
    """The module of `impl`, "torch" or "triton": `forward`, `backward`, `backward_stashed`, `backward_measured`."""
    if impl == "torch":
        return portable
    from prefuse.kernels.logprobs import launch

    return launch
