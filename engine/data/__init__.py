"""Rows of a data set -> examples as token ids -> batches. No model in it."""

from prefuse.engine.data.examples import (
    Dataset,
    Prompt,
    fingerprint,
    load_examples,
    load_prompts,
    summarize_skipped,
    unpair,
)
from prefuse.engine.data.fit import cut_prompt
from prefuse.engine.data.forms import DataError, Skipped
from prefuse.engine.data.table import Demonstration, Example, Examples, Kind, Labelled, Pair
from prefuse.engine.data.templates import DEFAULT_CHAT_TEMPLATE

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "DataError",
    "Dataset",
    "Demonstration",
    "Example",
    "Examples",
    "Kind",
    "Labelled",
    "Pair",
    "Prompt",
    "Skipped",
    "cut_prompt",
    "fingerprint",
    "load_examples",
    "load_prompts",
    "summarize_skipped",
    "unpair",
]
