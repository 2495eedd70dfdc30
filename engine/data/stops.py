"""Tokens that a data set has or lacks: those that end its answers, at which generation must stop, and unknown ones."""

from typing import Any

import numpy as np

from prefuse.engine.data.endings import control_tokens, ending_of
from prefuse.engine.data.ragged import Ragged
from prefuse.engine.data.rendering import ChatTemplate
from prefuse.engine.data.table import Examples

COMMON = 0.01  # a token that ends a smaller share of the answers ends them by chance


def last_tokens(examples: Examples) -> np.ndarray:  # (completions,) token ids
    completions = examples.completions
    return completions.values[completions.starts + completions.lengths - 1]


def stop_tokens(examples: Examples, tokenizer: Any) -> list[int]:
    """The control tokens (EOS, <|im_end|>, ...) that end answers."""
    ids, counts = np.unique(last_tokens(examples), return_counts=True)
    common = ids[counts >= COMMON * counts.sum()].tolist()
    return [token for token in common if token in _control_ids(tokenizer)]


def count_unstopped(examples: Examples, tokenizer: Any) -> int:
    """Answers that end with no control token: a model that learns them does not learn to stop."""
    return int((~np.isin(last_tokens(examples), sorted(_control_ids(tokenizer)))).sum())


def describe_unstopped(examples: Examples, tokenizer: Any, completions_cut: int) -> str | None:
    """A line that says how many answers do not stop, and the setting that mends it; None if there are none."""
    unstopped, answers = count_unstopped(examples, tokenizer), len(examples.completions)
    if unstopped <= completions_cut:
        return None
    token = missing_stop(tokenizer)
    fix = f"--eos_token '{token}'" if token else "--eos_token with a token of the tokenizer that is to end answers"
    return (
        f"{unstopped} of {answers} answers end with no stop token: a model that learns them does not learn to stop. "
        f"Fix: {fix}"
    )


def describe_unknown(examples: Examples, tokenizer: Any) -> str | None:
    """A line that says how many examples hold characters that the tokenizer does not have; None if there are none."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id):  # GPT-2's is its EOS
        return None
    held = {*_rows_with(unknown, examples.prompts), *_rows_with(unknown, examples.completions) // examples.sides}
    if not held:
        return None
    return (
        f"{len(held)} of {len(examples)} examples hold characters that the tokenizer does not have: the model reads "
        f"and learns {tokenizer.unk_token} in their place"
    )


def _rows_with(token: int, texts: Ragged) -> np.ndarray:  # (rows,) int64
    places = np.flatnonzero(texts.joined() == token)
    return np.unique(np.searchsorted(np.cumsum(texts.lengths), places, side="right"))


def missing_stop(tokenizer: Any) -> str | None:
    """The token that could end answers: where earlier turns of the chat template end with one, that one."""
    found = ending_of(ChatTemplate(tokenizer)).missing if tokenizer.chat_template else None
    usual = [token for token in control_tokens(tokenizer) if "end" in token or token == "</s>"]
    return found or tokenizer.eos_token or next(iter(usual), None)


def _control_ids(tokenizer: Any) -> set[int]:
    vocabulary = tokenizer.get_added_vocab()
    return {vocabulary[token] for token in control_tokens(tokenizer)}
