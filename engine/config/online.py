"""Settings of `prefuse online`: the algorithm, what a round samples, and how it is learned from."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.generation import ANSWERING
from prefuse.engine.config.guards import GuardSettings
from prefuse.engine.config.setting import Rule, Topic, above, at_least, setting
from prefuse.engine.errors import UserError
from prefuse.losses.policy import GRPO, RLOO, PPOClip, Reinforce
from prefuse.losses.sampled import PolicyLoss

# Topics of the help.
_POLICY = "Policy losses (docs/policy_losses.md)"
_PPO = "PPO (docs/online.md)"
SHARE = Rule("in (0, 1]", lambda value: 0 < value <= 1)
OVER_TOKENS = ("grpo", "rloo", "reinforce", "ppo")  # algorithms whose loss reads advantages
CLIPPED = ("grpo", "rloo", "ppo")
PAIRED = ("online_dpo", "iterative_dpo")
BETAS = {"grpo": 0.0, "rloo": 0.05, "reinforce": 0.0, "ppo": 0.05, "online_dpo": 0.1, "iterative_dpo": 0.1, "kto": 0.1}


@dataclass(frozen=True)
class OnlineSettings(Topic):
    title: ClassVar[str] = "Online (docs/online.md)"
    commands: ClassVar[tuple[str, ...]] = ("online",)

    algorithm: Literal[
        "grpo", "rloo", "reinforce", "ppo", "online_dpo", "iterative_dpo", "kto", "best_of_n"
    ] = setting(
        "grpo",
        "How scored samples are learned from. grpo, rloo, reinforce and ppo: by the advantage of each answer. "
        "online_dpo: best against worst, the reference is the first model; iterative_dpo: the policy as "
        "the round began. kto: above or below the mean of their group. best_of_n: the best of each group as a "
        "demonstration.",
    )  # fmt: skip
    max_completion_length: int = setting(256, "Most tokens of an answer.", rule=at_least(1))
    top_p: float = setting(
        1.0, "Sample from the likeliest tokens that together have this probability.", commands=ANSWERING, rule=SHARE
    )
    min_p: float | None = setting(
        None,
        "Sample from the tokens with at least this share of the likeliest one's probability.",
        commands=ANSWERING,
        rule=SHARE,
    )
    steps_per_generation: int = setting(
        1, "Optimizer steps that a round of samples is dealt to (TRL counts microbatches).", rule=at_least(1)
    )
    num_iterations: int = setting(1, "How often a round's samples are gone through.", rule=at_least(1))
    scale_rewards: Literal["group", "batch", "none"] = setting(
        "group",
        "grpo: what advantages are divided by: the spread of rewards in the group, in the batch, or nothing.",
        topic=_POLICY,
    )
    grpo_loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo"] = setting(
        "dapo",
        "grpo: TRL's loss_type, what the loss is a mean over (docs/policy_losses.md).",
        topic=_POLICY,
    )
    importance_sampling_level: Literal["token", "sequence"] = setting(
        "token",
        "grpo: one ratio for each token, or one for each answer (GSPO).",
        topic=_POLICY,
    )
    epsilon: float = setting(
        0.2,
        "grpo, rloo, ppo: how far a ratio may fall below 1 and still count.",
        rule=at_least(0),
        topic=_POLICY,
    )
    epsilon_high: float | None = setting(
        None,
        "grpo, rloo, ppo: how far it may rise above 1; cispo: its bound. None: epsilon.",
        rule=at_least(0),
        topic=_POLICY,
    )
    delta: float | None = setting(
        None, "grpo: upper bound of the ratio of answers below the mean.", rule=above(1), topic=_POLICY
    )
    kl_estimator: Literal["k1", "k2", "k3"] = setting(
        "k3",
        "grpo, reinforce: which estimate of the KL divergence beta multiplies.",
        topic=_POLICY,
    )
    entropy_coef: float = setting(
        0.0, "Weight of the entropy bonus of losses over tokens.", rule=at_least(0), topic=_POLICY
    )
    mask_truncated_completions: bool = setting(
        False, "Leave answers out of the loss that max_completion_length cut off."
    )
    missing_eos_penalty: float | None = setting(
        None, "What the score of an answer loses that max_completion_length cut off.", rule=at_least(0)
    )
    gamma: float = setting(
        1.0, "ppo: discount of what comes later.", rule=Rule("in [0, 1]", lambda v: 0 <= v <= 1), topic=_PPO
    )
    lam: float = setting(
        0.95, "ppo: decay of generalized advantages.", rule=Rule("in [0, 1]", lambda v: 0 <= v <= 1), topic=_PPO
    )
    value_learning_rate: float = setting(1e-3, "ppo: learning rate of the value head.", rule=above(0), topic=_PPO)
    cliprange_value: float = setting(0.2, "ppo: how far a value may move and still count.", rule=above(0), topic=_PPO)

    kl_target: float | None = setting(
        None,
        "KL budget, nats per token from the reference. With beta_horizon beta follows it, as in PPO's controller; "
        "without, a guard says that it is spent.",
        rule=above(0),
    )
    beta_horizon: int | None = setting(
        None, "Answers over which beta may double or halve to keep the KL at kl_target.", rule=at_least(1)
    )
    max_length_growth: float = setting(
        2.0,
        "Guard: mean length of answers over that of the first rounds.",
        rule=above(1),
        may_differ=True,
        topic=GuardSettings.title,
    )
    min_entropy: float = setting(
        0.1,
        "Guard: entropy of the policy as a share of that of the first rounds.",
        rule=at_least(0),
        may_differ=True,
        topic=GuardSettings.title,
    )
    max_duplicates: float = setting(
        0.9,
        "Guard: share of answers that another answer to the same prompt repeats.",
        rule=SHARE,
        may_differ=True,
        topic=GuardSettings.title,
    )
    max_zero_std: float = setting(
        0.9,
        "Guard: share of groups whose rewards are all equal, over the last rounds.",
        rule=SHARE,
        may_differ=True,
        topic=GuardSettings.title,
    )
    max_gold_drop: float = setting(
        0.1,
        "Guard: how far the held-out gold score may fall from its best, in its own spread, while the reward rises.",
        rule=at_least(0),
        may_differ=True,
        topic=GuardSettings.title,
    )

    def algorithm_beta(self) -> float:
        return BETAS.get(self.algorithm, 0.0) if self.beta is None else self.beta

    def reads_first_model(self) -> bool:
        """Whether samples are compared with the model that the run starts from."""
        penalty = self.algorithm in OVER_TOKENS and self.algorithm_beta() > 0
        return penalty or self.algorithm in ("online_dpo", "kto") or self.kl_target is not None

    def policy_loss(self) -> PolicyLoss:
        """Of an algorithm over tokens."""
        rest = {"entropy_coef": self.entropy_coef}
        bounds = {"epsilon": self.epsilon, "epsilon_high": self.epsilon_high}
        if self.algorithm == "rloo":
            return RLOO(**bounds, **rest)
        if self.algorithm == "reinforce":
            return Reinforce(beta=self.algorithm_beta(), kl_estimator=self.kl_estimator, **rest)
        if self.algorithm == "ppo":
            return PPOClip(self.epsilon, self.epsilon_high, reduction="token", **rest)
        length = self.max_completion_length if self.grpo_loss_type == "dr_grpo" else None
        return GRPO(
            self.grpo_loss_type, **bounds, delta=self.delta, beta=self.algorithm_beta(), max_completion_length=length,
            kl_estimator=self.kl_estimator, importance_sampling_level=self.importance_sampling_level, **rest,
        )  # fmt: skip

    def check(self, command: str) -> None:
        if command != "online":
            return
        if not self.scorer:
            raise UserError("scorer is required: what says how good an answer is, such as --scorer rewards.py:my_rule")
        if self.algorithm not in ("reinforce", "ppo") and self.num_generations < 2:
            raise UserError(f"{self.algorithm} compares answers to one prompt: set num_generations to 2 or more")
        answers = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if answers % self.num_generations:
            raise UserError(
                f"a step takes whole groups: per_device_train_batch_size x gradient_accumulation_steps is {answers} "
                f"answers, which num_generations {self.num_generations} does not divide"
            )
        if self.beta_horizon is not None and self.kl_target is None:
            raise UserError("beta_horizon is how fast beta follows kl_target: give kl_target, or drop beta_horizon")
        if self.beta_horizon is not None and self.algorithm not in ("rloo", "ppo"):
            raise UserError(
                f"beta_horizon moves the KL's part of a reward: it is for rloo and ppo, not {self.algorithm}"
            )
        if self.temperature <= 0:
            raise UserError("temperature must be above 0: the most likely answer alone leaves nothing to compare")
        self._check_belongs()
        if self.algorithm in OVER_TOKENS:
            try:
                self.policy_loss()
            except ValueError as error:
                raise UserError(str(error)) from None

    def _check_belongs(self) -> None:
        """A setting that the algorithm does not read is a mistake."""
        readers = {
            "scale_rewards": ("grpo",), "grpo_loss_type": ("grpo",), "importance_sampling_level": ("grpo",),
            "delta": ("grpo",), "epsilon": CLIPPED, "epsilon_high": CLIPPED, "kl_estimator": ("grpo", "reinforce"),
            "entropy_coef": OVER_TOKENS, "mask_truncated_completions": OVER_TOKENS, "kl_target": OVER_TOKENS,
            "pairs": PAIRED, "gamma": ("ppo",), "lam": ("ppo",), "value_learning_rate": ("ppo",),
            "cliprange_value": ("ppo",),
            "beta": tuple(BETAS),
        }  # fmt: skip
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, algorithms in readers.items():
            if getattr(self, name) != defaults[name] and self.algorithm not in algorithms:
                raise UserError(
                    f"{name} has a meaning only with algorithm {', '.join(algorithms)}, got algorithm "
                    f"{self.algorithm}: drop {name}"
                )
