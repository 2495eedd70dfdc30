"""Every preference loss, once: a small function of the numbers of each sequence."""

from prefuse.losses.contract import NEEDS, Loss, Sequences, needs_of
from prefuse.losses.dpo_family import FDPO, LDDPO, MODPO, ODPO, BetaDPO
from prefuse.losses.likelihood import CPO, ORPO, RPO, ChosenNLL, Mixture, SimPO, SLiC
from prefuse.losses.names import LOSSES, fields_of, loss_named
from prefuse.losses.pairs import AOT, APO, BCO, DPO, EXO, IPO, NCA, SPPO, DiscoPOP, DPONorm, Hinge, RobustDPO
from prefuse.losses.row_weights import objective_margins, wpo_weights
from prefuse.losses.unpaired import KTO, MOKTO, SFT, UNA, ConditionalSFT, PPOClip, kto_weights

__all__ = [
    "AOT",
    "APO",
    "BCO",
    "CPO",
    "DPO",
    "EXO",
    "FDPO",
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
    "RobustDPO",
    "SLiC",
    "Sequences",
    "SimPO",
    "fields_of",
    "kto_weights",
    "loss_named",
    "needs_of",
    "objective_margins",
    "wpo_weights",
]
