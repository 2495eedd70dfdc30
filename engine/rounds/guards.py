"""Guards of online training: what is known to go wrong while a policy learns from its own samples.

Beside those of `prefuse train`. All numbers are means of a round over all ranks, so all ranks decide alike. "Usual" is
the mean of the first FIRST rounds, "now" that of the last LAST.
"""

from collections.abc import Sequence

from prefuse.engine.config.settings import Config
from prefuse.engine.run.guards import Guards

FIRST = 5  # rounds that say what was usual
LAST = 3  # rounds that say how it is now
KEPT = ("reward", "completions/mean_length", "completions/duplicates", "frac_reward_zero_std", "entropy", "kl", "paid")


class OnlineGuards(Guards):
    def __init__(self, config: Config, beta: float | None = None):
        super().__init__(config, beta)
        self.first: dict[str, list[float]] = {}
        self.last: dict[str, list[float]] = {}
        self.best_gold: float | None = None
        self.reward_at_best: float | None = None
        self.penalty = config.algorithm_beta()  # beta as PPO's controller moves it

    def state(self) -> dict:
        names = ("first", "last", "best_gold", "reward_at_best", "penalty")
        return super().state() | {name: getattr(self, name) for name in names}

    # ---- every round -------------------------------------------------------------------------

    def on_round(self, number: int, means: dict[str, float], answers: int) -> None:
        """`means`: of what was sampled, before anything is learned from it; entropy and KL come with `on_log`."""
        self._keep(means)
        self._on_rewards(number, means)
        self._on_length(number)
        self._on_duplicates(number)
        self._on_truncated(number, means)

    def _keep(self, means: dict[str, float]) -> None:
        for name in KEPT:
            value = means.get(name)
            if value is None or value != value:
                continue
            if len(self.first.setdefault(name, [])) < FIRST:
                self.first[name] = [*self.first[name], value]
            self.last[name] = [*self.last.get(name, [])[1 - LAST :], value]

    def _usual_and_now(self, name: str) -> tuple[float, float] | None:
        first, last = self.first.get(name, []), self.last.get(name, [])
        if len(first) < FIRST or len(last) < LAST:
            return None
        return sum(first) / len(first), sum(last) / len(last)

    def _on_rewards(self, number: int, means: dict[str, float]) -> None:
        last = self.last.get("frac_reward_zero_std", [])
        if len(last) == LAST and min(last) > self.config.max_zero_std:
            self._act(
                "rewards all equal",
                f"in {sum(last) / LAST:.0%} of the groups of the last {LAST} rounds all rewards are equal (round "
                f"{number}): they teach nothing. Take harder or easier prompts, a finer scorer, more num_generations "
                "or a higher temperature",
            )
        if means.get("unscored", 0.0) > 0.5:
            self._act(
                "answers without a score",
                f"{means['unscored']:.0%} of the answers of round {number} have no score: look at the reasons above",
            )

    def _on_length(self, number: int) -> None:
        both = self._usual_and_now("completions/mean_length")
        if both is not None and both[1] > self.config.max_length_growth * both[0]:
            self._act(
                "length growth",
                f"answers have {both[1]:.0f} tokens in round {number} where {both[0]:.0f} were usual at first: if they "
                "are not better for it, the scorer pays for length. Take grpo_loss_type dr_grpo or dapo, a scorer with "
                "a length limit, or raise beta",
            )

    def _on_duplicates(self, number: int) -> None:
        last = self.last.get("completions/duplicates", [])
        if len(last) == LAST and min(last) > self.config.max_duplicates:
            self._act(
                "duplicate samples",
                f"{sum(last) / LAST:.0%} of the answers repeat another one to the same prompt by round {number}: "
                "groups hold little to compare. Raise temperature or entropy_coef, or stop here",
            )

    def _on_truncated(self, number: int, means: dict[str, float]) -> None:
        cut, reward, of_cut = (means.get(n) for n in ("completions/clipped_ratio", "reward", "reward_truncated"))
        if cut is None or reward is None or of_cut is None or not 0.05 < cut < 1:
            return
        finished = (reward - cut * of_cut) / (1 - cut)
        self._keep({"paid": of_cut - finished})
        paid = self.last["paid"]
        if len(paid) == LAST and min(paid) > 0:
            self._act(
                "truncated answers rewarded",
                f"{cut:.0%} of the answers of round {number} are cut off by max_completion_length, and their mean "
                f"score is {of_cut:.4g} where finished ones have {finished:.4g}: the policy learns not to stop. Set "
                "missing_eos_penalty or mask_truncated_completions, or raise max_completion_length",
            )

    # ---- every log line ----------------------------------------------------------------------

    def on_log(self, step: int, means: dict[str, float]) -> None:
        super().on_log(step, means)
        self._keep({name: means[name] for name in ("entropy", "kl") if name in means})
        both = self._usual_and_now("entropy")
        if both is not None and both[1] < self.config.min_entropy * both[0]:
            self._act(
                "entropy collapse",
                f"the policy's entropy is {both[1]:.3g} nats per token at step {step}, where {both[0]:.3g} was usual "
                "at first: it no longer tries anything new. Raise entropy_coef, temperature or epsilon_high, or lower "
                "learning_rate",
            )

    def on_kl(self, step: int, kl: float, answers: int) -> None:
        """Nats per token between the policy and the reference on a round's samples: the budget, or PPO's controller."""
        target, horizon = self.config.kl_target, self.config.beta_horizon
        if target is None:
            return
        if horizon is not None:  # Ziegler et al. 2019 (arXiv 1909.08593), section 2.2
            error = min(max(kl / target - 1, -0.2), 0.2)
            self.penalty *= 1 + error * answers / horizon
        elif kl > target:
            self._act(
                "KL budget",
                f"the policy is {kl:.4g} nats per token from its reference at step {step}, above kl_target "
                f"{target:.4g}: raise beta, set beta_horizon so that beta follows, or stop here",
            )

    def _on_loss(self, step: int, loss: float) -> None:
        """The loss of a policy hovers about 0 whatever is learned, so none is an explosion of the usual one."""
        if self.first_loss is None:
            self.first_loss = loss

    # ---- every evaluation --------------------------------------------------------------------

    def on_evaluation(self, step: int, means: dict[str, float]) -> None:
        """`means`: of the held-out prompts. Where there is no gold score, the first scorer's counts in its place."""
        gold, spread = means.get("gold", means.get("reward")), means.get("gold_std", means.get("reward_std"))
        reward = self._mean_reward()
        if gold is None or gold != gold or reward is None:
            return
        if self.best_gold is None or gold > self.best_gold:
            self.best_gold, self.reward_at_best = gold, reward
            return
        drop = (self.best_gold - gold) / spread if spread else 0.0
        if drop > self.config.max_gold_drop and reward > self.reward_at_best:
            what = "gold score" if "gold" in means else "held-out reward"
            self._act(
                "over-optimization",
                f"the reward in training has risen from {self.reward_at_best:.4g} to {reward:.4g} while the {what} has "
                f"fallen from {self.best_gold:.4g} to {gold:.4g} by step {step}: the policy exploits the scorer. Take "
                "the checkpoint before the fall, raise beta, or score with an ensemble (scorer_combine min)",
            )

    def _mean_reward(self) -> float | None:
        last: Sequence[float] = self.last.get("reward", [])
        return sum(last) / len(last) if last else None
