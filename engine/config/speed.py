"""Settings that change how a run computes, not what it computes (but for what `gradient_tolerance` lets go)."""

from dataclasses import dataclass
from typing import ClassVar

from prefuse.engine.config.setting import EVERY, TRAINING, Rule, Topic, setting
from prefuse.engine.errors import UserError


@dataclass(frozen=True)
class SpeedSettings(Topic):
    title: ClassVar[str] = "Speed and memory (docs/training.md)"
    commands: ClassVar[tuple[str, ...]] = TRAINING

    gradient_tolerance: float = setting(
        0.0,
        "Share of the head's gradient mass that its backward may skip, measured and logged as head/skipped_mass; 0 is "
        "exact. A trained model with a large vocabulary takes 0.001953125 (2 ** -9): docs/sparse_backward.md.",
        commands=("sft", "train"),  # where the head has a vocabulary
        rule=Rule("at least 0 and below 1", lambda value: 0.0 <= value < 1.0),
    )
    gradient_checkpointing: bool = setting(
        False,
        "Keep the inputs of each decoder layer alone, and run it again in the backward: less memory, a third slower.",
        may_differ=True,
    )
    torch_compile: bool = setting(False, "Compile the decoder layers. The head is fused already.")
    torch_compile_backend: str = setting("inductor", "torch.compile's backend.", only_with=("torch_compile", True))
    use_liger_kernel: bool = setting(
        False,
        "Liger's kernels for norms, rotary embeddings and gated layers, where it has them for the model. Needs a GPU.",
        commands=EVERY,
    )

    def check(self, command: str) -> None:
        if self.torch_compile and self.output_router_logits:
            raise UserError(
                "output_router_logits does not go with torch_compile: transformers collects router logits by hooks "
                "that compiled layers do not run. Drop one of the two"
            )
        if self.gradient_tolerance > 0.0 and self.impl == "reference":
            raise UserError("impl reference is exact: set gradient_tolerance to 0, or impl to auto, triton or torch")
