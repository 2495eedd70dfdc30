"""A setting's value from YAML or from the command line, as the type of its field."""

import difflib
import types
import typing
from collections.abc import Iterable
from typing import Literal

from prefuse.engine.config.settings import FIELDS
from prefuse.engine.errors import UserError

TRUE, FALSE, NONE = ("true", "yes", "1"), ("false", "no", "0"), ("none", "null")  # on the command line
# What people type who have other names in mind.
OTHER_NAMES = {
    "lr": "learning_rate", "epochs": "num_train_epochs", "num_epochs": "num_train_epochs", "steps": "max_steps",
    "batch_size": "per_device_train_batch_size", "eval_batch_size": "per_device_eval_batch_size",
    "grad_accum": "gradient_accumulation_steps", "model": "model_name_or_path", "ref_model": "ref_model_name_or_path",
    "data": "dataset_name", "dataset": "dataset_name", "train_file": "dataset_name", "output": "output_dir",
    "out": "output_dir", "loss": "loss_type", "gamma": "simpo_gamma", "delta": "slic_delta", "tau": "discopop_tau",
    "lora": "use_peft", "lora_rank": "lora_r", "fsdp": "parallel", "resume_from_checkpoint": "resume",
    "scheduler": "lr_scheduler_type", "optimizer": "optim", "torch_dtype": "dtype", "max_seq_length": "max_length",
    "num_processes": "nproc", "max_tokens": "max_new_tokens",
}  # fmt: skip


def typed(name: str, value: object) -> object:
    """A YAML value as the field's type. YAML 1.1 reads 1e-6 as text and yes as true: the first is meant as a
    number, the second is never meant as one."""
    for option in options_of(name):
        if option is types.NoneType:
            if value is None:
                return None
        elif typing.get_origin(option) is Literal:
            if value in typing.get_args(option):
                return value
        elif typing.get_origin(option) is list:
            values = [value] if isinstance(value, str) else value
            of = typing.get_args(option)[0]
            if of is float and isinstance(values, list):
                values = [float(x) if type(x) is int else x for x in values]
            if isinstance(values, list) and values and all(isinstance(item, of) for item in values):
                return values
        elif option is float:
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                try:
                    return float(value)
                except (ValueError, OverflowError):
                    pass
        elif type(value) is option:
            return value
    raise UserError(f"{name} must be {wanted(name)}, got {value!r} ({type(value).__name__})")


def from_words(name: str, words: list[str]) -> object:
    """The words after a flag as the field's type; no word at all is the bare flag of a boolean."""
    options = options_of(name)
    text = words[0] if words else "true"
    if types.NoneType in options and len(words) == 1 and text.lower() in NONE:
        return None
    if bool in options and text.lower() in (*TRUE, *FALSE):
        return text.lower() in TRUE
    if list[float] in options:
        try:
            return [float(word) for word in words]
        except ValueError:
            raise UserError(f"{name} must be {wanted(name)}, got {' '.join(words)!r}") from None
    if any(typing.get_origin(option) is list for option in options):
        return words
    if int in options or float in options:
        try:
            return (int if int in options else float)(text)
        except ValueError:
            pass
    elif str in options or text in literals(name):
        return text
    raise UserError(f"{name} must be {wanted(name)}, got {text!r}{did_you_mean(text, literals(name))}")


def options_of(name: str) -> tuple[object, ...]:
    annotation = FIELDS[name]
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)  # the latter is `Literal[...] | None`
    return typing.get_args(annotation) if union else (annotation,)


def literals(name: str) -> tuple[str, ...]:
    """The values of a setting that has few."""
    return tuple(
        value
        for option in options_of(name)
        if typing.get_origin(option) is Literal
        for value in typing.get_args(option)
    )


def wanted(name: str) -> str:
    return " or ".join(_type_name(option) for option in options_of(name))


def unknown_setting(name: str, where: str) -> UserError:
    """The error about a name that no setting has."""
    hint = did_you_mean(name, FIELDS, OTHER_NAMES) or "; `prefuse train --help` lists the settings"
    return UserError(f"unknown setting {name!r}{where}{hint}")


def did_you_mean(word: str, words: Iterable[str], other_names: dict[str, str] | None = None) -> str:
    """A hint that continues an error, or nothing. `other_names`: what people type, and what it is called here."""
    others = other_names or {}
    if word in others:
        return f"; did you mean {others[word]}?"
    likeness = {name: difflib.SequenceMatcher(None, name, word).ratio() for name in [*words, *others]}
    nearest = sorted(likeness, key=likeness.get, reverse=True)  # of equals a name of ours is the first
    near = list(dict.fromkeys(others.get(name, name) for name in nearest if likeness[name] >= 0.5))[:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _type_name(option: object) -> str:
    if option is types.NoneType:
        return "null"
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(typing.get_args(option))
    if typing.get_origin(option) is list:
        of = typing.get_args(option)[0]
        return {str: "a list of texts", float: "a list of numbers"}.get(of, "a list of `name: value` lines")
    return {dict: "`role: column` lines", bool: "true or false", int: "a whole number", float: "a number", str: "text"}[
        option
    ]
