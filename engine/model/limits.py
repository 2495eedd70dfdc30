"""What a model cannot take: tokens it has no row for, positions it has no place for. Said before training."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from prefuse.engine.data.batches import Examples
from prefuse.engine.errors import UserError
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.sharding import where_weights_are
from prefuse.models.trunk import trunk_of

POSITIONS = re.compile(r"(^|\.)(wpe|[^.]*pos[^.]*)$")  # a table of learned positions, by its module's name


def position_limit(model: nn.Module) -> int | None:
    """Most tokens of a sequence, for a model that looks positions up in a table; None for one that computes them.

    A table with fewer rows than the text has positions is of something else: patches of images, frames of sound.
    """
    config = model.config.get_text_config()
    given = getattr(config, "max_position_embeddings", None)
    for name, module in trunk_of(model).named_modules():
        if isinstance(module, nn.Embedding) and POSITIONS.search(name) and "relative" not in name:
            if module.num_embeddings >= (given or 0):
                return given or module.num_embeddings
    return None


def check_rows(lm: LanguageModel, examples: Examples) -> None:
    """Every token has a row in the head, and the longest row fits."""
    vocabulary = lm.vocabulary
    if len(examples) and examples.largest_token() >= vocabulary:
        row, token = next(_tokens_outside(examples, vocabulary))
        raise UserError(
            f"token id {token} in {row} is outside the model's vocabulary of {vocabulary}: expected the tokenizer that "
            "the model was trained with, or a row without this token"
        )
    if not len(examples):
        return
    longest = int(np.argmax(examples.lengths))
    length, limit = int(examples.lengths[longest]), position_limit(lm.model)
    whose = f"{type(lm.model).__name__} takes at most {limit} tokens, and {examples.rows[longest]} has {length}"
    if limit is not None and length > limit:
        raise UserError(
            f"{whose}: set max_length to {limit}, which takes the start from longer prompts (a row whose completion "
            "alone is longer must go)"
        )
    given = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None and isinstance(given, int) and length > given:
        ids = max((prompt + answer for prompt, answer in examples.sequences_of(longest)), key=len)
        _try(lm, ids, examples.rows[longest], given)


def check_mismatches(lm: LanguageModel, examples: Examples, max_length: int) -> None:
    """KTO reads a completion after another row's prompt: up to max_length tokens, whatever the rows have."""
    limit = position_limit(lm.model)
    longest = int(examples.prompts.lengths.max()) + int(examples.completions.lengths.max())
    if limit is not None and min(longest, max_length) > limit:
        raise UserError(
            f"{type(lm.model).__name__} takes at most {limit} tokens, and kto puts completions after other rows' "
            f"prompts, here up to {min(longest, max_length)} tokens: set max_length to {limit}"
        )


def check_prompts(lm: LanguageModel, prompts: Sequence[Sequence[int]], rows: Sequence[str], new_tokens: int) -> None:
    """Of `generate`: each prompt with `new_tokens` behind it."""
    vocabulary, limit = lm.vocabulary, position_limit(lm.model)
    for ids, row in zip(prompts, rows, strict=True):
        if ids and max(ids) >= vocabulary:
            raise UserError(
                f"token id {max(ids)} in {row} is outside the model's vocabulary of {vocabulary}: expected the "
                "tokenizer that the model was trained with, or a prompt without this token"
            )
        if limit is not None and len(ids) + new_tokens > limit:
            raise UserError(
                f"{type(lm.model).__name__} takes at most {limit} tokens, and the prompt of {row} has {len(ids)} with "
                f"max_new_tokens {new_tokens} behind it: lower max_new_tokens, or set max_length to shorten prompts"
            )


def _tokens_outside(examples: Examples, vocabulary: int):
    for index in range(len(examples)):
        for prompt, answer in examples.sequences_of(index):
            for token in (*prompt, *answer):
                if token >= vocabulary:
                    yield examples.rows[index], token


@torch.no_grad()
def _try(lm: LanguageModel, ids: list[int], row: str, given: int) -> None:
    """A row beyond what the model was made for: most compute positions and go on, some have no place for it."""
    try:
        with lm.autocast():
            where_weights_are(lambda lm: lm.model(torch.tensor([ids], device=lm.device)))(lm)
    except (IndexError, RuntimeError, ValueError) as error:
        fault = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{type(lm.model).__name__} cannot take {row}, which has {len(ids)} tokens where its config says "
            f"max_position_embeddings {given} ({fault}): set max_length to {given}"
        ) from None
