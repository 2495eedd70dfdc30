"""Settings of the preference loss: its name, its hyperparameters, and the reference it is relative to."""

import dataclasses
import typing
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import Topic, above, setting
from prefuse.engine.errors import UserError
from prefuse.losses.contract import Loss, needs_of
from prefuse.losses.names import fields_of, loss_from, loss_named, setting_names
from prefuse.losses.unpaired import SFT


@dataclass(frozen=True)
class LossSettings(Topic):
    """The loss itself says which values its fields may have."""

    title: ClassVar[str] = "Loss (docs/losses.md)"
    commands: ClassVar[tuple[str, ...]] = ("train", "eval")

    loss_type: Literal[
        "dpo", "ipo", "kto", "simpo", "orpo", "cpo", "slic", "rpo", "sigmoid", "sigmoid_norm", "hinge", "robust",
        "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop", "f_dpo", "ld_dpo",
        "una", "una_pair", "ppo_clip", "sft",
    ] = setting(
        "dpo",
        "Preference loss of `train` and `eval`: docs/losses.md has equations and papers. kto, una and ppo_clip also "
        "take pairs, each as one good and one bad completion; simpo, orpo, cpo and slic use no reference. `eval` takes "
        "sft too: loss, perplexity and accuracy of the completions' tokens.",
    )  # fmt: skip
    beta: float | None = setting(
        None,
        "Strength of the pull towards the reference, or what the loss's paper calls beta (orpo: lambda). None: 0.1, "
        "but 2 for simpo and 5 for sigmoid_norm, which compare means per token. `online`: 0 for grpo and reinforce, "
        "0.05 for rloo and ppo, whose reward it lowers.",
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
    simpo_gamma: float | None = setting(None, "simpo: the margin that the rewards are to have. None: 1.")
    slic_delta: float | None = setting(None, "slic: the margin that the log-probabilities are to have. None: 1.")
    discopop_tau: float | None = setting(None, "discopop: temperature of its modulation. None: 0.05.")
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = setting(
        "reverse_kl", "f_dpo: the divergence from the reference."
    )
    f_alpha_divergence_coef: float | None = setting(None, "f_dpo: alpha of alpha_divergence. None: 0.5.")
    ld_alpha: float | None = setting(
        None, "ld_dpo: weight of the tokens that the longer completion has beyond the shorter one. None: 0.5."
    )
    ppo_clip: float | None = setting(None, "ppo_clip: how far a token's ratio may leave 1 and still count. None: 0.2.")
    una_distance: Literal["bce", "mse"] = setting(
        "bce", "una, una_pair: distance of the implicit reward from the label."
    )
    kto_value: Literal["logistic", "concave", "linear"] = setting(
        "logistic", "kto: its value function; concave and linear (risk-neutral) are its paper's ablations."
    )
    kto_reference_point: float | None = setting(
        None, "kto: a constant in place of z0, which is then not computed. None: z0."
    )
    desirable_weight: float = setting(1.0, "KTO: weight of the desirable completions.")
    undesirable_weight: float = setting(1.0, "KTO: weight of the undesirable completions.")
    z0_scope: Literal["step", "microbatch"] = setting(
        "step",
        "KTO: one reference point per optimizer step, or one per microbatch (the paper's and TRL's habit). A "
        "microbatch then is per_device_train_batch_size rows, in flat batches too.",
        commands=("train",),
    )
    output_router_logits: bool = setting(
        False,
        "Mixtures of experts: add the balance loss of the router, as transformers and TRL do, and log it as aux_loss.",
        commands=("sft", "train"),
    )
    router_aux_loss_coef: float | None = setting(
        None,
        "Weight of the router's balance loss. None: the model's own, of its config.json.",
        commands=("sft", "train"),
        rule=above(0),
        only_with=("output_router_logits", True),
    )
    reference_cache: str | None = setting(
        None,
        "Folder that keeps reference log-probabilities between runs; None keeps them in memory.",
        commands=("train",),
        may_differ=True,
    )

    def loss(self) -> Loss:
        """The loss these settings name."""
        return SFT() if self.loss_type == "sft" else loss_from(self, self.loss_type)

    def check(self, command: str) -> None:
        if command not in LossSettings.commands:
            return
        if command == "train" and self.loss_type == "sft":
            raise UserError("loss_type sft is for `prefuse eval`: train on completions with `prefuse sft`")
        for name in (*LOSS_SETTINGS, "z0_scope"):
            if getattr(self, name) != _FIELDS[name].default and self.loss_type not in loss_types_with(name):
                raise UserError(
                    f"{name} has a meaning only with loss_type {', '.join(loss_types_with(name))}, got loss_type "
                    f"{self.loss_type}: drop {name}"
                )
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


_FIELDS = {field.name: field for field in dataclasses.fields(LossSettings)}
LOSS_TYPES = tuple(name for name in typing.get_args(_FIELDS["loss_type"].type) if name != "sft")  # of preferences
# Setting -> field of the losses that have it.
LOSS_SETTINGS = {
    setting: field for name in LOSS_TYPES for field, setting in setting_names(name).items() if setting in _FIELDS
}


def loss_types_with(name: str) -> list[str]:
    """The values of loss_type with which the setting `name` has a meaning."""
    if name == "z0_scope":
        return [loss_type for loss_type in LOSS_TYPES if "z0" in needs_of(loss_named(loss_type))]
    return [loss_type for loss_type in LOSS_TYPES if LOSS_SETTINGS[name] in fields_of(loss_type)]
