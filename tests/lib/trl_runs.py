"""Short runs of TRL's trainers on tiny models made on the spot: what they logged, and the weights they ended with.

A run is a dict, so that it can be handed to a process: `{"trainer": "dpo", "model": "llama", **settings of TRL}`.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

from tiny_run import LABELLED, PAIRS, SHAPE
from tiny_tokenizer import CHATML, tiny_tokenizer

# Logits of a few units: the cap of Gemma, at 30 in the models that are trained, has to bite.
MODELS = {
    "llama": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    "gemma2": ("Gemma2", {"final_logit_softcapping": 1.5, "head_dim": 8}),  # its embeddings are tied as well
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "cohere": ("Cohere", {"logit_scale": 0.5}),
    "granite": ("Granite", {"logits_scaling": 3.0}),
}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
# Of a log, what the clock decides, and what no one computed.
CLOCKED = ("runtime", "per_second", "step_time", "total_flos")


def tiny_model(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> transformers.PreTrainedModel:
    family, options = MODELS[name]
    tokens = {"vocab_size": len(tiny_tokenizer()), "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, f"{family}Config")(**tokens | SHAPE | {"initializer_range": 0.1} | options)
    torch.manual_seed(seed)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)


def reference_of(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Another model than the policy, so that no reward is 0 from the start."""
    reference = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.02 * torch.empty(parameter.shape).normal_(generator=generator).to(parameter.dtype)
    return reference


def by_length(completions: list[str], **_: Any) -> list[float]:
    """A reward for GRPO and RLOO that differs between completions."""
    return [len(text) + text.count("a") / 2 for text in completions]


def make_trainer(run: dict, folder: Path):
    """The trainer that `run` describes, on the CPU, a log line every step."""
    import trl

    kind, settings = run["trainer"], dict(run)
    model = tiny_model(settings.pop("model", "llama"))
    peft, frozen = settings.pop("lora", None), settings.pop("frozen_head", False)
    reference, kind = settings.pop("reference", True), settings.pop("trainer")
    if frozen:
        model.get_output_embeddings().requires_grad_(False)
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": 5, "per_device_train_batch_size": 2, "learning_rate": 0.1,
        "lr_scheduler_type": "constant", "optim": "sgd", "logging_steps": 1, "report_to": "none", "use_cpu": True,
        "save_strategy": "no", "bf16": False, "disable_tqdm": True, "seed": 7,
    }  # fmt: skip
    tokenizer = tiny_tokenizer(chat_template=CHATML)
    tokenizer.pad_token = tokenizer.eos_token
    extra: dict[str, Any] = {"processing_class": tokenizer}
    if kind in ("grpo", "rloo"):
        arguments |= {"num_generations": 2, "max_completion_length": 6, "beta": 0.05, "temperature": 0.9}
        arguments |= {"per_device_train_batch_size": 4}
        # Their reference is the policy as it was, read from where the policy came from.
        model.save_pretrained(folder / "model")
        model.config._name_or_path = str(folder / "model")
        data, extra["reward_funcs"] = [{"prompt": pair["prompt"]} for pair in PAIRS], by_length
    elif kind == "sft":
        data = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
    else:
        data = LABELLED if kind == "kto" else PAIRS
        if reference and peft is None:
            extra["ref_model"] = reference_of(model)
    if peft is not None:
        from peft import LoraConfig

        extra["peft_config"] = LoraConfig(**LORA | peft)
    name = {"dpo": "DPO", "kto": "KTO", "sft": "SFT", "grpo": "GRPO", "rloo": "RLOO"}[kind]
    config = getattr(trl, f"{name}Config")(**arguments | settings)
    return getattr(trl, f"{name}Trainer")(model=model, args=config, train_dataset=Dataset.from_list(data), **extra)


def train(run: dict, folder: Path) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    """(one dict per logged step, the weights at the end)"""
    trainer = make_trainer(run, folder)
    trainer.train()
    return logs_of(trainer), weights_of(trainer)


def logs_of(trainer) -> list[dict[str, float]]:
    return [
        {key: float(value) for key, value in line.items() if not any(word in key for word in CLOCKED)}
        for line in trainer.state.log_history
    ]


def weights_of(trainer) -> dict[str, torch.Tensor]:
    model = trainer.accelerator.unwrap_model(trainer.model)
    whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in model.state_dict().items()}
    return {name: x.detach().clone() for name, x in whole.items()}
