"""A reference that follows the policy, Gorbatovski et al. 2024 (TR-DPO, arXiv 2404.09656), eq. 4 and 5.

following = FollowingReference(alpha=0.6, steps=512)        # TRL's ref_model_mixup_alpha and ref_model_sync_steps
if following.update(step, reference, policy):
    ...                                                    # log-probabilities of the reference are stale now
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from prefuse.losses.contract import check_share


@dataclass(frozen=True)
class FollowingReference:
    """Every `steps` optimizer steps: reference = alpha policy + (1 - alpha) reference; alpha 1 copies the policy."""

    alpha: float = 0.6
    steps: int = 512

    def __post_init__(self):
        check_share("alpha", self.alpha)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    def update(self, step: int, reference: nn.Module, policy: nn.Module) -> bool:
        """After optimizer step number `step`, counted from 1: whether the reference moved."""
        if step % self.steps:
            return False
        follow(reference, policy, self.alpha)
        return True


@torch.no_grad()
def follow(reference: nn.Module, policy: nn.Module, alpha: float) -> None:
    """reference = alpha policy + (1 - alpha) reference, in place, parameter by parameter; buffers are copied.

    Computed in float64 and rounded once, so that a small step is not lost in half precision sooner than it must be.
    Raises ValueError unless both have the same names and shapes.
    """
    ours, theirs = dict(reference.named_parameters()), dict(policy.named_parameters())
    different = sorted(ours.keys() ^ theirs.keys() | {name for name in ours.keys() & theirs.keys()
                                                      if ours[name].shape != theirs[name].shape})  # fmt: skip
    if different:
        raise ValueError(f"reference and policy differ in {', '.join(different[:5])}: expected two models of one shape")
    for name, parameter in ours.items():
        mixed = alpha * theirs[name].double() + (1 - alpha) * parameter.double()
        parameter.copy_(mixed)
    buffers = dict(policy.named_buffers())
    for name, buffer in reference.named_buffers():
        if name in buffers:
            buffer.copy_(buffers[name])
