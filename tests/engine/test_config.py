"""Settings: where a value comes from, how a wrong one is named, and that what is saved reads back the same."""

import ast
import dataclasses
import inspect

import pytest

from prefuse.engine.cli import parse
from prefuse.engine.config import settings as config_module
from prefuse.engine.config.settings import Config, validate
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


def test_every_field_has_a_docstring():
    (tree,) = ast.parse(inspect.getsource(Config)).body
    for field, text in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr), f"{field.target.id} has no docstring below it"
            assert isinstance(text.value, ast.Constant), field.target.id


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
        ("loss_type: ppo", r"loss_type must be one of dpo, ipo, kto, .*discopop, got 'ppo' \(str\)"),
        ("[1, 2]", "must hold `name: value` lines, got a list"),
        ("beta: [", "is not valid YAML"),
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
            "beta has a meaning only with loss_type dpo, ipo, .*discopop, got",
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
    """A new number must be put into one of the checks, or named here with the reason why it needs none."""
    checked = {*config_module._AT_LEAST_ONE, *config_module._AT_LEAST_ZERO, *config_module._ABOVE_ZERO}
    checked |= {"learning_rate", "max_steps", "eval_fraction", "adam_beta1", "adam_beta2", "warmup_ratio"}
    checked |= {"max_loss_ratio", "max_kl", "lora_dropout"}
    checked |= set(config_module.LOSS_SETTINGS)  # by the loss
    numbers = {f.name for f in dataclasses.fields(Config) if f.type in (int, float, float | None)}
    assert numbers == checked
