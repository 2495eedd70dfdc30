"""Whether a judge is the model whose answers it judges: models prefer their own (arXiv 2404.13076)."""

from __future__ import annotations

import logging
from pathlib import Path

from prefuse.engine.run.files import sha256_of
from prefuse.engine.score.answers import file_name
from prefuse.engine.score.contract import Scorer

logger = logging.getLogger(__name__)


def is_judge_of(scorer: Scorer | None, path: str) -> bool:
    """By the name where a server has it, else by the weights."""
    backend = getattr(scorer, "backend", None)
    if backend is None:
        return False
    served = getattr(backend, "model", None)  # of a server: the name alone is known
    return served in (path, Path(path).name) if served is not None else _same_weights(path, backend.name)


def warn_of_self_judge(scorer: Scorer | None, path: str) -> None:
    """For commands in which a model may judge what it says: it is said, once, and not refused."""
    if is_judge_of(scorer, path):
        logger.warning(
            "%s judges its own answers, which models prefer (arXiv 2404.13076): its verdicts say more about its taste "
            "than about quality. Take another judge where you can", scorer.name,
        )  # fmt: skip


def wrote_the_answers(scorer: Scorer | None, generator: str) -> bool:
    """The same of answer files, which say who wrote them by name alone."""
    backend = getattr(scorer, "backend", None)
    if backend is None:
        return False
    own = getattr(backend, "model", None) or backend.name
    return generator in (own, Path(own).name, file_name(own))


def _same_weights(path: str, other: str) -> bool:
    if Path(path).resolve() == Path(other).resolve():
        return True
    weights = [sorted(sha256_of(file) for file in Path(folder).glob("*.safetensors")) for folder in (path, other)]
    return bool(weights[0]) and weights[0] == weights[1]
