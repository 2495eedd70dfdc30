"""The model that online training compares its samples with."""

from __future__ import annotations

from dataclasses import replace

from prefuse.engine.config.settings import Config
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.load import load_model
from prefuse.engine.run.ranks import Ranks


def reference_of(lm: LanguageModel, config: Config, ranks: Ranks) -> LanguageModel | None:
    """The model that samples are compared with: the first one. With adapters it is the same model without them."""
    if config.algorithm == "iterative_dpo" and config.ref_model_name_or_path is None:
        return lm  # as it is when a round begins
    if not config.reads_first_model() and config.ref_model_name_or_path is None:
        return None
    if lm.adapters is not None and config.ref_model_name_or_path is None:
        return lm
    path = config.ref_model_name_or_path or config.model_name_or_path
    return load_model(path, replace(config, use_peft=False), lm.device, ranks)
