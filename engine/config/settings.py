"""Every setting of a run in one flat dataclass: TRL's names where TRL has one.

Values come from the defaults, then a YAML file (``--config``), then the command line. The run folder keeps the result
as ``config.yaml``, so ``prefuse train --config run/config.yaml`` repeats it.
"""

import dataclasses
from dataclasses import dataclass

from prefuse.engine.config.batches import BatchSettings
from prefuse.engine.config.data import DataSettings
from prefuse.engine.config.evaluation import EvaluationSettings
from prefuse.engine.config.generation import GenerationSettings
from prefuse.engine.config.guards import GuardSettings
from prefuse.engine.config.labelling import LabellingSettings
from prefuse.engine.config.lora import LoraSettings
from prefuse.engine.config.loss import LOSS_SETTINGS, LOSS_TYPES, LossSettings
from prefuse.engine.config.model import ModelSettings
from prefuse.engine.config.online import OnlineSettings
from prefuse.engine.config.optimization import BITSANDBYTES, OptimizationSettings
from prefuse.engine.config.output import OutputSettings
from prefuse.engine.config.ranks import RankSettings
from prefuse.engine.config.rewards import RewardSettings
from prefuse.engine.config.rows import RowSettings
from prefuse.engine.config.sampling import SamplingSettings
from prefuse.engine.config.scoring import ScoringSettings
from prefuse.engine.config.setting import TRAINING, Topic, check_value, known
from prefuse.engine.config.speed import SpeedSettings
from prefuse.engine.config.text import TextSettings
from prefuse.engine.errors import UserError

__all__ = [
    "BITSANDBYTES", "FIELDS", "LOSS_SETTINGS", "LOSS_TYPES", "TOPICS", "TRAINING_COMMANDS", "Config", "commands_of",
    "decides_weights", "settings_of", "validate",
]  # fmt: skip


@dataclass(frozen=True)
class Config(
    # In the order of the help; a dataclass takes the fields of its last base first.
    GuardSettings,
    RankSettings,
    EvaluationSettings,
    GenerationSettings,
    SamplingSettings,
    ScoringSettings,
    LabellingSettings,
    OnlineSettings,
    OutputSettings,
    SpeedSettings,
    LoraSettings,
    OptimizationSettings,
    BatchSettings,
    RewardSettings,
    LossSettings,
    TextSettings,
    DataSettings,
    RowSettings,
    ModelSettings,
):
    """All topics in one: `config.beta` is a setting wherever it is declared."""

    def token_budget(self, batch_size: int, sequences: int) -> int:
        """Tokens of a flat batch that stands for a padded one of `batch_size` examples of so many sequences."""
        return self.max_tokens_per_batch or batch_size * sequences * self.max_length

    def command_defaults(self, command: str) -> dict[str, object]:
        return {name: value for topic in TOPICS for name, value in topic.command_defaults(self, command).items()}

    def check(self, command: str) -> None:
        for topic in TOPICS:
            if any(command in commands_of(field.name) for field in dataclasses.fields(topic)):
                topic.check(self, command)


TOPICS: tuple[type[Topic], ...] = Config.__bases__[::-1]
_FIELDS = {field.name: field for field in dataclasses.fields(Config)}
FIELDS = {name: field.type for name, field in _FIELDS.items()}
TRAINING_COMMANDS = TRAINING
_TOPIC_OF = {field.name: topic for topic in TOPICS for field in dataclasses.fields(topic)}


def commands_of(name: str) -> tuple[str, ...]:
    """The commands for which the setting `name` has a meaning."""
    own = known(_FIELDS[name]).commands
    return _TOPIC_OF[name].commands if own is None else own


def settings_of(command: str) -> dict[str, dict[str, dataclasses.Field]]:
    """{title of the topic: {name: field}} of what has a meaning for `command`."""
    topics = {}
    for name, field in _FIELDS.items():
        if command in commands_of(name):
            topics.setdefault(known(field).topic or _TOPIC_OF[name].title, {})[name] = field
    return topics


def decides_weights(name: str) -> bool:
    """Whether a resumed run must have the value of `name` that it began with."""
    return not known(_FIELDS[name]).may_differ and bool(set(commands_of(name)) & set(TRAINING_COMMANDS))


def validate(config: Config, command: str) -> Config:
    """The settings with the command's own defaults filled in; UserError names the first that cannot be."""
    filled = config.command_defaults(command)
    config = dataclasses.replace(config, **{k: v for k, v in filled.items() if getattr(config, k) is None})
    for name, field in _FIELDS.items():
        check_value(name, getattr(config, name), known(field))
        if getattr(config, name) == "" and field.default is None:
            raise UserError(f"{name} must not be empty: give a value, or drop it")
    for name, field in _FIELDS.items():
        if known(field).only_with is not None and getattr(config, name) != field.default:
            other, value = known(field).only_with
            said = str(value).lower()
            if getattr(config, other) != value:
                raise UserError(f"{name} has a meaning only with {other} {said}: set {other} to {said}, or drop {name}")
    config.check(command)
    return config
