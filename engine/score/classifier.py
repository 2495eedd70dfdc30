"""A reward model as a scorer: a folder that `AutoModelForSequenceClassification` loads, with its own tokenizer.

`prefuse reward` and TRL's RewardTrainer leave such folders. A model that this project trained reads rows as they were
tokenized in training; any other gets the conversation through its own chat template, whole, or, without a template,
prompt and answer end to end with EOS behind, as TRL trains it.

A score in a batch is the score alone. A decoder runs flat batches in which a prompt runs once for all its answers, if
that gives its own scores, which is tried out; any other model is padded on the right with a token that its own rule
for the last token knows as padding.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prefuse.engine.config.yaml_file import is_of_a_run
from prefuse.engine.data.of_run import text_key, text_of_scorer
from prefuse.engine.data.records import BadRow, Record, Skipped
from prefuse.engine.data.templates import TextOptions, render, template_of
from prefuse.engine.data.tokenize import tokenize
from prefuse.engine.errors import UserError, fault_of
from prefuse.engine.hub import require_repository
from prefuse.engine.model.adapters import base_of, quiet
from prefuse.engine.model.load import without_report
from prefuse.engine.model.reward_model import heads_of
from prefuse.engine.report.log import progress
from prefuse.engine.run.files import sha256_of
from prefuse.engine.score.cache import Cache, json_digest
from prefuse.engine.score.contract import Columns, NoScore, Scores, Text, by_answer, shaped
from prefuse.models.flat import check_packing
from prefuse.models.score import check_score, sequence_heads
from prefuse.models.trunk import UnsupportedModel
from prefuse.packing import pack


@dataclass
class Classifier:
    name: str
    model: Any  # a PreTrainedModel with one logit
    tokenizer: Any
    key: str
    own_rows: bool  # tokenized as this project's training does
    batch_size: int = 8
    cache: Cache | None = None
    shares: bool = False  # a prompt runs once for all its answers
    heads: int = 1
    text: TextOptions = field(default_factory=TextOptions)
    columns: tuple[str, ...] = field(default=(), init=False)

    def score(
        self, prompts: Sequence[Text], answers: Sequence[Sequence[str]], columns: Columns | None = None
    ) -> Scores:
        return by_answer(self._flat, prompts, answers, None)

    def score_heads(self, prompts: Sequence[Text], answers: Sequence[Sequence[str]]) -> list[Scores]:
        """The scores of each head: an ensemble in one folder has several."""
        asked = [prompt for prompt, own in zip(prompts, answers, strict=True) for _ in own]
        found = self.numbers(asked, [answer for own in answers for answer in own])
        heads = ([own if isinstance(own, NoScore) else own[head] for own in found] for head in range(self.heads))
        return [shaped(own, answers) for own in heads]

    def _flat(self, prompts: list[Text], answers: list[str], columns: dict[str, list]) -> list[float | NoScore]:
        found = self.numbers(prompts, answers)
        return [own if isinstance(own, NoScore) else self._one_of(own) for own in found]

    def _one_of(self, numbers: list[float]) -> float:
        """The score, of the numbers that the model has for an answer."""
        return sum(numbers) / len(numbers)

    def numbers(self, prompts: list[Text], answers: list[str]) -> list[list[float] | NoScore]:
        """What the model says of each answer; what it has said before is in the cache."""
        keys = [json_digest(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        known = [None if self.cache is None else self.cache.get(key) for key in keys]
        found: list[list[float] | NoScore] = [own if isinstance(own, list) else [own] for own in known]
        ids: dict[int, Any] = {}
        asked = [i for i, value in enumerate(known) if value is None]
        tokens = self._tokens([prompts[i] for i in asked], [answers[i] for i in asked])
        for i, outcome in zip(asked, tokens, strict=True):
            fault = outcome if isinstance(outcome, NoScore) else self._fault(outcome)
            if fault is None:
                ids[i] = self._read(outcome)
            else:
                found[i] = fault
        batches = self._batches(ids, [json_digest(prompt) for prompt in prompts])
        for part in progress(batches, f"scoring by {self.name}", len(batches)):
            groups = [[ids[i] for i in own] for own in part]
            run = self.shared(groups) if self.shares else self.logits([one for own in groups for one in own])
            for i, values in zip([i for own in part for i in own], run, strict=True):
                found[i] = values
                if self.cache is not None and all(value == value for value in values):
                    self.cache.put(keys[i], values)
        return found

    def _batches(self, ids: dict[int, Any], prompts: list[str]) -> list[list[list[int]]]:
        """Answers in groups, those of one prompt together, and groups in batches; the longest first."""
        groups: dict[str, list[int]] = {}
        for i in ids:
            groups.setdefault(prompts[i] if self.shares else str(i), []).append(i)
        batches: list[list[list[int]]] = []
        room = 0
        for own in sorted(groups.values(), key=lambda own: -max(len(ids[i]) for i in own)):
            if len(own) > room:
                batches.append([])
                room = max(self.batch_size, len(own))
            batches[-1].append(own)
            room -= len(own)
        return batches

    @torch.no_grad()
    def shared(self, groups: list[list[list[int]]]) -> list[list[float]]:
        """The same scores from one flat batch, in which what the sequences of a group begin with runs once."""
        device = next(self.model.parameters()).device
        packed = pack([part for own in groups for part in _parts(own)])
        return sequence_heads(self.model, packed.to(device)).double().tolist()

    def logits(self, sequences: list[list[int]]) -> list[list[float]]:
        return self._padded(sequences).tolist()

    @torch.no_grad()
    def _padded(self, sequences: list[list[int]]) -> Tensor:  # (B, C), or (B, T, C) of tokens
        """The model's own forward."""
        width = max(map(len, sequences))
        pad = self._padding(sequences)
        ids = torch.tensor([one + [pad] * (width - len(one)) for one in sequences])
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in sequences])
        config = self.model.config.get_text_config()
        before, config.pad_token_id = config.pad_token_id, pad  # the rule for the last token looks there
        try:
            device = next(self.model.parameters()).device
            return self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.double().cpu()
        finally:
            config.pad_token_id = before

    def _padding(self, sequences: list[list[int]]) -> int:
        """The model's own padding, which decides where it reads a score; without one, a token of no sequence here."""
        own = self.model.config.get_text_config().pad_token_id
        if own is not None:
            return own
        used = {token for one in sequences for token in one}
        return next((t for t in range(self._vocabulary()) if t not in used), 0)

    def _read(self, ids: list[int]) -> list[int]:
        """Without padding tokens at the end: the model reads its score at the last token that is none."""
        own = self.model.config.get_text_config().pad_token_id
        end = len(ids)
        while end > 2 and ids[end - 1] == own:
            end -= 1
        return ids[:end]

    def _vocabulary(self) -> int:
        return self.model.get_input_embeddings().weight.shape[0]

    def _fault(self, ids: list[int]) -> NoScore | None:
        if len(ids) < 2:
            return NoScore("empty", "prompt and answer together have no two tokens")
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
            encoded = tokenize(render(records, self.tokenizer, self.text), self.tokenizer)
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
            return template_of(self.tokenizer, self.text).ids([*turns, {"role": "assistant", "content": answer}])
        except BadRow as problem:
            return NoScore("template", str(problem)[:200])


