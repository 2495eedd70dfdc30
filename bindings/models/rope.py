"""Rotary embeddings that depend on the longest row of a batch (longrope, dynamic NTK), held still for a run.

transformers chooses their frequencies anew in every forward, by the largest position that is in the batch. So a row's
log-probability depends on its neighbours, and reference numbers that were computed in another batch do not fit.

    kinds = hold_rope(model, longest)      # from now on, the frequencies of a row of `longest` tokens
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from prefuse.models.trunk import trunk_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BY_BATCH = ("dynamic", "longrope")


def batch_dependent_ropes(model: PreTrainedModel) -> Iterator[tuple[nn.Module, list]]:
    """The rotary modules whose frequencies follow the batch, each with its kinds of layers ([None] for one kind)."""
    for module in trunk_of(model).modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds if isinstance(kinds, dict) else {None: kinds}
        found = [layer for layer, kind in by_layer.items() if kind in BY_BATCH]
        if found and hasattr(type(module).forward, "__wrapped__"):
            yield module, found


@torch.no_grad()
def hold_rope(model: PreTrainedModel, longest: int) -> list[str]:
    """Choose the frequencies of a row of `longest` tokens for all rows to come; the kinds that were held, if any."""
    held = []
    for module, layers in list(batch_dependent_ropes(model)):
        module.__dict__.pop("forward", None)
        x = next(model.parameters()).new_empty(1, 1, 1)
        positions = torch.tensor([[longest - 1]], device=x.device)
        for layer in layers:
            module(x, positions, **({} if layer is None else {"layer_type": layer}))
            held.append(module.rope_type if layer is None else module.rope_type[layer])
        plain = inspect.unwrap(type(module).forward)  # past the decorator that chooses anew, and torch.no_grad's
        module.forward = types.MethodType(torch.no_grad()(plain), module)
    return held
