"""The three stages of RLHF in one script, on a CPU in minutes: demonstrations, a reward model, learning from it.

    python examples/rlhf.py                          # iterative DPO in the last stage; --algorithm grpo, ppo, ...

    sort d x a b =>     a b d x        what the people in this story prefer

1. `prefuse sft`: a small Llama learns to sort either way.
2. `prefuse label` and `prefuse reward`: its own answers are compared by a rule (the people), and a reward model learns
   from these comparisons alone.
3. `prefuse online`: the policy learns from the reward model. The rule is its gold score: looked at, never learned.

The exit code is 1 unless the gold score of held-out answers has clearly risen.
"""

import argparse
import json
import sys
from pathlib import Path

import demo
import online
import torch
from transformers.utils.logging import disable_progress_bar

FOLDER = Path("runs/rlhf")


def make_reward_model(folder: Path) -> None:
    demo.prefuse(
        "label", model_name_or_path=folder / "sft", dataset_name=folder / "prompts.jsonl", num_generations=4,
        pairs="all", scorer=f"{online.RULE}:ascending", max_new_tokens=10, per_device_eval_batch_size=200,
        output_file=folder / "compared.jsonl",
    )  # fmt: skip
    demo.prefuse(
        "reward", model_name_or_path=folder / "sft", dataset_name=folder / "compared.jsonl",
        output_dir=folder / "reward", num_train_epochs=6, per_device_train_batch_size=32, learning_rate=1e-3,
        logging_steps=20, eval_steps=10_000, save_steps=0, eval_fraction=0.1,
    )  # fmt: skip


def learn(folder: Path, algorithm: str) -> tuple[float, float]:
    """The gold score of held-out answers before and after."""
    demo.prefuse(
        "online", algorithm=algorithm, model_name_or_path=folder / "sft", dataset_name=folder / "prompts.jsonl",
        scorer=folder / "reward", gold_scorer=f"{online.RULE}:ascending", output_dir=folder / algorithm,
        eval_fraction=0.3, num_generations=8, per_device_train_batch_size=128, max_completion_length=10, max_steps=30,
        learning_rate=1e-3, logging_steps=5, eval_steps=10, save_steps=0, score_cache="none",
        **online.SETTINGS[algorithm],
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / algorithm / "metrics.jsonl").read_text().splitlines()]
    gold = [line["eval_gold"] for line in lines if "eval_gold" in line]
    return gold[0], gold[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algorithm", choices=online.SETTINGS, default="iterative_dpo")
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    demo.FOLDER = FOLDER
    folder = demo.fresh(FOLDER)
    online.make_start(folder, epochs=2.0)
    make_reward_model(folder)
    before, after = learn(folder, args.algorithm)
    demo.console.print(f"by the rule, {before:.1%} of the held-out answers are right before, {after:.1%} after")
    return int(after < before + 0.1)


if __name__ == "__main__":
    sys.exit(main())
