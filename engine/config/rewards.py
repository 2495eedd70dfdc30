"""Settings of `prefuse reward`: which loss makes scores out of comparisons, or out of steps."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import SCORING, Topic, at_least, setting
from prefuse.engine.errors import UserError
from prefuse.losses.rewards import AllPairs, BradleyTerry, PlackettLuce, RewardLoss, StepReward


@dataclass(frozen=True)
class RewardSettings(Topic):
    title: ClassVar[str] = "Reward model (docs/rewards.md)"
    commands: ClassVar[tuple[str, ...]] = ("reward",)

    reward_loss: Literal["bradley_terry", "plackett_luce", "all_pairs", "steps"] = setting(
        "bradley_terry",
        "What a reward model learns from. bradley_terry: pairs (of a list of scored answers those that --pairs names). "
        "plackett_luce, all_pairs: whole rankings, each answer run once. steps: prompt, completions and labels (two "
        "lists), TRL's stepwise form; the model says of each step whether it is right.",
    )
    step_separator: str | None = setting(
        None,
        "steps: the text behind each step, at whose end its score stands; where an answer is cut into steps; "
        "\\n is a newline in it. None: a newline, or what a process reward model was trained with.",
        commands=("reward", *SCORING),
    )
    center_rewards_coefficient: float | None = setting(
        None,
        "Weight of the squared sum of a pair's scores, which keeps scores around 0 (TRL's name; 0.01 is usual). None: "
        "none.",
        rule=at_least(0),
    )

    def separator(self) -> str | None:
        """What stands behind each step: a command line says newlines as \\n."""
        return self.step_separator and self.step_separator.replace("\\n", "\n").replace("\\t", "\t")

    def scores_loss(self) -> RewardLoss:
        """The loss these settings name."""
        if self.reward_loss == "steps":
            return StepReward()
        if self.reward_loss == "plackett_luce":
            return PlackettLuce(self.center_rewards_coefficient)
        pairs = {"bradley_terry": BradleyTerry, "all_pairs": AllPairs}[self.reward_loss]
        return pairs(self.center_rewards_coefficient, self.label_smoothing or 0.0)

    def check(self, command: str) -> None:
        if command != "reward":
            return
        without = {"label_smoothing": ("plackett_luce", "steps"), "center_rewards_coefficient": ("steps",)}
        for name, losses in without.items():
            if getattr(self, name) and self.reward_loss in losses:
                raise UserError(f"{name} has no meaning with reward_loss {self.reward_loss}: drop it")
        try:
            self.scores_loss()
        except ValueError as error:
            raise UserError(str(error)) from None
