"""Every preference loss, once: a small function of the numbers of each sequence."""

from prefuse.losses.contract import NEEDS, Loss, Sequences, needs_of
from prefuse.losses.likelihood import CPO, ORPO, RPO, ChosenNLL, Mixture, SimPO, SLiC
from prefuse.losses.names import LOSSES, fields_of, loss_named
from prefuse.losses.pairs import AOT, APO, BCO, DPO, EXO, IPO, NCA, SPPO, DiscoPOP, DPONorm, Hinge, RobustDPO
from prefuse.losses.unpaired import KTO, SFT

__all__ = [
    "AOT",
    "APO",
    "BCO",
    "CPO",
    "DPO",
    "EXO",
    "IPO",
    "KTO",
    "LOSSES",
    "NCA",
    "NEEDS",
    "ORPO",
    "RPO",
    "SFT",
    "SPPO",
    "ChosenNLL",
    "DPONorm",
    "DiscoPOP",
    "Hinge",
    "Loss",
    "Mixture",
    "RobustDPO",
    "SLiC",
    "Sequences",
    "SimPO",
    "fields_of",
    "loss_named",
    "needs_of",
]
