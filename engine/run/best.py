"""The best evaluation of a run so far, by one metric: which checkpoint it is, and when waiting for a better one ends.

The settings are those of transformers: metric_for_best_model, greater_is_better, early_stopping_patience,
early_stopping_threshold, load_best_model_at_end. The evaluation before the first step is not counted, as there.
"""

import math

from prefuse.engine.config.settings import Config
from prefuse.engine.errors import UserError
from prefuse.engine.report.log import say

SMALLER_IS_BETTER = (
    "loss", "kl_to_ref", "perplexity", "kl", "kl_per_token", "sqrt_kl", "refusals", "self_similarity", "cut_answers",
)  # fmt: skip  # where greater_is_better is not given


class Best:
    def __init__(self, config: Config) -> None:
        self.name = (config.metric_for_best_model or "loss").removeprefix("eval_")
        self.wanted = config.metric_for_best_model is not None
        greater = config.greater_is_better
        self.greater = self.name not in SMALLER_IS_BETTER if greater is None else greater
        self.patience, self.threshold = config.early_stopping_patience, config.early_stopping_threshold
        self.value: float | None = None
        self.step: int | None = None
        self.waited = 0  # evaluations without a better one
        self.metrics: dict[str, float] = {}  # of the best evaluation

    def state(self) -> dict:
        """What a resumed run must know to decide as this one would."""
        return {name: getattr(self, name) for name in ("value", "step", "waited", "metrics")}

    def restore(self, state: dict | None) -> None:
        for name, value in (state or {}).items():
            setattr(self, name, value)

    def on_evaluation(self, step: int, means: dict[str, float]) -> bool:
        """Whether it is the best so far. `means`: of the held-out rows, without a prefix."""
        if not self.wanted:
            return False
        if self.name not in means:
            raise UserError(
                f"metric_for_best_model {self.name} is no metric of the held-out rows, which have {', '.join(means)}"
            )
        value = means[self.name]
        if step == 0 or not math.isfinite(value):
            return False
        gain = math.inf if self.value is None else (value - self.value) * (1 if self.greater else -1)
        self.waited = 0 if gain > self.threshold else self.waited + 1
        if gain <= 0:
            return False
        self.value, self.step, self.metrics = value, step, dict(means)
        return True

    @property
    def stop(self) -> str:
        """Why the run is to end here, or nothing."""
        if self.patience is None or self.waited < self.patience:
            return ""
        return (
            f"eval_{self.name} has not improved in {self.waited} evaluations (early_stopping_patience "
            f"{self.patience}); its best is {self.value:.6g}, of step {self.step}"
        )

    def say(self) -> None:
        if self.wanted and self.step is not None:
            say(f"best eval_{self.name}: {self.value:.6g}, of step {self.step}")
