"""TRL's trainers on this library's head (`enable`), and trainers on flat batches (`DPOTrainer`, `KTOTrainer`)."""

import importlib
from typing import Any

from prefuse.trl.switch import (
    PARAMETERS,
    Replacement,
    UnsupportedTRL,
    check_trl_head,
    disable,
    enable,
    enabled,
    is_enabled,
    recognize,
)

__all__ = [
    "PARAMETERS",
    "Replacement",
    "UnsupportedTRL",
    "check_trl_head",
    "disable",
    "enable",
    "enabled",
    "is_enabled",
    "recognize",
]


TRAINERS = ("DPOTrainer", "KTOTrainer")


def __getattr__(name: str) -> Any:
    """Trainers that go further than the switch, imported when they are asked for."""
    if name not in TRAINERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if importlib.util.find_spec("prefuse.trl.trainers") is None:
        raise AttributeError(f"this build of prefuse has no {name}: use trl.{name} with prefuse.trl.enable()")
    return getattr(importlib.import_module("prefuse.trl.trainers"), name)
