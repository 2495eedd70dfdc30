"""Guards: what is known to go wrong in preference training, looked for while it can still be helped.

Each says what it saw, once, and what to do; with `guard_action: stop` it also ends the run, with a checkpoint and the
model. Loss or gradient that is no number is another matter: that step makes no update, and too many of them in a row
are an error. docs/guards.md has the cases. All decisions come from numbers that every rank has, so all decide alike.
"""

import logging
import math
import statistics
from collections.abc import Sequence

from prefuse.engine.config.settings import Config
from prefuse.engine.errors import Diverged

logger = logging.getLogger(__name__)

HISTORY = 50  # losses the median is taken of
ENOUGH = 10  # of them, before a loss can be called an explosion
MASTERED = 0.99  # reward accuracy in training
KTO_RATIO = (0.8, 1.6)  # weighted good over bad: the paper's 1 to 4/3 (arXiv 2402.01306, section 4.2), a fifth wider
SHOWN_ROWS = 8


class Guards:
    def __init__(self, config: Config, beta: float | None = None):
        self.config = config
        self.beta = beta  # None without a reference
        self.stop = ""  # why the run is to end here
        self.losses: list[float] = []  # the last of the finite ones
        self.first_loss: float | None = None
        self.skipped_in_row = 0
        self.skipped = 0
        self.best_accuracy: float | None = None
        self.train_accuracy: float | None = None
        self.fired: list[str] = []
        self.sound = True  # whether the last step's loss was a number, and no explosion

    def state(self) -> dict:
        """What a resumed run must know to decide as this one would."""
        names = ("losses", "first_loss", "skipped_in_row", "skipped", "best_accuracy", "train_accuracy", "fired")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value)

    def on_step(self, step: int, loss: float, norm: float, rows: Sequence[str]) -> bool:
        """Whether the update may be made. `rows`: those whose loss is no number, or all of the step."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_row = 0
            usual = statistics.median(self.losses) if self.losses else loss
            self.sound = loss <= self.config.max_loss_ratio * max(1.0, abs(usual), abs(self.first_loss or 0.0))
            self._on_loss(step, loss)
            return True
        self.sound = False
        self.skipped += 1
        self.skipped_in_row += 1
        named = ", ".join(rows[:SHOWN_ROWS]) + (f" and {len(rows) - SHOWN_ROWS} more" if len(rows) > SHOWN_ROWS else "")
        what = f"the loss ({loss}) or its gradient ({norm}) is not finite in step {step} at rows {named}"
        if self.skipped_in_row > self.config.max_skipped_steps:
            raise Diverged(f"{what}, the {_ordinal(self.skipped_in_row)} such step in a row: no update was made of it")
        logger.warning("%s: no update was made (%d such steps so far)", what, self.skipped)
        return False

    def _on_loss(self, step: int, loss: float) -> None:
        if self.first_loss is None:
            self.first_loss = loss
        if len(self.losses) >= ENOUGH:
            usual = statistics.median(self.losses)
            if loss > max(self.config.max_loss_ratio * usual, self.first_loss):
                self._act(
                    "loss explosion",
                    f"the loss of step {step} is {loss:.4g}, where {usual:.4g} was usual and {self.first_loss:.4g} the "
                    "first: lower learning_rate or raise warmup_ratio, and go back to a checkpoint before this step",
                )
        self.losses = [*self.losses[1 - HISTORY :], loss]

    def on_log(self, step: int, means: dict[str, float]) -> None:
        self.train_accuracy = means.get("rewards/accuracies", self.train_accuracy)
        self._on_chosen(step, means, "")

    def on_evaluation(self, step: int, means: dict[str, float]) -> None:
        """`means`: of the held-out rows, without a prefix."""
        self._on_chosen(step, means, "held-out ")
        accuracy, kl = means.get("rewards/accuracies"), means.get("kl_to_ref")
        if accuracy is not None:
            best = accuracy if self.best_accuracy is None else self.best_accuracy
            drop = best - accuracy
            if self.train_accuracy is not None and self.train_accuracy > MASTERED:
                if drop > self.config.max_accuracy_drop:
                    self._act(
                        "over-fitting",
                        f"reward accuracy is {self.train_accuracy:.3f} in training and has fallen from "
                        f"{best:.3f} to {accuracy:.3f} on held-out rows by step {step}: train for fewer "
                        "epochs, raise beta, or take the checkpoint before the fall",
                    )
            self.best_accuracy = max(best, accuracy)
        if kl is not None and self.config.max_kl is not None and kl > self.config.max_kl:
            self._act(
                "KL",
                f"the policy is {kl:.4g} nats per token from its reference at step {step}, above max_kl "
                f"{self.config.max_kl:.4g}: raise beta, lower learning_rate, or stop here",
            )

    def _on_chosen(self, step: int, means: dict[str, float], where: str) -> None:
        """The reference gave the chosen completions logps - rewards / beta."""
        if self.beta is None or "rewards/chosen" not in means or "logps/chosen" not in means:
            return
        ratio = means["rewards/chosen"] / self.beta
        reference = means["logps/chosen"] - ratio
        if -ratio > self.config.max_chosen_drop * abs(reference):
            self._act(
                "collapse of chosen",
                f"the {where}chosen completions have log-probability {means['logps/chosen']:.4g} at step {step}, "
                f"where the reference gives {reference:.4g}: margins grow while both sides become unlikely. "
                "Raise beta, lower learning_rate, or drop pairs whose sides hardly differ",
            )

    def check_labels(self, labels: Sequence[bool]) -> None:
        """Before the first step, of a loss whose completions are good or bad. The ratio is a matter of KTO's paper."""
        good = sum(labels)
        bad = len(labels) - good
        config = self.config
        name = "KTO" if config.loss_type == "kto" else config.loss_type
        if not good or not bad:
            self._act(
                f"{name} labels",
                f"all {len(labels)} rows are {'desirable' if good else 'undesirable'}: {name} then only pulls the "
                "policy one way. Add rows of the other kind, or use `prefuse sft` for good ones",
            )
        if not good or not bad or config.loss_type != "kto":
            return
        ratio = config.desirable_weight * good / (config.undesirable_weight * bad) if config.undesirable_weight else 1.0
        if config.desirable_weight and not KTO_RATIO[0] <= ratio <= KTO_RATIO[1]:
            name, value = ("undesirable_weight", good / bad) if good > bad else ("desirable_weight", bad / good)
            self._act(
                "KTO labels",
                f"{good} desirable rows of weight {config.desirable_weight:g} against {bad} undesirable ones of weight "
                f"{config.undesirable_weight:g} make {ratio:.3g}, expected 1 to 4/3: set {name} to {value:.3g}",
            )

    def _act(self, name: str, message: str) -> None:
        if name not in self.fired:
            self.fired = [*self.fired, name]
            logger.warning("guard, %s: %s", name, message)
        if self.config.guard_action == "stop":
            self.stop = f"{name}: {message}"


def _ordinal(number: int) -> str:
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10 if number % 100 not in (11, 12, 13) else 0, 'th') }"
