"""Settings of `prefuse generate`, and of `prefuse eval` with a scorer: how many prompts are answered, and how."""

from dataclasses import dataclass
from typing import ClassVar

from prefuse.engine.config.setting import Rule, Topic, at_least, setting

SAMPLING = ("online", "label", "revise")  # answers are sampled, not the most likely ones
ANSWERING = ("generate", "eval", *SAMPLING)


@dataclass(frozen=True)
class GenerationSettings(Topic):
    title: ClassVar[str] = "Generation"
    commands: ClassVar[tuple[str, ...]] = ("generate", "eval", "label", "revise")

    num_prompts: int | None = setting(
        None,
        "How many prompts of the dataset to answer; 0 answers all. None: 8 for `generate`, and all elsewhere.",
        rule=at_least(0),
    )
    max_new_tokens: int = setting(128, "Most tokens of an answer.", rule=at_least(1), most=10_000_000)
    temperature: float | None = setting(
        None,
        "0 takes the most likely token; above it, samples, from the whole distribution unless top_p or min_p is set. "
        "Nothing else shapes the text: no penalty, top_p or beam of the model's generation_config.json. None: 0, but 1 "
        "for `online`, `label` and `revise`.",
        commands=ANSWERING,
        rule=Rule("0, or at least 0.001 and at most 1000", lambda value: value == 0 or 1e-3 <= value <= 1e3),
    )

    def command_defaults(self, command: str) -> dict[str, object]:
        return {"num_prompts": 8 if command == "generate" else 0, "temperature": float(command in SAMPLING)}
