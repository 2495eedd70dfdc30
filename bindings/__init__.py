"""Preference optimization of language models, fused before the logits exist."""

from prefuse.following import FollowingReference
from prefuse.kernels import linear_kl, linear_logprobs
from prefuse.kl import kl_estimate
from prefuse.losses.advantages import batch_advantages, gae, group_advantages, token_rewards, whiten
from prefuse.losses.dpo_family import FDPO, LDDPO, MODPO, ODPO, BetaDPO
from prefuse.losses.likelihood import CPO, ORPO, RPO, ChosenNLL, Mixture, SimPO, SLiC
from prefuse.losses.names import loss_named
from prefuse.losses.pairs import AOT, APO, BCO, DPO, EXO, IPO, NCA, SPPO, DiscoPOP, DPONorm, Hinge, RobustDPO
from prefuse.losses.policy import GRPO, RLOO, PPOClip, Reinforce, clipped_value_loss
from prefuse.losses.rewards import AllPairs, BradleyTerry, PlackettLuce, StepReward
from prefuse.losses.row_weights import objective_margins, wpo_weights
from prefuse.losses.unpaired import KTO, MOKTO, SFT, UNA, ConditionalSFT, kto_weights
from prefuse.policy import PolicyOutput, linear_policy_loss, policy_loss
from prefuse.preference import (
    Mismatched,
    PreferenceOutput,
    kto_reference_point,
    linear_preference_loss,
    preference_loss,
    reduce_metrics,
)
from prefuse.reward import RewardOutput, combine_steps, reward_loss

__version__ = "0.1.0"

__all__ = [
    "AOT",
    "APO",
    "BCO",
    "CPO",
    "DPO",
    "EXO",
    "FDPO",
    "GRPO",
    "IPO",
    "KTO",
    "LDDPO",
    "MODPO",
    "MOKTO",
    "NCA",
    "ODPO",
    "ORPO",
    "RLOO",
    "RPO",
    "SFT",
    "SPPO",
    "UNA",
    "AllPairs",
    "BetaDPO",
    "BradleyTerry",
    "ChosenNLL",
    "ConditionalSFT",
    "DPONorm",
    "DiscoPOP",
    "FollowingReference",
    "Hinge",
    "Mismatched",
    "Mixture",
    "PPOClip",
    "PlackettLuce",
    "PolicyOutput",
    "PreferenceOutput",
    "Reinforce",
    "RewardOutput",
    "RobustDPO",
    "SLiC",
    "SimPO",
    "StepReward",
    "batch_advantages",
    "clipped_value_loss",
    "combine_steps",
    "gae",
    "group_advantages",
    "kl_estimate",
    "kto_reference_point",
    "kto_weights",
    "linear_kl",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_preference_loss",
    "loss_named",
    "objective_margins",
    "policy_loss",
    "preference_loss",
    "reduce_metrics",
    "reward_loss",
    "token_rewards",
    "whiten",
    "wpo_weights",
]
