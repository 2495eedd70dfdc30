"""docs/online.md and docs/ai_feedback.md: their commands have these flags, their settings and algorithms exist."""

import re
import shlex
import typing
from pathlib import Path

import pytest

from prefuse.engine.config.online import OnlineSettings
from prefuse.engine.config.settings import FIELDS, commands_of
from prefuse.engine.rounds import guards, learn

ROOT = Path(__file__).resolve().parents[2]
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("online.md", "ai_feedback.md")}


def shown(page):
    """The command lines of a page, in words."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page, re.S | re.M)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("prefuse")]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_begins_with_commands_that_exist(name):
    words = shown(PAGES[name])
    assert PAGES[name].splitlines()[2] == "```bash"
    assert words
    for _, command, *rest in words:
        flags = [word.removeprefix("--") for word in rest if word.startswith("--")]
        assert flags
        assert all(command in commands_of(flag) for flag in flags), (command, flags)


def test_every_algorithm_and_every_setting_is_on_the_page():
    page = PAGES["online.md"]
    named = re.findall(r"^\| `(\w+)` \| (?:all|the|each|answers)", page, re.M)
    assert set(named) == set(typing.get_args(FIELDS["algorithm"]))
    guarded = re.findall(r"^\| ([\w -]+) \| .*\| `(\w+)`", page.split("## Guards")[1], re.M)
    source = Path(guards.__file__).read_text(encoding="utf-8")
    for guard, setting in guarded:
        assert f'"{guard}"' in source
        assert setting in OnlineSettings.__dataclass_fields__


def test_the_metrics_on_the_page_are_those_of_a_round():
    page = PAGES["online.md"].split("## What is logged")[1].split("##")[0]
    source = Path(learn.__file__).read_text(encoding="utf-8")
    for metric in ("frac_reward_zero_std", "completions/clipped_ratio", "completions/duplicates", "reward_truncated"):
        assert f"`{metric}`" in page
        assert f'"{metric}"' in source


@pytest.mark.parametrize("name", PAGES)
def test_linked_files_exist(name):
    for link in re.findall(r"\]\(([^)#\s]+)", PAGES[name]):
        assert "://" in link or (ROOT / "docs" / link).exists(), link
