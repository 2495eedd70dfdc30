"""docs/online.md and docs/ai_feedback.md: the commands that they begin with run, settings and algorithms exist."""

import re
import shlex
import typing
from pathlib import Path

import pytest

from online_runs import PROMPTS
from prefuse.engine import cli
from prefuse.engine.config.online import OnlineSettings
from prefuse.engine.config.settings import FIELDS, commands_of
from prefuse.engine.rounds import guards, learn
from tiny_run import save_model, write_rows

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


QUICKER = ["--num_generations", "2", "--per_device_train_batch_size", "4", "--max_completion_length", "4"]
SHORT = {
    "online": [*QUICKER, "--max_steps", "1", "--max_length", "64", "--eval_fraction", "0"],
    "eval": ["--max_new_tokens", "4"], "label": ["--max_new_tokens", "4", "--num_generations", "2"],
    "revise": ["--max_new_tokens", "4", "--num_prompts", "3"],
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param("online.md", marks=pytest.mark.slow), "ai_feedback.md"])
def test_the_first_commands_run_as_they_stand(name, tmp_path, monkeypatch):
    """On tiny models and few rows, so with smaller numbers behind them; each finds what the one before has made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFUSE_CACHE", str(tmp_path / "cache"))
    for model in ("sft", "judge"):
        save_model(tmp_path / model)
    for rows in ("prompts", "held_out"):
        write_rows(tmp_path / f"{rows}.jsonl", PROMPTS[:6])
    (tmp_path / "rewards.py").write_text(
        re.search(r"^```python\n(def my_rule.*?)^```$", PAGES["online.md"], re.S | re.M)[1]
    )
    (tmp_path / "constitution.yaml").write_text(
        re.search(r"^```yaml\n(.*?)^```$", PAGES["ai_feedback.md"], re.S | re.M)[1]
    )
    block = re.search(r"^```bash\n(.*?)^```$", PAGES[name], re.S | re.M)[1]
    lines = [shlex.split(line, comments=True) for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    assert [words[0] for words in lines] == ["prefuse", "prefuse"]
    for _, command, *rest in lines:
        head = ["--impl", "torch"] if command in ("online", "eval") else []
        assert cli.main([command, *rest, *SHORT[command], "--device", "cpu", *head]) == 0
    made = {"online.md": ["grpo/model.safetensors"], "ai_feedback.md": ["ai_pairs.jsonl", "revised.jsonl"]}
    assert all((tmp_path / path).exists() for path in made[name])


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own default
def test_the_snippet_for_trl_runs():
    (snippet,) = re.findall(r"^```python\n(import prefuse.trl.*?)^```$", PAGES["online.md"], re.S | re.M)
    names: dict = {}
    try:
        exec(
            compile(snippet.replace("use_vllm=True", "use_vllm=True, use_cpu=True, bf16=False"), "online.md", "exec"),
            names,
        )
    finally:
        names["prefuse"].trl.disable()
    assert names["settings"].vllm_mode == "colocate"


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
