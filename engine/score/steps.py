"""A process reward model as a scorer: what it says of an answer's steps, as one number.

    --scorer prm --scorer_steps min         # or product, or last

The folder is one that `AutoModelForTokenClassification` loads with two labels, or with one, as `prefuse reward
--reward_loss steps` and TRL's trainer of such models leave it. An answer is cut into steps at `step_separator`; each is
right with the probability that the model gives at the last token of the separator behind it. An answer's score is the
probability of its weakest step, of all its steps, or of the last one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from prefuse.engine.config.rewards import RewardSettings
from prefuse.engine.config.yaml_file import is_of_a_run, read_settings
from prefuse.engine.data.of_run import text_key, text_of_scorer
from prefuse.engine.data.records import BadRow, Skipped
from prefuse.engine.data.rendering import ChatTemplate
from prefuse.engine.data.steps import SEPARATOR, encoded, solution, steps_of
from prefuse.engine.data.templates import TextOptions, template_of
from prefuse.engine.score.cache import Cache
from prefuse.engine.score.classifier import Classifier, can_share, digest_of, load_whole, tokenizer_of
from prefuse.engine.score.contract import NoScore, Text
from prefuse.models.score import step_scores
from prefuse.packing import pack
from prefuse.reward import combine_steps


@dataclass(frozen=True)
class Solution:
    """An answer in steps as token ids."""

    prompt: list[int]
    ids: list[int]
    ends: list[bool]  # of `ids`: where a step ends

    def __len__(self) -> int:
        return len(self.prompt) + len(self.ids)


@dataclass
class StepClassifier(Classifier):
    """A `Classifier` with a number for each step."""

    how: str = "min"  # what one number is made by: "min", "product" or "last"
    separator: str = SEPARATOR
    template: ChatTemplate | None = field(default=None, repr=False)

    def _one_of(self, numbers: list[float]) -> float:
        return combine_steps(torch.tensor(numbers), torch.tensor([0, len(numbers)]), self.how).item()

    def steps(self, prompts: Sequence[Text], answers: Sequence[str]) -> list[list[float] | NoScore]:
        """The probability of each step of each answer."""
        found = self.numbers(list(prompts), list(answers))
        return [own if isinstance(own, NoScore) else torch.tensor(own).sigmoid().tolist() for own in found]

    def _tokens(self, prompts: list[Text], answers: list[str]) -> list[Solution | NoScore]:
        records = []
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            try:
                steps = steps_of(answer, self.separator)
                records.append(solution(str(number), prompt, steps, self.template, self.separator))
            except BadRow as problem:
                records.append(Skipped.of(str(number), problem))
        found: list[Solution | NoScore] = []
        for answer, record in zip(answers, encoded(records, self.tokenizer), strict=True):
            if not steps_of(answer, self.separator):
                found.append(NoScore("empty", "the answer has no step"))
            elif isinstance(record, Skipped):
                found.append(NoScore("template", record.reason))
            elif sum(record.learned or []) != len(steps_of(answer, self.separator)):
                found.append(NoScore("separator", f"the tokenizer has no token for it: {self.separator!r}"))
            else:
                found.append(Solution(record.prompt, record.sides["completion"], record.learned))
        return found

    def _fault(self, outcome: Solution) -> NoScore | None:
        return super()._fault(outcome.prompt + outcome.ids)

    def _read(self, outcome: Solution) -> Solution:
        return outcome

    @torch.no_grad()
    def shared(self, groups: list[list[Solution]]) -> list[list[float]]:
        """From one flat batch, in which the prompt of a group runs once."""
        device = next(self.model.parameters()).device
        packed = pack([(own[0].prompt, [one.ids for one in own]) for own in groups]).to(device)
        solutions = [one for own in groups for one in own]
        ends = torch.tensor([end for one in solutions for end in one.ends], device=device)
        found = step_scores(self.model, packed, ends).double().split([sum(one.ends) for one in solutions])
        return [own.tolist() for own in found]

    def logits(self, solutions: list[Solution]) -> list[list[float]]:
        logits = self._padded([one.prompt + one.ids for one in solutions])  # (B, T, C)
        numbers = logits[..., 0] if logits.shape[-1] == 1 else logits[..., 1] - logits[..., 0]
        return [
            [float(row[len(one.prompt) + i]) for i, end in enumerate(one.ends) if end]
            for one, row in zip(solutions, numbers, strict=True)
        ]


def load_step_classifier(
    path: str, device: torch.device, how: str, separator: str | None, batch_size: int, cache_folder: Path | None,
    trust_remote_code: bool = False, asked: TextOptions | None = None,
) -> StepClassifier:  # fmt: skip
    """The process reward model of a folder. Without `separator`, the one it was trained with here, or a newline.

    `asked`: how the run that asks renders its own conversations (see `text_of_scorer`).
    """
    model = load_whole(path, trust_remote_code, steps=True).to(device).eval()
    tokenizer = tokenizer_of(path, trust_remote_code)
    config = Path(path) / "config.yaml"
    trained: dict[str, Any] = read_settings(config) if config.is_file() and is_of_a_run(config) else {}
    separator = separator or RewardSettings(step_separator=trained.get("step_separator")).separator() or SEPARATOR
    text = text_of_scorer(path, asked)
    key = f"steps {digest_of(Path(path), model)} {separator!r}{text_key(text, tokenizer)}"
    cache = Cache(cache_folder, key) if cache_folder is not None else None
    template = template_of(tokenizer, text) if tokenizer.chat_template else None
    return StepClassifier(
        path, model, tokenizer, f"{key} {how}", False, batch_size, cache, can_share(model), 1, text, how, separator,
        template,
    )  # fmt: skip
