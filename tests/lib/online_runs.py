"""Short runs of `prefuse online` on a tiny model, with a rule that any policy can please: vowels in the answer."""

from pathlib import Path

from prefuse.engine.online import PromptRows
from prefuse.engine.train import train
from tiny_run import read_log, settings, write_rows

# The tokenizer's answers are short strings: how many vowels, so that most groups have unequal rewards.
RULE = '''
def vowels(prompts, completions, **_):
    """How many of the answer's characters are vowels; more is better."""
    return [sum(letter in "aeiou" for letter in answer) / 8 for answer in completions]


def same(prompts, completions, **_):
    return [1.0 for _ in completions]


def gold(prompts, completions, **_):
    """The opposite of the rule: what the rule cannot see."""
    return [-sum(letter in "aeiou" for letter in answer) / 8 for answer in completions]
'''
PROMPTS = [
    {"prompt": f"say {'very ' * (i % 3)}{noun} {i}"} for i, noun in enumerate(["sky", "sea", "grass", "house"] * 4)
]


def write_rule(folder: Path) -> str:
    path = folder / "rules.py"
    path.write_text(RULE)
    return str(path)


def online(model: str, folder: Path, out: str = "run", rule: str = "vowels", **changes) -> list[dict]:
    """Run it and read its log."""
    rows = write_rows(folder / "prompts.jsonl", PROMPTS)
    given = {
        "model_name_or_path": model, "dataset_name": rows, "output_dir": str(folder / out),
        "scorer": [f"{write_rule(folder)}:{rule}"], "num_generations": 4, "per_device_train_batch_size": 16,
        "max_completion_length": 8, "max_steps": 2, "learning_rate": 1e-2, "algorithm": "grpo", "score_cache": "none",
    }  # fmt: skip
    train(settings("online", **given | changes), "online", PromptRows())
    return read_log(folder / out)
