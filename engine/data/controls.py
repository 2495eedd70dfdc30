"""Control tokens of conditional SFT: text before the prompts of good and of bad answers (Korbak et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from prefuse.engine.data.ragged import Ragged
from prefuse.engine.data.records import DataError
from prefuse.engine.data.table import Examples
from prefuse.tokens import with_control


@dataclass(frozen=True)
class Controls:
    good: list[int]
    bad: list[int]
    bos: int | None = None  # stays in front

    @classmethod
    def of(cls, tokenizer: Any, texts: tuple[str, str]) -> Controls:
        good, bad = (control_ids(tokenizer, text) for text in texts)
        if good == bad:
            raise DataError(f"control_good and control_bad have the same tokens: {texts[0]!r} and {texts[1]!r}")
        return cls(good, bad, tokenizer.bos_token_id)

    @property
    def length(self) -> int:
        return max(len(self.good), len(self.bad))

    def before(self, examples: Examples) -> Examples:
        """Each prompt behind the control tokens of its label."""
        rows = (
            behind_control(prompt, self.good if label else self.bad, self.bos)
            for prompt, label in zip(examples.prompts, examples.labels, strict=True)
        )
        return replace(examples, prompts=Ragged.of(rows))


def control_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a control text, which the tokenizer must be able to write."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    written = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if not ids or tokenizer.unk_token_id in ids or written.strip() != text.strip():
        raise DataError(
            f"the tokenizer cannot write the control text {text!r} (it writes {written!r}): give another to "
            "control_good and control_bad, in words that it has"
        )
    return ids


def behind_control(prompt: list[int], control: list[int], bos: int | None) -> list[int]:
    start = 1 if bos is not None and prompt[:1] == [bos] else 0
    return prompt[:start] + with_control(prompt[start:], True, control, ())
