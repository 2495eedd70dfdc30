"""A real chat model learns a format from a rule alone: GRPO with LoRA on SmolLM2, minutes on a CPU.

    python examples/format_rule.py --model_name_or_path SmolLM2-135M-Instruct

The rule is `regex=^The `, of a kind that is built in: an answer that begins with "The" is worth 1, any other 0. Its
first eight tokens tell. The questions are written here. The exit code is 1 unless held-out questions are answered in
this form clearly more often.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import demo
import torch
from transformers.utils.logging import disable_progress_bar

FOLDER = Path("runs/format_rule")
THINGS = ("a cat", "the sea", "an apple", "a bicycle", "the moon", "a library", "snow", "a violin", "bread", "a river",
          "a clock", "the desert", "a bridge", "honey", "a lamp", "a garden")  # fmt: skip
QUESTIONS = ("What is {}?", "Why do people like {}?", "What colour is {}?", "Where would I find {}?",
             "Tell me something about {}.")  # fmt: skip


def write_data(folder: Path) -> None:
    asked = [question.format(thing) for thing in THINGS for question in QUESTIONS]
    random.Random(0).shuffle(asked)
    for name, part in (("held", asked[:24]), ("prompts", asked[24:])):
        rows = [{"prompt": [{"role": "user", "content": text}]} for text in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def learn(folder: Path, model: str, steps: int = 8) -> tuple[float, float]:
    """The share of held-out questions that are answered in this form, before and after."""
    write_data(folder)
    demo.prefuse(
        "online", algorithm="grpo", model_name_or_path=model, dataset_name=folder / "prompts.jsonl",
        eval_dataset=folder / "held.jsonl", scorer="regex=^The ", output_dir=folder / "run", use_peft=True, lora_r=16,
        num_generations=8, per_device_train_batch_size=32, max_completion_length=8, max_steps=steps,
        learning_rate=1e-3, lr_scheduler_type="constant", warmup_ratio=0.0, per_device_eval_batch_size=8,
        logging_steps=1, eval_steps=10_000, save_steps=0, score_cache="none",
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = [line["eval_reward"] for line in lines if "eval_reward" in line]
    return rewards[0], rewards[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    demo.FOLDER = FOLDER
    before, after = learn(demo.fresh(FOLDER), args.model_name_or_path, args.steps)
    demo.console.print(f"{before:.1%} of the held-out answers begin as the rule has it before, {after:.1%} after")
    return 0 if after > before + 0.2 else 1


if __name__ == "__main__":
    sys.exit(main())
