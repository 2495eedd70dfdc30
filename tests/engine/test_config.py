"""Settings: where a value comes from, how a wrong one is named, and that what is saved reads back the same."""

import dataclasses
import re
import typing

import pytest

from prefuse.engine.cli import parse
from prefuse.engine.config import help as help_pages
from prefuse.engine.config.setting import LOADING, known
from prefuse.engine.config.settings import (
    FIELDS,
    LOSS_SETTINGS,
    TOPICS,
    TRAINING_COMMANDS,
    Config,
    commands_of,
    decides_weights,
    settings_of,
    validate,
)
from prefuse.engine.config.yaml_file import read_yaml, write_yaml
from prefuse.engine.errors import UserError

NEEDED = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}


def yaml_file(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return str(path)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = yaml_file(tmp_path, "beta: 0.3\nloss_type: ipo\n")
    command, config = parse(["train", "--config", path, "--beta", "0.5"])
    assert command == "train"
    assert (config.beta, config.loss_type, config.max_length) == (0.5, "ipo", Config.max_length)
    assert parse(["train", f"--config={path}"])[1].beta == 0.3


def test_saved_settings_read_back_the_same(tmp_path):
    config = Config(model_name_or_path="ünï", learning_rate=5e-7, bf16=False, resume=True, max_steps=3)
    write_yaml(config, tmp_path / "config.yaml", "train")
    assert read_yaml(tmp_path / "config.yaml") == config


def test_a_run_keeps_the_settings_of_its_command_alone(tmp_path):
    write_yaml(Config(history="h"), tmp_path / "config.yaml", "sft")
    text = (tmp_path / "config.yaml").read_text()
    assert "learning_rate: null" in text
    assert "history" not in text
    assert "loss_type" not in text


def test_every_field_is_declared_once_with_its_help():
    declared = [field for topic in TOPICS for field in dataclasses.fields(topic)]
    assert [field.name for field in declared] == list(FIELDS)
    for field in declared:
        assert known(field).about.endswith("."), field.name
        assert set(commands_of(field.name)) <= set(LOADING), field.name
        if known(field).only_with is not None:
            other, value = known(field).only_with
            assert isinstance(value, bool) if FIELDS[other] is bool else value in typing.get_args(FIELDS[other])


def test_settings_by_command():
    shown = {command: {name for names in settings_of(command).values() for name in names} for command in LOADING}
    assert shown["train"] >= {"beta", "learning_rate", "output_dir", "resume", "nproc", "z0_scope"}
    assert shown["sft"].isdisjoint({"beta", "loss_type", "ref_model_name_or_path", "num_generations"})
    assert shown["eval"].isdisjoint({"learning_rate", "output_dir", "nproc"})
    assert shown["generate"].isdisjoint({"beta", "learning_rate", "output_dir", "nproc", "impl"})
    assert "temperature" in shown["generate"]
    trained = validate(Config(model_name_or_path="m", dataset_name="d", output_dir="o"), "train")
    assert (trained.temperature, trained.num_prompts) == (None, None)  # `prefuse eval --config` has its own
    merged = {"model_name_or_path", "base_model_name_or_path", "dtype", "trust_remote_code", "output_dir"}
    assert shown["merge"] == merged


def test_what_a_resumed_run_may_differ_in():
    """The settings that decide the weights, in full: a setting that is added must be put here or declared free."""
    free = {name for name in FIELDS if not decides_weights(name)}
    assert {name for name in FIELDS if not set(commands_of(name)) & set(TRAINING_COMMANDS)} <= free
    assert {name for name in FIELDS if decides_weights(name)} == {
        "model_name_or_path", "gguf_file", "ref_model_name_or_path", "dtype", "bf16", "impl", "eval_fraction",
        "max_length", "seed", "gradient_tolerance",
        "loss_type", "beta", "label_smoothing", "nll_weight", "simpo_gamma", "slic_delta", "discopop_tau",
        "f_divergence_type", "f_alpha_divergence_coef", "ld_alpha", "ppo_clip", "una_distance", "kto_value",
        "kto_reference_point", "kto_reference_free", "kto_one_per_prompt", "kto_weights", "desirable_weight",
        "undesirable_weight", "z0_scope", "score_low", "score_high", "odpo_scale", "modpo_weight", "beta_dpo_alpha",
        "beta_dpo_baseline", "beta_dpo_level", "use_weighting", "sync_ref_model", "ref_model_mixup_alpha",
        "ref_model_sync_steps", "control_good", "control_bad", "padding_free",
        "output_router_logits", "router_aux_loss_coef",
        "max_tokens_per_batch", "learning_rate", "reward_loss", "reward_heads",
            "head_bootstrap", "center_rewards_coefficient", "step_separator",
        "lr_scheduler_type", "warmup_ratio", "warmup_steps", "num_train_epochs", "max_steps", "max_grad_norm",
        "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim", "use_peft", "lora_r", "lora_alpha",
        "load_in_4bit", "bnb_4bit_quant_type", "use_bnb_nested_quant",
            "lora_dropout", "lora_target_modules", "lora_modules_to_save", "torch_compile", "torch_compile_backend",
        "use_liger_kernel", "chat_template", "chat_template_kwargs", "system_prompt", "eos_token", "template_date",
        "sft_turns", "multi_turn", "learn_after_stop", "truncation_mode", "long_completions",
        "metric_for_best_model", "greater_is_better", "load_best_model_at_end", "early_stopping_patience",
        "early_stopping_threshold",
        "algorithm", "num_generations", "max_completion_length", "temperature", "top_p", "min_p",
        "steps_per_generation", "num_iterations", "scale_rewards", "grpo_loss_type", "importance_sampling_level",
        "epsilon", "epsilon_high", "delta", "kl_estimator", "entropy_coef", "mask_truncated_completions",
        "server_type", "use_transformers_continuous_batching",
        "missing_eos_penalty", "gamma", "lam", "value_learning_rate", "cliprange_value", "kl_target", "beta_horizon",
        "num_prompts", "max_new_tokens", "scorer_columns", "text_dataset",
        "scorer", "scorer_steps", "scorer_combine", "scorer_weights", "scorer_spread_weight", "judge_rubric",
        "judge_mode",
        "judge_max_tokens",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("learning_rate: 5e-7", 5e-7),  # YAML 1.1 reads this as text
        ("learning_rate: 1", 1.0),
        ("learning_rate: null", None),
        ("resume: true", True),
        ("bf16: null", None),
        ("max_steps: 7", 7),
        ('output_dir: "7"', "7"),
        ("lora_target_modules: [q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("lora_target_modules: .*_proj", [".*_proj"]),
        ("lora_target_modules: null", None),
    ],
)
def test_yaml_values_take_the_type_of_their_field(tmp_path, line, value):
    got = getattr(read_yaml(yaml_file(tmp_path, line)), line.split(":")[0])
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("betta: 0.1", r"unknown setting 'betta' in .*run.yaml; did you mean beta"),
        ("zzzzzz: 0.1", "unknown setting 'zzzzzz' .* lists the settings"),
        ("beta: much", r"beta must be a number or null, got 'much' \(str\)"),
        ("beta: true", r"beta must be a number or null, got True \(bool\)"),
        ("resume: 1", r"resume must be true or false, got 1 \(int\)"),
        ("max_steps: 2.5", r"max_steps must be a whole number, got 2.5 \(float\)"),
        ("max_steps: true", r"max_steps must be a whole number, got True \(bool\)"),
        ("lora_target_modules: [1]", r"lora_target_modules must be a list of texts or null, got \[1\] \(list\)"),
        ("lora_target_modules: []", r"lora_target_modules must be a list of texts or null, got \[\] \(list\)"),
        ("output_dir: 7", r"output_dir must be text, got 7 \(int\)"),
        ("bf16: maybe", r"bf16 must be true or false or null, got 'maybe' \(str\)"),
        ("loss_type: ppo", r"loss_type must be one of dpo, ipo, kto, .*discopop, .*got 'ppo' \(str\)"),
        ("[1, 2]", "must hold `name: value` lines, got a list"),
        ("beta: [", "is not valid YAML"),
        ("beta: 0.1\nseed: 1\nbeta: 0.2", "'beta' is given twice: keep one of the two.* line 3"),
        ("lr: 0.1", "unknown setting 'lr' in .*run.yaml; did you mean learning_rate"),
        ("seed: 2001-99-99", r"not valid YAML|seed must be a whole number"),
        ("num_train_epochs: " + "9" * 400, "num_train_epochs must be a number"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_yaml(yaml_file(tmp_path, text))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the config file .*none\.yaml"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("command", "changes", "message"),
    [
        ("train", {"model_name_or_path": ""}, "model_name_or_path is required: give --model_name_or_path"),
        ("train", {"dataset_name": ""}, "dataset_name is required"),
        ("sft", {"output_dir": ""}, "output_dir is required"),
        ("eval", {}, "ref_model_name_or_path is required"),
        ("train", {"beta": 0.0}, "beta must be > 0, got 0.0"),
        ("train", {"beta": float("nan")}, "beta must be > 0, got nan"),
        ("train", {"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (
            "train",
            {"label_smoothing": 0.1, "loss_type": "ipo"},
            "label_smoothing has a meaning only with loss_type",
        ),
        ("train", {"simpo_gamma": 1.0}, "simpo_gamma has a meaning only with loss_type simpo, got loss_type dpo"),
        ("train", {"nll_weight": 1.0}, "nll_weight has a meaning only with loss_type orpo, cpo, slic, rpo, got"),
        (
            "train",
            {"beta": 0.1, "loss_type": "slic"},
            "beta has a meaning only with loss_type dpo, ipo, .*mo_kto, got",
        ),
        ("train", {"label_smoothing": 0.0, "loss_type": "exo_pair"}, r"label_smoothing must be in \(0, 0.5\), got 0.0"),
        ("train", {"slic_delta": -1.0, "loss_type": "slic"}, r"delta must be finite and >= 0, got -1.0"),
        ("train", {"desirable_weight": 2.0}, "desirable_weight has a meaning only with loss_type kto"),
        ("train", {"desirable_weight": -1.0, "loss_type": "kto"}, "desirable_weight must be >= 0, got -1.0"),
        ("train", {"max_steps": 0}, r"max_steps must be -1 \(num_train_epochs decides\) or at least 1, got 0"),
        ("train", {"logging_steps": 0}, "logging_steps must be at least 1, got 0"),
        ("train", {"learning_rate": -1.0}, "learning_rate must be at least 0, got -1.0"),
        ("train", {"learning_rate": float("nan")}, "learning_rate must be at least 0, got nan"),
        ("train", {"num_train_epochs": 0.0}, "num_train_epochs must be above 0, got 0.0"),
        ("train", {"adam_beta2": 1.0}, r"adam_beta2 must be in \[0, 1\), got 1.0"),
        ("train", {"warmup_ratio": 1.5}, r"warmup_ratio must be in \[0, 1\], got 1.5"),
        ("train", {"eval_fraction": 1.0}, r"eval_fraction must be in \[0, 1\): training needs rows too, got 1.0"),
        ("train", {"max_loss_ratio": 1.0}, "max_loss_ratio must be above 1, got 1.0"),
        ("train", {"max_kl": 0.0}, "max_kl must be above 0, or null for no limit, got 0.0"),
        ("train", {"nproc": 0}, "nproc must be at least 1, got 0"),
        ("train", {"nproc": 10**6}, "nproc must be at most 4096, got 1000000"),
        ("train", {"num_train_epochs": float("inf")}, "num_train_epochs must be at most 100000, got inf"),
        ("train", {"learning_rate": float("inf")}, "learning_rate must be finite, got inf"),
        ("train", {"beta": float("inf")}, "beta must be finite, got inf"),
        ("train", {"seed": 2**64}, "seed must be at most 4294967295, got 18446744073709551616"),
        ("train", {"max_steps": 2**31}, "max_steps must be at most 2147483647, got 2147483648"),
        ("train", {"adam_epsilon": 1e-300}, "adam_epsilon must be above 0, and not 0 in float32"),
        ("train", {"use_peft": True, "lora_target_modules": ["("]}, r"or one regular expression, got '\('"),
        ("train", {"dataset_name": "a\0b"}, "dataset_name must be text without control characters"),
        ("train", {"eval_dataset": ""}, "eval_dataset must not be empty: give a value, or drop it"),
        ("generate", {"temperature": 1e-30}, "temperature must be 0, or at least 0.001 and at most 1000, got 1e-30"),
        ("train", {"fsdp_cpu_offload": True}, "fsdp_cpu_offload has a meaning only with parallel fsdp"),
        ("train", {"lora_r": 8}, "lora_r has a meaning only with use_peft true: set use_peft to true, or drop lora_r"),
        ("sft", {"lora_modules_to_save": ["norm"]}, "lora_modules_to_save has a meaning only with use_peft true"),
        ("train", {"use_peft": True, "lora_r": 0}, "lora_r must be at least 1, got 0"),
        ("train", {"use_peft": True, "lora_dropout": 1.0}, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ("train", {"torch_compile_backend": "eager"}, "torch_compile_backend has a meaning only with torch_compile"),
        ("train", {"optim": "adamw_8bit", "parallel": "fsdp"}, "optim adamw_8bit keeps states that cannot be spread"),
        ("generate", {"eval_fraction": 0.0}, r"eval_fraction must be in \(0, 1\], got 0.0"),
        ("generate", {"output_file": __file__}, "output_file .* exists: give another name, or remove it"),
        ("generate", {"output_file": "/none/x"}, "output_file /none/x is in a folder that does not exist"),
    ],
)
def test_a_setting_that_cannot_be_is_named(command, changes, message):
    with pytest.raises(UserError, match=message):
        validate(dataclasses.replace(Config(**NEEDED), **changes), command)


def test_defaults_that_depend_on_the_command():
    config = Config(**NEEDED, ref_model_name_or_path="r")
    assert validate(config, "train").learning_rate == 1e-6
    assert validate(config, "sft").learning_rate == 2e-5
    assert validate(dataclasses.replace(config, use_peft=True), "train").learning_rate == 1e-5
    assert validate(config, "train").eval_fraction == 0.05
    assert validate(config, "eval").eval_fraction == 1.0


def test_every_number_is_checked():
    """A number without a rule is the loss's to check, or depends on the command."""
    numbers = [f for f in dataclasses.fields(Config) if f.type in (int, float, int | None, float | None)]
    without = {field.name for field in numbers if known(field).rule is None}
    assert without == {field.name for field in numbers} & {*LOSS_SETTINGS, "eval_fraction"}


# ---------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--use_peft", "use_peft", True),
        ("--use_peft true", "use_peft", True),
        ("--use_peft=false", "use_peft", False),
        ("--use_peft False", "use_peft", False),
        ("--use_peft --beta 1", "use_peft", True),
        ("--no_use_peft", "use_peft", False),
        ("--no-use-peft", "use_peft", False),
        ("--bf16", "bf16", True),
        ("--bf16 None", "bf16", None),
        ("--learning-rate 5e-7", "learning_rate", 5e-7),
        ("--max_steps -1", "max_steps", -1),
        ("--max_kl null", "max_kl", None),
        ("--max_grad_norm inf", "max_grad_norm", float("inf")),
        ("--lora_target_modules q_proj v_proj --seed 1", "lora_target_modules", ["q_proj", "v_proj"]),
        ("--dataset_name null", "dataset_name", "null"),  # a name that is not optional
        ("--output_dir=--strange", "output_dir", "--strange"),
        ("--beta 0.1 --beta 0.2", "beta", 0.2),
    ],
)
def test_flags_take_the_type_of_their_field(words, name, value):
    got = getattr(parse(["train", *words.split()])[1], name)
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", r"expected a command first: prefuse sft \| train \| reward \| online \| label \| revise \| eval"),
        ("--verison", "expected a command first; did you mean --version"),
        ("--beta 1", "expected a command first"),
        ("trian", "unknown command 'trian'; did you mean train"),
        ("evaluate", "unknown command 'evaluate'; did you mean eval"),
        ("dpo", "unknown command 'dpo': the loss is a setting, prefuse train --loss_type dpo"),
        ("zzzzzz", "unknown command 'zzzzzz': expected sft, train, reward, online, label, revise, eval, generate"),
        ("train --bata 1", "unknown setting 'bata'; did you mean beta"),
        ("train --lr=1", "unknown setting 'lr'; did you mean learning_rate"),
        ("train --modle m", "unknown setting 'modle'; did you mean model_name_or_path"),
        ("train --beta x", "beta must be a number or null, got 'x'"),
        ("train --beta", "argument --beta: expected 1 argument"),
        ("train --resume maybe", "resume must be true or false, got 'maybe'"),
        ("train --seed 1.5", "seed must be a whole number, got '1.5'"),
        ("train --loss_type ipoo", "loss_type must be one of dpo, .*, got 'ipoo'; did you mean ipo"),
        ("train extra", "unrecognized arguments: extra"),
        (
            "generate --learning_rate 1",
            "learning_rate has no meaning for `prefuse generate`, only for sft, train, reward, online: drop",
        ),
        ("sft --beta 1", "beta has no meaning for `prefuse sft`, only for train, eval, online: drop --beta"),
        ("train --config a.yaml --config b.yaml", r"--config is given twice \(a.yaml, b.yaml\)"),
        ("train --config=a.yaml --config b.yaml", "--config is given twice"),
    ],
)
def test_a_wrong_flag_is_named(words, message):
    with pytest.raises(UserError, match=message):
        parse(words.split())


def test_a_file_may_hold_what_other_commands_need_and_says_what_is_not_used(tmp_path, capsys):
    path = yaml_file(tmp_path, "beta: 0.3\nlearning_rate: 1e-5\nlogging_steps: 10\n")
    config = parse(["eval", "--config", path])[1]
    assert (config.beta, config.learning_rate) == (0.3, None)
    assert "without a meaning for `prefuse eval`, not used: learning_rate\n" in capsys.readouterr().err


@pytest.mark.parametrize("command", help_pages.NEEDED)
def test_what_a_command_says_it_needs_is_what_it_cannot_be_without(command):
    names = re.findall(r"--(\w+)", help_pages.NEEDED[command])
    given = dict.fromkeys(names, "x") | ({"scorer": ["length"]} if "scorer" in names else {})
    assert f"needs {help_pages.NEEDED[command]}, or --config" in help_pages.needed_of(command)
    for left_out in names:
        with pytest.raises(UserError, match=f"{left_out} is required"):
            validate(Config(**{name: value for name, value in given.items() if name != left_out}), command)
