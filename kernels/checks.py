"""What every public function asks of its arguments, once: tensors, options, targets, implementation, dtype.

N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from prefuse.kernels.options import OUTPUTS, HeadOptions
from prefuse.kernels.tiles.table import reaches
from prefuse.kernels.vocab import Whole

IMPLS = ("auto", "triton", "torch", "reference")


def check_head_tensors(hidden: Tensor, weight: Tensor, bias: Tensor | None, **others: Tensor) -> None:
    """TypeError or ValueError unless hidden (N, D), weight (V, D) and bias (V,) fit; `others` share hidden's device."""
    tensors = {"hidden": hidden, "weight": weight, **others, "bias": bias}
    for name, x in tensors.items():
        if x is not None or name != "bias":
            check_plain_tensor(name, x, hidden)
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None and not x.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            "expected hidden (N, D) and weight (V, D) with the same D, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}; flatten batches to (N, D) first"
        )
    if len(weight) == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight (V, D) must not be empty, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias ({len(weight)},), one per row of weight, got {tuple(bias.shape)}")


def check_plain_tensor(name: str, x: object, hidden: Tensor) -> None:
    """A whole torch.Tensor on hidden's device, no DTensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if hasattr(x, "full_tensor"):
        raise TypeError(
            f"{name} is a DTensor, whose storage is only this rank's shard. Call the op inside the forward of the "
            "FSDP root module, with the head in the root unit: there its weight is a plain, whole tensor and its "
            "gradient is reduced"
        )
    check_device(name, x, hidden)


def check_device(name: str, x: Tensor, like: Tensor, like_name: str = "hidden") -> None:
    if x.device != like.device:
        raise TypeError(f"{name} is on {x.device} but {like_name} is on {like.device}; move one of them")


def check_one_per_row(name: str, x: Tensor, hidden: Tensor) -> None:
    """`x` has one element for each row of hidden."""
    if x.shape != hidden.shape[:1]:
        raise ValueError(f"expected {name} ({hidden.shape[0]},), one per row of hidden, got {tuple(x.shape)}")


def check_token_ids(targets: Tensor) -> None:
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise TypeError(f"targets must hold integer token ids, got {targets.dtype}")


def check_targets(targets: Tensor, shard: Whole, rows: int, ignore_index: int) -> None:
    """Targets (N,) in the vocabulary, `rows` of which are here, or `ignore_index`. No check on CUDA."""
    if targets.is_cuda or targets.numel() == 0:  # a check would wait for the GPU; its kernels stay within the weight
        return
    bad = ~shard.valid(shard.local(targets), rows) & (targets != ignore_index)
    if bool(bad.any()):
        i = int(bad.nonzero()[0, 0])
        vocab = int(shard.vocab) if shard.sharded else rows
        raise ValueError(
            f"targets[{i}] = {int(targets[i])} is outside the vocabulary [0, {vocab}) and is not "
            f"ignore_index = {ignore_index}"
        )


def check_options(options: HeadOptions, outputs: tuple[str, ...] = ()) -> None:
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


def check_impl(impl: str) -> None:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {list(IMPLS)}, got {impl!r}")


def check_tolerance(tolerance: float, impl: str = "auto") -> None:
    """Raises unless it is a `gradient_tolerance`, and one that `impl` has."""
    if not 0.0 <= tolerance < 1.0:
        raise ValueError(f"gradient_tolerance must be in [0, 1), 0.0 for the exact gradient, got {tolerance}")
    if tolerance > 0.0 and impl == "reference":
        raise ValueError('impl="reference" is exact: set gradient_tolerance to 0.0, or use another impl')


def resolve(impl: str, x: Tensor) -> str:
    """ "auto" -> "triton" where it can run on `x`, else "torch"; RuntimeError for an `impl` that cannot run."""
    if impl == "auto":
        can_run = x.is_cuda and x.dtype != torch.float64 and has_triton() and reaches(x.device)
        return "triton" if can_run else "torch"
    if impl != "triton":
        return impl
    if not has_triton():
        raise RuntimeError('impl="triton" needs the triton package; install it, or use impl="torch"')
    if x.dtype == torch.float64:
        raise RuntimeError('impl="triton" has no float64; use impl="torch" or "reference"')
    if not x.is_cuda:
        from triton import knobs

        if not knobs.runtime.interpret:
            raise RuntimeError(
                f'impl="triton" needs CUDA tensors, got {x.device}; use impl="torch", '
                "or set TRITON_INTERPRET=1 before triton is imported to interpret the kernels"
            )
    return impl


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def in_compute_dtype(hidden: Tensor) -> Tensor:
    """`hidden` in the dtype to compute in: autocast's where it is on, float64 excepted, else its own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return hidden.to(torch.get_autocast_dtype(device))
    return hidden


def refuse_double_backward(function: str, instead: str) -> Callable[..., NoReturn]:
    """The backward of a backward operator: raises RuntimeError; `instead` is the impl that has a second derivative."""

    def refuse(*_) -> NoReturn:
        raise RuntimeError(
            f"{function} has no second derivative{' in Triton' if instead == 'torch' else ''}: its backward was "
            f'differentiated (create_graph=True?). Use impl="{instead}" where a double backward is needed.'
        )

    return refuse
