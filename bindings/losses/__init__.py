"""Every preference loss, once: a small function of the numbers of each sequence."""

from prefuse.losses.advantages import batch_advantages, gae, group_advantages, token_rewards, whiten
from prefuse.losses.contract import NEEDS, Loss, Sequences, needs_of
from prefuse.losses.dpo_family import FDPO, LDDPO, MODPO, ODPO, BetaDPO
from prefuse.losses.likelihood import CPO, ORPO, RPO, ChosenNLL, Mixture, SimPO, SLiC
from prefuse.losses.names import LOSSES, fields_of, loss_named
from prefuse.losses.pairs import AOT, APO, BCO, DPO, EXO, IPO, NCA, SPPO, DiscoPOP, DPONorm, Hinge, RobustDPO
from prefuse.losses.policy import GRPO, RLOO, PPOClip, Reinforce, clipped_value_loss
from prefuse.losses.row_weights import objective_margins, wpo_weights
from prefuse.losses.sampled import POLICY_NEEDS, PolicyObjective, Sampled
from prefuse.losses.unpaired import KTO, MOKTO, SFT, UNA, ConditionalSFT, kto_weights

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
    "LOSSES",
    "MODPO",
    "MOKTO",
    "NCA",
    "NEEDS",
    "ODPO",
    "ORPO",
    "POLICY_NEEDS",
    "RLOO",
    "RPO",
    "SFT",
    "SPPO",
    "UNA",
    "BetaDPO",
    "ChosenNLL",
    "ConditionalSFT",
    "DPONorm",
    "DiscoPOP",
    "Hinge",
    "Loss",
    "Mixture",
    "PPOClip",
    "PolicyObjective",
    "Reinforce",
    "RobustDPO",
    "SLiC",
    "Sampled",
    "Sequences",
    "SimPO",
    "batch_advantages",
    "clipped_value_loss",
    "fields_of",
    "gae",
    "group_advantages",
    "kto_weights",
    "loss_named",
    "needs_of",
    "objective_margins",
    "token_rewards",
    "whiten",
    "wpo_weights",
]
