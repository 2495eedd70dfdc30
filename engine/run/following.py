"""The reference of a run with sync_ref_model: a model beside the policy, which follows it (TR-DPO, arXiv 2404.09656).

Its log-probabilities hold until it moves, so nothing is computed before training: each batch asks it anew. A
checkpoint has its weights in reference-*.safetensors, to the last bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefuse.engine.data.batches import Batch
from prefuse.engine.model.forward import LanguageModel, completion_logps
from prefuse.engine.run.ranks import Ranks, fill_, whole
from prefuse.following import FollowingReference

FILE_BYTES = 4 << 30


class Following:
    def __init__(self, lm: LanguageModel, rule: FollowingReference) -> None:
        self.lm, self.rule = lm, rule
        lm.model.requires_grad_(False)
        self.moved = False  # since the held-out rows were asked about

    def ask(self, batch: Batch) -> Batch:
        """The batch, with what the reference says of it now."""
        return dataclasses.replace(batch, ref_logps=completion_logps(self.lm, batch).float())

    def after(self, step: int, policy: LanguageModel) -> None:
        """After optimizer step number `step`, counted from 1."""
        self.moved |= self.rule.update(step, self.lm.model, policy.model)

    def _state(self) -> dict[str, Tensor]:
        """By name; a tied parameter appears once."""
        return {**dict(self.lm.model.named_parameters()), **dict(self.lm.model.named_buffers())}

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self._state().values())

    def files(self, ranks: Ranks) -> Iterator[dict[str, Tensor]]:
        """Whole tensors, a file's worth at a time; on other ranks than the main, empty."""
        tensors, size = {}, 0
        for name, value in self._state().items():
            full = whole(value)
            size += full.numel() * full.element_size()
            if ranks.main:
                tensors[name] = full.detach().cpu().clone(memory_format=torch.contiguous_format)
            if size > FILE_BYTES:
                yield tensors
                tensors, size = {}, 0
        if size:
            yield tensors

    def fault_of(self, path: Path) -> str | None:
        """What is wrong with its weights in a checkpoint."""
        saved, own = dict(_tensors(path)), self._state()
        for name, value in own.items():
            if name not in saved:
                return f"it lacks the reference's {name}"
            if saved[name].shape != value.shape or not saved[name].isfinite().all():
                return f"the reference's {name} has another shape, or numbers that are not finite"
        return None

    def load(self, path: Path) -> None:
        own = self._state()
        with torch.no_grad():
            for name, value in _tensors(path):
                fill_(own[name], value)
        self.moved = True


def move_on(
    following: Following | None, loss: Any, step: int, policy: LanguageModel, metrics: dict[str, Tensor]
) -> Any:
    """After optimizer step number `step`: moves a reference that follows; the loss of the next step, which some
    change by their mean margin."""
    if following is not None:
        following.after(step, policy)
    if not hasattr(loss, "after") or "rewards/margins" not in metrics:
        return loss
    total, count = metrics["rewards/margins"].tolist()
    return loss.after(total / count)


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import safe_open

    for file in sorted(path.glob("reference-*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)
