"""Every causal LM of the installed transformers, made tiny: its config by rules over the names of its sizes.

    model = tiny_model("mixtral")       # float64, eval mode, weights stirred

Windows, chunks and blocks are shorter than the sequences of the checks (`TOKENS`), so that what they do is seen. Each
kind of layer that a config names is kept once or twice. Weights are larger than fresh ones and no tensor is symmetric,
so that no two ways of computing agree by accident.
"""

from __future__ import annotations

import math

import torch
from torch import nn

VOCABULARY, TOKENS = 120, 24

# Sizes by the names that configs have for them.
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCABULARY),
    **dict.fromkeys(("eos_token_id",), 2),
    **dict.fromkeys(("bos_token_id", "decoder_start_token_id"), 1),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "lru_width", "attention_hidden_size", "hidden_size_global"), 32),
    **dict.fromkeys(("output_embedding_size", "input_embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dim_ff", "dff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size_mlp", "dense_intermediate_size", "d_inner", "d_ff"), 48),
    **dict.fromkeys(("feed_forward_size", "shared_intermediate_size", "expert_ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_layers_per_stack"), 2),
    **dict.fromkeys(("num_global_layers", "depth"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "global_head_dim", "d_head", "dim_head", "kv_channels", "d_kv"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim", "attention_head_size", "rotary_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim",), 8),
    **dict.fromkeys(("qk_head_dim",), 16),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "laurel_rank", "adapter_rank"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length"), 64),
    **dict.fromkeys(("max_target_positions", "model_max_length"), 64),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "zero_expert_num"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "moe_layer_end_index"), 1),
    **dict.fromkeys(("sliding_window", "attention_chunk_size", "window_size", "attention_window_size"), 8),
    **dict.fromkeys(("local_attention", "sliding_window_size", "rel_extent", "keep_window_size"), 8),
    **dict.fromkeys(("local_attention_window_len", "local_attn_chunk_length", "lsh_attn_chunk_length"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "block_size", "index_block_size", "max_inference_chunksize"), 8),
    **dict.fromkeys(("index_topk", "index_topk_blocks"), 2),
    **dict.fromkeys(("index_n_heads",), 16),
    **dict.fromkeys(("index_head_dim",), 8),
    **dict.fromkeys(("max_window_layers",), 1),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers"), 2),
    **dict.fromkeys(("no_rope_layer_interval", "attn_layer_period", "expert_layer_period", "layer_group_size"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_d_ssm",), 64),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_n_groups", "n_groups"), 4),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("hidden_size_per_layer_input", "router_hidden_size", "backbone_hidden_size"), 8),
    **dict.fromkeys(("num_kv_shared_layers",), 0),
    **dict.fromkeys(("floor_scale", "log_scaling_n_floor"), 8),
    **dict.fromkeys(("original_max_position_embeddings",), 64),
    **dict.fromkeys(("query_pre_attn_scalar",), 8),
    **dict.fromkeys(("encoder_hash_byte_group_vocab",), 50),
    **dict.fromkeys(("scale_emb",), 2),
    **dict.fromkeys(("dim_model_base",), 16),
    **dict.fromkeys(("hc_mult", "hc_count"), 2),
    **dict.fromkeys(("hc_lowrank", "ple_embed_dim", "d_rel", "gated_norm_rank"), 8),
    **dict.fromkeys(("ngram_vocab_size_base",), 50),
    **dict.fromkeys(("make_ngram_vocab_size_divisible_by", "split_ngram_parts", "heads_per_ngram"), 2),
    # what stands beside the language model
    **dict.fromkeys(("image_size",), 28),
    **dict.fromkeys(("patch_size",), 14),
    **dict.fromkeys(("out_hidden_size", "output_channels", "mlp_dim", "vision_output_dim", "projector_input_dim"), 32),
    **dict.fromkeys(("projector_output_dim",), 32),
}  # fmt: skip


