"""Settings of LoRA: which adapters are trained beside the model's own weights."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from prefuse.engine.config.setting import TRAINING, Rule, Topic, at_least, setting
from prefuse.engine.errors import UserError

WITH_PEFT = ("use_peft", True)
IN_4BIT = ("load_in_4bit", True)


@dataclass(frozen=True)
class LoraSettings(Topic):
    title: ClassVar[str] = "LoRA (docs/training.md)"
    commands: ClassVar[tuple[str, ...]] = TRAINING

    use_peft: bool = setting(
        False,
        "Train adapters of low rank (LoRA) beside the model's own weights. The reference is the model without them.",
    )
    lora_r: int = setting(16, "Their rank.", rule=at_least(1), most=65536, only_with=WITH_PEFT)
    lora_alpha: int = setting(
        32,
        "What they add is scaled by lora_alpha / lora_r.",
        rule=at_least(1),
        only_with=WITH_PEFT,
    )
    lora_dropout: float = setting(
        0.0,
        "Share of their inputs that is dropped in training. With it, ranks and accumulation change the update.",
        rule=Rule("in [0, 1)", lambda value: 0 <= value < 1),
        only_with=WITH_PEFT,
    )
    lora_target_modules: list[str] | None = setting(
        None,
        "Names of the layers that get one (q_proj v_proj), or a single pattern. None: all linear layers but the head.",
        only_with=WITH_PEFT,
    )
    lora_modules_to_save: list[str] | None = setting(
        None, "Names of modules that are trained whole, and saved with the adapters.", only_with=WITH_PEFT
    )

    load_in_4bit: bool = setting(
        False,
        "QLoRA: keep the base model in 4 bits (bitsandbytes) and train adapters beside it. The heads stay as they are.",
        commands=(*TRAINING, "eval", "generate"),
    )
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = setting(
        "nf4", "The 4-bit numbers.", commands=(*TRAINING, "eval", "generate"), only_with=IN_4BIT
    )
    use_bnb_nested_quant: bool = setting(
        False, "Quantize their scales too.", commands=(*TRAINING, "eval", "generate"), only_with=IN_4BIT
    )

    def check(self, command: str) -> None:
        if self.load_in_4bit and command in TRAINING and not self.use_peft:
            raise UserError("load_in_4bit trains adapters beside the base: give --use_peft true")
        if len(self.lora_target_modules or ()) == 1:
            try:
                re.compile(self.lora_target_modules[0])
            except re.error as error:
                raise UserError(
                    f"lora_target_modules must be names of layers or one regular expression, got "
                    f"{self.lora_target_modules[0]!r}: {error}"
                ) from None
