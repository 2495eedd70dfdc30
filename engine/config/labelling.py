"""Settings of AI feedback: `prefuse label` and `prefuse revise`."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import Rule, Topic, at_least, require, setting
from prefuse.engine.errors import UserError


@dataclass(frozen=True)
class LabellingSettings(Topic):
    title: ClassVar[str] = "AI feedback (docs/ai_feedback.md)"
    commands: ClassVar[tuple[str, ...]] = ("label", "revise")

    constitution: str | None = setting(
        None,
        "YAML file of principles: each comparison of a judge, and each critique of `revise`, is by one of them, which "
        "the seed draws.",
    )
    label_form: Literal["pairs", "labelled", "scored", "steps"] = setting(
        "pairs",
        "What a row of the output is: chosen and rejected, an answer with a label, an answer with a score, or an "
        "answer in steps with a label for each (by rollouts of model_name_or_path from there; docs/rewards.md).",
        commands=("label",),
    )
    step_labels: Literal["hard", "soft"] = setting(
        "hard",
        "A step's label: whether any of its rollouts succeeds, or the share that does.",
        commands=("label",),
        only_with=("label_form", "steps"),
    )
    success_threshold: float = setting(
        0.5,
        "Above which score a rollout succeeds.",
        commands=("label",),
        rule=Rule("a number", math.isfinite),
        only_with=("label_form", "steps"),
    )
    num_revisions: int = setting(1, "Critiques and revisions of each answer.", commands=("revise",), rule=at_least(1))

    def check(self, command: str) -> None:
        if command not in LabellingSettings.commands:
            return
        require(self, "output_file")
        if command == "revise":
            require(self, "constitution")
            return
        if not self.scorer:
            raise UserError("scorer is required: what says which answer is better, such as --scorer judge=FOLDER")
        if self.label_form == "steps":
            self._check_steps()
        elif self.model_name_or_path and self.num_generations < 2:
            raise UserError("labels compare answers to one prompt: set num_generations to 2 or more")

    def _check_steps(self) -> None:
        if not self.model_name_or_path:
            raise UserError("labels of steps come from rollouts: give --model_name_or_path, the model that goes on")
        if self.temperature == 0 and self.num_generations > 1:
            raise UserError("rollouts at temperature 0 are all the same: set temperature above 0, for instance 1.0")
        if self.constitution is not None:
            raise UserError("a constitution is read by a judge that compares: labels of steps take none")
