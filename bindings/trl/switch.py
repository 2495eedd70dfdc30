"""TRL's trainers on this library's head: their per-token log-probabilities come from `linear_logprobs`.

    import prefuse.trl

    prefuse.trl.enable()                 # DPO, KTO, SFT, GRPO and RLOO; before or after a trainer is made
    trl.DPOTrainer(...).train()
    prefuse.trl.disable()                # or, for a while: `with prefuse.trl.enabled(): ...`

All these trainers reach their head through one autograd function of TRL's, which `enable` replaces. It is private to
TRL, so nothing about it is taken on trust: version, name, arguments and who calls it must be what is known here, and
its numbers and gradients on a small head must be ours. Else `UnsupportedTRL` says what was found, and TRL is left as
it was.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import math
import re
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType, ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from prefuse.kernels.checks import IMPLS, check_tolerance
from prefuse.kernels.logprobs.linear_logprobs import logprobs_within
from prefuse.kernels.options import HeadOptions

OLDEST, TOO_NEW = (1, 15), (2, 0)
MODULE, NAME, CALLER = "trl.trainer.utils", "_ChunkedLogProbFunction", "add_fused_lm_head"
# What the function returns after the log-probabilities, in TRL's order; None where not asked for.
EXTRAS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
PARAMETERS = {
    "hidden": inspect.Parameter.empty, "weight": inspect.Parameter.empty, "bias": inspect.Parameter.empty,
    "targets": inspect.Parameter.empty, "temperature": inspect.Parameter.empty, "chunk_size": inspect.Parameter.empty,
    "final_logit_softcapping": None, "logit_scale": 1.0, "outputs": EXTRAS,
}  # fmt: skip
ADVICE = "Install a TRL that is known here (pip install 'trl>=1.16,<2'), or train without prefuse.trl."

PerToken = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class UnsupportedTRL(RuntimeError):
    """The TRL that is installed is not one this adapter knows; it has not been touched."""


@dataclass(frozen=True)
class Replacement:
    """Stands where TRL's function class stood: `apply` takes the same arguments and returns the same five results."""

    workspace: int
    impl: str
    gradient_tolerance: float = 0.0

    def apply(
        self,
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,)
        temperature: float,
        chunk_size: int,  # of the vocabulary; this library has tiles of its own
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = EXTRAS,
    ) -> PerToken:  # five of (N,)
        """`log_softmax(logits)[targets]`, and what `outputs` names. Both it and the entropy are differentiable."""
        check_trl_head(hidden, weight)
        options = HeadOptions(final_logit_softcapping, float(logit_scale), float(temperature))
        names = tuple(name for name in EXTRAS if name in outputs)
        found = logprobs_within(
            self.workspace, hidden, weight, targets, bias, options, names, self.impl,
            gradient_tolerance=self.gradient_tolerance,
        )  # fmt: skip
        logps, extra = found if names else (found, {})
        # What an operator returns are views, which may not be changed in place; results of an autograd function may.
        extra = {name: x.bool() if name == "is_top1" else x.clone() for name, x in extra.items()}
        return logps.clone(), *(extra.get(name) for name in EXTRAS)


class _State:
    """What is replaced, and how long. (A class: `_swap` would also swap the original in this module's namespace.)"""

    lock = threading.RLock()  # importing TRL may run code that comes here
    lasting = False  # enable() without disable()
    blocks = 0  # `with enabled()` that are open, in all threads
    original: Any = None
    replacement: Replacement | None = None


# --------------------------------------------------------------------------------------------- the switch


def enable(*, workspace: int = 0, impl: str = "auto", gradient_tolerance: float = 0.0) -> None:
    """TRL's trainers compute their log-probabilities here from now on; a second call changes nothing.

    Args:
        workspace: bytes a forward may keep, so that the backward of a trainable head takes one pass over the
            vocabulary less; 0 keeps nothing.
        impl, gradient_tolerance: as in `linear_logprobs`. What a tolerance above 0.0 skips is told to
            `prefuse.kernels.record_skipped_mass`; TRL has no metric for it.

    Raises:
        ImportError: there is no TRL.
        UnsupportedTRL: this TRL is not known here, and was left alone.
        ValueError: an option out of range, or other options than those in force.
    """
    with _State.lock:
        _install(workspace, impl, gradient_tolerance)
        _State.lasting = True


