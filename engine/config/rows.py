"""Settings of how rows are read where their columns do not say it: which column is what, verdicts, scores, mixtures."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from prefuse.engine.config.setting import EVERY, TRAINING, Rule, Topic, setting
from prefuse.engine.errors import UserError

TRAINED = (*TRAINING, "eval")
NUMBER = Rule("a number", lambda value: value == value)


@dataclass(frozen=True)
class RowSettings(Topic):
    title: ClassVar[str] = "Rows (docs/data.md)"
    commands: ClassVar[tuple[str, ...]] = EVERY

    # A resumed run compares its rows by their tokens, so how they were read may differ.
    columns: str | dict | None = setting(
        None,
        "Which column is what, as in prompt=question,chosen=better,rejected=worse,unused=notes; in YAML also a "
        "mapping, {prompt: question, unused: [notes, remarks]}. Roles: prompt, input, system, history, messages, "
        "completion, chosen, rejected, first, second, verdict, answers, scores, label, score, weight, margin, text, "
        "tools, chat_template_kwargs, unused.",
        may_differ=True,
    )
    verdict_column: str | None = setting(
        None, "Of several columns that say which of two answers is better, this one.", may_differ=True
    )
    verdict_first: str | None = setting(
        None,
        "Its values that prefer the first of the two answers, separated by commas: --verdict_first=-3,-2,-1; of "
        "numbers on a scale, from where on they do: --verdict_first '>0.5'.",
        may_differ=True,
    )
    verdict_second: str | None = setting(
        None,
        "Its values that prefer the second answer, where others beside them are neither: those are ties.",
        may_differ=True,
    )
    score_column: str | None = setting(
        None,
        "Of several columns of scores (or keys of answers), the one that counts; --score_column=-loss where the lowest "
        "is the best.",
        may_differ=True,
    )
    good_from: float | None = setting(
        None, "Answers with this score or a higher one are good (kto, sft).", rule=NUMBER, may_differ=True
    )
    bad_to: float | None = setting(
        None,
        "Answers with this score or a lower one are bad; those between are set aside and counted.",
        rule=NUMBER,
        may_differ=True,
    )
    pairs: Literal["best_worst", "all", "best_vs_random"] = setting(
        "best_worst",
        "Which pairs a list of scored answers gives: the best against the worst, each against each that is worse, or "
        "the best against one of the others.",
        may_differ=True,
    )
    row_weights: bool = setting(
        True,
        "A column `weight` (or row_weight, sample_weight) multiplies the loss of its row, and so does how sure a "
        "verdict between 1 and 2 is. false: all rows count the same.",
        commands=TRAINED,
        may_differ=True,
    )
    objective_weights: str | None = setting(
        None,
        "odpo, modpo, mo_kto: other objectives and their weights, as in safety=0.3,brevity=0.2. Their scores, in "
        "columns safety_chosen and safety_rejected (or safety, of one answer), make the margin.",
        commands=("train", "eval"),
        may_differ=True,
    )
    max_skipped: float = setting(
        0.5,
        "The run stops where more than this share of the rows cannot be used.",
        rule=Rule("in [0, 1]", lambda value: 0 <= value <= 1),
        may_differ=True,
    )
    dataset_config: str | None = setting(
        None, "Of a dataset with several configurations, the one to read.", may_differ=True
    )
    datasets: list[str] | list[dict] | None = setting(
        None,
        "A mixture in place of dataset_name, as in TRL: a list of {path, name, split, columns, fraction}; on the "
        "command line a.jsonl b.jsonl, or path=a.jsonl,fraction=0.7 path=b.jsonl,fraction=0.3. Fractions are shares of "
        "the whole, which is as large as no row twice allows.",
        may_differ=True,
    )

    def reading(self) -> dict[str, Any]:
        """What `load_examples` takes of it."""
        names = "columns", "verdict_column", "verdict_first", "verdict_second", "score_column", "good_from", "bad_to"
        names = *names, "pairs", "row_weights", "objective_weights", "dataset_config", "seed"
        return {name: getattr(self, name) for name in names}

    def check(self, command: str) -> None:
        if self.good_from is not None and self.bad_to is not None and not self.bad_to < self.good_from:
            raise UserError(f"bad_to {self.bad_to:g} must be below good_from {self.good_from:g}")
        if self.datasets and self.dataset_name:
            raise UserError("dataset_name and datasets are both given: a run reads one set or one mixture")
