"""Answers that were sampled once are not sampled again: `label` and `revise` go on after a kill where they stood.

An answer depends on the weights, the settings of sampling, its seed and the batch (or request) that it is drawn in. All
of these are the key under which score_cache keeps it, so what is read there is what would be sampled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.sampling import Answer, shape_of
from prefuse.engine.report.log import say
from prefuse.engine.score.cache import Cache, cache_folder, json_digest
from prefuse.engine.score.classifier import digest_of


@dataclass
class KeptAnswers:
    """The answers of every batch that was whole before the process ended."""

    cache: Cache
    found: int = field(default=0, init=False)  # answers that were there

    def answers(self, asked: Any, make: Callable[[], list[Answer]]) -> list[Answer]:
        """What `asked`, anything that JSON can say, was answered before; else what `make` samples now."""
        key = json_digest(asked)
        known = self.cache.get(key)
        if known is None:
            made = make()
            self.cache.put(key, [astuple(one) for one in made])
            return made
        if not self.found:
            say("answers that were sampled before are read from score_cache, not sampled again")
        self.found += len(known)
        return [Answer(*one) for one in known]


def kept_of_model(config: Config, lm: LanguageModel, tokenizer: Any) -> KeptAnswers:
    """Of a model in this process: its files, and what else decides a draw on this machine."""
    weights = digest_of(Path(config.model_name_or_path), lm.model)
    how = [asdict(shape_of(config)), config.per_device_eval_batch_size, config.use_transformers_continuous_batching]
    made_of = [lm.device.type, str(lm.compute_dtype), torch.__version__, tokenizer.eos_token_id, tokenizer.pad_token_id]
    return KeptAnswers(Cache(cache_folder(config.score_cache), json_digest("answers", weights, how, made_of)))


def kept_of_server(config: Config) -> KeptAnswers:
    """Of a server, which is known by its address; the model's name, the seed and the settings stand in each request."""
    return KeptAnswers(
        Cache(cache_folder(config.score_cache), json_digest("answers", config.server_type, config.server_base_url))
    )
