"""docs/coming_from.md names settings that exist."""

import dataclasses
import re
from pathlib import Path

import pytest

from prefuse.engine.config.settings import FIELDS, LOSS_TYPES, Config, commands_of, validate

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "coming_from.md").read_text(encoding="utf-8")
CELLS = [cells[-1] for line in PAGE.splitlines() if (cells := [c for c in line.strip("| \n").split("|") if c.strip()])]


def test_every_flag_on_our_side_is_a_setting():
    named = {name for cell in CELLS for name in re.findall(r"--(\w+)", cell)}
    assert {"beta", "parallel", "resume"} <= named
    assert named <= set(FIELDS)


@pytest.mark.parametrize("name", ["nll_weight", "lora_modules_to_save", "ref_model_name_or_path", "columns"])
def test_settings_that_are_named_without_dashes_exist(name):
    assert f"`{name}" in PAGE
    assert name in FIELDS


def test_losses_that_are_named_exist():
    named = set(re.findall(r"loss_type[: ]+`?(\w+)", PAGE))
    assert {"dpo", "kto", "rpo"} <= named <= set(LOSS_TYPES)


@pytest.mark.parametrize(
    ("command", "name"), [("train", "DPOConfig"), ("reward", "RewardConfig"), ("sft", "SFTConfig")]
)
def test_every_default_of_trl_that_differs_and_changes_a_number_is_named(command, name):
    """Settings that both have under one name; what only names files, logs or kept checkpoints changes none."""
    trl = pytest.importorskip("trl")
    theirs = {
        field.name: field.default if field.default is not dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(getattr(trl, name))
    }
    given = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    ours = dataclasses.asdict(validate(Config(**given), command))
    silent = {
        "output_dir", "save_total_limit", "report_to", "run_name", "torch_compile_backend", "eval_steps", "loss_type",
        "padding_free", "logging_steps", "save_steps", "bf16",
    }  # fmt: skip
    if command != "train":  # settings that stand open until the loss is known
        silent |= {"beta", "label_smoothing"}
    resolved = {"beta", "label_smoothing", "discopop_tau", "f_alpha_divergence_coef", "simpo_gamma"}  # None: the loss's
    differ = {
        setting for setting in ours.keys() & theirs.keys() - silent - resolved if ours[setting] != theirs[setting]
    } & {setting for setting in FIELDS if command in commands_of(setting)}
    section = PAGE[PAGE.index("## TRL") : PAGE.index("## Liger")]
    assert {setting for setting in differ if setting not in section} == set()
