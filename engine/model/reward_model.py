"""A reward model: a decoder with transformers' sequence classification head (token classification, for steps), which
runs a prompt once for all its answers.

It starts from a causal LM, whose trunk it takes (the score head is new, drawn from the seed), or from a folder that has
a score head already. What is saved is what `AutoModelForSequenceClassification` reads, with equal scores.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

import prefuse
from prefuse import RewardOutput
from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import IGNORE_INDEX, Batch, Examples
from prefuse.engine.data.ranked import RankedBatch
from prefuse.engine.data.steps import StepBatch
from prefuse.engine.data.stops import last_tokens
from prefuse.engine.errors import UserError
from prefuse.engine.model.adapters import WEIGHTS, task_of
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.load import load_model, read_weights
from prefuse.engine.run.ranks import ALONE, Ranks
from prefuse.losses.rewards import RewardLoss
from prefuse.models.head import Head
from prefuse.models.score import (
    check_score,
    end_states,
    heads_of_states,
    score_layer,
    score_of_states,
    step_states,
)
from prefuse.models.trunk import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NEW = "score."  # the weights that a causal LM lacks
MOST_OF_A_ROW = 16  # in one head's sample; a 17th has a chance of 1e-15
HEAD = "head_"  # what begins the labels of an ensemble's heads in config.json: they are no classes


@dataclass(frozen=True)
class RewardModel(LanguageModel):
    """`LanguageModel` with a head of one score, weight (1, D), or an ensemble of k heads on one trunk, (k, D).

    `bootstrap`: the seed by which each head draws its own weights of the rows; None: all learn from all rows alike.
    """

    bootstrap: int | None = None

    @property
    def heads(self) -> int:
        return self.head.weight.shape[0] if task_of(self.model) == "SEQ_CLS" else 1

    @property
    def scores(self) -> bool:
        return True

    @property
    def vocabulary(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    @staticmethod
    def head_layer(model: nn.Module) -> nn.Module:
        return score_layer(model)

    @staticmethod
    def head_of(model: nn.Module) -> Head:
        layer = score_layer(model)
        return Head(layer.weight, layer.bias)

    def check(self, input_ids: Tensor) -> None:  # (1, T)
        check_score(self.model, input_ids)

    def states(self, batch: Batch) -> Tensor:  # (S, D), or (M, D) of steps
        if isinstance(batch, StepBatch):
            return step_states(self.model, batch.tokens, batch.targets != IGNORE_INDEX)
        return end_states(self.model, batch.tokens)

    def scores_of_states(self, states: Tensor) -> Tensor:  # (M, D) -> (M,) float32
        """In float32, outside of autocast: a score of bfloat16 has three digits. Of several heads their mean."""
        if self.heads > 1:
            return self.heads_of_states(states).mean(1)
        with torch.autocast(self.device.type, enabled=False):
            return score_of_states(self.model, states.to(self.head.weight.dtype))

    def heads_of_states(self, states: Tensor) -> Tensor:  # (M, D) -> (M, k) float32
        with torch.autocast(self.device.type, enabled=False):
            return heads_of_states(self.model, states.to(self.head.weight.dtype))

    def loss_of_states(self, states: Tensor, batch: Batch, loss: RewardLoss, num_items: int | None) -> RewardOutput:
        if isinstance(batch, RankedBatch):
            given = {"cu_groups": batch.cu_groups, "ranks": batch.ranks, "weights": batch.numbers.get("weights")}
        elif isinstance(batch, StepBatch):
            given = {"labels": batch.step_labels}
        else:
            given = {name: batch.numbers.get(name) for name in ("weights", "margins")}
        if self.heads > 1:
            return self._loss_of_heads(self.heads_of_states(states), batch, loss, num_items, given)
        return prefuse.reward_loss(self.scores_of_states(states), loss, num_items=num_items, **given)

    def _loss_of_heads(
        self, scores: Tensor, batch: Batch, loss: RewardLoss, num_items: int | None, given: dict
    ) -> RewardOutput:  # scores (S, k)
        """The mean of the heads' own losses. The metrics are of the mean score, and how far the heads are apart."""
        weights = given.pop("weights", None)
        drawn = self._weights(batch.rows).to(scores.device)  # (E, k)
        drawn = drawn if weights is None else drawn * weights[:, None]
        outs = [
            prefuse.reward_loss(own, loss, num_items=num_items, weights=of_rows, **given)
            for own, of_rows in zip(scores.unbind(1), drawn.unbind(1), strict=True)
        ]
        whole = prefuse.reward_loss(scores.detach().mean(1), loss, num_items=num_items, **given)
        spread = scores.detach().double().std(1, correction=0)
        metrics = whole.metrics | {"head_spread": torch.stack([spread.sum(), spread.new_tensor(len(spread))])}
        total, losses = (torch.stack([getattr(out, name) for out in outs]).mean(0) for name in ("loss", "losses"))
        return RewardOutput(total, losses, whole.rewards, metrics)

    def _weights(self, rows: Sequence[str]) -> Tensor:  # (E, k) float64
        if self.bootstrap is None:
            return torch.ones(len(rows), self.heads, dtype=torch.float64)
        drawn = [[bootstrap_weight(self.bootstrap, head, row) for head in range(self.heads)] for row in rows]
        return torch.tensor(drawn, dtype=torch.float64).reshape(len(rows), self.heads)


