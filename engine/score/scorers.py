"""One setting -> a scorer.

--scorer reward_folder                     a reward model, of answers or of steps
--scorer reward_a reward_b --scorer_combine min      an ensemble
--scorer rewards.py:helpful                a function with TRL's signature
--scorer math=solution                     a rule (rules.py has the list)
--scorer judge=folder                      a language model that compares two answers
--scorer judge=http://localhost:8000/v1#model        the same behind an OpenAI-compatible server
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.data.dataset import text_options
from prefuse.engine.errors import UserError
from prefuse.engine.score.cache import cache_folder
from prefuse.engine.score.contract import Scorer
from prefuse.engine.score.ensemble import Ensemble
from prefuse.engine.score.function import load_function
from prefuse.engine.score.rules import RULES, TextRule

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def scorer_of(specs: Sequence[str], config: Config, device: torch.device) -> Scorer:
    """The scorer that the setting names: one, or an ensemble of all."""
    members = tuple(_one(spec, config, device) for spec in specs)
    weighted = config.scorer_weights is not None and list(specs) == config.scorer
    if len(members) == 1 and not weighted and getattr(members[0], "heads", 1) == 1:
        return members[0]
    judges = [member.name for member in members if hasattr(member, "compare")]
    if judges:
        raise UserError(f"{', '.join(judges)}: a judge compares, and is no member of an ensemble; give it alone")
    if weighted:
        headed = [member.name for member in members if getattr(member, "heads", 1) > 1]
        if headed:
            raise UserError(f"scorer_weights has a weight for each scorer, and {', '.join(headed)} has several heads")
        return Ensemble(members, "sum", weights=tuple(config.scorer_weights))
    return Ensemble(members, config.scorer_combine, config.scorer_spread_weight)


def model_of(spec: str) -> str | None:
    """The folder, or the name on the hub, of the model that a scorer loads into this process; None for the others."""
    kind, equals, argument = spec.partition("=")
    if kind == "judge" and equals:
        return None if argument.startswith(("http://", "https://")) else argument
    if (kind in RULES and (equals or not Path(spec).exists())) or re.search(r"\.py:\w+$", spec):
        return None
    return spec if Path(spec).is_dir() or _HUB_NAME.fullmatch(spec) else None


def _one(spec: str, config: Config, device: torch.device) -> Scorer:
    kind, equals, argument = spec.partition("=")
    if kind == "judge" and equals:
        from prefuse.engine.score.judge import judge_of

        return judge_of(argument, config, device)
    if kind in RULES and (equals or not Path(spec).exists()):
        return TextRule(kind, argument)
    if re.search(r"\.py:\w+$", spec):
        return load_function(spec, config.scorer_timeout)
    if Path(spec).is_dir() or _HUB_NAME.fullmatch(spec):
        return _reward_model(spec, config, device)
    raise UserError(
        f"scorer {spec}: expected a reward model's folder, FILE.py:FUNCTION, judge=FOLDER, judge=URL#MODEL, or a rule: "
        f"{', '.join(RULES)} (docs/evaluation.md)"
    )


def _reward_model(path: str, config: Config, device: torch.device) -> Scorer:
    from prefuse.engine.model.reward_model import scores_steps
    from prefuse.engine.score.classifier import load_classifier
    from prefuse.engine.score.steps import load_step_classifier

    rest = (
        config.per_device_eval_batch_size,
        cache_folder(config.score_cache),
        config.trust_remote_code,
        text_options(config),
    )
    if scores_steps(path):
        return load_step_classifier(path, device, config.scorer_steps, config.separator(), *rest)
    return load_classifier(path, device, *rest)
