"""How a setting is declared: in one place, with its default, its help, its commands and its rule.

    learning_rate: float | None = setting(None, "Peak learning rate.", rule=at_least(0))

A topic is a frozen dataclass of settings (engine/config/optimization.py, ...); `Config` in settings.py is all topics
in one. To add a setting, add a line to its topic: flag, YAML key, help and checks follow from it.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from prefuse.engine.errors import UserError

TRAINING = ("sft", "train", "reward", "online")  # the commands that train
EVERY = (*TRAINING, "eval", "generate", "label", "revise")  # the commands that load a model and read rows
SCORING = ("sft", "train", "eval", "online", "label", "revise")  # the commands that take scorers
LOADING = (*EVERY, "merge")  # the commands that load a model
MOST = 2**31 - 1  # of a whole number: counts and lengths are int32 somewhere


@dataclass(frozen=True)
class Rule:
    """What a value must be: `wanted` continues the sentence "NAME must be"."""

    wanted: str
    holds: Callable[[Any], bool]  # must be false for nan


def at_least(least: float) -> Rule:
    return Rule(f"at least {least}", lambda value: value >= least)


def above(bound: float) -> Rule:
    return Rule(f"above {bound}", lambda value: value > bound)


@dataclass(frozen=True)
class Setting:
    """What is known of a setting besides its name, its type and its default."""

    about: str
    commands: tuple[str, ...] | None  # None: those of its topic
    may_differ: bool  # a resumed run may have another value: the weights that it ends with are the same
    rule: Rule | None  # not asked about None
    only_with: tuple[str, object] | None  # (another setting, the value it must have)
    most: int | None  # None: MOST for whole numbers
    finite: bool  # whether infinity is refused
    topic: str | None  # the title that it stands under in the help; None: that of its topic


def setting(
    default: Any,
    about: str,
    *,
    commands: Sequence[str] | None = None,
    may_differ: bool = False,
    rule: Rule | None = None,
    only_with: tuple[str, object] | None = None,
    most: int | None = None,
    finite: bool = True,
    topic: str | None = None,
) -> Any:
    """A field of a topic. See `Setting` for what the arguments mean."""
    commands = None if commands is None else tuple(commands)
    about_it = Setting(about, commands, may_differ, rule, only_with, most, finite, topic)
    return dataclasses.field(default=default, metadata={"setting": about_it})


class Topic:
    """Settings of one subject, and the rules that need more than one value or the command. A mixin of `Config`."""

    title: ClassVar[str]  # in the help
    commands: ClassVar[tuple[str, ...]] = EVERY  # for which its settings have a meaning

    def command_defaults(self, command: str) -> dict[str, object]:
        """Values for settings that are None and whose default depends on the command."""
        return {}

    def check(self, command: str) -> None:
        """Raise UserError if the settings of this topic cannot be."""


def known(field: dataclasses.Field) -> Setting:
    return field.metadata["setting"]


def check_value(name: str, value: object, known: Setting) -> None:
    """UserError if the setting may not have `value`, whatever the others are."""
    if isinstance(value, list):
        for item in value:
            check_value(name, item, known)
    if isinstance(value, str) and any(ord(character) < 32 for character in value):
        raise UserError(f"{name} must be text without control characters, got {value!r}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if known.rule is not None:
            check_rule(name, value, known.rule)
        most = MOST if known.most is None and isinstance(value, int) else known.most
        if most is not None and value > most:
            raise UserError(f"{name} must be at most {most}, got {value}")
        if known.finite and math.isinf(value):
            raise UserError(f"{name} must be finite, got {value}")


def check_rule(name: str, value: float, rule: Rule) -> None:
    if not rule.holds(value):
        raise UserError(f"{name} must be {rule.wanted}, got {value}")


def require(config: Any, name: str) -> None:
    """UserError if the setting has been left empty."""
    if not getattr(config, name):
        raise UserError(f"{name} is required: give --{name}, or {name}: in the --config file")
