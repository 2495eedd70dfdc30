"""`--gguf_file`: weights and tokenizer of a file in GGUF form, trained on and saved as safetensors."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefuse.engine.errors import UserError
from prefuse.engine.model import load
from prefuse.engine.train import train
from tiny_run import PAIRS, settings, write_rows

HEADS, WIDTH, VOCABULARY = 4, 32, 259


def write_gguf(path: Path) -> None:
    """A Llama of one layer over single bytes, as llama.cpp's converter lays it out."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "ab", "<s>", "</s>"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([1] * 257 + [3, 3])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(258)
    shapes = {
        "token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,), "output": (VOCABULARY, WIDTH),
        "blk.0.attn_norm": (WIDTH,), "blk.0.ffn_norm": (WIDTH,), "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH // 2, WIDTH), "blk.0.attn_v": (WIDTH // 2, WIDTH), "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (48, WIDTH), "blk.0.ffn_up": (48, WIDTH), "blk.0.ffn_down": (WIDTH, 48),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", (0.2 * rng.standard_normal(shape) + (len(shape) == 1)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="needs gguf: pip install gguf")
def test_a_gguf_file_is_trained_on_and_saved_as_safetensors(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    write_gguf(folder / "tiny.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32)
    config = settings(
        model_name_or_path=str(folder), gguf_file="tiny.gguf", output_dir=str(tmp_path / "run"), max_steps=1,
        dataset_name=write_rows(tmp_path / "rows.jsonl", PAIRS), learning_rate=0.0, max_length=128,
    )  # fmt: skip
    train(config, "train")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)
    weights = saved.state_dict()
    for name, x in theirs.state_dict().items():
        assert torch.equal(weights[name], x), name
    tokenizers = [
        AutoTokenizer.from_pretrained(tmp_path / "run"),
        AutoTokenizer.from_pretrained(folder, gguf_file="tiny.gguf"),
    ]
    assert tokenizers[0]("what is the sky?").input_ids == tokenizers[1]("what is the sky?").input_ids


def test_what_cannot_be_read_is_said(tmp_path, monkeypatch):
    changes = {"model_name_or_path": str(tmp_path), "dataset_name": "d", "output_dir": str(tmp_path / "run")}
    config = settings(**changes, gguf_file="tiny.gguf")
    with pytest.raises(UserError, match=r"gguf_file tiny\.gguf does not exist in"):
        load.load_model(str(tmp_path), config, torch.device("cpu"))
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="gguf_file needs the package gguf: pip install gguf"):
        load.load_tokenizer(str(tmp_path), config)
