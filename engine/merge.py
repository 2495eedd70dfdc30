"""`prefuse merge`: the adapters of a run put into their base model, as one whole model.

    prefuse merge --model_name_or_path runs/lora --output_dir runs/whole

    W = W_base + lora_alpha / lora_r * B A

computed in float32 and written in `dtype` (--dtype bfloat16; a whole model too is written so). The base is the one that
the adapters name, or base_model_name_or_path. Training of all weights starts from whole models, so this is also the way
from an SFT run with adapters to `prefuse train`; with use_peft a run goes on with the adapters themselves.
"""

import dataclasses
import shlex
from pathlib import Path

import torch

from prefuse.engine.config.settings import Config
from prefuse.engine.errors import UserError
from prefuse.engine.model.adapters import base_of
from prefuse.engine.model.load import SHARD_SIZE, load_tokenizer
from prefuse.engine.model.reward_model import loader_of
from prefuse.engine.report.log import say
from prefuse.engine.run.files import published_folder


def merge(config: Config) -> None:
    """Write the whole model into output_dir, which appears when it is complete."""
    source, folder = Path(config.model_name_or_path), Path(config.output_dir)
    base = base_of(source)
    if base is None and config.dtype == "float32":
        raise UserError(
            f"{source} holds no adapters: expected a folder with adapter_config.json, as a run with use_peft writes it "
            "(a whole model can be written in bfloat16: --dtype bfloat16)"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"output_dir {folder} exists and is not empty: give another folder")
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    lm = loader_of(config.model_name_or_path)(
        config.model_name_or_path, dataclasses.replace(config, dtype="float32"), torch.device("cpu")
    )
    # peft refuses adapters that hold a NaN
    model = lm.model if lm.adapters is None else lm.adapters.merge_and_unload(safe_merge=True)
    model = model.to(getattr(torch, config.dtype))
    if lm.scores:
        lm.model.config.get_text_config().pad_token_id = tokenizer.pad_token_id  # where the score of a row is taken
    with published_folder(folder) as aside:
        model.save_pretrained(aside, max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(aside)
    what = f"{source} in {config.dtype}" if base is None else f"{base} with the adapters of {source}"
    say(f"{what} is in {folder}: `--model_name_or_path {shlex.quote(str(folder))}`")
