"""docs/evaluation.md: its Python runs, its commands have the flags shown, and every setting of scoring is named. The
commands of docs/rewards.md have the flags shown too."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from prefuse.engine.cli import parse
from prefuse.engine.config.evaluation import EvaluationSettings
from prefuse.engine.config.settings import validate
from prefuse.engine.score.rules import RULES

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
REWARDS = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```bash\n(.*?)```", PAGE + REWARDS, re.DOTALL)
COMMANDS = [shlex.split(line) for block in SHELL for line in block.strip().splitlines() if " bench " not in line]
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_have_the_settings_shown(words):
    command, config = parse(words[1:])
    validate(config, command)


@pytest.mark.parametrize("text", PYTHON)
def test_python_runs(text):
    exec(text, {})


def test_what_there_is_is_named():
    assert len(COMMANDS) >= 3
    for field in dataclasses.fields(EvaluationSettings):
        assert field.name in PAGE, field.name
    for rule in RULES:
        assert f"`{rule}" in PAGE, rule
