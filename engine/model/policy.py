"""Sampled answers through the model: what a batch of them brings, and the policy loss of it.

N completion tokens of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import prefuse
from prefuse import PolicyOutput

if TYPE_CHECKING:
    from prefuse.engine.data.batches import Batch
    from prefuse.engine.model.forward import LanguageModel
    from prefuse.losses.sampled import PolicyObjective


@dataclass(frozen=True)
class SampledTokens:
    """What a batch of sampled answers brings beside its tokens."""

    advantages: Tensor  # (N,) float32
    old_logps: Tensor | None  # (N,) None: those of the step itself
    temperature: float
    old_values: Tensor | None = None  # (N,) ppo
    returns: Tensor | None = None  # (N,) ppo

    def to(self, device: torch.device) -> SampledTokens:
        tensors = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, **tensors)


def policy_loss_of_states(
    lm: LanguageModel,
    hidden: Tensor,  # (N, D)
    batch: Batch,
    loss: PolicyObjective,
    num_items: int | None = None,
) -> PolicyOutput:
    sampled = batch.sampled
    with lm.autocast():
        return prefuse.linear_policy_loss(
            hidden, lm.head.weight, batch.targets, batch.cu_seqlens, sampled.old_logps, sampled.advantages,
            ref_logps=batch.ref_logps, loss=loss, num_items=num_items, temperature=sampled.temperature, impl=lm.impl,
            **lm.head.options(),
        )  # fmt: skip