def load_reward_model(
    path: str, config: Config, device: torch.device, ranks: Ranks = ALONE, *, trains: bool = False
) -> RewardModel:
    """The reward model at `path`; with `trains`, from a causal LM too. An ensemble keeps its number of heads."""
    there, wanted = heads_of(path), config.reward_heads
    if there is not None and wanted not in (1, there):
        raise UserError(f"reward_heads is {wanted}, and {path} has {there} heads: drop it, or start from another model")
    read = partial(_read, heads=there or wanted)
    lm = load_model(path, config, device, ranks, trains=trains, read=read, make=RewardModel)
    return replace(lm, bootstrap=config.seed) if lm.heads > 1 and config.head_bootstrap else lm


def load_step_model(
    path: str, config: Config, device: torch.device, ranks: Ranks = ALONE, *, trains: bool = False
) -> RewardModel:
    """The same with a head of two labels for every token: is the step that ends here right?"""
    return load_model(path, config, device, ranks, trains=trains, read=_read_steps, make=RewardModel)


def _read(path: str, config: Config, heads: int) -> PreTrainedModel:
    from transformers import AutoModelForSequenceClassification as Auto

    model = _with_head(Auto, "a model with a sequence classification head", path, config, heads)
    if heads > 1:
        model.config.id2label = {i: f"{HEAD}{i}" for i in range(heads)}
        model.config.label2id = {name: i for i, name in model.config.id2label.items()}
    return model


def _read_steps(path: str, config: Config) -> PreTrainedModel:
    from transformers import AutoModelForTokenClassification as Auto

    return _with_head(Auto, "a model with a token classification head", path, config, 2)


def _with_head(auto: type, what: str, path: str, config: Config, labels: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)  # the new head: every rank draws the same
        model = read_weights(auto, what, path, config, new=NEW, num_labels=labels)
    try:
        score_layer(model)
    except UnsupportedModel as error:
        raise UserError(str(error)) from None
    return model


def loader_of(path: str) -> Callable[..., LanguageModel]:
    """What loads the model of a folder, whole or as adapters: one that scores answers, or steps, or a causal LM."""
    said = _kind_of(path)
    if "TOKEN_CLS" in said or "ForTokenClassification" in said:
        return load_step_model
    return load_reward_model if "SEQ_CLS" in said or "ForSequenceClassification" in said else load_model


def bootstrap_weight(seed: int, head: int, row: str) -> int:
    """How often a row stands in the head's own sample of all rows, drawn with replacement: Poisson(1) for many rows.

    It depends on nothing else, so a resumed run and every rank have the same (Oza and Russell 2001).
    """
    digest = hashlib.sha256(f"{seed} {head} {row}".encode()).digest()
    left, count, chance = int.from_bytes(digest[:8]) / 2**64, 0, math.exp(-1)
    while left >= chance and count < MOST_OF_A_ROW:
        left, count = left - chance, count + 1
        chance /= count
    return count


def scores_steps(path: str) -> bool:
    """Whether the folder holds a process reward model."""
    return loader_of(path) is load_step_model


def heads_of(path: str) -> int | None:
    """How many heads an ensemble in one folder has; None for a single head, and for what is no reward model."""
    adapters = Path(path) / WEIGHTS
    if adapters.is_file():
        with suppress(OSError, SafetensorError), safe_open(adapters, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys() if name.endswith("score.weight")]
            return shapes[0][0] if shapes and shapes[0][0] > 1 and "SEQ_CLS" in _kind_of(path) else None
        return None
    try:
        names = json.loads((Path(path) / "config.json").read_text(encoding="utf-8"))["id2label"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return len(names) if len(names) > 1 and all(str(name).startswith(HEAD) for name in names) else None


def _kind_of(path: str) -> str:
    for name, key in ("adapter_config.json", "task_type"), ("config.json", "architectures"):
        try:
            said = json.loads((Path(path) / name).read_text(encoding="utf-8"))[key]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        return str(said)
    return ""


def pad_apart(model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Iterable[Examples]) -> str | None:
    """Give model and tokenizer a padding token that ends no answer, if theirs does: a line that says so, or None.

    transformers takes the score at the last token that is not padding. Where the padding token is the one that ends
    answers (a common habit), that is the token before it, which was not trained.
    """
    ends = set(np.unique(np.concatenate([last_tokens(examples) for examples in rows])).tolist())
    names = ("pad_token", "unk_token", "bos_token")
    tokens = [token for name in names if (token := getattr(tokenizer, name)) is not None]
    tokens += [*tokenizer.get_added_vocab(), *tokenizer.convert_ids_to_tokens(range(min(len(tokenizer), 1000)))]
    before = tokenizer.pad_token
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in dict.fromkeys(tokens) if token is not None}
    chosen = next((token for token, number in ids.items() if number not in ends and number < vocabulary), None)
    if chosen is None:
        raise UserError("every token of the tokenizer ends some answer: expected one that can be padding")
    tokenizer.pad_token = chosen
    model.config.get_text_config().pad_token_id = ids[chosen]
    if chosen == before or before is None:
        return None
    return (
        f"the padding token {before!r} also ends answers, and transformers would take it there for padding: the reward "
        f"model and its tokenizer pad with {chosen!r} instead"
    )
