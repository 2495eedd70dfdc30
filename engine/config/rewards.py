"""Settings of `prefuse reward`: which loss makes scores out of comparisons, or out of steps."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import Topic, at_least, setting
from prefuse.engine.errors import UserError
from prefuse.losses.rewards import BradleyTerry, RewardLoss


@dataclass(frozen=True)
class RewardSettings(Topic):
    title: ClassVar[str] = "Reward model (docs/rewards.md)"
    commands: ClassVar[tuple[str, ...]] = ("reward",)

    reward_loss: Literal["bradley_terry"] = setting(
        "bradley_terry",
        "What a reward model learns from: bradley_terry, from pairs.",
    )
    center_rewards_coefficient: float | None = setting(
        None,
        "Weight of the squared sum of a pair's scores, which keeps scores around 0 (TRL's name; 0.01 is usual). None: "
        "none.",
        rule=at_least(0),
    )

    def scores_loss(self) -> RewardLoss:
        """The loss these settings name."""
        return BradleyTerry(self.center_rewards_coefficient, self.label_smoothing or 0.0)

    def check(self, command: str) -> None:
        try:
            self.scores_loss()
        except ValueError as error:
            raise UserError(str(error)) from None
