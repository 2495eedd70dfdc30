"""Settings of the guards, which look for what is known to go wrong in preference training."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import TRAINING, Rule, Topic, above, at_least, setting


@dataclass(frozen=True)
class GuardSettings(Topic):
    title: ClassVar[str] = "Guards (docs/guards.md)"
    commands: ClassVar[tuple[str, ...]] = TRAINING

    guard_action: Literal["warn", "stop"] = setting(
        "warn",
        "What a guard does besides saying what it saw. stop: end the run there, with a checkpoint and the model.",
        may_differ=True,
    )
    max_skipped_steps: int = setting(
        3,
        "Optimizer steps in a row that may be skipped because loss or gradient is not finite; one more ends the run.",
        rule=at_least(0),
        may_differ=True,
    )
    max_loss_ratio: float = setting(
        5.0, "A step's loss over the median of those before it.", rule=above(1), may_differ=True
    )
    max_chosen_drop: float = setting(
        0.5,
        "How far the chosen completions' log-probability may fall below the reference's, as a share of it.",
        rule=above(0),
        may_differ=True,
    )
    max_accuracy_drop: float = setting(
        0.02,
        "How far held-out accuracy may fall from its best while it is above 0.99 in training.",
        rule=at_least(0),
        may_differ=True,
    )
    max_score_drift: float = setting(
        10.0,
        "`reward`: how far the mean of held-out scores may lie from 0, in units of their spread.",
        rule=above(0),
        commands=("reward",),
        may_differ=True,
    )
    max_length_preference: float = setting(
        0.1,
        "`reward`: in how many more pairs, as a share, a reward model may prefer the longer answer than the data does.",
        rule=above(0),
        commands=("reward",),
        may_differ=True,
    )
    max_kl: float | None = setting(
        None,
        "Nats per token that the policy may move away from the reference on held-out rows. None: no limit.",
        rule=Rule("above 0, or null for no limit", lambda value: value > 0),
        may_differ=True,
    )
