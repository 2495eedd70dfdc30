"""Settings of the batches: how many rows make a step, and how a step is split into passes."""

from dataclasses import dataclass
from typing import ClassVar

from prefuse.engine.config.setting import EVERY, TRAINING, Topic, at_least, setting
from prefuse.engine.errors import UserError


@dataclass(frozen=True)
class BatchSettings(Topic):
    title: ClassVar[str] = "Batches"
    commands: ClassVar[tuple[str, ...]] = (*TRAINING, "eval")

    # How a step is split changes its update by rounding alone. A resumed run compares the product of both and of ranks.
    per_device_train_batch_size: int = setting(
        8,
        "Pairs, or sequences (kto, sft), in one forward and backward pass. Without padding it is their number times "
        "gradient_accumulation_steps that counts: passes are cut by tokens.",
        commands=TRAINING,
        rule=at_least(1),
        may_differ=True,
    )
    gradient_accumulation_steps: int = setting(
        1,
        "Passes summed into one optimizer step. The loss is divided by the step's true count of items.",
        commands=TRAINING,
        rule=at_least(1),
        may_differ=True,
    )
    per_device_eval_batch_size: int = setting(
        8,
        "Pairs or sequences in one evaluation pass; prompts in one generation pass.",
        commands=EVERY,
        rule=at_least(1),
        may_differ=True,
    )
    padding_free: bool | None = setting(
        None,
        "Run flat batches: sequences end to end, a prompt once for all of its completions. None: where the model takes "
        "them, which is tried out; false: padded batches.",
    )
    max_tokens_per_batch: int | None = setting(
        None,
        "Most tokens of a flat batch; a pair that has more is one of its own. None: as many as a padded batch of "
        "per_device_train_batch_size (in evaluation, per_device_eval_batch_size) can have at max_length.",
        rule=at_least(1),
    )

    def check(self, command: str) -> None:
        if self.max_tokens_per_batch is not None and self.padding_free is False:
            raise UserError("max_tokens_per_batch is about flat batches: drop it, or padding_free false")