def _parts(sequences: list[list[int]]) -> list[tuple[list[int], list[list[int]]]]:
    """The sequences as what they begin with in common and the rest of each; apart where they share nothing."""
    first, last = min(sequences), max(sequences)  # in the order of dictionaries: what these share, all share
    most = min(map(len, sequences)) - 1
    common = next((i for i in range(most) if first[i] != last[i]), most)
    if common == 0:
        return [(one[:1], [one[1:]]) for one in sequences]
    return [(sequences[0][:common], [one[common:] for one in sequences])]


def load_classifier(
    path: str, device: torch.device, batch_size: int, cache_folder: Path | None, trust_remote_code: bool = False,
    asked: TextOptions | None = None,
) -> Classifier:  # fmt: skip
    """The reward model of a folder or of the hub: whole, or as adapters beside its base.

    `asked`: how the run that asks renders its own conversations (see `text_of_scorer`).
    """
    model = load_whole(path, trust_remote_code).to(device).eval()
    tokenizer = tokenizer_of(path, trust_remote_code)
    config = Path(path) / "config.yaml"
    own_rows = config.is_file() and is_of_a_run(config)
    text = text_of_scorer(path, asked)
    key = f"classifier {digest_of(Path(path), model)} {own_rows}{text_key(text, tokenizer)}"
    cache = Cache(cache_folder, key) if cache_folder is not None else None
    return Classifier(
        path, model, tokenizer, key, own_rows, batch_size, cache, can_share(model), model.config.num_labels, text
    )


