"""The demo's sorting task learned from its rule alone, by samples: in minutes on a CPU.

    python examples/online.py                         # GRPO
    python examples/online.py --algorithm rloo        # or another algorithm of `prefuse online`

    sort d x a b =>     a b d x        reward 1
                        x d b a        reward 0, as everything else

1. `prefuse sft` teaches a small Llama the task. Half of what it is shown descends, and so do half of its answers.
2. `prefuse online` samples answers of that model, asks sorting_rule.py, and learns: nobody shows it an answer.

The exit code is 1 unless the share of ascending answers to held-out prompts has clearly risen.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import demo
import torch
from transformers.utils.logging import disable_progress_bar

FOLDER = Path("runs/online")
RULE = Path(__file__).with_name("sorting_rule.py")
# What an algorithm needs beside the settings below.
SETTINGS = {
    "grpo": {}, "rloo": {"beta": 0.0}, "reinforce": {}, "ppo": {"beta": 0.0}, "online_dpo": {"beta": 0.5},
    "iterative_dpo": {"beta": 0.5}, "kto": {"beta": 0.5}, "best_of_n": {},
}  # fmt: skip


def make_start(folder: Path, epochs: float = 3.0) -> None:
    """A model that sorts either way, and prompts it has not seen."""
    rng = random.Random(demo.SEED)
    pairs = demo.make_pairs(600 + 12_000, rng)
    prompts, shown = pairs[:600], pairs[600:]
    rows = [{"prompt": pair["prompt"], "completion": pair[rng.choice(demo.SIDES)]} for pair in shown]
    files = {"demonstrations": rows, "prompts": [{"prompt": pair["prompt"]} for pair in prompts]}
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    tokenizer = demo.make_tokenizer()
    demo.make_model(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    demo.prefuse(
        "sft", model_name_or_path=folder / "base", dataset_name=folder / "demonstrations.jsonl",
        output_dir=folder / "sft", num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=4e-3,
        lr_scheduler_type="cosine", logging_steps=200, eval_steps=10_000, save_steps=0,
    )  # fmt: skip


def learn(folder: Path, algorithm: str, steps: int = 40) -> tuple[float, float]:
    """The share of ascending answers to held-out prompts before and after."""
    demo.prefuse(
        "online", algorithm=algorithm, model_name_or_path=folder / "sft", dataset_name=folder / "prompts.jsonl",
        scorer=f"{RULE}:ascending", output_dir=folder / algorithm, eval_fraction=0.5,
        num_generations=8, per_device_train_batch_size=128, max_completion_length=10, max_steps=steps,
        learning_rate=1e-3, logging_steps=5, eval_steps=10_000, save_steps=0, **SETTINGS[algorithm],
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / algorithm / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["eval_reward"] for line in lines if "eval_reward" in line]
    return rewards[0], rewards[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=SETTINGS, nargs="+", default=["grpo"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    demo.FOLDER = FOLDER
    folder = demo.fresh(FOLDER)
    make_start(folder)
    failed = 0
    for algorithm in args.algorithm:
        before, after = learn(folder, algorithm)
        demo.console.print(f"{algorithm}: {before:.1%} of the held-out answers ascend before, {after:.1%} after")
        failed += after < before + 0.2
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