def disable() -> None:
    """TRL's own function is back wherever it stood. Inside `with enabled()`, at the end of the block."""
    with _State.lock:
        _State.lasting = False
        _restore()


@contextlib.contextmanager
def enabled(*, workspace: int = 0, impl: str = "auto", gradient_tolerance: float = 0.0) -> Iterator[None]:
    """`enable` for a block of code. Blocks nest, in one thread and over several; the last one out restores TRL's own
    function, unless `enable` was called too.
    """
    with _State.lock:
        _install(workspace, impl, gradient_tolerance)
        _State.blocks += 1
    try:
        yield
    finally:
        with _State.lock:
            _State.blocks -= 1
            _restore()


def is_enabled() -> bool:
    """Whether TRL's trainers compute their log-probabilities here."""
    return _State.replacement is not None


def _install(workspace: int, impl: str, gradient_tolerance: float) -> None:
    wanted = Replacement(workspace, impl, gradient_tolerance)
    if isinstance(workspace, bool) or not isinstance(workspace, int) or workspace < 0:
        raise ValueError(f"workspace must be a whole number of bytes, 0 or more, got {workspace!r}")
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {list(IMPLS)}, got {impl!r}")
    check_tolerance(gradient_tolerance, impl)
    if _State.replacement is None:
        original = recognize()
        _swap(original, wanted)
        _State.original, _State.replacement = original, wanted
    elif _State.replacement != wanted:
        raise ValueError(
            f"prefuse.trl is enabled already, as {_State.replacement}, and not as {wanted}: disable it first"
        )


def _restore() -> None:
    if _State.replacement is not None and not _State.lasting and not _State.blocks:
        _swap(_State.replacement, _State.original)
        _State.original = _State.replacement = None


def _swap(old: Any, new: Any) -> None:
    """Puts `new` in the place of `old` in every imported module, under whatever name it is there."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)


# ------------------------------------------------------------------------------------------ what is known


def recognize() -> type[torch.autograd.Function]:
    """TRL's function class; raises UnsupportedTRL where anything about it is not as known here."""
    try:
        trl = importlib.import_module("trl")
    except ImportError as error:
        raise ImportError(f"prefuse.trl needs TRL, and importing it failed: {error}. {ADVICE}") from error
    version = str(trl.__version__)
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or not OLDEST <= (number := (int(found[1]), int(found[2]))) < TOO_NEW:
        raise UnsupportedTRL(f"TRL {version} is not known to prefuse.trl: expected 1.15 or later, below 2. {ADVICE}")

    module = importlib.import_module(MODULE)
    function = getattr(module, NAME, None)
    if not (inspect.isclass(function) and issubclass(function, torch.autograd.Function)):
        raise _unknown(version, f"{MODULE}.{NAME} is {function!r}, expected an autograd function (is it patched?)")
    parameters = dict(list(inspect.signature(function.forward).parameters.items())[1:])  # without ctx
    if [(name, p.default) for name, p in parameters.items()] != list(PARAMETERS.items()):
        raise _unknown(version, f"{NAME}.forward takes ({', '.join(map(str, parameters.values()))})")
    if NAME not in _globals_of(getattr(module, CALLER, None)):
        raise _unknown(version, f"{MODULE}.{CALLER} does not use {NAME}, so replacing it would change nothing")
    if number >= (1, 16):  # 1.15 runs on a GPU alone, and the trainer has not chosen its GPU yet
        _compare(version, function)
    return function


def _unknown(version: str, what: str) -> UnsupportedTRL:
    return UnsupportedTRL(f"TRL {version} is not as prefuse.trl knows it: {what}. {ADVICE}")


