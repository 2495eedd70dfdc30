"""Sampled answers through the model: what a batch of them brings, and the policy loss of it.

N completion tokens of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

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
    value_head: nn.Module | None = None  # (N, D) -> (N,) ppo
    cliprange_value: float = 0.2

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
        out = prefuse.linear_policy_loss(
            hidden, lm.head.weight, batch.targets, batch.cu_seqlens, sampled.old_logps, sampled.advantages,
            ref_logps=batch.ref_logps, loss=loss, num_items=num_items, temperature=sampled.temperature, impl=lm.impl,
            **lm.head.options(),
        )  # fmt: skip
    return out if sampled.value_head is None else with_value_loss(out, sampled, hidden, num_items)


def with_value_loss(out: PolicyOutput, sampled: SampledTokens, hidden: Tensor, num_items: int | None) -> PolicyOutput:
    """The loss of PPO's value head beside the policy's; neither moves what the other learns."""
    losses = prefuse.clipped_value_loss(
        sampled.value_head(hidden), sampled.old_values, sampled.returns, sampled.cliprange_value
    )
    count = len(losses) if num_items is None else num_items
    metric = torch.stack([losses.detach().sum(), losses.new_tensor(len(losses))])
    return replace(
        out, loss=out.loss + (losses.sum() / count).float(), metrics={**out.metrics, "loss/value_avg": metric}
    )
