"""A reward model as a scorer: a folder that `AutoModelForSequenceClassification` loads, with its own tokenizer.

`prefuse reward` and TRL's RewardTrainer leave such folders. A model that this project trained reads rows as they were
tokenized in training; any other gets the conversation through its own chat template, whole, or, without a template,
prompt and answer end to end with EOS behind, as TRL trains it. A score in a batch is the score alone: sequences are
padded on the right with a token that the model's own rule for the last token knows as padding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefuse.engine.config.yaml_file import is_of_a_run
from prefuse.engine.data.records import Record, Skipped
from prefuse.engine.data.templates import render
from prefuse.engine.data.tokenize import tokenize
from prefuse.engine.errors import UserError
from prefuse.engine.report.log import progress
from prefuse.engine.run.files import sha256_of
from prefuse.engine.score.cache import Cache, digest
from prefuse.engine.score.contract import Columns, NoScore, Scores, Text, by_answer


@dataclass
class Classifier:
    name: str
    model: Any  # a PreTrainedModel with one logit
    tokenizer: Any
    key: str
    own_rows: bool  # tokenized as this project's training does
    batch_size: int = 8
    cache: Cache | None = None
    columns: tuple[str, ...] = field(default=(), init=False)

    def score(
        self, prompts: Sequence[Text], answers: Sequence[Sequence[str]], columns: Columns | None = None
    ) -> Scores:
        return by_answer(self._flat, prompts, answers, None)

    def _flat(self, prompts: list[Text], answers: list[str], columns: dict[str, list]) -> list[float | NoScore]:
        keys = [digest(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        known = [None if self.cache is None else self.cache.get(key) for key in keys]
        found: list[float | NoScore] = [float("nan")] * len(answers)
        ids: dict[int, list[int]] = {}
        asked = [i for i, value in enumerate(known) if value is None]
        tokens = self._tokens([prompts[i] for i in asked], [answers[i] for i in asked])
        for i, outcome in zip(asked, tokens, strict=True):
            fault = outcome if isinstance(outcome, NoScore) else self._fault(outcome)
            if fault is None:
                ids[i] = outcome
            else:
                found[i] = fault
        order = sorted(ids, key=lambda i: -len(ids[i]))
        starts = range(0, len(order), self.batch_size)
        for start in progress(starts, f"scoring by {self.name}", len(starts)):
            part = order[start : start + self.batch_size]
            for i, value in zip(part, self.logits([ids[i] for i in part]).tolist(), strict=True):
                found[i] = value
                if self.cache is not None and value == value:
                    self.cache.put(keys[i], value)
        return [value if value is not None else own for value, own in zip(known, found, strict=True)]

    @torch.no_grad()
    def logits(self, sequences: list[list[int]]) -> Tensor:  # (B,)
        width = max(map(len, sequences))
        pad = self._padding(sequences)
        ids = torch.tensor([one + [pad] * (width - len(one)) for one in sequences])
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in sequences])
        config = self.model.config.get_text_config()
        before, config.pad_token_id = config.pad_token_id, pad  # the rule for the last token looks there
        try:
            device = next(self.model.parameters()).device
            return self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits[:, 0].double().cpu()
        finally:
            config.pad_token_id = before

    def _padding(self, sequences: list[list[int]]) -> int:
        """The model's own padding, which decides where it reads a score; without one, a token of no sequence here."""
        own = self.model.config.get_text_config().pad_token_id
        if own is not None:
            return own
        used = {token for one in sequences for token in one}
        return next((t for t in range(self._vocabulary()) if t not in used), 0)

    def _vocabulary(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    def _fault(self, ids: list[int]) -> NoScore | None:
        if not ids:
            return NoScore("empty", "prompt and answer have no token")
        if max(ids) >= self._vocabulary():
            return NoScore("vocabulary", f"token {max(ids)} is outside the reward model's {self._vocabulary()}")
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if isinstance(most, int) and len(ids) > most > 0:
            return NoScore("too long", f"{len(ids)} tokens, the reward model takes {most}")
        return None

    def _tokens(self, prompts: list[Text], answers: list[str]) -> list[list[int] | NoScore]:
        if self.own_rows:
            records = [
                Record(str(i), p, {"completion": [{"role": "assistant", "content": a}] if isinstance(p, list) else a})
                for i, (p, a) in enumerate(zip(prompts, answers, strict=True))
            ]
            encoded = tokenize(render(records, self.tokenizer), self.tokenizer)
            return [
                NoScore("template", one.reason) if isinstance(one, Skipped) else one.prompt + one.sides["completion"]
                for one in encoded
            ]
        return [self._foreign(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]

    def _foreign(self, prompt: Text, answer: str) -> list[int] | NoScore:
        if not self.tokenizer.chat_template:
            if isinstance(prompt, list):
                return NoScore("template", "the rows are conversations, and the reward model has no chat template")
            eos = [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]
            ids = self.tokenizer(prompt + answer)["input_ids"]
            return ids if ids[-1:] == eos else ids + eos
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        try:
            turns = [*turns, {"role": "assistant", "content": answer}]
            return self.tokenizer.apply_chat_template(turns, tokenize=True, return_dict=True)["input_ids"]
        except Exception as error:  # a template raises whatever it likes
            return NoScore("template", f"{type(error).__name__}: {error}".splitlines()[0][:200])


def load_classifier(
    path: str, device: torch.device, batch_size: int, cache_folder: Path | None, trust_remote_code: bool = False
) -> Classifier:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path, output_loading_info=True, trust_remote_code=trust_remote_code
        )
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a file of another's making makes transformers do
        raise UserError(f"cannot load a reward model from {path}: {str(error).splitlines()[0]}") from None
    if info["missing_keys"]:
        raise UserError(
            f"{path} is no reward model: its weights lack {', '.join(sorted(info['missing_keys'])[:3])}; expected a "
            "folder of AutoModelForSequenceClassification, as `prefuse reward` and TRL's RewardTrainer leave it"
        )
    if model.config.num_labels != 1:
        raise UserError(f"{path} has {model.config.num_labels} labels: expected a reward model with num_labels 1")
    config = Path(path) / "config.yaml"
    own_rows = config.is_file() and is_of_a_run(config)
    key = f"classifier {_digest_of(Path(path), model)} {own_rows}"
    cache = Cache(cache_folder, key) if cache_folder is not None else None
    return Classifier(path, model.to(device).eval(), tokenizer, key, own_rows, batch_size, cache)


def _digest_of(folder: Path, model: Any) -> str:
    """Of all files that decide a score; for a name of the hub, of the weights in memory."""
    if folder.is_dir():
        kinds = (".safetensors", ".json", ".jinja", ".model", ".bin")
        files = [file for file in sorted(folder.iterdir()) if file.suffix in kinds]
        return digest([[file.name, sha256_of(file)] for file in files])
    content = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        content.update(name.encode())
        content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
