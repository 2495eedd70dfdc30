"""Settings of the preference loss: its name, its hyperparameters, and the reference it is relative to."""

import dataclasses
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import Rule, Topic, above, at_least, setting
from prefuse.engine.errors import UserError
from prefuse.losses.contract import Loss, needs_of
from prefuse.losses.names import fields_of, loss_from, loss_named, setting_names
from prefuse.losses.unpaired import SFT

# Topics of the help.
_VARIANTS = "Variants of losses (docs/losses.md)"
_KTO = "KTO (docs/losses.md)"
_REFERENCE = "Reference (docs/training.md)"
_ROUTER = "Router of mixtures of experts (docs/training.md)"


@dataclass(frozen=True)
class LossSettings(Topic):
    """The loss itself says which values its fields may have."""

    title: ClassVar[str] = "Loss (docs/losses.md)"
    commands: ClassVar[tuple[str, ...]] = ("train", "eval")

    loss_type: Literal[
        "dpo", "ipo", "kto", "simpo", "orpo", "cpo", "slic", "rpo", "sigmoid", "sigmoid_norm", "hinge", "robust",
        "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "f_dpo", "ld_dpo",
        "beta_dpo", "odpo", "modpo", "aot", "aot_unpaired", "una", "una_pair", "una_score", "ppo_clip", "mo_kto",
        "csft", "sft",
    ] = setting(
        "dpo",
        "Preference loss of `train` and `eval`: docs/losses.md has equations and papers. kto, mo_kto, una, ppo_clip "
        "and csft also take pairs, each as one good and one bad completion; simpo, orpo, cpo, slic and csft use no "
        "reference; odpo, modpo and mo_kto need margins of the rows, una_score scores; aot, aot_unpaired and beta_dpo "
        "(by batch) look at a microbatch as a whole, which is then per_device_train_batch_size rows. `eval` takes sft "
        "too: loss, perplexity and accuracy of the completions' tokens.",
    )  # fmt: skip
    beta: float | None = setting(
        None,
        "Strength of the pull towards the reference, or what the loss's paper calls beta (orpo: lambda). None: 0.1, "
        "but 2 for simpo and 5 for sigmoid_norm, which compare means per token. Published: dpo 0.01 to 0.6, ipo 0.01, "
        "kto 0.01 to 0.3, simpo 2 to 10 (with simpo_gamma 0.1 to 0.8 of it), orpo 0.05 to 0.1, sigmoid_norm 5, "
        "sppo_hard 0.001, apo_zero 0.05; docs/losses.md names the model, the learning rate and the source of each. "
        "`online`: 0 for grpo and reinforce, 0.05 for rloo and ppo, whose reward it lowers.",
        commands=("train", "eval", "online"),
    )
    label_smoothing: float | None = setting(
        None,
        "The share of pairs whose preference is thought to be flipped, in [0, 0.5). None: 0, but 0.1 for robust and "
        "0.001 for exo_pair.",
        commands=("train", "eval", "reward"),
    )
    nll_weight: float | None = setting(
        None,
        "orpo, cpo, rpo, slic: weight of the SFT term. None: 1, but 0.1 for slic, whose term is a sum over tokens.",
    )
    simpo_gamma: float | None = setting(
        None, "simpo: the margin that the rewards are to have. None: 1.", topic=_VARIANTS
    )
    slic_delta: float | None = setting(
        None, "slic: the margin that the log-probabilities are to have. None: 1.", topic=_VARIANTS
    )
    discopop_tau: float | None = setting(None, "discopop: temperature of its modulation. None: 0.05.", topic=_VARIANTS)
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = setting(
        "reverse_kl",
        "f_dpo: the divergence from the reference.",
        topic=_VARIANTS,
    )
    f_alpha_divergence_coef: float | None = setting(
        None, "f_dpo: alpha of alpha_divergence. None: 0.5.", topic=_VARIANTS
    )
    ld_alpha: float | None = setting(
        None,
        "ld_dpo: weight of the tokens that the longer completion has beyond the shorter one. None: 0.5.",
        topic=_VARIANTS,
    )
    ppo_clip: float | None = setting(
        None, "ppo_clip: how far a token's ratio may leave 1 and still count. None: 0.2.", topic=_VARIANTS
    )
    una_distance: Literal["bce", "mse"] = setting(
        "bce",
        "una, una_pair, una_score: distance of the implicit reward from what is known.",
        topic=_VARIANTS,
    )
    score_low: float | None = setting(
        None,
        "una_score: the score that counts as 0. None: the least of the rows of dataset_name, which is said.",
        rule=Rule("a number", lambda value: value == value),
        topic=_VARIANTS,
    )
    score_high: float | None = setting(
        None,
        "una_score: the score that counts as 1. None: the greatest of the rows of dataset_name, which is said.",
        rule=Rule("a number", lambda value: value == value),
        topic=_VARIANTS,
    )
    odpo_scale: float | None = setting(None, "odpo: what margins are multiplied by. None: 1.", topic=_VARIANTS)
    modpo_weight: float | None = setting(
        None,
        "modpo, mo_kto: weight of the objective that the pairs or labels are of. None: 0.5.",
        topic=_VARIANTS,
    )
    beta_dpo_alpha: float | None = setting(
        None, "beta_dpo: how far beta follows the margins. None: 0.6.", topic=_VARIANTS
    )
    beta_dpo_baseline: float | None = setting(
        None,
        "beta_dpo: the margin at which beta is as it is set; it follows the mean margin of the steps. None: 0.",
        topic=_VARIANTS,
    )
    beta_dpo_level: Literal["batch", "pair"] = setting(
        "batch",
        "beta_dpo: one strength for each microbatch, from its mean margin, or one for each pair.",
        topic=_VARIANTS,
    )
    use_weighting: bool = setting(
        False, "Weigh each pair by how likely the policy itself is to write it (WPO, arXiv 2406.11827)."
    )
    kto_value: Literal["logistic", "concave", "linear"] = setting(
        "logistic",
        "kto: its value function; concave and linear (risk-neutral) are its paper's ablations.",
        topic=_KTO,
    )
    kto_reference_point: float | None = setting(
        None,
        "kto: a constant in place of z0, which is then not computed. None: z0.",
        topic=_KTO,
    )
    kto_reference_free: bool = setting(
        False,
        "kto: log-probabilities in place of log-ratios, as of a uniform reference; its paper's ablation.",
        topic=_KTO,
    )
    kto_one_per_prompt: bool = setting(
        False,
        "kto: of the training rows of a prompt one, drawn by seed (its paper's one-y-per-x).",
        commands=("train",),
        topic=_KTO,
    )
    kto_weights: Literal["given", "auto"] = setting(
        "given",
        "auto: desirable_weight and undesirable_weight from the number of training rows of each kind, so that "
        "w_d n_d / (w_u n_u) is in the paper's [1, 4/3].",
        topic=_KTO,
    )
    desirable_weight: float = setting(1.0, "KTO: weight of the desirable completions.", topic=_KTO)
    undesirable_weight: float = setting(1.0, "KTO: weight of the undesirable completions.", topic=_KTO)
    z0_scope: Literal["step", "microbatch"] = setting(
        "step",
        "KTO: one reference point per optimizer step, or one per microbatch (the paper's and TRL's habit). A "
        "microbatch then is per_device_train_batch_size rows, in flat batches too.",
        commands=("train",),
        topic=_KTO,
    )
    sync_ref_model: bool = setting(
        False,
        "Let the reference follow the policy (TR-DPO, arXiv 2404.09656). It stays in memory beside the policy, and "
        "held-out rewards are relative to it as it is then.",
        commands=("train",),
        topic=_REFERENCE,
    )
    ref_model_mixup_alpha: float = setting(
        0.6,
        "sync_ref_model: reference = alpha policy + (1 - alpha) reference. 1 copies the policy.",
        commands=("train",),
        rule=Rule("in (0, 1]", lambda value: 0 < value <= 1),
        only_with=("sync_ref_model", True),
        topic=_REFERENCE,
    )
    ref_model_sync_steps: int = setting(
        512,
        "sync_ref_model: after every so many steps.",
        commands=("train",),
        rule=at_least(1),
        only_with=("sync_ref_model", True),
        topic=_REFERENCE,
    )
    output_router_logits: bool = setting(
        False,
        "Mixtures of experts: add the balance loss of the router, as transformers and TRL do, and log it as aux_loss.",
        commands=("sft", "train"),
        topic=_ROUTER,
    )
    router_aux_loss_coef: float | None = setting(
        None,
        "Weight of the router's balance loss. None: the model's own, of its config.json.",
        commands=("sft", "train"),
        rule=above(0),
        only_with=("output_router_logits", True),
        topic=_ROUTER,
    )
    reference_cache: str | None = setting(
        None,
        "Folder that keeps reference log-probabilities between runs; None keeps them in memory.",
        commands=("train",),
        may_differ=True,
        topic=_REFERENCE,
    )

    def loss(self) -> Loss:
        """The loss these settings name."""
        return SFT() if self.loss_type == "sft" else loss_from(self, self.loss_type)

    def check(self, command: str) -> None:
        if command not in LossSettings.commands:
            return
        if command == "train" and self.loss_type == "sft":
            raise UserError("loss_type sft is for `prefuse eval`: train on completions with `prefuse sft`")
        for name in (*LOSS_SETTINGS, *ASKED):
            if getattr(self, name) != DEFAULTS[name] and self.loss_type not in loss_types_with(name):
                raise UserError(
                    f"{name} has a meaning only with loss_type {', '.join(loss_types_with(name))}, got loss_type "
                    f"{self.loss_type}: drop {name}"
                )
        if self.kto_weights == "auto" and (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0):
            raise UserError("kto_weights auto finds desirable_weight and undesirable_weight itself: drop them, or it")
        if None not in (self.score_low, self.score_high) and not self.score_low < self.score_high:
            raise UserError(f"score_low {self.score_low:g} must be below score_high {self.score_high:g}")
        self._check_following()
        try:
            loss = self.loss()
        except (ValueError, TypeError) as error:
            raise UserError(str(error)) from None
        by_loss = command == "eval" and not self.scorer
        if by_loss and "reference" in needs_of(loss) and not self.ref_model_name_or_path:
            raise UserError(
                f"ref_model_name_or_path is required: rewards of {self.loss_type} are relative to a reference. Give "
                "--ref_model_name_or_path, or --loss_type sft for loss and perplexity of the completions alone"
            )

    def _check_following(self) -> None:
        if not self.sync_ref_model:
            return
        if self.use_peft:
            raise UserError(
                "sync_ref_model moves the weights of a reference, and with use_peft the reference is the base of the "
                "adapters: train all weights, or drop sync_ref_model"
            )
        if self.reference_cache is not None:
            raise UserError("reference_cache keeps what stays the same, and with sync_ref_model nothing does: drop it")


