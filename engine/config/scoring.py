"""Settings of scorers and judges: what says how good an answer is."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import SCORING, Topic, above, at_least, setting
from prefuse.engine.errors import UserError


@dataclass(frozen=True)
class ScoringSettings(Topic):
    title: ClassVar[str] = "Scores (docs/evaluation.md)"
    commands: ClassVar[tuple[str, ...]] = SCORING

    scorer: list[str] | None = setting(
        None,
        "What scores answers: a reward model's folder, FILE.py:FUNCTION (TRL's signature), a rule (exact, contains, "
        "number, math, regex, format, length, as in number=COLUMN), judge=FOLDER or judge=URL#MODEL. Several are an "
        "ensemble. `eval`: with it, the model's answers are compared with those of ref_model_name_or_path. `train`, "
        "`sft`: held-out prompts are answered and scored at every evaluation.",
    )
    scorer_combine: Literal["mean", "min", "mean_minus_std"] = setting(
        "mean", "How the scores of several are one: their mean, the smallest, or the mean minus the spread."
    )
    scorer_weights: list[float] | None = setting(
        None,
        "Several objectives on one batch: a weight for each scorer, as many as there are (TRL's reward_weights). The "
        "score is then the sum of the scores times their weights.",
    )
    scorer_spread_weight: float = setting(
        1.0, "How many standard deviations mean_minus_std takes off.", rule=at_least(0)
    )
    scorer_steps: Literal["min", "product", "last"] = setting(
        "min",
        "What a process reward model's score of an answer is: the probability that its weakest step is right, that all "
        "of its steps are, or that the last one is.",
    )
    scorer_timeout: float = setting(
        60.0, "Seconds that one call of a Python function may take.", rule=above(0), may_differ=True
    )
    gold_scorer: list[str] | None = setting(
        None,
        "A second scorer, which is trusted more: the over-optimization of the first is seen against it, and the "
        "agreement of both is Cohen's kappa.",
        may_differ=True,
    )
    score_cache: str = setting(
        "auto",
        "Where scores of reward models, replies of judges and what `label` and `revise` sample are kept, by content: a "
        "folder; auto, prefuse/scores in the user's cache folder (or scores in $PREFUSE_CACHE); none.",
        may_differ=True,
    )
    judge_rubric: str | None = setting(
        None, "File with the rules that a judge follows (a rubric, a constitution), in place of the built-in ones."
    )
    judge_mode: Literal["letter", "reason"] = setting(
        "letter",
        "letter: the judge says A or B, and their probabilities count; reason: it explains itself and ends with "
        "[[A]], [[B]] or [[C]].",
    )
    judge_max_tokens: int = setting(512, "Most tokens of a reply with reasons.", rule=at_least(1))
    judge_api_key_env: str = setting(
        "PREFUSE_API_KEY",
        "Environment variable with the key of a judge's server. The key is never written anywhere.",
        may_differ=True,
    )
    judge_timeout: float = setting(
        60.0, "Seconds that a judge's server may take for a reply.", rule=above(0), may_differ=True
    )
    judge_retries: int = setting(
        4, "More tries of a request that failed for a while.", rule=at_least(0), may_differ=True
    )
    judge_workers: int = setting(4, "Requests at once.", rule=at_least(1), most=256, may_differ=True)
    judge_price: str | None = setting(
        None,
        "USD for a million tokens read and written, as in 0.15,0.6: the cost is then said.",
        may_differ=True,
    )
    allow_self_judge: bool = setting(
        False,
        "Let a model judge itself. Models prefer their own answers, so without this it is refused.",
        may_differ=True,
    )

    def check(self, command: str) -> None:
        prices_of(self.judge_price)
        if self.scorer_weights is not None:
            if len(self.scorer_weights) != len(self.scorer or []):
                raise UserError(
                    f"scorer_weights has {len(self.scorer_weights)} numbers for {len(self.scorer or [])} scorers: give "
                    "one for each"
                )
            if self.scorer_combine != "mean":
                raise UserError("scorer_weights are of a weighted sum: drop scorer_combine, or the weights")
        if self.gold_scorer and not self.scorer:
            raise UserError("gold_scorer is a second scorer: give --scorer too")


def prices_of(text: str | None) -> tuple[float, float] | None:
    """USD a million tokens read and written."""
    if text is None:
        return None
    try:
        read, written = (float(part) for part in text.split(","))
        if not (0 <= read < math.inf and 0 <= written < math.inf):
            raise ValueError
    except ValueError:
        raise UserError(f"judge_price must be two numbers, USD a million tokens read and written, got {text}") from None
    return read, written
