"""Short runs of a trainer of TRL's kind on tiny models: what it logged, and the weights it ended with."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from torch import nn

from tiny_run import PAIRS, SHAPE
from tiny_tokenizer import CHATML, tiny_tokenizer

SETTINGS = {"vocab_size": 300, "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1}
LAYERS = {"sliding_window": 6, "query_pre_attn_scalar": 8, "head_dim": 8}
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**SETTINGS | SHAPE),
    "tied": lambda: transformers.LlamaConfig(**SETTINGS | SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SETTINGS | SHAPE, head_dim=8),
    # A softcap small enough to bend the logits, and a window shorter than the sequences.
    "gemma2": lambda: transformers.Gemma2Config(
        **SETTINGS | SHAPE | LAYERS, final_logit_softcapping=2.0, attn_logit_softcapping=2.0, pad_token_id=0
    ),
}
# Two pairs have the prompt of another one, once within four rows and once apart, and one answer in common with it.
AGAIN = [PAIRS[i] | {"rejected": "grass grass"} for i in (0, 4)]
ROWS = [*PAIRS[:6], *AGAIN, *PAIRS[6:10]]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in ROWS
]
LABELLED = [
    {"prompt": row["prompt"], "completion": row["chosen" if i % 3 else "rejected"], "label": bool(i % 3)}
    for i, row in enumerate(ROWS)
]
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos"}
TIMES |= {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time"}


def save(folder: Path, name: str, seed: int = 0) -> str:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name]())
    with torch.no_grad():  # Gemma 2 scales by 1 + weight, with weights of zero: nothing would depend on it
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / name)
    return str(folder / name)


def arguments(config: type, output_dir: Path | str, **changes):
    """A run of five steps on the CPU in float32, that logs every step."""
    return config(
        **{
            "output_dir": str(output_dir), "bf16": False, "use_cpu": True, "report_to": "none", "disable_tqdm": True,
            "max_steps": 5, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "logging_steps": 1,
            "learning_rate": 1e-3, "adam_epsilon": 1e-3, "save_strategy": "no",
        } | changes
    )  # fmt: skip


def build(trainer: type, model, rows: list[dict], output_dir: Path | str, config: type, options: dict, **changes):
    """`trainer` with fresh copies of everything that it might change."""
    options = dict(options)
    if isinstance(model, nn.Module):
        model = copy.deepcopy(model)
    if options.get("ref_model") is not None:
        options["ref_model"] = copy.deepcopy(options["ref_model"])
    if options.get("eval_rows") is not None:
        options["eval_dataset"] = Dataset.from_list(options.pop("eval_rows"))
    if "peft_config" in options:  # PEFT writes the model's name into it
        options = options | {"peft_config": copy.deepcopy(options["peft_config"])}
    return trainer(
        model=model, args=arguments(config, output_dir, **changes), train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(chat_template=CHATML), **options,
    )  # fmt: skip


def log_of(trainer) -> list[dict[str, float]]:
    return [{key: value for key, value in row.items() if key not in TIMES} for row in trainer.state.log_history]


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_log(got: list[dict], expected: list[dict], tolerance: float = 1e-5) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        # Where policy and reference are one, who wins is rounding's choice (0 wins nothing, 1e-9 does).
        tied = abs(other.get("rewards/margins", 1.0)) < 1e-5
        wrong = {
            key: (one[key], other[key])
            for key in other.keys() - ({"rewards/accuracies"} if tied else set())
            if not abs(one[key] - other[key]) <= tolerance * max(1.0, abs(other[key]))
        }
        assert not wrong, f"at step {other['step']}: {wrong}"


def assert_same_weights(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        bound = 1e-5 * max(1.0, value.abs().max().item())
        torch.testing.assert_close(got[name], value, rtol=0, atol=bound, msg=lambda text, name=name: f"{name}: {text}")
