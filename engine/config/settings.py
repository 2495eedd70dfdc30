"""Every setting of a run in one flat dataclass: TRL's names where TRL has one.

Values come from the defaults below, then a YAML file (``--config``), then the command line.
The run folder keeps the result as ``config.yaml``, so ``prefuse train --config run/config.yaml`` repeats it.
"""

import dataclasses
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefuse.engine.errors import UserError
from prefuse.losses.contract import Loss, needs_of
from prefuse.losses.names import fields_of, loss_from, loss_named, settings_of


@dataclass(frozen=True)
class Config:
    # Model
    model_name_or_path: str = ""
    """Model to start from: a folder with safetensors weights, or a hub name."""
    ref_model_name_or_path: str | None = None
    """Reference model. `train`: the initial model if not given. `eval`, `generate`: the model to compare with."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights and of the optimizer's states. Float32 unless memory forbids it: at learning rates
    near 5e-7 most bfloat16 weights do not move at all."""
    bf16: bool | None = None
    """Compute in bfloat16 by autocast. None: where the GPU supports it; never by default on CPU."""
    device: str = "auto"
    """Device to run on: auto (cuda if there is one, else cpu), cpu, cuda, cuda:1, ..."""
    impl: Literal["auto", "triton", "torch", "reference"] = "auto"
    """Which implementation of the fused head runs (see prefuse.linear_logprobs)."""

    # Data
    dataset_name: str = ""
    """Rows to train on, evaluate, or prompt with: a JSON, JSONL or Parquet file, a folder, or a hub name."""
    dataset_train_split: str = "train"
    """Split to read when dataset_name or eval_dataset has splits."""
    eval_dataset: str | None = None
    """Held-out rows. If not given, eval_fraction of dataset_name is held out."""
    dataset_test_split: str = "test"
    """Split of eval_dataset to read when it has splits."""
    eval_fraction: float | None = None
    """Share of dataset_name's prompts that is held out (chosen by seed) when eval_dataset is not given. None: 0.05
    for `train` and `sft`; `eval` and `generate` then look at all rows."""
    max_length: int = 1024
    """Most tokens of a prompt and its completion. A longer prompt loses its start; a completion is never cut."""

    # Loss
    loss_type: Literal[
        "dpo", "ipo", "kto", "simpo", "orpo", "cpo", "slic", "rpo", "sigmoid", "sigmoid_norm", "hinge", "robust",
        "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "discopop",
    ] = "dpo"  # fmt: skip
    """Preference loss of `train` and `eval`: docs/losses.md has equations and papers. kto also takes pairs, each as one
    good and one bad completion; simpo, orpo, cpo and slic use no reference."""
    beta: float | None = None
    """Strength of the pull towards the reference, or what the loss's paper calls beta (orpo: lambda). None: 0.1, but 2
    for simpo and 5 for sigmoid_norm, which compare means per token."""
    label_smoothing: float | None = None
    """The share of pairs whose preference is thought to be flipped, in [0, 0.5). None: 0, but 0.1 for robust and 0.001
    for exo_pair."""
    nll_weight: float | None = None
    """orpo, cpo, rpo, slic: weight of the SFT term. None: 1, but 0.1 for slic, whose term is a sum over tokens."""
    simpo_gamma: float | None = None
    """simpo: the margin that the rewards are to have. None: 1."""
    slic_delta: float | None = None
    """slic: the margin that the log-probabilities are to have. None: 1."""
    discopop_tau: float | None = None
    """discopop: temperature of its modulation. None: 0.05."""
    desirable_weight: float = 1.0
    """KTO: weight of the desirable completions."""
    undesirable_weight: float = 1.0
    """KTO: weight of the undesirable completions."""
    z0_scope: Literal["step", "microbatch"] = "step"
    """KTO: one reference point per optimizer step, or one per microbatch (the paper's and TRL's habit). A microbatch
    then is per_device_train_batch_size rows, in flat batches too."""
    reference_cache: str | None = None
    """Folder that keeps reference log-probabilities between runs; None keeps them in memory."""

    # Optimization
    learning_rate: float | None = None
    """Peak learning rate. None: 1e-6 for `train`, 2e-5 for `sft`, and ten times that with use_peft."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup_ratio: float = 0.1
    """Share of all steps in which the learning rate rises linearly from 0."""
    warmup_steps: int = 0
    """Warm-up steps; if not 0, wins over warmup_ratio."""
    per_device_train_batch_size: int = 8
    """Pairs, or sequences (kto, sft), in one forward and backward pass. Without padding it is their number
    times gradient_accumulation_steps that counts: passes are cut by tokens."""
    gradient_accumulation_steps: int = 1
    """Passes summed into one optimizer step. The loss is divided by the step's true count of items."""
    padding_free: bool | None = None
    """Run flat batches: sequences end to end, a prompt once for all of its completions. None: where the model takes
    them, which is tried out; false: padded batches."""
    max_tokens_per_batch: int | None = None
    """Most tokens of a flat batch; a pair that has more is one of its own. None: as many as a padded batch of
    per_device_train_batch_size (in evaluation, per_device_eval_batch_size) can have at max_length."""
    num_train_epochs: float = 1.0
    """Passes over the training rows."""
    max_steps: int = -1
    """Optimizer steps; if positive, wins over num_train_epochs."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    weight_decay: float = 0.0
    """AdamW's weight decay; norms and biases have none."""
    adam_beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    adam_beta2: float = 0.999
    """AdamW's decay of the mean squared gradient."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = (
        "adamw_torch"
    )
    """Which AdamW steps. adamw_torch_fused: in one kernel. The others are bitsandbytes': states of 8 bits, and
    paged ones that move to the CPU's memory while the GPU's is short."""
    seed: int = 42
    """Decides the order of the rows, the held-out rows, KTO's mismatches and sampling."""

    # LoRA, speed and memory (docs/training.md)
    use_peft: bool = False
    """Train adapters of low rank (LoRA) beside the model's own weights. The reference is the model without them."""
    lora_r: int = 16
    """Their rank."""
    lora_alpha: int = 32
    """What they add is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.0
    """Share of their inputs that is dropped in training. With it, ranks and accumulation change the update."""
    lora_target_modules: list[str] | None = None
    """Names of the layers that get one (q_proj v_proj), or a single pattern. None: all linear layers but the head."""
    lora_modules_to_save: list[str] | None = None
    """Names of modules that are trained whole, and saved with the adapters."""
    gradient_checkpointing: bool = False
    """Keep the inputs of each decoder layer alone, and run it again in the backward: less memory, a third slower."""
    torch_compile: bool = False
    """Compile the decoder layers. The head is fused already."""
    torch_compile_backend: str = "inductor"
    """torch.compile's backend."""
    use_liger_kernel: bool = False
    """Liger's kernels for norms, rotary embeddings and gated layers, where it has them for the model. Needs a GPU."""

    # Output
    output_dir: str = ""
    """Folder of the run: model, checkpoints, config.yaml, metrics.jsonl, curves.png. Must be new or empty."""
    resume: bool = False
    """Go on from the newest whole checkpoint in output_dir."""
    save_steps: int = 500
    """Optimizer steps between checkpoints; 0 writes none."""
    save_total_limit: int = 2
    """Checkpoints kept; 0 keeps all."""
    logging_steps: int = 10
    """Optimizer steps between lines of metrics."""
    eval_steps: int = 100
    """Optimizer steps between evaluations, beside those before the first and after the last step."""
    per_device_eval_batch_size: int = 8
    """Pairs or sequences in one evaluation pass; prompts in one generation pass."""

    # `eval` and `generate`
    output_file: str | None = None
    """`eval`: JSON file, `generate`: JSONL file for the results. Must not exist."""
    num_prompts: int = 8
    """`generate`: how many prompts of the dataset to answer; 0 answers all."""
    max_new_tokens: int = 128
    """`generate`: most tokens of an answer."""
    temperature: float = 0.0
    """`generate`: 0 takes the most likely token; above it, samples from the whole distribution."""

    # Many processes (`train` and `sft`)
    nproc: int = 1
    """Processes to start on this machine, one for each GPU. Under torchrun or Slurm leave it: they start them."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every process holds the whole model. fsdp: weights, gradients and optimizer states are spread over all."""
    fsdp_cpu_offload: bool = False
    """fsdp: shards and the optimizer's step stay in the CPU's memory."""
    ddp_timeout: int = 1800
    """Seconds that a process waits for the others before it gives up."""
    max_restarts: int = 0
    """How often a run whose processes died starts again by itself, from its last checkpoint."""

    # Guards (docs/guards.md)
    guard_action: Literal["warn", "stop"] = "warn"
    """What a guard does besides saying what it saw. stop: end the run there, with a checkpoint and the model."""
    max_skipped_steps: int = 3
    """Optimizer steps in a row that may be skipped because loss or gradient is not finite; one more ends the run."""
    max_loss_ratio: float = 5.0
    """Guard: a step's loss over the median of those before it."""
    max_chosen_drop: float = 0.5
    """Guard: how far the chosen completions' log-probability may fall below the reference's, as a share of it."""
    max_accuracy_drop: float = 0.02
    """Guard: how far held-out accuracy may fall from its best while it is above 0.99 in training."""
    max_kl: float | None = None
    """Guard: nats per token that the policy may move away from the reference on held-out rows. None: no limit."""

    def token_budget(self, batch_size: int, sequences: int) -> int:
        """Tokens of a flat batch that stands for a padded one of `batch_size` examples of so many sequences."""
        return self.max_tokens_per_batch or batch_size * sequences * self.max_length

    def loss(self) -> Loss:
        """The preference loss these settings name."""
        return loss_from(self, self.loss_type)


