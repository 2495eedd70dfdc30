"""Per-token log-probabilities straight from hidden states and the head's weight: the public door, and the autograd.

    N tokens, D hidden, V vocabulary.

The door checks its arguments and picks implementation and mode; the private operators below it have fixed arity and
scalar arguments, as torch.library wants them, and call `portable` or `triton_head`.
"""

from __future__ import annotations

import importlib.util
import math

import torch
import torch.distributed as dist
from torch import Tensor

from prefuse.kernels import reference
from prefuse.kernels.gemm import accumulator_dtype
from prefuse.kernels.logprobs import portable
from prefuse.kernels.logprobs.portable import RowGrads, empty_forward, stash_size
from prefuse.kernels.options import OUTPUTS, HeadOptions
from prefuse.kernels.tiles.table import reaches
from prefuse.kernels.vocab import Whole, place_of, remember, shard_of

IMPLS = ("auto", "triton", "torch", "reference")


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
    return logprobs_within(0, hidden, weight, targets, bias, options, outputs, impl, vocab_group)


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
) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
    """`linear_logprobs`, which keeps nothing, and `linear_preference_loss`, which may."""
    hidden, targets, impl = prepare(hidden, weight, targets, bias, options, outputs, impl)
    if impl == "reference":
        if vocab_group is not None:
            raise ValueError('impl="reference" takes the whole head: gather the weight\'s rows, without vocab_group')
        logps, extra = _reference(hidden, weight, bias, targets, options)
        return (logps, {name: extra[name] for name in outputs}) if outputs else logps

    mode = _mode(workspace, hidden, weight, bias, impl)
    group = remember(vocab_group)
    place = place_of(weight.detach(), group) if group else None
    logps, _, _, extra, *_ = _forward_op(
        hidden, weight, bias, targets, place, options.softcap, options.logit_scale, options.temperature,
        options.ignore_index, group, ",".join(outputs), mode, impl,
    )  # fmt: skip
    if not outputs:
        return logps
    return logps, {name: x if name == "entropy" else x.detach() for name, x in zip(outputs, extra, strict=True)}


def prepare(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, options: HeadOptions,
    outputs: tuple[str, ...], impl: str,
) -> tuple[Tensor, Tensor, str]:  # fmt: skip
    """Checks everything; hidden in the dtype to compute in, targets as int64, and which implementation it will be."""
    _check_tensors(hidden, weight, targets, bias)
    targets = targets.long()  # before any comparison: -100 wraps around in a uint8 tensor
    _check_options(options, outputs, impl)
    impl = _resolve(impl, hidden)
    if torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    return hidden, targets, impl


def fits(workspace: int, hidden: Tensor, weight: Tensor, impl: str) -> bool:
    """Whether the weights of all rows may be kept for the backward."""
    return stash_size(len(hidden), len(weight), hidden) * _stash_dtype(impl, hidden).itemsize <= workspace


def _mode(workspace: int, hidden: Tensor, weight: Tensor, bias: Tensor | None, impl: str) -> str:
    """The cheapest of `portable.MODES` that applies."""
    # float16 has no range for weights that are not normalized yet.
    if not torch.is_grad_enabled() or hidden.dtype == torch.float16:
        return "lean"
    if not weight.requires_grad and not (bias is not None and bias.requires_grad):
        return "frozen" if hidden.requires_grad else "lean"
    return "stash" if fits(workspace, hidden, weight, impl) else "lean"


def _stash_dtype(impl: str, hidden: Tensor) -> torch.dtype:
    """What the products of `impl` take: half types wherever the device multiplies them."""
    return hidden.dtype if impl == "triton" or hidden.is_cuda else accumulator_dtype(hidden.dtype)


