"""What a call brings for its loss beside log-probabilities, and the checks that it is what the loss needs.

S sequences, P = S / 2 pairs; an item is a pair for a loss over pairs, else a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from prefuse.losses.contract import NEEDS, Loss, needs_of


class Mismatched(NamedTuple):
    """Completions paired with another row's prompt. Given as `z0`: z0 is computed from them (`kto_reference_point`).

    Use it where a batch is a whole optimizer step. If microbatches or ranks share a step, call `kto_reference_point`.
    """

    logps: Tensor  # (N',) of the policy
    ref_logps: Tensor | None  # (N',) or (K,); None for a loss without reference
    cu_seqlens: Tensor  # (K + 1,)


@dataclass(frozen=True)
class LossInputs:
    """Everything that is given for the rows of a call, or of a group of them."""

    labels: Tensor | None = None  # (S,) bool
    z0: Tensor | float | Mismatched | None = None  # ()
    weights: Tensor | None = None  # (items,)
    margins: Tensor | None = None  # (items,)
    scores: Tensor | None = None  # (S,)

    def of(self, sequences: slice, per_item: int) -> LossInputs:
        """The inputs of some of the sequences, which must be neighbours and whole items."""
        if sequences == slice(None):
            return self
        items = slice(sequences.start // per_item, sequences.stop // per_item)
        parts = {"labels": sequences, "scores": sequences, "weights": items, "margins": items}
        given = {name: getattr(self, name)[part] for name, part in parts.items() if getattr(self, name) is not None}
        return replace(self, **given)

    def double(self, name: str) -> Tensor | None:
        """A number for each item, as losses take it: float64, without gradient."""
        value = getattr(self, name)
        return None if value is None else value.detach().double()

    def tensors(self) -> dict[str, Tensor]:
        """By name, all tensors that must be on the device of the log-probabilities."""
        given = {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor) and f.name != "z0"}
        if isinstance(self.z0, Mismatched):
            given |= {f"z0.{name}": x for name, x in self.z0._asdict().items() if x is not None}
        return given


def sequences_per_item(loss: Loss) -> int:
    return 2 if loss.per == "pair" else 1


def check_loss_inputs(loss: Loss, sequences: int, ref_logps: Tensor | None, given: LossInputs) -> None:
    """Raises unless the call brings what the loss needs, nothing else, and all of it in its shape."""
    name, needs = type(loss).__name__, needs_of(loss)
    if loss.per == "pair" and sequences % 2:
        raise ValueError(f"{name} takes pairs (chosen, rejected adjacent), got an odd number of sequences: {sequences}")
    if "reference" in needs and ref_logps is None:
        raise ValueError(f"{name} needs ref_logps; for a uniform reference pass zeros ({sequences},) in float64")
    if "reference" not in needs and ref_logps is not None:
        raise ValueError(f"{name} uses no reference, so ref_logps must be None")
    others = [need for need in NEEDS if need != "reference"]
    for need in others:
        if need in needs and getattr(given, need) is None:
            raise ValueError(f"{name} needs {' and '.join(NEEDS[other] for other in others if other in needs)}")
        if need not in needs and getattr(given, need) is not None:
            raise ValueError(f"{name} takes no {need}: leave it out, or give a loss whose needs name it")
    if isinstance(given.z0, Mismatched):
        check_packed(given.z0.logps, given.z0.cu_seqlens)
    if isinstance(given.z0, Tensor) and given.z0.dim():
        raise ValueError(f"z0 must be one number for all sequences, shape (), got {tuple(given.z0.shape)}")
    if given.labels is not None and given.labels.dtype != torch.bool:
        raise TypeError(f"labels must be bool, got {given.labels.dtype}")
    items, item = sequences // sequences_per_item(loss), "pair" if loss.per == "pair" else "sequence"
    shapes = {"labels": (sequences, "sequence"), "scores": (sequences, "sequence")}
    shapes |= {"weights": (items, item), "margins": (items, item)}
    for need, (count, each) in shapes.items():
        value = getattr(given, need)
        if value is None:
            continue
        if need != "labels" and not value.is_floating_point():
            raise TypeError(f"{need} must be floating-point, got {value.dtype}")
        if value.shape != (count,):
            raise ValueError(f"expected {need} ({count},), one per {each}, got {tuple(value.shape)}")


def check_packed(logps: Tensor, cu_seqlens: Tensor) -> None:
    """Raises unless `cu_seqlens` cuts `logps` into sequences."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens must be a tensor (S + 1,) of offsets, beginning with 0")
    if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"cu_seqlens must hold integers (int32), got {cu_seqlens.dtype}")
    if logps.dim() != 1:
        raise ValueError(
            f"expected logps (N,), the completion tokens of all sequences end to end, got {tuple(logps.shape)}"
        )
    # A look at the values would break a graph that is being compiled, or wait for the device.
    if torch.compiler.is_compiling() or cu_seqlens.is_cuda:
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != len(logps) or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to N = {len(logps)}, got {cu_seqlens.tolist()[:8]} ... {last}")


def check_devices(logps: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, x in others.items():
        if x is not None and x.device != logps.device:
            raise TypeError(f"{name} is on {x.device} but logps is on {logps.device}; move one of them")
