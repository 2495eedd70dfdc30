"""Exact per-token KL(policy || reference) straight from two sets of hidden states: the public door, and the autograd.

    N tokens, D hidden (its own for each model), V vocabulary.

The door checks its arguments; the private operators below it have fixed arity and scalar arguments, as torch.library
wants them, and call `portable` or `launch`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prefuse.kernels import checks, reference
from prefuse.kernels.gemm import accumulator_dtype
from prefuse.kernels.gradients import Needs, empty_gradients
from prefuse.kernels.kl import portable
from prefuse.kernels.kl.portable import KLForward, KLSide
from prefuse.kernels.options import HeadOptions

REF_OPTIONS = ("softcap", "logit_scale", "temperature")


def linear_kl(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (N, ref D)
    ref_weight: Tensor,  # (V, ref D)
    *,
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    mask: Tensor | None = None,  # (N,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ref_options: Mapping[str, float | None] | None = None,
    impl: str = "auto",
) -> Tensor:
    """Equals, without either model's `(N, V)` logits ever existing::

        logp = torch.log_softmax(logits(hidden, weight, bias), -1)                # kept in float32
        with torch.no_grad():
            logr = torch.log_softmax(logits(ref_hidden, ref_weight, ref_bias), -1)
        kl = (logp.exp() * (logp - logr)).sum(-1)                                 # 0 where `mask` is False

        def logits(hidden, weight, bias):
            return softcap * torch.tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature

    It keeps its digits where that sum cancels: the error is that of logits rounded to float32, about
    `eps * largest |logit| * sqrt(2 KL)`, plus a few `eps * KL`. Equal inputs give exactly 0, and no row is negative.

    One pass over the vocabulary folds both heads' tiles together: N D V multiply-adds for each head. The backward
    recomputes the tiles, and takes as much again for each of `hidden` and `weight` that needs a gradient.

    Args:
        hidden, ref_hidden: (N, D) and (N, ref D) of one dtype, in which the op computes (under autocast: in
            autocast's); it accumulates, exponentiates and returns in float32 (float64 for float64).
        weight, ref_weight: (V, D) and (V, ref D), over the same vocabulary; may be one tensor, and of another dtype.
        bias, ref_bias: (V,) added to the products. Columns that are -inf in both heads add nothing.
        mask: (N,) bool, True for the rows to keep. The others are exactly 0, with exactly zero gradient, whatever
            their hidden states hold.
        softcap, logit_scale, temperature, impl: as in `linear_logprobs`, for both heads.
        ref_options: those of the reference where they differ, such as `{"softcap": None}`.

    Returns:
        (N,) nats, float32. The gradient goes to hidden, weight and bias alone: the reference's tensors are taken as
        constants, also those that require one. Where a token has p > 0 and r = 0 the row is inf, and its gradient NaN.

    Raises:
        TypeError: a tensor of the wrong kind (not floating, a mask that is not bool, a DTensor, mixed devices or
            dtypes of the hidden states).
        ValueError: shapes that do not fit, unequal vocabularies, an option out of range or unknown.
        RuntimeError: an `impl` that cannot run here.
    """
    options = HeadOptions(softcap, float(logit_scale), float(temperature))
    tensors = (hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    _check(*tensors, mask, options, impl)
    scalars = _scalars(options, _reference_options(options, ref_options))
    impl = checks.resolve(impl, hidden)
    tensors = _prepare(*tensors)
    if impl == "reference":
        return reference.linear_kl(*tensors, mask, *scalars).to(accumulator_dtype(tensors[0].dtype))
    return _forward_op(*tensors, mask, *scalars, impl)[0]


# ---------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("prefuse::linear_kl_forward", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ref_softcap: float | None,
    ref_logit_scale: float,
    ref_temperature: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if len(hidden) == 0:
        return tuple(portable.empty_forward(hidden))
    policy = KLSide(hidden, weight, bias, HeadOptions(softcap, logit_scale, temperature))
    other = KLSide(ref_hidden, ref_weight, ref_bias, HeadOptions(ref_softcap, ref_logit_scale, ref_temperature))
    return tuple(_module(impl).forward(policy, other, mask))


@_forward_op.register_fake
def _(hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, *_):
    return tuple(portable.empty_forward(hidden))


@torch.library.custom_op("prefuse::linear_kl_backward", mutates_args=())
def _backward_op(
    grad: Tensor,  # (N,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    lse: Tensor,
    anchor: Tensor,
    mean: Tensor,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ref_softcap: float | None,
    ref_logit_scale: float,
    ref_temperature: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    needs = Needs(needs_hidden, needs_weight, needs_bias)
    if len(hidden) == 0:
        return tuple(x.zero_() for x in empty_gradients(hidden, weight, bias, needs))
    policy = KLSide(hidden, weight, bias, HeadOptions(softcap, logit_scale, temperature))
    other = KLSide(ref_hidden, ref_weight, ref_bias, HeadOptions(ref_softcap, ref_logit_scale, ref_temperature))
    saved = KLForward(grad, lse, anchor, mean)  # (the first field, the KL itself, is not read)
    grads = _module(impl).backward(grad, policy, other, mask, saved, needs)
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


@_backward_op.register_fake
def _(
    grad, hidden, weight, bias, ref_hidden, ref_weight, ref_bias, mask, lse, anchor, mean, softcap, logit_scale,
    temperature, ref_softcap, ref_logit_scale, ref_temperature, needs_hidden, needs_weight, needs_bias, impl,
):  # fmt: skip
    return empty_gradients(hidden, weight, bias, Needs(needs_hidden, needs_weight, needs_bias))


def _save(ctx, inputs, output) -> None:
    *tensors, softcap, scale, temperature, ref_softcap, ref_scale, ref_temperature, impl = inputs
    _, lse, anchor, mean = output
    ctx.set_materialize_grads(False)
    ctx.scalars = (softcap, scale, temperature, ref_softcap, ref_scale, ref_temperature)
    ctx.impl = impl
    ctx.save_for_backward(*tensors, lse, anchor, mean)


def _backward(ctx, grad, *_):
    nothing = (None,) * 11
    if grad is None:
        return None, None, None, *nothing
    needs = ctx.needs_input_grad[:3]
    grads = _backward_op(grad, *ctx.saved_tensors, *ctx.scalars, *needs, ctx.impl)
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *nothing


_forward_op.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(checks.refuse_double_backward("linear_kl", instead="reference"))


# ---------------------------------------------------------------------------------------------- helpers


def _module(impl: str):
    if impl == "torch":
        return portable
    from prefuse.kernels.kl import launch

    return launch


def _scalars(options: HeadOptions, ref_options: HeadOptions) -> tuple[float | None, ...]:
    return tuple(getattr(o, name) for o in (options, ref_options) for name in REF_OPTIONS)


def _reference_options(options: HeadOptions, given: Mapping[str, float | None] | None) -> HeadOptions:
    """The policy's options, with those that are given in their place."""
    given = {} if given is None else dict(given)
    if unknown := [name for name in given if name not in REF_OPTIONS]:
        raise ValueError(f"unknown ref_options {unknown}; choose from {list(REF_OPTIONS)}")
    chosen = {name: given.get(name, getattr(options, name)) for name in REF_OPTIONS}
    chosen = HeadOptions(chosen["softcap"], float(chosen["logit_scale"]), float(chosen["temperature"]))
    _of_reference(checks.check_options, chosen)
    return chosen


def _check(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    ref_bias: Tensor | None,
    mask: Tensor | None,
    options: HeadOptions,
    impl: str,
) -> None:
    checks.check_options(options)
    checks.check_impl(impl)
    checks.check_head_tensors(hidden, weight, bias)
    _of_reference(checks.check_head_tensors, ref_hidden, ref_weight, ref_bias)
    checks.check_device("ref_hidden", ref_hidden, hidden)
    if len(ref_hidden) != len(hidden):
        raise ValueError(
            f"expected ref_hidden ({len(hidden)}, D), a row for each row of hidden, got {tuple(ref_hidden.shape)}"
        )
    if len(ref_weight) != len(weight):
        raise ValueError(
            f"policy and reference must share one vocabulary, but weight has {len(weight)} rows and ref_weight "
            f"{len(ref_weight)}; if the surplus is padding, cut it off: ref_weight[:V]"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor, True for the rows to keep, got {got}")
    checks.check_one_per_row("mask", mask, hidden)
    checks.check_device("mask", mask, hidden)


def _prepare(hidden, weight, bias, ref_hidden, ref_weight, ref_bias) -> tuple[Tensor | None, ...]:
    """The same tensors, hidden states in the dtype that the op computes in, the reference's without gradients."""
    hidden, ref_hidden = checks.in_compute_dtype(hidden), checks.in_compute_dtype(ref_hidden)
    if ref_hidden.dtype != hidden.dtype:
        raise TypeError(f"hidden is {hidden.dtype} but ref_hidden is {ref_hidden.dtype}; cast one of them")
    ref_bias = None if ref_bias is None else ref_bias.detach()
    return hidden, weight, bias, ref_hidden.detach(), ref_weight.detach(), ref_bias


def _of_reference(check, *args) -> None:
    """`check(*args)`; an error says that it is about the reference."""
    try:
        check(*args)
    except (TypeError, ValueError) as error:
        raise type(error)(f"of the reference: {error}") from None
