"""Tiny models of transformers, their batches, and the truth from their own logits."""

import pytest
import torch
import transformers

from prefuse.transformers import (
    UnsupportedModel,
    sequence_logps,
)
from tiny_run import SHAPE

V = 300
TINY = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "head_dim": 8, **SHAPE}
TINY |= {"initializer_range": 0.2}
GPT = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 1, "n_embd": 32, "n_layer": 2, "n_head": 4}
# Heads: plain; tied; with a bias; with a cap (and sliding windows); with a factor, tied; with a divisor; and two with
# learned positions.
ARCHITECTURES = {
    "Llama": (transformers.LlamaConfig, TINY),
    "Qwen3": (transformers.Qwen3Config, TINY | {"tie_word_embeddings": True}),
    "Phi": (transformers.PhiConfig, {k: v for k, v in TINY.items() if k != "head_dim"}),
    "Gemma3": (transformers.Gemma3TextConfig, TINY | {"final_logit_softcapping": 5.0, "sliding_window": 6}),
    "Cohere": (transformers.CohereConfig, TINY | {"logit_scale": 0.25}),
    "Granite": (transformers.GraniteConfig, TINY | {"logits_scaling": 8.0}),
    "GPT2": (transformers.GPT2Config, GPT),
    "OPT": (transformers.OPTConfig, {"vocab_size": V, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
                                     "num_attention_heads": 4, "word_embed_proj_dim": 32}),
}  # fmt: skip


def build(name="Llama", **changes):
    config, settings = ARCHITECTURES[name]
    model = transformers.AutoModelForCausalLM.from_config(
        config(**settings | changes), attn_implementation="sdpa"
    ).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:  # zero at first
        torch.nn.init.normal_(bias, std=0.3)
    return model


# Of unequal lengths, one with a single token that counts, one whose first token is labelled, one with none that counts.
LENGTHS, PROMPTS = (11, 7, 13, 5), (4, 6, 0, 5)
ROWS = [[(17 * i + 29 * j * j + 3) % (V - 3) + 3 for j in range(length)] for i, length in enumerate(LENGTHS)]


def padded(side="right", rows=ROWS, prompts=PROMPTS, width=15):
    """input_ids, labels and attention_mask, each (B, width)."""
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for row, prompt in zip(rows, prompts, strict=True):
        pad = width - len(row)
        for name, values, fill in (
            ("input_ids", row, 2),
            ("labels", [-100] * prompt + row[prompt:], -100),
            ("attention_mask", [1] * len(row), 0),
        ):
            batch[name].append(values + [fill] * pad if side == "right" else [fill] * pad + values)
    return {name: torch.tensor(values) for name, values in batch.items()}


def flat(rows=ROWS, prompts=PROMPTS):
    ids = torch.tensor([[i for row in rows for i in row]])
    labels = [x for row, prompt in zip(rows, prompts, strict=True) for x in [-100] * prompt + row[prompt:]]
    cu_seqlens = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    return {"input_ids": ids, "labels": torch.tensor([labels]), "cu_seqlens": cu_seqlens}


BATCHES = {"right": padded, "left": lambda: padded("left"), "flat": flat}


def oracle(model, rows=ROWS, prompts=PROMPTS, temperature=1.0):
    """Per sequence the log-probabilities of its labelled tokens: each sequence by itself, from the model's logits."""
    result = []
    for row, prompt in zip(rows, prompts, strict=True):
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1] / temperature
        chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
        result.append(chosen[max(prompt, 1) - 1 :])
    return result


COEFFICIENTS = torch.tensor([0.7, -1.3, 0.4, 2.0], dtype=torch.float64)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, wanted, rtol=1e-4):
    """To `rtol` of each tensor, but for what rounding of the largest leaves in a small one."""
    assert got.keys() == wanted.keys()
    size = max(grad.norm() for grad in wanted.values())
    assert size > 0
    for name, grad in wanted.items():
        assert (got[name] - grad).norm() <= rtol * grad.norm() + 1e-2 * rtol * size, name


# A group of two completions, one of one, one of three: their prompts run once.
GROUPS = [(ROWS[0][:4], [ROWS[0][4:], [9, 8]]), (ROWS[1][:3], [ROWS[1][3:]]), (ROWS[2][:2], [[5], [6, 7], [7, 6, 5]])]


# ---------------------------------------------------------------------------------------------------------
# PEFT


TRUNK = ["q_proj", "v_proj"]


def lora(*targets, model=None, **options):
    """A model in PEFT's LoRA whose adapters already do something."""
    peft = pytest.importorskip("peft")
    base = build() if model is None else model
    options = {"r": 4, "lora_alpha": 8, "target_modules": list(targets), "task_type": "CAUSAL_LM"} | options
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    for name, p in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            p.data += 0.1 * torch.randn_like(p)
    return wrapped


# ---------------------------------------------------------------------------------------------------------
# What is refused, and what to do


def refuse(model, *words, error=UnsupportedModel, **batch):
    with pytest.raises(error) as caught:
        sequence_logps(model, **(batch or padded()))
    for word in words:
        assert word in str(caught.value)
