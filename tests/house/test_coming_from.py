"""docs/coming_from.md names settings that exist."""

import re
from pathlib import Path

import pytest

from prefuse.engine.config.settings import FIELDS, LOSS_TYPES

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
