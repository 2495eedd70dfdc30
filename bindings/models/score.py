"""The score of an answer: the head of transformers' ForSequenceClassification models at the answer's last token.

    scores = sequence_scores(model, pack([(prompt, [answer, answer, ...])]))      # (S,)

transformers runs a row for each answer and looks for the last token that is not padding. Here the prompt runs once for
all its answers (`prefuse.packing`), and only the last token of each reaches the head. `check_score` compares the two on
the model itself.

T tokens of a flat batch, S answers, D hidden size, C labels (1 for a reward model).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prefuse.kernels.attention.gather import Gather, gather
from prefuse.kernels.attention.segments import Segments
from prefuse.models.flat import flat_hidden
from prefuse.models.probes import quietly
from prefuse.models.trunk import UnsupportedModel, class_of, trunk_hidden
from prefuse.packing import Packed, Padded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAMES = ("score", "classifier")  # what transformers calls the layer


def score_layer(model: nn.Module) -> nn.Module:
    """The layer that makes scores: `nn.Linear`. Raises UnsupportedModel for a model without one.

    With PEFT's `modules_to_save` around it, that wrapper, which runs the copy in force.
    """
    layer = next((layer for name in NAMES if (layer := getattr(model, name, None)) is not None), None)
    inner = layer
    if "peft" in sys.modules:
        from peft.utils.other import ModulesToSaveWrapper

        if isinstance(layer, ModulesToSaveWrapper):
            inner = layer.original_module
    if not isinstance(inner, nn.Linear):
        raise UnsupportedModel(
            f"{class_of(model).__name__} has no linear layer called {' or '.join(NAMES)}: expected a decoder with "
            "transformers' sequence classification head (AutoModelForSequenceClassification, num_labels=1)"
        )
    return layer


def end_states(model: PreTrainedModel, tokens: Packed | Padded) -> Tensor:  # (S, D)
    """The last hidden state of each answer."""
    if isinstance(tokens, Packed):
        segments = tokens.segments
        return gather(flat_hidden(model, tokens), segments.once(_ends, tokens.input_ids.device))
    hidden = trunk_hidden(model, tokens.input_ids, tokens.attention_mask)  # (S, T, D)
    last = tokens.predictors[tokens.cu_seqlens[1:].long() - 1] + 1  # what predicts an answer's last token, and that
    return hidden.flatten(0, 1).index_select(0, last)


def _ends(segments: Segments, device: torch.device) -> Gather:
    return Gather.of(torch.tensor([s.own[-1] for s in segments.all if s.prompt]), device)


def step_states(model: PreTrainedModel, tokens: Packed | Padded, ends: Tensor) -> Tensor:  # (M, D)
    """The hidden states at the completion tokens where `ends` (N,) is true."""
    if isinstance(tokens, Packed):
        places = [place for s in tokens.segments.all if s.prompt for place in s.own]
        chosen = torch.tensor(places, device=ends.device)[ends]
        return flat_hidden(model, tokens).index_select(0, chosen)
    hidden = trunk_hidden(model, tokens.input_ids, tokens.attention_mask)
    return hidden.flatten(0, 1).index_select(0, tokens.predictors[ends] + 1)


def score_of_states(model: nn.Module, states: Tensor) -> Tensor:  # (M, D) -> (M,)
    """One number for each state: the head's only logit, or of two labels the second less the first."""
    logits = score_layer(model)(states).float()
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


def heads_of_states(model: nn.Module, states: Tensor) -> Tensor:  # (M, D) -> (M, C)
    """The numbers of all heads for each state."""
    return score_layer(model)(states).float()


def sequence_scores(model: PreTrainedModel, tokens: Packed | Padded) -> Tensor:  # (S,) float32
    """Equals `model(input_ids).logits[:, 0]` of each prompt with its answer alone, in the order of the answers.

    `model`: an `AutoModelForSequenceClassification` with num_labels=1 of a decoder, differentiable. The first time that
    a model is used, `check_packing` compares its flat batches with single rows; UnsupportedModel where they differ.
    """
    return score_of_states(model, end_states(model, tokens))


def sequence_heads(model: PreTrainedModel, tokens: Packed | Padded) -> Tensor:  # (S, C) float32
    """Equals `model(input_ids).logits` of each prompt with its answer alone: `sequence_scores` for C heads."""
    return heads_of_states(model, end_states(model, tokens))


def step_scores(model: PreTrainedModel, tokens: Packed | Padded, ends: Tensor) -> Tensor:  # (N,) bool -> (M,) float32
    """The scores of steps: at the completion tokens where `ends` is true, in their order.

    `model`: an `AutoModelForTokenClassification` of a decoder with two labels (TRL's process reward models: is the step
    right?), whose score is the second logit less the first, or a model of one label.
    """
    return score_of_states(model, step_states(model, tokens, ends))


def check_score(model: PreTrainedModel, input_ids: Tensor) -> None:  # (1, T)
    """Refuse the model if its own forward makes other scores of a row than are made here.

    Without a padding token, for this once: where that is the one that ends answers, the forward looks before it.
    """
    config = model.config.get_text_config()
    padding, config.pad_token_id = config.pad_token_id, None
    try:
        with quietly(model):
            expected = model(input_ids).logits.float()
            got = score_layer(model)(trunk_hidden(model, input_ids)).float()
    finally:
        config.pad_token_id = padding
    got = got if expected.dim() == got.dim() else got[:, -1]  # token classification has one for each token
    bound = 64 * torch.finfo(next(model.parameters()).dtype).eps * (1 + expected.abs().max())
    if got.shape != expected.shape or not bool(((got - expected).abs() <= bound).all()):
        raise UnsupportedModel(
            f"the scores of {class_of(model).__name__} are not its {' or '.join(NAMES)} layer at the last token: "
            f"{expected.flatten()[:3].tolist()} by its own forward, {got.flatten()[:3].tolist()} here"
        )
