"""Settings of the optimizer: how long training goes on, and how far a step goes."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import EVERY, TRAINING, Rule, Topic, above, at_least, setting
from prefuse.engine.errors import UserError

BITSANDBYTES = ("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit")  # values of optim
DECAY = Rule("in [0, 1)", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class OptimizationSettings(Topic):
    title: ClassVar[str] = "Optimization (docs/training.md)"
    commands: ClassVar[tuple[str, ...]] = TRAINING

    learning_rate: float | None = setting(
        None,
        "Peak learning rate. None: 1e-6 for `train` and `online`, 2e-5 for `sft` and `reward`, and ten times that with "
        "use_peft. Smaller models take more: docs/training.md has a table by size, and one of the memory they need.",
        rule=at_least(0),
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = setting(
        "linear", "How the learning rate falls after the warm-up."
    )
    warmup_ratio: float = setting(
        0.1,
        "Share of all steps in which the learning rate rises linearly from 0.",
        rule=Rule("in [0, 1]", lambda value: 0 <= value <= 1),
    )
    warmup_steps: int = setting(0, "Warm-up steps; if not 0, wins over warmup_ratio.", rule=at_least(0))
    num_train_epochs: float = setting(
        1.0,
        "Passes over the training rows.",
        rule=above(0),
        most=100_000,
    )
    max_steps: int = setting(
        -1,
        "Optimizer steps; if positive, wins over num_train_epochs.",
        rule=Rule("-1 (num_train_epochs decides) or at least 1", lambda value: value == -1 or value >= 1),
    )
    max_grad_norm: float = setting(
        1.0, "Gradients are scaled down to this norm. inf: never.", rule=above(0), finite=False
    )
    weight_decay: float = setting(0.0, "AdamW's weight decay; norms and biases have none.", rule=at_least(0))
    adam_beta1: float = setting(0.9, "AdamW's decay of the mean gradient.", rule=DECAY)
    adam_beta2: float = setting(0.999, "AdamW's decay of the mean squared gradient.", rule=DECAY)
    adam_epsilon: float = setting(
        1e-8,
        "AdamW's epsilon.",
        rule=Rule("above 0, and not 0 in float32 (1e-37 or more)", lambda value: value >= 1e-37),
    )
    optim: Literal["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"] = setting(
        "adamw_torch",
        "Which AdamW steps. adamw_torch_fused: in one kernel. The others are bitsandbytes': states of 8 bits, and "
        "paged ones that move to the CPU's memory while the GPU's is short.",
    )
    seed: int = setting(
        42,
        "Decides the order of the rows, the held-out rows, KTO's mismatches and sampling.",
        commands=EVERY,
        rule=at_least(0),
        most=2**32 - 1,  # as numpy and transformers have it
    )

    def command_defaults(self, command: str) -> dict[str, object]:
        whole, adapters = (1e-6, 1e-5) if command in ("train", "online") else (2e-5, 2e-4)
        return {"learning_rate": adapters if self.use_peft else whole}

    def check(self, command: str) -> None:
        if self.optim in BITSANDBYTES and self.parallel == "fsdp":
            raise UserError(
                f"optim {self.optim} keeps states that cannot be spread over ranks: use adamw_torch with parallel fsdp"
            )
