"""Preference optimization of language models, fused before the logits exist."""

from .kernels import linear_kl, linear_logprobs
from .kl import kl_estimate
from .losses import DPO, IPO, KTO, SFT
from .preference import (
    Mismatched,
    PreferenceOutput,
    kto_reference_point,
    linear_preference_loss,
    preference_loss,
    reduce_metrics,
)

__version__ = "0.1.0"

__all__ = [
    "DPO",
    "IPO",
    "KTO",
    "SFT",
    "Mismatched",
    "PreferenceOutput",
    "kl_estimate",
    "kto_reference_point",
    "linear_kl",
    "linear_logprobs",
    "linear_preference_loss",
    "preference_loss",
    "reduce_metrics",
]