_FIELDS = {field.name: field for field in dataclasses.fields(LossSettings)}
LOSS_TYPES = tuple(name for name in typing.get_args(_FIELDS["loss_type"].type) if name != "sft")  # of preferences
DEFAULTS = {name: field.default for name, field in _FIELDS.items()} | {"objective_weights": None}
# Setting -> field of the losses that have it.
LOSS_SETTINGS = {
    setting: field for name in LOSS_TYPES for field, setting in setting_names(name).items() if setting in _FIELDS
}


# Settings that no loss has as a field: which losses they have a meaning with.
ASKED: dict[str, Callable[[Loss], bool]] = {
    "z0_scope": lambda loss: "z0" in needs_of(loss),
    "kto_weights": lambda loss: hasattr(loss, "undesirable_weight"),
    "kto_one_per_prompt": lambda loss: hasattr(loss, "undesirable_weight"),
    "score_low": lambda loss: "scores" in needs_of(loss),
    "score_high": lambda loss: "scores" in needs_of(loss),
    "objective_weights": lambda loss: "margins" in needs_of(loss),
    "use_weighting": lambda loss: loss.per == "pair",
    "sync_ref_model": lambda loss: "reference" in needs_of(loss),
}


def loss_types_with(name: str) -> list[str]:
    """The values of loss_type with which the setting `name` has a meaning."""
    if name in ASKED:
        return [loss_type for loss_type in LOSS_TYPES if ASKED[name](loss_named(loss_type))]
    return [loss_type for loss_type in LOSS_TYPES if LOSS_SETTINGS[name] in fields_of(loss_type)]
