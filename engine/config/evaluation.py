"""Settings of `prefuse eval` with a scorer: what is compared, and the signs of over-optimization over a run."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from prefuse.engine.config.setting import Topic, at_least, setting
from prefuse.engine.errors import UserError


@dataclass(frozen=True)
class EvaluationSettings(Topic):
    title: ClassVar[str] = "Evaluation by scores (docs/evaluation.md)"
    commands: ClassVar[tuple[str, ...]] = ("eval",)

    num_generations: int | None = setting(
        None,
        "Answers sampled for each prompt. `eval`: from 2 on, best-of-n is drawn up too. `online`: the group whose "
        "rewards are compared. `label`: those that are compared, or the rollouts from each step. None: 1 for `eval`, "
        "8 for `online` and for rollouts, 2 for `label`.",
        commands=("eval", "online", "label"),
        rule=at_least(1),
        most=1024,
    )
    model_answers: str | None = setting(
        None, "Answers that are there already, in place of the model's: a file of AlpacaEval, MT-Bench or Arena-Hard."
    )
    ref_answers: str | None = setting(None, "The same in place of the reference's.")
    questions: str | None = setting(None, "question.jsonl of MT-Bench or Arena-Hard, for their answer files.")
    answers_dir: str | None = setting(
        None,
        "Folder to write answers and verdicts to: AlpacaEval's outputs and annotations, and model_answer/ and "
        "question.jsonl as MT-Bench and Arena-Hard read them. Must be new or empty.",
    )
    history: str | None = setting(
        None,
        "JSONL file to append this look to: drift of the model since the last look at the same prompts is then said.",
    )
    scorer_columns: list[str] | None = setting(
        None, "More columns of the rows to hand to a Python function, beside those that it names."
    )
    checkpoints: str | None = setting(
        None,
        "Folder of a run: each of its checkpoints is looked at with --scorer (and --gold_scorer): rewards, KL, length, "
        "diversity, refusals, perplexity, and the curve of over-optimization as a picture.",
    )
    text_dataset: str | None = setting(
        None, "Plain text (.txt, or rows with a text column) whose perplexity shows what alignment costs elsewhere."
    )

    def command_defaults(self, command: str) -> dict[str, object]:
        return {"num_generations": {"online": 8, "label": 8 if self.label_form == "steps" else 2}.get(command, 1)}

    def check(self, command: str) -> None:
        if command != "eval":
            return
        if self.num_generations > 1 and self.temperature == 0:
            raise UserError("num_generations above 1 needs samples: set temperature above 0, for instance 1.0")
        for name in ("model_answers", "ref_answers", "checkpoints", "history"):
            if getattr(self, name) and not self.scorer:
                raise UserError(f"{name} needs something that scores answers: give --scorer")
        if bool(self.model_answers) != bool(self.ref_answers):
            raise UserError("model_answers and ref_answers are compared with each other: give both")
        if self.answers_dir is not None and Path(self.answers_dir).exists() and any(Path(self.answers_dir).iterdir()):
            raise UserError(f"answers_dir {self.answers_dir} is not empty: give a new folder")