# ---------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("prefuse::linear_logprobs_forward", mutates_args=())
def _forward_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    place: Tensor | None,  # (2,) of this rank's shard of the head, see `vocab.place_of`
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
    _check_targets(targets, shard, len(weight), ignore_index)
    if len(hidden) == 0:
        return tuple(empty_forward(hidden, weight, names, mode, _stash_dtype(impl, hidden)))
    return tuple(_module(impl).forward(hidden, weight, bias, targets, options, names, mode, shard))


@_forward_op.register_fake
def _(
    hidden, weight, bias, targets, place, softcap, logit_scale, temperature, ignore_index, group, outputs, mode, impl
):  # fmt: skip
    return tuple(
        empty_forward(hidden, weight, tuple(filter(None, outputs.split(","))), mode, _stash_dtype(impl, hidden))
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
    share: Tensor | None,
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
    needs = (needs_hidden, needs_weight, needs_bias)
    if len(hidden) == 0:
        return tuple(x.zero_() for x in _empty_backward(hidden, weight, bias, needs))
    row = RowGrads(grad, lse, q, grad_entropy, entropy)
    shard = shard_of(place, group)
    if stash is None:
        grads = _module(impl).backward(hidden, weight, bias, targets, row, options, needs, shard)
    else:
        grads = _module(impl).backward_stashed(
            hidden, weight, bias, targets, row, stash, share, options, needs, shard=shard
        )  # fmt: skip
    return tuple(hidden.new_empty(0) if g is None else g for g in grads)


@_backward_op.register_fake
def _(
    grad, grad_entropy, hidden, weight, bias, targets, lse, q, entropy, stash, share, place,
    softcap, logit_scale, temperature, ignore_index, group, needs_hidden, needs_weight, needs_bias, impl,
):  # fmt: skip
    return _empty_backward(hidden, weight, bias, (needs_hidden, needs_weight, needs_bias))


def _save(ctx, inputs, output) -> None:
    hidden, weight, bias, targets, place, *scalars, outputs, mode, impl = inputs
    _, lse, q, extra, direction, stash, share = output
    ctx.set_materialize_grads(False)
    names = outputs.split(",")
    ctx.entropy_row = names.index("entropy") if "entropy" in names else None
    ctx.scalars, ctx.mode, ctx.impl = scalars, mode, impl
    entropy = None if ctx.entropy_row is None else extra[ctx.entropy_row].clone()
    direction = direction if mode == "frozen" else None
    stash, share = (stash, share) if mode == "stash" else (None, None)
    ctx.save_for_backward(hidden, weight, bias, targets, lse, q, entropy, direction, stash, share, place)


def _backward(ctx, grad, _lse, _q, grad_extra, *_):
    nothing = (None,) * 10
    hidden, weight, bias, targets, lse, q, entropy, direction, stash, share, place = ctx.saved_tensors
    grad_entropy = None if grad_extra is None or ctx.entropy_row is None else grad_extra[ctx.entropy_row]
    if ctx.mode == "frozen" and grad_entropy is None:
        return None if grad is None else _scale_rows_op(grad, direction), None, None, *nothing
    # The entropy has another direction: where someone differentiates it, the tiles are recomputed.
    grad = torch.zeros_like(lse) if grad is None else grad
    needs = ctx.needs_input_grad[:3]
    grads = _backward_op(
        grad, grad_entropy, hidden, weight, bias, targets, lse, q, None if grad_entropy is None else entropy,
        *((stash, share) if grad_entropy is None else (None, None)), place, *ctx.scalars, *needs, ctx.impl,
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


def refuse_double_backward(*_):
    raise RuntimeError(
        "linear_logprobs has no second derivative: its backward was differentiated (create_graph=True?). "
        'Use impl="reference" where a double backward is needed.'
    )


_forward_op.register_autograd(_backward, setup_context=_save)
_backward_op.register_autograd(refuse_double_backward)
_scale_rows_op.register_autograd(refuse_double_backward)


# ---------------------------------------------------------------------------------------------- helpers


def _module(impl: str):
    if impl == "torch":
        return portable
    from prefuse.kernels.logprobs import launch as triton_head

    return triton_head


def _empty_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, needs) -> tuple[Tensor, Tensor, Tensor]:
    like = (hidden, weight, bias)
    return tuple(x.new_empty(x.shape) if needed else hidden.new_empty(0) for x, needed in zip(like, needs, strict=True))


def _reference(hidden, weight, bias, targets, options: HeadOptions):
    _check_targets(targets, Whole(), len(weight), options.ignore_index)
    dtype = accumulator_dtype(hidden.dtype)
    o = options
    logps, extra = reference.linear_logprobs(
        hidden, weight, bias, targets, o.softcap, o.logit_scale, o.temperature, o.ignore_index
    )
    return logps.to(dtype), {name: value.to(dtype) for name, value in extra.items()}


def _resolve(impl: str, hidden: Tensor) -> str:
    if impl == "auto":
        fits = hidden.is_cuda and hidden.dtype != torch.float64 and _has_triton() and reaches(hidden.device)
        return "triton" if fits else "torch"
    if impl != "triton":
        return impl
    if not _has_triton():
        raise RuntimeError('impl="triton" needs the triton package; install it, or use impl="torch"')
    if hidden.dtype == torch.float64:
        raise RuntimeError('impl="triton" has no float64; use impl="torch" or "reference"')
    if not hidden.is_cuda:
        from triton import knobs

        if not knobs.runtime.interpret:
            raise RuntimeError(
                f'impl="triton" needs CUDA tensors, got {hidden.device}; use impl="torch", '
                "or set TRITON_INTERPRET=1 before triton is imported to interpret the kernels"
            )
    return impl


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _check_tensors(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    for name, x in (("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias)):
        if x is None and name == "bias":
            continue
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if hasattr(x, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor, whose storage is only this rank's shard. Call the op inside the forward of the "
                "FSDP root module, with the head in the root unit: there its weight is a plain, whole tensor and its "
                "gradient is reduced"
            )
        if x.device != hidden.device:
            raise TypeError(f"{name} is on {x.device} but hidden is on {hidden.device}; move one of them")
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must hold integer token ids, got {targets.dtype}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "expected hidden (N, D) and weight (V, D) with the same D, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}; flatten batches to (N, D) first"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"expected targets ({hidden.shape[0]},), one per row of hidden, got {tuple(targets.shape)}")
    if len(weight) == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight (V, D) must not be empty, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias ({len(weight)},), one per row of weight, got {tuple(bias.shape)}")


def _check_options(options: HeadOptions, outputs: tuple[str, ...], impl: str) -> None:
    if options.softcap is not None and not 0 < options.softcap < math.inf:
        raise ValueError(f"softcap must be > 0, or None for no cap, got {options.softcap}")
    if not 0 < options.temperature < math.inf:
        raise ValueError(f"temperature must be > 0, got {options.temperature}")
    if not -math.inf < options.logit_scale < math.inf:
        raise ValueError(f"logit_scale must be a finite number, got {options.logit_scale}")
    if isinstance(outputs, str):
        raise TypeError(f"outputs must be a tuple of names, got the string {outputs!r}; write ({outputs!r},)")
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise ValueError(f"unknown outputs {unknown}; choose from {list(OUTPUTS)}")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {list(IMPLS)}, got {impl!r}")


def _check_targets(targets: Tensor, shard: Whole, rows: int, ignore_index: int) -> None:
    if targets.is_cuda or targets.numel() == 0:  # on CUDA the kernels never read outside; a check would wait for it
        return
    bad = ~shard.valid(shard.local(targets), rows) & (targets != ignore_index)
    if bool(bad.any()):
        i = int(bad.nonzero()[0, 0])
        vocab = int(shard.vocab) if shard.sharded else rows
        raise ValueError(
            f"targets[{i}] = {int(targets[i])} is outside the vocabulary [0, {vocab}) and is not "
            f"ignore_index = {ignore_index}"
        )
