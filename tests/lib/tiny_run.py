"""A tiny model with its tokenizer on disk, tiny data files, and a whole run of the engine on them."""

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefuse.engine.config.settings import Config, validate
from tiny_tokenizer import CHATML, tiny_tokenizer

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Prompts and answers of unequal lengths, in tokens and between the two sides: padding and packing must both matter.
PAIRS = [
    {"prompt": f"what {'colour ' * (i % 4)}is {noun}?", "chosen": f"it is {good}", "rejected": f"{bad} " * (1 + i % 3)}
    for i, (noun, good, bad) in enumerate(
        (noun, good, bad)
        for noun in ("the sky", "the sea", "grass", "a very old house")
        for good, bad in (("blue", "no"), ("green and blue", "hello there"), ("good", "the the the the"))
    )
]
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
    for i, pair in enumerate(PAIRS)
]


def save_model(folder: Path, *, seed: int = 0, model=None, chat_template: str | None = CHATML, **options) -> str:
    """A Llama of 300 tokens with weights large enough that its logits differ, unless `model` is given."""
    tokenizer = tiny_tokenizer(chat_template=chat_template)
    if model is None:
        torch.manual_seed(seed)
        settings = {"vocab_size": len(tokenizer), "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1}
        model = LlamaForCausalLM(LlamaConfig(**settings | SHAPE | options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(command: str = "train", **changes) -> Config:
    """Validated settings for a short run on the CPU."""
    defaults = {"device": "cpu", "impl": "torch", "max_length": 64, "learning_rate": 1e-2, "eval_fraction": 0.0}
    defaults |= {"per_device_train_batch_size": 4, "logging_steps": 1, "save_steps": 0}
    return validate(Config(**(defaults | changes)), command)


def read_log(folder: Path | str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    whole = Path(folder) / "model.safetensors"
    return load_file(whole if whole.exists() else Path(folder) / "adapter_model.safetensors")
