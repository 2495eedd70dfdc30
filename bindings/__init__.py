"""Preference optimization of language models, fused before the logits exist."""

from prefuse.kernels import linear_kl, linear_logprobs
from prefuse.kl import kl_estimate
from prefuse.losses.likelihood import CPO, ORPO, RPO, ChosenNLL, Mixture, SimPO, SLiC
from prefuse.losses.names import loss_named
from prefuse.losses.pairs import AOT, APO, BCO, DPO, EXO, IPO, NCA, SPPO, DiscoPOP, DPONorm, Hinge, RobustDPO
from prefuse.losses.unpaired import KTO, SFT
from prefuse.preference import (
    Mismatched,
    PreferenceOutput,
    kto_reference_point,
    linear_preference_loss,
    preference_loss,
    reduce_metrics,
)

__version__ = "0.1.0"

__all__ = [
    "AOT",
    "APO",
    "BCO",
    "CPO",
    "DPO",
    "EXO",
    "IPO",
    "KTO",
    "NCA",
    "ORPO",
    "RPO",
    "SFT",
    "SPPO",
    "ChosenNLL",
    "DPONorm",
    "DiscoPOP",
    "Hinge",
    "Mismatched",
    "Mixture",
    "PreferenceOutput",
    "RobustDPO",
    "SLiC",
    "SimPO",
    "kl_estimate",
    "kto_reference_point",
    "linear_kl",
    "linear_logprobs",
    "linear_preference_loss",
    "loss_named",
    "preference_loss",
    "reduce_metrics",
]