def tokenizer_of(path: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a file of another's making makes transformers do
        raise UserError(f"no tokenizer in {path}: {fault_of(error)}") from None


def can_share(model: Any) -> bool:
    """Whether flat batches give the model's own scores, which is tried out on it."""
    device = next(model.parameters()).device
    pad = model.config.get_text_config().pad_token_id
    probe = [token for token in range(20) if token != pad and token < model.get_input_embeddings().weight.shape[0]]
    try:
        check_score(model, torch.tensor([probe], device=device))
        check_packing(model)
    except (UnsupportedModel, RuntimeError, TypeError, ValueError, AttributeError):  # an encoder, its own pooling, ...
        return False
    return True


def load_whole(path: str, trust_remote_code: bool, *, steps: bool = False) -> Any:
    """A model with a head for scores, of answers or of steps; adapters are merged into their base."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    auto = AutoModelForTokenClassification if steps else AutoModelForSequenceClassification
    base = base_of(Path(path))
    require_repository(base or path)
    if base is not None:
        return _with_adapters(auto, path, base, trust_remote_code)
    try:
        with without_report():
            model, info = auto.from_pretrained(path, output_loading_info=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a file of another's making makes transformers do
        raise UserError(f"cannot load a reward model from {path}: {fault_of(error)}") from None
    if info["missing_keys"]:
        raise UserError(
            f"{path} is no reward model: its weights lack {', '.join(sorted(info['missing_keys'])[:3])}; expected a "
            f"folder of {auto.__name__}, as `prefuse reward` and TRL's reward trainers leave it"
        )
    labels = model.config.num_labels
    if labels > 2 if steps else labels != (heads_of(path) or 1):
        wanted = "a process reward model with num_labels 2" if steps else "a reward model with num_labels 1"
        raise UserError(f"{path} has {labels} labels: expected {wanted}")
    return model


def _with_adapters(auto: Any, path: str, base: str, trust_remote_code: bool) -> Any:
    """The base with a score head, and the adapters merged into it."""
    from peft import PeftModel

    try:
        labels = heads_of(path) or 1
        with torch.random.fork_rng(devices=[]):  # a head that the base lacks is drawn, and then read from the folder
            with without_report():
                model = auto.from_pretrained(base, num_labels=labels, trust_remote_code=trust_remote_code)
        with quiet():
            return PeftModel.from_pretrained(model, path).merge_and_unload()
    except Exception as error:  # whatever files of another's making make peft and transformers do
        raise UserError(f"cannot load a reward model from {path}: {fault_of(error)}") from None


def digest_of(folder: Path, model: Any) -> str:
    """Of all files that decide a score; for a name of the hub, of the weights in memory."""
    if folder.is_dir():
        kinds = (".safetensors", ".json", ".jinja", ".model", ".bin")
        files = [file for file in sorted(folder.iterdir()) if file.suffix in kinds]
        base = base_of(folder)
        below = "" if base is None or not Path(base).is_dir() else digest_of(Path(base), model)
        return json_digest([[file.name, sha256_of(file)] for file in files], below)
    content = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        content.update(name.encode())
        content.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
