"""README.md of a trained model: what was done, from the run's own settings."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import yaml

from prefuse.engine.config.settings import Config, settings_of

NOT_IN_CARD = {"output_dir", "resume", "device", "nproc", "max_restarts", "output_file"}  # of the machine
METRICS = (
    "eval_reward",
    "eval_gold",
    "reward",
    "eval_accuracy",
    "eval_margin",
    "eval_ece",
    "eval_length_correlation",
    "eval_loss",
    "eval_rewards/accuracies",
    "eval_rewards/margins",
    "eval_kl_to_ref",
    "loss",
)


def model_card(config: Config, command: str, metrics: Mapping[str, float]) -> str:
    base, name = config.model_name_or_path, Path(config.output_dir).resolve().name
    loss = {"sft": "sft", "reward": config.reward_loss, "online": config.algorithm}.get(command, config.loss_type)
    about = {
        "base_model": base,
        "library_name": "peft" if config.use_peft else "transformers",
        "pipeline_tag": "text-classification" if command == "reward" else "text-generation",
        "tags": ["prefuse", loss, *(["lora"] if config.use_peft else [])],
    }
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    rows = [
        (setting, getattr(config, setting))
        for fields in settings_of(command).values()
        for setting in fields
        if setting not in NOT_IN_CARD and getattr(config, setting) != defaults[setting]
    ]
    what = "LoRA adapters for" if config.use_peft else "Trained from"
    parts = [
        "---\n" + yaml.safe_dump(about, sort_keys=False, allow_unicode=True) + "---",
        f"# {name}",
        f"{what} `{base}`, by `prefuse {command}` with the loss {loss} on `{config.dataset_name}`.",
        "## Settings\n\nThose that differ from the defaults; `config.yaml` has all.",
        _table(("setting", "value"), rows),
    ]
    last = [(key, f"{metrics[key]:.4g}") for key in METRICS if key in metrics]
    if last:
        parts += ["## Last metrics", _table(("metric", "mean"), last)]
    return "\n\n".join([*parts, "## Use", _usage(config, command)]) + "\n"


def _usage(config: Config, command: str) -> str:
    if command == "reward":
        return _usage_of_scores(config)
    run, base = str(Path(config.output_dir).resolve().name), config.model_name_or_path
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if config.use_peft:
        lines.insert(0, "from peft import PeftModel")
        lines.append(f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {run!r})")
    else:
        lines.append(f"model = AutoModelForCausalLM.from_pretrained({run!r})")
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({run!r})")
    return "```python\n" + "\n".join(lines) + "\n```"


def _usage_of_scores(config: Config) -> str:
    run, base = str(Path(config.output_dir).resolve().name), config.model_name_or_path
    kind = "TokenClassification" if config.reward_loss == "steps" else "SequenceClassification"
    auto = f"AutoPeftModelFor{kind}" if config.use_peft else f"AutoModelFor{kind}"
    labels, use = 1, "score = model(**rows).logits[:, 0]  # one number a row, more is better"
    if config.reward_loss == "steps":
        labels, use = 2, "logits = model(**rows).logits  # (1, T, 2): read where a step's separator ends; 1 is right"
    lines = [
        "from transformers import AutoTokenizer"
        if config.use_peft
        else f"from transformers import {auto}, AutoTokenizer",
        f"from peft import {auto}" if config.use_peft else "",
        f"tokenizer = AutoTokenizer.from_pretrained({run!r})",
        f"model = {auto}.from_pretrained({run!r}, num_labels={labels}).eval()",
        'rows = tokenizer([prompt + answer], return_tensors="pt", padding=True)',
        use,
    ]
    about = f"The base model is `{base}`.\n\n" if config.use_peft else ""
    return about + "```python\n" + "\n".join(lines) + "\n```"


def _table(header: tuple[str, str], rows: list[tuple[str, object]]) -> str:
    escape = lambda value: str(value).replace("|", "\\|")  # noqa: E731
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {escape(value)} |" for name, value in rows])