FIELDS = {field.name: field.type for field in dataclasses.fields(Config)}
TRAINING_COMMANDS = ("sft", "train")
LOSS_TYPES = typing.get_args(FIELDS["loss_type"])
# Setting -> field of the losses that have it.
LOSS_SETTINGS = {
    setting: field for name in LOSS_TYPES for field, setting in settings_of(name).items() if setting in FIELDS
}
BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")  # values of optim

_AT_LEAST_ONE = (
    "max_length",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "logging_steps",
    "eval_steps",
    "max_new_tokens",
    "nproc",
    "ddp_timeout",
    "lora_r",
    "lora_alpha",
)
_AT_LEAST_ZERO = (
    "warmup_steps",
    "weight_decay",
    "save_steps",
    "save_total_limit",
    "num_prompts",
    "temperature",
    "seed",
    "max_restarts",
    "max_skipped_steps",
    "max_accuracy_drop",
)
_ABOVE_ZERO = ("num_train_epochs", "max_grad_norm", "adam_epsilon", "max_chosen_drop")
_ONLY_WITH = {
    "fsdp_cpu_offload": ("parallel", "fsdp"),
    "lora_r": ("use_peft", True),
    "lora_alpha": ("use_peft", True),
    "lora_dropout": ("use_peft", True),
    "lora_target_modules": ("use_peft", True),
    "lora_modules_to_save": ("use_peft", True),
    "torch_compile_backend": ("torch_compile", True),
}


