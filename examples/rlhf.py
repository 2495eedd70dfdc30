"""The three stages of RLHF on the demo's sorting task, in two minutes on a CPU: `python examples/rlhf.py`.

    sort d x a b =>     a b d x        preferred
                        x d b a        as correct, not preferred

1. `prefuse sft` teaches a small Llama to sort. Half of what it is shown descends, and so do half of its answers.
2. `prefuse label` compares four of its own answers to each prompt, by the rule in the place of people; `prefuse reward`
   trains a reward model on these pairs.
3. `prefuse online` samples answers, which the reward model alone scores, and learns from them. It is stopped early: a
   reward model that knows only answers of the first policy is soon exploited, its scores rising while the rule's fall.

The rule judges held-out prompts after stages 1 and 3. The exit code is 1 unless the last model is clearly better.
"""

import json
import random
import sys
from pathlib import Path

import demo
import torch
from transformers.utils.logging import disable_progress_bar

FOLDER = Path("runs/rlhf")
RULE = Path(__file__).with_name("sorting_rule.py")


def write_data(folder: Path) -> None:
    """Demonstrations in either order; prompts alone, to sample from and held out."""
    rng = random.Random(demo.SEED)
    pairs = demo.make_pairs(300 + 600 + 12_000, rng)
    files = {
        "held": [{"prompt": pair["prompt"]} for pair in pairs[:300]],
        "prompts": [{"prompt": pair["prompt"]} for pair in pairs[300:900]],
        "demonstrations": [{"prompt": p["prompt"], "completion": p[rng.choice(demo.SIDES)]} for p in pairs[900:]],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def ascending(folder: Path, name: str) -> float:
    """The rule's mean over one sampled answer to each held-out prompt."""
    out = folder / f"{name}.json"
    demo.prefuse(
        "eval", model_name_or_path=folder / name, eval_dataset=folder / "held.jsonl", scorer=f"{RULE}:ascending",
        temperature=1.0, max_new_tokens=10, per_device_eval_batch_size=100, output_file=out, score_cache="none",
    )  # fmt: skip
    return json.loads(out.read_text(encoding="utf-8"))["score"]


ALGORITHMS = {
    "iterative_dpo": {"beta": 1.0, "steps_per_generation": 2, "max_steps": 15, "learning_rate": 5e-4},
    "grpo": {"max_steps": 15, "learning_rate": 1e-3},
}  # fmt: skip


def stages(folder: Path, algorithms: tuple[str, ...] = ("iterative_dpo",), epochs: float = 2.0) -> dict[str, float]:
    """The share of ascending answers after SFT and after each algorithm; and how often the reward model is right."""
    write_data(folder)
    tokenizer = demo.make_tokenizer()
    demo.make_model(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    demo.prefuse(
        "sft", model_name_or_path=folder / "base", dataset_name=folder / "demonstrations.jsonl",
        output_dir=folder / "sft", num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=4e-3,
        lr_scheduler_type="cosine", logging_steps=200, eval_steps=10_000, save_steps=0,
    )  # fmt: skip
    found = {"sft": ascending(folder, "sft")}
    demo.prefuse(
        "label", model_name_or_path=folder / "sft", dataset_name=folder / "prompts.jsonl", num_generations=4,
        scorer=f"{RULE}:ascending", pairs="all", max_new_tokens=10, per_device_eval_batch_size=100, score_cache="none",
        output_file=folder / "compared.jsonl",
    )  # fmt: skip
    demo.prefuse(
        "reward", model_name_or_path=folder / "sft", dataset_name=folder / "compared.jsonl",
        output_dir=folder / "reward", learning_rate=1e-3, per_device_train_batch_size=32, logging_steps=50,
        eval_steps=10_000, save_steps=0,
    )  # fmt: skip
    for algorithm in algorithms:
        demo.prefuse(
            "online", algorithm=algorithm, model_name_or_path=folder / "sft", dataset_name=folder / "prompts.jsonl",
            scorer=folder / "reward", output_dir=folder / algorithm, num_generations=8, per_device_train_batch_size=128,
            max_completion_length=10, logging_steps=5, eval_strategy="no", eval_fraction=0.0, save_steps=0,
            **ALGORITHMS[algorithm],
        )  # fmt: skip
        found[algorithm] = ascending(folder, algorithm)
    return found


def main() -> int:
    torch.set_num_threads(1)
    disable_progress_bar()
    demo.FOLDER = FOLDER
    found = stages(demo.fresh(FOLDER))
    for name, share in found.items():
        demo.console.print(f"{name}: {share:.1%} of the held-out answers ascend")
    return 0 if found["iterative_dpo"] > found["sft"] + 0.05 else 1


if __name__ == "__main__":
    sys.exit(main())