def _globals_of(function: Any) -> set[str]:
    """The names that a function and those defined in it look up."""
    todo, names = [getattr(function, "__code__", None)], set()
    while todo:
        if isinstance(code := todo.pop(), CodeType):
            names.update(code.co_names)
            todo.extend(code.co_consts)
    return names


def _compare(version: str, function: type[torch.autograd.Function]) -> None:
    """TRL's results and gradients against ours on a head of 5 tokens and 11 words, with every option in use."""
    names = ("log_probs", *EXTRAS, "the gradient of hidden", "the gradient of weight", "the gradient of bias")
    ours = _results(Replacement(0, "torch"))
    try:
        theirs = _results(function)
    except Exception as error:
        raise _unknown(version, f"{NAME} of a small head fails: {error!r}") from error
    if len(theirs) != len(ours):
        raise _unknown(version, f"{NAME} returns {len(theirs) - 3} results, expected {len(ours) - 3}")
    for name, a, b in zip(names, theirs, ours, strict=True):
        if a.dtype != b.dtype or not torch.allclose(a.double(), b.double(), rtol=1e-4, atol=1e-5):
            raise _unknown(version, f"{name} of a small head is {a.tolist()} there and {b.tolist()} here")


def _results(function: Any) -> list[Tensor]:
    def spread(*shape: int) -> Tensor:
        """Numbers between -2 and 2, without a draw from anyone's generator."""
        counts = torch.arange(math.prod(shape), dtype=torch.float32, device="cpu")
        return counts.add(1).square().mul(0.7).cos().mul(2).reshape(shape)

    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        hidden, weight, bias = (x.requires_grad_() for x in (spread(5, 3), spread(11, 3), spread(11)))
        targets = torch.tensor([0, 10, 4, 4, 7], device="cpu")
        results = function.apply(hidden, weight, bias, targets, 0.7, 4, 2.5, 1.3, EXTRAS)
        loss = sum((x * spread(5)).sum() for x in results[:2])
        return [*(x.detach() for x in results), *torch.autograd.grad(loss, (hidden, weight, bias))]


# --------------------------------------------------------------------------------------------- what is refused


def check_trl_head(hidden: Tensor, weight: Tensor) -> None:
    """Raises where TRL hands over a head that is not a whole, plain matrix, or whose gradient would be wrong."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "prefuse.trl does not run under DeepSpeed ZeRO-3, which takes the head's weight away before the backward: "
            "use ZeRO-2 or FSDP2, or call prefuse.trl.disable()"
        )
    plain = weight.dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    if not plain or is_traceable_wrapper_subclass(weight) or weight.shape[1:] != hidden.shape[1:]:
        raise ValueError(
            f"the head's weight is a {type(weight).__name__} of {weight.dtype} and shape {tuple(weight.shape)}, "
            f"expected a plain floating-point (V, {hidden.shape[1]}): a quantized head would be multiplied by its "
            "codes. Leave the head out of quantization (llm_int8_skip_modules=['lm_head'] for bitsandbytes, "
            "modules_to_not_convert for others), or call prefuse.trl.disable()"
        )
    if _gathered_over_data(weight):
        raise ValueError(
            "the head is an FSDP2 unit of its own: TRL gathers its weight in a way whose backward does not add up the "
            "ranks' gradients. Leave Linear and the head's class out of transformer_layer_cls_to_wrap (accelerate then "
            "puts the head into one unit with the last norm, which is right), or freeze the head"
        )


def _gathered_over_data(weight: Tensor) -> bool:
    """Whether it is `DTensor.full_tensor()` of a trainable weight whose ranks see different rows.

    Ranks that share the head's columns alone (tensor parallelism) compute the same, and there is nothing to add up.
    """
    spec = getattr(weight.grad_fn, "dtensor_spec", None)
    return spec is not None and spec.mesh.mesh_dim_names != ("tp",)
