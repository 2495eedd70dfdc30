"""Losses by name: TRL's `loss_type`s and the papers' own names, in one table.

prefuse.loss_named("simpo", beta=2.0, gamma=1.0) == prefuse.SimPO(beta=2.0, gamma=1.0)
"""

from __future__ import annotations

import dataclasses
import difflib

from prefuse.losses.contract import Loss
from prefuse.losses.dpo_family import FDPO, LDDPO, MODPO, ODPO, BetaDPO
from prefuse.losses.likelihood import CPO, ORPO, RPO, ChosenNLL, SimPO, SLiC
from prefuse.losses.pairs import AOT, APO, BCO, DPO, EXO, IPO, NCA, SPPO, DiscoPOP, DPONorm, Hinge, RobustDPO
from prefuse.losses.policy import PPOClip
from prefuse.losses.unpaired import KTO, MOKTO, UNA, ConditionalSFT

# name -> the class, and the fields that the name itself decides
LOSSES: dict[str, tuple[type, dict[str, object]]] = {
    "dpo": (DPO, {}),
    "ipo": (IPO, {}),
    "kto": (KTO, {}),
    "simpo": (SimPO, {}),
    "orpo": (ORPO, {}),
    "cpo": (CPO, {}),
    "slic": (SLiC, {}),
    "rpo": (RPO, {}),
    "f_dpo": (FDPO, {}),
    "ld_dpo": (LDDPO, {}),
    "beta_dpo": (BetaDPO, {}),
    "odpo": (ODPO, {}),
    "modpo": (MODPO, {}),
    "mo_kto": (MOKTO, {}),
    "una": (UNA, {"feedback": "labels"}),
    "una_pair": (UNA, {"feedback": "pairs"}),
    "una_score": (UNA, {"feedback": "scores"}),
    "ppo_clip": (PPOClip, {}),
    "csft": (ConditionalSFT, {}),
    # TRL's DPOTrainer
    "sigmoid": (DPO, {}),
    "sigmoid_norm": (DPONorm, {}),
    "hinge": (Hinge, {}),
    "robust": (RobustDPO, {}),
    "exo_pair": (EXO, {}),
    "nca_pair": (NCA, {}),
    "bco_pair": (BCO, {}),
    "sppo_hard": (SPPO, {}),
    "aot": (AOT, {"paired": True}),
    "aot_unpaired": (AOT, {"paired": False}),
    "apo_zero": (APO, {"anchor": "zero"}),
    "apo_down": (APO, {"anchor": "down"}),
    "discopop": (DiscoPOP, {}),
    "sft": (ChosenNLL, {}),
}


def fields_of(name: str) -> tuple[str, ...]:
    """The hyperparameters that the loss of this name takes."""
    cls, fixed = _entry(name)
    return tuple(field.name for field in dataclasses.fields(cls) if field.name not in fixed)


# {field: setting} where the setting, of the engine or of TRL's configs, has another name than the field.
SETTINGS = {
    "gamma": "simpo_gamma", "delta": "slic_delta", "tau": "discopop_tau", "value": "kto_value",
    "reference_point": "kto_reference_point", "clip": "ppo_clip", "distance": "una_distance",
}  # fmt: skip


def setting_names(name: str) -> dict[str, str]:
    """{field: the setting it is read from} for the loss of this name."""
    return {field: SETTINGS.get(field, field) for field in fields_of(name)}


def loss_from(settings: object, name: str) -> Loss:
    """The loss of this name, its hyperparameters from the attributes of `settings`; one that is None is left out."""
    given = {field: getattr(settings, setting, None) for field, setting in setting_names(name).items()}
    return loss_named(name, **{field: value for field, value in given.items() if value is not None})


def loss_named(name: str, **hyperparameters: object) -> Loss:
    """The loss of this name. ValueError for an unknown name, TypeError for a hyperparameter that the loss has not.

    `fields_of(name)` lists the hyperparameters that it has.
    """
    cls, fixed = _entry(name)
    unknown = sorted(set(hyperparameters) - set(fields_of(name)))
    if unknown:
        raise TypeError(f"the loss {name!r} has no {', '.join(unknown)}; it takes {', '.join(fields_of(name))}")
    return cls(**fixed, **hyperparameters)


def _entry(name: str) -> tuple[type, dict[str, object]]:
    if name not in LOSSES:
        near = difflib.get_close_matches(str(name), LOSSES, n=3, cutoff=0.5) or list(LOSSES)
        raise ValueError(f"unknown loss {name!r}; did you mean {' or '.join(near)}?")
    return LOSSES[name]