# What the rules do not make, by model type: settings of the text config, or of the whole where that has none.
OWN = {
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 4},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx_attention": {"rope_theta": 10000.0},
    "qwen4_exp_text": {
        "indexer_n_heads": 4, "indexer_kv_heads": 2, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "zamba": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "zamba2": {"attention_head_dim": 16, "kv_channels": 16},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "reformer": {"is_decoder": True, "attn_layers": ["local", "local"], "axial_pos_embds": False},
    "xglm": {},
    "xmod": {"default_language": "en_XX", "is_decoder": True},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "xlstm": {"num_heads": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "bert": {"is_decoder": True},
    "bert-generation": {"is_decoder": True},
    "roberta": {"is_decoder": True},
    "camembert": {"is_decoder": True},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY - 8},
    "phi3": {"max_position_embeddings": 64, "original_max_position_embeddings": 64},
}  # fmt: skip


# Their own forward has constants or buffers of float32 that meet no float64, or masks that overflow in it.
SINGLE = {"inkling2_text", "xglm", "gemma2", "vaultgemma", "granitemoe_swa"}

# Why a type cannot be compared with itself, where the error does not say so.
NOT_TRIED = {
    "dots3_note": "a model of text, images and sound; its language model is dots3_note_text, above or below",
    "gemma3n": "its images need the timm library",
    "gemma4_assistant": "a draft model: it reads the cache of another model, and has no forward without it",
    "gemma4_unified_assistant": "a draft model: it reads the cache of another model, and has no forward without it",
    "musicgen": "AutoModelForCausalLM gives its decoder the config of the whole model, which has no dropout",
    "musicgen_melody": "AutoModelForCausalLM gives its decoder the config of the whole model, which has no dropout",
}


def causal_types() -> dict[str, str]:
    """Model types and the names of their classes, as transformers' AutoModelForCausalLM has them."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str):
    """The default config of a model type with small sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _small(CONFIG_MAPPING[kind], kind)


def _small(config_class: type, kind: str):
    default = config_class()
    changes = {name: SIZES[name] for name in _sizes(default)}
    changes |= _fewer_layers(default, changes)
    if "kv_lora_rank" in changes and "num_key_value_heads" in changes:  # latent attention has as many as heads
        changes["num_key_value_heads"] = SIZES["num_attention_heads"]
    for name in config_class.sub_configs or {}:
        given = getattr(default, name, None)
        if given is not None and getattr(type(given), "model_type", ""):
            changes[name] = _small(type(given), kind)
    return config_class(**(changes | OWN.get(config_class.model_type, {})))


def _sizes(config) -> list[str]:
    """The names of SIZES that the config has, each as a number."""
    known = {**config.to_dict(), **vars(config)}
    ids = [name for name in SIZES if name.endswith("_token_id") and known.get(name) is not None]
    return ids + [name for name in SIZES if type(known.get(name)) is int and name not in ids]


def _fewer_layers(config, changes: dict) -> dict:
    """Of each kind of layer one, in the order of their first appearance; per-layer lists go with them."""
    layers = getattr(config, "num_hidden_layers", None)
    if "num_hidden_layers" not in changes and not isinstance(layers, int):
        return {}
    lists = {
        name: list(value)
        for name, value in config.to_dict().items()
        if isinstance(value, (list, tuple)) and len(value) == layers and layers > 3
    }
    if not lists:
        return {}
    kinds = list(zip(*(value for name, value in lists.items() if name.endswith(("types", "type"))), strict=True))
    kept = sorted({kinds.index(kind) for kind in kinds}) if kinds else [0, 1]
    kept = kept if len(kept) > 1 else [0, 1]
    return {"num_hidden_layers": len(kept)} | {
        name: [SIZES.get(name, value[i]) for i in kept] if not isinstance(value[0], (list, tuple)) else value
        for name, value in lists.items()
    }


def dtype_of(kind: str) -> torch.dtype:
    return torch.float32 if kind in SINGLE else torch.float64


def tiny_model(kind: str, dtype: torch.dtype | None = None):
    """A model of that type in eval mode, its weights stirred; in float64 where its own forward takes that."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), experts_implementation="eager").eval()
    stir(model)
    return model.to(dtype_of(kind) if dtype is None else dtype)


@torch.no_grad()
def stir(model: nn.Module, seed: int = 1) -> None:
    """Matrices get entries of the size 1 / sqrt(columns), vectors some noise beside what they had."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if not p.is_floating_point():
            continue
        noise = torch.randn(p.shape, generator=generator)
        if p.dim() >= 2:
            p.copy_(noise * (1.2 / math.sqrt(p.shape[-1])))
        else:
            p.add_(0.2 * noise)
