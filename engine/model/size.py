"""How large a model is and what a run of it keeps in memory, by its config alone: no weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prefuse.engine.config.settings import Config
from prefuse.engine.errors import UserError
from prefuse.engine.hub import require_repository
from prefuse.engine.model.adapters import WEIGHTS, add_adapters, base_of
from prefuse.engine.model.load import gguf_of


@dataclass(frozen=True)
class ModelSize:
    weights: int  # how many, adapters included
    trained: int
    largest: int  # of the single weights
    about: Any  # transformers' config of the text model


def size_of(path: str, config: Config, auto: type, *, trains: bool, **options: object) -> ModelSize:
    """Of the model in a folder, or of the adapters there with their base, by one of transformers' Auto classes."""
    base = base_of(Path(path))
    about = config_of(base or path, config, **options)
    with torch.device("meta"):
        model = auto.from_config(about, trust_remote_code=config.trust_remote_code)
        if base is None and trains and config.use_peft:
            add_adapters(model, config)
    sizes = {id(p): (p.numel(), p.requires_grad) for p in model.parameters()}
    weights, trained = (sum(n for n, counts in sizes.values() if counts or every) for every in (True, False))
    if base is not None:
        adapters = _numbers_in(Path(path) / WEIGHTS)
        weights, trained = weights + adapters, adapters
    return ModelSize(weights, trained if trains else 0, max(n for n, _ in sizes.values()), about.get_text_config())


def cut_model(path: str, config: Config, auto: type, layers: int, **options: object) -> nn.Module:
    """The model of a folder, or the base of its adapters, with its first `layers` layers and made-up weights."""
    about = config_of(base_of(Path(path)) or path, config, **options)
    text = about.get_text_config()
    whole = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == whole:  # one entry for each layer
            setattr(text, name, value[:layers])
    text.num_hidden_layers = min(layers, whole)
    with torch.random.fork_rng(devices=[]):
        return auto.from_config(
            about, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
        )  # fmt: skip


def config_of(path: str, config: Config, **options: object) -> Any:
    """transformers' config of a model in a folder or on the hub."""
    from transformers import AutoConfig

    options |= gguf_of(path, config.gguf_file)
    require_repository(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code, **options)
    except Exception as error:  # whatever a file of another's making makes transformers do
        raise UserError(f"cannot read the config of {path}: {' '.join(str(error).split())[:200]}") from None


def _numbers_in(file: Path) -> int:
    """Of a safetensors file, by its header."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]
    except SafetensorError as error:
        raise UserError(f"cannot read {file}: {error}") from None
    return sum(torch.Size(shape).numel() for shape in shapes)


def number_bytes(config: Config) -> int:
    """Of a number that the trunk computes with."""
    return 2 if config.bf16 or config.dtype == "bfloat16" else 4


def activations_per_token(config: Config, about: Any) -> int:
    """Bytes that the backward of the decoder layers reads: about 10 hidden and 4 inner numbers for each layer; with
    gradient_checkpointing the hidden state of each, and one layer's as it is computed again."""
    hidden, layers, one = about.hidden_size, about.num_hidden_layers, _of_a_layer(about)
    return (layers * hidden + one if config.gradient_checkpointing else layers * one) * number_bytes(config)


def working_per_token(config: Config, about: Any) -> int:
    """Bytes of one layer's numbers: what a pass without gradients holds at once."""
    return _of_a_layer(about) * number_bytes(config)


def _of_a_layer(about: Any) -> int:
    return 10 * about.hidden_size + 4 * (getattr(about, "intermediate_size", None) or 4 * about.hidden_size)


def cache_per_token(config: Config, about: Any) -> int:
    """Bytes of keys and values of all layers, as sampling keeps them."""
    heads = getattr(about, "num_attention_heads", None) or 1
    groups = getattr(about, "num_key_value_heads", None) or heads
    width = getattr(about, "head_dim", None) or about.hidden_size // heads
    return 2 * about.num_hidden_layers * groups * width * number_bytes(config)