def validate(config: Config, command: str) -> Config:
    """The settings with the command's own defaults filled in; UserError names the first that cannot be."""
    trains = command in TRAINING_COMMANDS
    if config.learning_rate is None:
        whole, adapters = (2e-5, 2e-4) if command == "sft" else (1e-6, 1e-5)
        config = dataclasses.replace(config, learning_rate=adapters if config.use_peft else whole)
    if config.eval_fraction is None:
        config = dataclasses.replace(config, eval_fraction=0.05 if trains else 1.0)

    required = ["model_name_or_path"]
    required += ["output_dir"] if trains else []
    required += ["ref_model_name_or_path"] if command == "eval" else []  # what rewards and KL are relative to
    required += ["dataset_name"] if trains or config.eval_dataset is None else []
    for name in required:
        if not getattr(config, name):
            raise UserError(f"{name} is required: give --{name}, or {name}: in the --config file")

    _require(config, _AT_LEAST_ONE, "at least 1", lambda value: value >= 1)
    _require(config, _AT_LEAST_ZERO, "at least 0", lambda value: value >= 0)
    _require(config, _ABOVE_ZERO, "above 0", lambda value: value > 0)
    _require(config, ("learning_rate",), "at least 0", lambda value: value >= 0)
    _require(config, ("max_steps",), "-1 (num_train_epochs decides) or at least 1", lambda v: v == -1 or v >= 1)
    _require(config, ("adam_beta1", "adam_beta2"), "in [0, 1)", lambda value: 0 <= value < 1)
    if trains:
        _require(config, ("eval_fraction",), "in [0, 1): training needs rows too", lambda value: 0 <= value < 1)
    else:
        _require(config, ("eval_fraction",), "in (0, 1]", lambda value: 0 < value <= 1)
    _require(config, ("warmup_ratio",), "in [0, 1]", lambda value: 0 <= value <= 1)
    if config.max_tokens_per_batch is not None:
        _require(config, ("max_tokens_per_batch",), "at least 1", lambda value: value >= 1)
        if config.padding_free is False:
            raise UserError("max_tokens_per_batch is about flat batches: drop it, or padding_free false")
    _require(config, ("max_loss_ratio",), "above 1", lambda value: value > 1)
    _require(config, ("max_kl",), "above 0, or null for no limit", lambda value: value is None or value > 0)
    for name, (other, value) in _ONLY_WITH.items():
        if getattr(config, name) != getattr(Config, name) and getattr(config, other) != value:
            said = str(value).lower()
            raise UserError(f"{name} has a meaning only with {other} {said}: set {other} to {said}, or drop {name}")
    _require(config, ("lora_dropout",), "in [0, 1)", lambda value: 0 <= value < 1)
    if config.optim in BITSANDBYTES and config.parallel == "fsdp":
        raise UserError(
            f"optim {config.optim} keeps states that cannot be spread over ranks: use adamw_torch with parallel fsdp"
        )
    for name in (*LOSS_SETTINGS, "z0_scope"):
        if command != "sft" and getattr(config, name) != getattr(Config, name) and config.loss_type not in _types(name):
            raise UserError(
                f"{name} has a meaning only with loss_type {', '.join(_types(name))}, got loss_type "
                f"{config.loss_type}: drop {name}"
            )
    if not trains and config.output_file is not None and Path(config.output_file).exists():
        raise UserError(f"output_file {config.output_file} exists: give another name, or remove it")
    if config.output_file is not None and not Path(config.output_file).absolute().parent.is_dir():
        raise UserError(f"output_file {config.output_file} is in a folder that does not exist: make it first")
    try:
        config.loss()
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from None
    return config


def _types(setting: str) -> list[str]:
    """The values of loss_type with which a setting has a meaning."""
    if setting == "z0_scope":
        return [name for name in LOSS_TYPES if "z0" in needs_of(loss_named(name))]
    return [name for name in LOSS_TYPES if LOSS_SETTINGS[setting] in fields_of(name)]


def _require(config: Config, names: tuple[str, ...], wanted: str, holds: typing.Callable[[float], bool]) -> None:
    for name in names:
        value = getattr(config, name)
        if not holds(value):  # also false for nan
            raise UserError(f"{name} must be {wanted}, got {value}")
