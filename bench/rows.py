"""Rows, a tokenizer and a small Llama to train, for benchmarks of whole runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED = 0
# Tokens of prompts, chosen and rejected answers in a small public set of chat preferences: its deciles.
CHAT = {
    "prompt": (8, 34, 57, 87, 131, 205, 462, 607, 882, 1286, 1500),
    "chosen": (2, 27, 90, 189, 272, 334, 405, 472, 533, 628, 700),
    "rejected": (2, 62, 125, 222, 281, 362, 435, 488, 558, 653, 700),
}
# Prompts four times as long as their answers.
LONG = {
    "prompt": tuple(range(128, 641, 51)),
    "chosen": tuple(range(32, 161, 13)),
    "rejected": tuple(range(32, 161, 13)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    rows: list[dict]  # in a form that prefuse reads
    tokenizer: PreTrainedTokenizerFast


def drawn_case(name: str, deciles: dict[str, Sequence[int]], count: int, vocabulary: int) -> Case:
    """Random words. There is something to learn: those of the first half are more frequent where preferred."""
    rng = random.Random(SEED)

    def words(kind: str, share: float) -> str:
        tenth = rng.random() * (len(deciles[kind]) - 1)
        low, high = deciles[kind][int(tenth)], deciles[kind][int(tenth) + 1]
        count = round(low + (high - low) * (tenth % 1))
        half = vocabulary // 2
        return " ".join(f"w{rng.randrange(1, half) + half * (rng.random() > share)}" for _ in range(count))

    shares = {"prompt": 0.5, "chosen": 0.6, "rejected": 0.4}
    rows = [{kind: words(kind, share) for kind, share in shares.items()} for _ in range(count)]
    ids = {"<end>": 0} | {f"w{i}": i for i in range(1, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Case(name, rows, PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>"))


def read_case(path: Path, count: int, vocabulary: int) -> Case:
    """`count` rows of a JSON or JSONL file, by chance, and a byte-level BPE learned from all of them."""
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<end>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((line for row in rows for line in texts(row)), trainer)
    random.Random(SEED).shuffle(rows)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    return Case(path.name, rows[:count], fast)


def texts(value: Any) -> Iterator[str]:
    """Every string in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)


def save_model(case: Case, folder: Path, arguments: argparse.Namespace) -> None:
    """A Llama of random weights, of the size that `add_model_arguments` takes."""
    torch.manual_seed(SEED)
    heads = arguments.hidden_size // 64
    config = LlamaConfig(
        vocab_size=max(arguments.vocab_size, len(case.tokenizer)), hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 11 // 4, num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=arguments.max_length,
        bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    case.tokenizer.save_pretrained(folder)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hidden_size", type=int, default=256, help="a multiple of 64")
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=8192)
    parser.add_argument("--max_length", type=int, default=2560)
