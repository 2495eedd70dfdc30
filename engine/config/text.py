"""Settings of the text: how rows become tokens."""

import datetime
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from prefuse.engine.config.setting import TRAINING, Topic, setting
from prefuse.engine.errors import UserError


@dataclass(frozen=True)
class TextSettings(Topic):
    title: ClassVar[str] = "Text"

    chat_template: str | None = setting(
        None,
        "Chat template in place of the tokenizer's, and saved with the model: a Jinja file, `chatml`, or the name of "
        "one that trl ships (qwen3, llama3, ...).",
    )
    chat_template_kwargs: str | None = setting(
        None,
        """Arguments for the chat template, as JSON: '{"enable_thinking": false}'. A row's own column of this name """
        "comes on top.",
    )
    system_prompt: str | None = setting(
        None, "First turn of conversations that have no system turn: the text, or a .txt file that holds it."
    )
    eos_token: str | None = setting(
        None,
        "Token that ends answers, in place of the tokenizer's EOS; also put behind answers that the chat template ends "
        "with none.",
    )
    template_date: str | None = setting(
        None,
        "The day (2026-11-28) that chat templates take for today. None: the first day of the run, which it then keeps.",
    )
    sft_turns: Literal["all", "last"] = setting(
        "all",
        "Which answers of a conversation are learned. Turns with weight 0, train false or loss_weight 0 never are.",
        commands=("sft",),
    )
    multi_turn: Literal["refuse", "first", "all"] = setting(
        "refuse",
        "Pairs that differ before the last turn: refused, compared in the first answer that differs, or in all answers "
        "from there on (the turns between them are not learned).",
        commands=("train", "reward", "eval"),
    )
    learn_after_stop: bool | None = setting(
        None,
        "Learn what the chat template writes behind the stop token too, as TRL does. None: false, but true for "
        "`reward`, whose scores stand at the end of the whole text.",
        commands=(*TRAINING, "eval"),
    )
    truncation_mode: Literal["keep_end", "keep_start"] = setting(
        "keep_end", "Which part of a prompt that is too long for max_length stays."
    )
    long_completions: Literal["skip", "cut"] = setting(
        "skip",
        "What happens to a row whose completion leaves no room in max_length: it is left out, or its end is cut off, "
        "and its prompt to half of max_length; counted either way.",
        commands=(*TRAINING, "eval"),
    )

    def command_defaults(self, command: str) -> dict[str, object]:
        return {"learn_after_stop": command == "reward"}

    def template_arguments(self) -> dict[str, Any]:
        try:
            arguments = json.loads(self.chat_template_kwargs or "{}")
        except ValueError as error:
            raise UserError(f"chat_template_kwargs is not JSON: {error}") from None
        if not isinstance(arguments, dict):
            raise UserError(f"chat_template_kwargs must be a JSON object, got {self.chat_template_kwargs}")
        return arguments

    def check(self, command: str) -> None:
        self.template_arguments()
        try:
            if self.template_date is not None:
                datetime.date.fromisoformat(self.template_date)
        except ValueError:
            raise UserError(f"template_date must be a day like 2026-11-28, got {self.template_date}") from None
