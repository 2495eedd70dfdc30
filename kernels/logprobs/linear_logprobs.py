"""Per-token log-probabilities straight from hidden states and the head's weight: the public door, and the autograd.

    N tokens, D hidden, V vocabulary.

The door checks its arguments and picks implementation and mode; the private operators below it have fixed arity and
scalar arguments, as torch.library wants them, and call `portable` or `launch`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from prefuse.kernels import checks, reference
from prefuse.kernels.gemm import accumulator_dtype
from prefuse.kernels.gradients import Needs, empty_gradients
from prefuse.kernels.logprobs.call import (
    HeadCall,
    fits,
    implementation,
    prepare_call,
    refuse_double_backward,
    stash_dtype,
)
from prefuse.kernels.logprobs.portable import RowGrads, empty_forward
from prefuse.kernels.options import HeadOptions
from prefuse.kernels.vocab import Whole, remember, shard_of, shard_place


def linear_logprobs(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    *,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    impl: str = "auto",
    vocab_group: dist.ProcessGroup | None = None,
    gradient_tolerance: float = 0.0,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """Equals, without the `(N, V)` logits ever existing::

        logits = hidden @ weight.T + bias                                  # kept in float32
        logits = softcap * torch.tanh(logit_scale * logits / softcap) / temperature
        logps  = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

    with `logps = 0`, and no gradient at all, where `targets == ignore_index`.

    Args:
        hidden: (N, D) bfloat16, float16, float32 or float64: the op computes in this dtype (under autocast: in
            autocast's), and accumulates, exponentiates and returns in float32 (float64 for float64).
        weight: (V, D) the head, any floating dtype; cast slice by slice where it differs from `hidden`'s.
        targets: (N,) integers in [0, V), or `ignore_index`. Checked on CPU.
        bias: (V,) added to the products.
        softcap: tanh cap of Gemma 2; must be > 0.
        logit_scale: factor on the products (Cohere's `logit_scale`; for Granite `1 / logits_scaling`).
        temperature: divides the logits; must be > 0.
        outputs: any of "entropy" (nats, differentiable), "mean_logits", "log_sum_sq_probs", "is_top1".
        impl: "triton" (CUDA tensors, or CPU tensors under Triton's interpreter), "torch" (any device), "reference"
            (materializes in float64) or "auto": "triton" where it can run, else "torch". Never falls back by itself.
        vocab_group: ranks that share the head, each with its own rows of `weight` and `bias` (as many as it likes), in
            the order of the ranks. All call with the same `hidden` and the same `targets`, which count columns of the
            whole vocabulary, and get the same log-probabilities and the whole `dhidden`; `dweight` is their own rows'.

        gradient_tolerance: share of the gradient's mass, sum |dL/dlogp| (1 - p_target), that the backward may skip; 0.0
            skips nothing. Above it the backward works on the columns that matter, measures what it skipped (see
            `record_skipped_mass`), and takes the exact path for blocks of rows that would skip more. Log-probabilities
            do not change. Try 2 ** -9: then dhidden is as exact as rounding dlogits to bfloat16 makes it.

    Returns:
        (N,) log-probabilities in nats, float32; with `outputs`, also a dict of (N,) tensors by name.
        Gradients: `dhidden` in hidden's dtype, `dweight` in the weight's. When the weight needs no gradient the forward
        makes the direction `d logp / d hidden` in the same pass, and the backward only scales it.

    Raises:
        TypeError: a tensor of the wrong kind (not floating, not integer, a DTensor, mixed devices).
        ValueError: shapes that do not fit, an option out of range, a target outside the vocabulary.
        RuntimeError: an `impl` that cannot run here.
    """
    options = HeadOptions(softcap, float(logit_scale), float(temperature), int(ignore_index))
    call = prepare_call(hidden, weight, targets, bias, options, outputs, impl, vocab_group, gradient_tolerance)
    return logprobs_of(call, outputs=outputs)


def logprobs_within(
    workspace: int,  # bytes that may be kept from the forward to the backward, to save a pass over the vocabulary
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: HeadOptions,
    outputs: tuple[str, ...],
    impl: str,
    vocab_group: dist.ProcessGroup | None = None,
    gradient_tolerance: float = 0.0,
    guess: Tensor | None = None,
    meter: Tensor | None = None,
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """`linear_logprobs` that may keep `workspace` bytes; `guess` and `meter` as in `logprobs_of`."""
    call = prepare_call(hidden, weight, targets, bias, options, outputs, impl, vocab_group, gradient_tolerance)
    return logprobs_of(call, workspace, outputs, guess, meter)


def logprobs_of(
    call: HeadCall,
    workspace: int = 0,
    outputs: tuple[str, ...] = (),
    guess: Tensor | None = None,  # (N,) log-probabilities near the targets' own: they help gradient_tolerance
    meter: Tensor | None = None,  # (2,) where its backward writes the skipped and the whole mass
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """What `linear_logprobs` returns."""
    if call.gradient_tolerance > 0.0 and torch.is_grad_enabled() and any(call.needs) and len(call.hidden):
        # Its `torch.compiler.disable` imports torch._dynamo, a second and more, which only a tolerance needs.
        from prefuse.kernels.logprobs.sparse_autograd import sparse_logprobs

        logps, extra = sparse_logprobs(call, outputs, guess, meter)
        return (logps, _named(outputs, extra)) if outputs else logps
    hidden, weight, bias, targets, o, impl, vocab_group, _ = call
    if impl == "reference":
        if vocab_group is not None:
            raise ValueError('impl="reference" takes the whole head: gather the weight\'s rows, without vocab_group')
        logps, extra = _reference(call)
        return (logps, {name: extra[name] for name in outputs}) if outputs else logps

    group = remember(vocab_group)
    place = shard_place(weight.detach(), group) if group else None
    logps, _, _, extra, *_ = _forward_op(
        hidden, weight, bias, targets, place, o.softcap, o.logit_scale, o.temperature, o.ignore_index, group,
        ",".join(outputs), _mode(call, workspace), impl,
    )  # fmt: skip
    if not outputs:
        return logps
    return logps, _named(outputs, extra)


def _named(outputs: tuple[str, ...], extra: Tensor) -> dict[str, Tensor]:
    return {name: x if name == "entropy" else x.detach() for name, x in zip(outputs, extra, strict=True)}


def _mode(call: HeadCall, workspace: int) -> str:
    """The cheapest of `portable.MODES` that applies."""
    needs = call.needs
    # float16 has no range for weights that are not normalized yet.
    if not torch.is_grad_enabled() or call.hidden.dtype == torch.float16:
        return "lean"
    if not needs.weight and not needs.bias:
        return "frozen" if needs.hidden else "lean"
    return "stash" if fits(call, workspace) else "lean"


# ---------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("prefuse::linear_logprobs_forward", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    place: Tensor | None,  # (2,) of this rank's shard of the head, see `vocab.shard_place`
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    group: str,
    outputs: str,
    mode: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = HeadOptions(softcap, logit_scale, temperature, ignore_index)
    names = tuple(filter(None, outputs.split(",")))
    shard = shard_of(place, group)
    checks.check_targets(targets, shard, len(weight), ignore_index)
    if len(hidden) == 0:
        return tuple(empty_forward(hidden, weight, names, mode, stash_dtype(impl, hidden)))
    return tuple(implementation(impl).forward(hidden, weight, bias, targets, options, names, mode, shard))


@_forward_op.register_fake
def _(
    hidden, weight, bias, targets, place, softcap, logit_scale, temperature, ignore_index, group, outputs, mode, impl
):  # fmt: skip
    return tuple(
        empty_forward(hidden, weight, tuple(filter(None, outputs.split(","))), mode, stash_dtype(impl, hidden))
    )


@torch.library.custom_op("prefuse::linear_logprobs_backward", mutates_args=())
def _backward_op(
    grad: Tensor,  # (N,)
    grad_entropy: Tensor | None,  # (N,)
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    q: Tensor,
    entropy: Tensor | None,
    stash: Tensor | None,
    scale: Tensor | None,
    place: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    group: str,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = HeadOptions(softcap, logit_scale, temperature, ignore_index)
    needs = Needs(needs_hidden, needs_weight, needs_bias)
    if len(hidden) == 0:
        return tuple(x.zero_() for x in empty_gradients(hidden, weight, bias, needs))
    row = RowGrads(grad, lse, q, grad_entropy, entropy)
    shard = shard_of(place, group)
    if stash is None:
        grads = implementation(impl).backward(hidden, weight, bias, targets, row, options, needs, shard)
    else:
        grads = implementation(impl).backward_stashed(
            hidden, weight, bias, targets, row, stash, scale, options, needs, shard=shard
        )  # fmt: skip
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


@_backward_op.register_fake
def _(
    grad, grad_entropy, hidden, weight, bias, targets, lse, q, entropy, stash, scale, place,
    softcap, logit_scale, temperature, ignore_index, group, needs_hidden, needs_weight, needs_bias, impl,
):  # fmt: skip
    return empty_gradients(hidden, weight, bias, Needs(needs_hidden, needs_weight, needs_bias))


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, place, *scalars, outputs, mode, impl = inputs
    _, lse, q, extra, direction, stash, scale = output
    ctx.set_materialize_grads(False)
    names = outputs.split(",")
    ctx.entropy_row = names.index("entropy") if "entropy" in names else None
    ctx.scalars, ctx.mode, ctx.impl = scalars, mode, impl
    entropy = None if ctx.entropy_row is None else extra[ctx.entropy_row].clone()
    direction = direction if mode == "frozen" else None
    stash, scale = (stash, scale) if mode == "stash" else (None, None)
    ctx.save_for_backward(hidden, weight, bias, targets, lse, q, entropy, direction, stash, scale, place)


def _backward(ctx, grad, _lse, _q, grad_extra, *_):
    nothing = (None,) * 10
    hidden, weight, bias, targets, lse, q, entropy, direction, stash, scale, place = ctx.saved_tensors
    grad_entropy = None if grad_extra is None or ctx.entropy_row is None else grad_extra[ctx.entropy_row]
    if ctx.mode == "frozen" and grad_entropy is None:
        return None if grad is None else _scale_rows_op(grad, direction), None, None, *nothing
    # The entropy has another direction: where it is differentiated, the tiles are recomputed.
    grad = torch.zeros_like(lse) if grad is None else grad
    needs = ctx.needs_input_grad[:3]
    grads = _backward_op(
        grad, grad_entropy, hidden, weight, bias, targets, lse, q, None if grad_entropy is None else entropy,
        *((stash, scale) if grad_entropy is None else (None, None)), place, *ctx.scalars, *needs, ctx.impl,
    )  # fmt: skip
    return *(g if needed else None for g, needed in zip(grads, needs, strict=True)), *nothing


@torch.library.custom_op("prefuse::scale_rows", mutates_args=())
def _scale_rows_op(grad: Tensor, direction: Tensor) -> Tensor:
    """(N,), (N, D) -> dhidden (N, D); a row without gradient stays exactly 0."""
    scaled = (grad[:, None] * direction.to(grad.dtype)).to(direction.dtype)
    return torch.where(grad[:, None] == 0, torch.zeros_like(scaled), scaled)


@_scale_rows_op.register_fake
def _(grad, direction):
    return torch.empty_like(direction)


_forward_op.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(refuse_double_backward)
_scale_rows_op.register_autograd(refuse_double_backward)


# ---------------------------------------------------------------------------------------------- helpers


def _reference(call: HeadCall) -> tuple[Tensor, dict[str, Tensor]]:
    checks.check_targets(call.targets, Whole(), len(call.weight), call.options.ignore_index)
    dtype, o = accumulator_dtype(call.hidden.dtype), call.options
    logps, extra = reference.linear_logprobs(
        call.hidden, call.weight, call.bias, call.targets, o.softcap, o.logit_scale, o.temperature, o.ignore_index
    )
    return logps.to(dtype), {name: value.to(dtype) for name, value in extra.items()}
