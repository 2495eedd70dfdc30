"""Every way of computing a preference loss's head that the GPU suite times, each from one `TimedInputs`.

A variant takes a batch and returns per-token log-probabilities (N,), or the loss itself (). Imports stand inside, so
that a peer that is missing or fails is a line in the report and no more.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

import prefuse
from prefuse.bench.cases import AMPLE
from prefuse.bench.gpu_inputs import TimedInputs

Variant = Callable[[TimedInputs], Tensor]


def prefuse_logps(x: TimedInputs) -> Tensor:
    return prefuse.linear_logprobs(x.hidden, x.weight, x.targets, softcap=x.softcap, impl="triton")


def prefuse_sparse(x: TimedInputs) -> Tensor:
    """Up to 2^-9 of the gradient's mass skipped and measured."""
    return prefuse.linear_logprobs(
        x.hidden, x.weight, x.targets, softcap=x.softcap, impl="triton", gradient_tolerance=2**-9
    )


def prefuse_dpo(x: TimedInputs, workspace: int) -> Tensor:
    ref_logps = torch.zeros(len(x.cu_seqlens) - 1, dtype=torch.float64, device=x.hidden.device)
    return prefuse.linear_preference_loss(
        x.hidden, x.weight, x.targets, x.cu_seqlens, ref_logps, workspace=workspace, softcap=x.softcap, impl="triton"
    ).loss


def trl(x: TimedInputs) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    _let_trl_run_alone()
    vocab_chunk = 32768  # as its trainers call it
    return ChunkedLogProbFunction.apply(x.hidden, x.weight, None, x.targets, 1.0, vocab_chunk, x.softcap, 1.0, ())[0]


def _let_trl_run_alone() -> None:
    """Its backward imports the trainers for one helper, which does nothing without ZeRO-3."""
    try:
        import trl.trainer.utils  # noqa: F401
    except Exception:
        stand_in = types.ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *parameters: contextlib.nullcontext()
        sys.modules["trl.trainer.utils"] = stand_in


def liger_dpo(x: TimedInputs) -> Tensor:
    """Chunked by pairs; its own reference pass left out. (The first half of the batch is chosen here: equal work.)"""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    _refuse_softcap(x)
    sequences = len(x.cu_seqlens) - 1
    hidden, targets = x.hidden.view(sequences, -1, x.hidden.shape[1]), x.targets.view(sequences, -1)
    loss = LigerFusedLinearDPOLoss(use_ref_model=False, compute_nll_loss=False)
    return loss(x.weight, hidden, targets)[0]


def liger_scaled(x: TimedInputs) -> Tensor:
    """The CuTe kernel on Hopper, chunks of PyTorch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    _refuse_softcap(x)
    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(x.hidden, x.weight, x.targets)
    return -(nll[0] if isinstance(nll, tuple) else nll)


def cce(x: TimedInputs, filter_eps: str | None = "high") -> Tensor:
    """Skips the gradient of tiles whose largest |dlogit| is under 2^-12; exactly all of them without the filter."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(
        x.hidden, x.weight, x.targets, softcap=x.softcap, reduction="none", filter_eps=filter_eps, impl="cce"
    )


def torch_chunked(x: TimedInputs) -> Tensor:
    """Since torch 2.13; the result is bf16."""
    from torch.nn import LinearCrossEntropyOptions

    _refuse_softcap(x)
    options = LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="none", options=options)


def eager(x: TimedInputs) -> Tensor:
    """bf16 logits, then a float32 log-softmax."""
    return _eager(x.hidden, x.weight, x.targets, x.softcap)


def compiled(x: TimedInputs) -> Tensor:
    return _compiled()(x.hidden, x.weight, x.targets, x.softcap)


def _eager(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    logits = hidden @ weight.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits.float(), -1).gather(1, targets[:, None])[:, 0]


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(_eager, dynamic=False)


def _refuse_softcap(x: TimedInputs) -> None:
    if x.softcap is not None:
        raise NotImplementedError("no softcap")


FIRST: dict[str, Variant] = {
    "prefuse": prefuse_logps,
    "prefuse DPO, 3 units": functools.partial(prefuse_dpo, workspace=AMPLE),
    "prefuse sparse": prefuse_sparse,
    "TRL chunked log-probs": trl,
    "Liger scaled CE": liger_scaled,
    "Liger chunked DPO": liger_dpo,
}
OTHERS: dict[str, Variant] = {
    "prefuse DPO, 4 units": functools.partial(prefuse_dpo, workspace=0),
    "CCE": cce,
    "CCE without filter": functools.partial(cce, filter_eps=None),
    "F.linear_cross_entropy": torch_chunked,
    "eager": eager,
}
SLOW: dict[str, Variant] = {"torch.compile": compiled}
VARIANTS = {**FIRST, **OTHERS, **SLOW}
# These return the loss: they are steps of training and have no forward worth timing alone. The plans of `prefuse DPO`
# differ with a trainable head only.
MODES_OF = {
    "prefuse DPO, 3 units": ("trainable",),
    "prefuse sparse": ("trainable", "frozen"),
    "prefuse DPO, 4 units": ("trainable", "frozen"),
    "Liger chunked DPO": ("trainable", "frozen"),
}


# Mode -> what needs a gradient, and the products of N * D * V multiply-adds that its rate is counted by.
MODES = {
    "no grad": ((), 1),
    "frozen": (("hidden",), 2),
    "trainable": (("hidden", "weight"), 4),
}
GEMM_UNITS = {"no grad": (1,), "frozen": (2,), "trainable": (4, 3)}


def step(variant: Variant, x: TimedInputs) -> None:
    """Forward, and backward if anything needs a gradient."""
    if not (x.hidden.requires_grad or x.weight.requires_grad):
        with torch.no_grad():
            variant(x)
        return
    out = variant(x)
    out.backward(x.grad.to(out.dtype) if out.dim() else None)
