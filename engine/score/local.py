"""A judge in this process: a folder with a causal language model, asked through its own chat template."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.data.dataset import text_options
from prefuse.engine.data.of_run import text_key, text_of_scorer
from prefuse.engine.data.records import BadRow
from prefuse.engine.data.templates import TextOptions, template_of
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.load import load_model, load_tokenizer
from prefuse.engine.model.sampling import Shape, pad_left, sample
from prefuse.engine.report.log import progress
from prefuse.engine.run.files import sha256_of
from prefuse.engine.score.cache import Cache, json_digest
from prefuse.engine.score.contract import NoScore
from prefuse.engine.score.judge import Reply
from prefuse.engine.score.rubric import LETTERS, Rubric


@dataclass
class Local:
    name: str
    key: str
    lm: LanguageModel
    tokenizer: Any
    rubric: Rubric
    config: Config
    most_tokens: int | None  # that the model takes
    text: TextOptions

    def ask(self, questions: Sequence[list[dict]], keep: Sequence[str], cache: Cache) -> dict[str, Reply | NoScore]:
        replies: dict[str, Reply | NoScore] = {}
        ids: dict[str, list[int]] = {}
        room = 1 if self.rubric.mode == "letter" else self.config.judge_max_tokens
        for key, question in zip(keep, questions, strict=True):
            tokens = self._tokens(question)
            if isinstance(tokens, NoScore):
                replies[key] = tokens
            elif self.most_tokens is not None and len(tokens) + room > self.most_tokens:
                replies[key] = NoScore("too long", f"{len(tokens)} tokens, the judge takes {self.most_tokens}")
            else:
                ids[key] = tokens
        size = self.config.per_device_eval_batch_size
        order = sorted(ids, key=lambda key: -len(ids[key]))
        starts = range(0, len(order), size)
        for start in progress(starts, f"asking {self.name}", len(starts)):
            part = order[start : start + size]
            said = self._letters if self.rubric.mode == "letter" else self._reasons
            for key, reply in zip(part, said([ids[key] for key in part]), strict=True):
                replies[key] = reply
                cache.put(key, asdict(reply))
        return replies

    def _tokens(self, question: list[dict]) -> list[int] | NoScore:
        if not self.tokenizer.chat_template:
            return self.tokenizer(question[0]["content"] + "\nVerdict: ")["input_ids"]
        try:
            template = template_of(self.tokenizer, self.text)
            return template.ids(template.begun(question), generation_prompt=True)
        except BadRow as problem:
            return NoScore("template", str(problem)[:200])

    @torch.no_grad()
    def _letters(self, batch: list[list[int]]) -> list[Reply]:
        """The probability of each letter as the next word, over all tokens that say it, with or without a blank."""
        ids, mask = pad_left(batch)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with self.lm.autocast():
            logits = self.lm.model(
                input_ids=ids.to(self.lm.device),
                attention_mask=mask.to(self.lm.device),
                position_ids=positions.to(self.lm.device),
                logits_to_keep=1,
            ).logits[:, -1]
        shares = torch.softmax(logits.double(), -1).cpu()
        tokens = {letter: self._saying(letter, shares.shape[1]) for letter in LETTERS}
        return [
            Reply("", {letter: float(row[own].sum()) for letter, own in tokens.items()}, (len(one), 1))
            for row, one in zip(shares, batch, strict=True)
        ]

    def _saying(self, letter: str, vocabulary: int) -> list[int]:
        said = self.tokenizer.batch_decode([[token] for token in range(min(vocabulary, len(self.tokenizer)))])
        return [token for token, text in enumerate(said) if text.strip() == letter]

    def _reasons(self, batch: list[list[int]]) -> list[Reply]:
        shape = Shape(self.config.judge_max_tokens, temperature=0.0)
        answers = sample(self.lm, self.tokenizer, batch, shape, len(batch), self.config.seed)
        return [Reply(a.text, None, (len(one), len(a.ids))) for a, one in zip(answers, batch, strict=True)]


def local_of(path: str, config: Config, device: torch.device, rubric: Rubric) -> Local:
    lm = load_model(path, config, device)
    tokenizer = load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    files = [f for f in sorted(Path(path).glob("*")) if f.suffix in (".safetensors", ".json", ".jinja", ".model")]
    key = json_digest([[f.name, sha256_of(f)] for f in files] or path, str(lm.compute_dtype), config.judge_max_tokens)
    text = text_of_scorer(path, text_options(config))
    key += text_key(text, tokenizer)
    most = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    return Local(path, key, lm, tokenizer, rubric, config, most, text)
