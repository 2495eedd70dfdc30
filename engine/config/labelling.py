"""Settings of AI feedback: `prefuse label` and `prefuse revise`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import Topic, at_least, require, setting
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
    label_form: Literal["pairs", "labelled", "scored"] = setting(
        "pairs",
        "What a row of the output is: chosen and rejected, an answer with a label, or an answer with a score.",
        commands=("label",),
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
        if self.model_name_or_path and self.num_generations < 2:
            raise UserError("labels compare answers to one prompt: set num_generations to 2 or more")
