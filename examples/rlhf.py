"""The three stages of RLHF on the demo's sorting task, in two minutes on a CPU: `python examples/rlhf.py`.

    sort d x a b =>     a b d x        preferred
                        x d b a        as correct, not preferred

1. `prefuse sft` teaches a small Llama to sort. Half of what it is shown descends, and so do half of its answers.
2. `prefuse label` compares four of its own answers to each prompt, by the rule in the place of people; `prefuse reward`
   trains a reward model on these pairs.
3. `prefuse online --algorithm iterative_dpo` samples answers, which the reward model alone scores, and learns best
   against worst; each round's reference is the policy as the round began.

Stages 2 and 3 are done twice: the second reward model has seen what the first one's policy writes. (One that knows only
answers of the first model is soon exploited: its scores rise while the rule's fall.) The rule judges held-out prompts
after each stage. The exit code is 1 unless each is better than the one before.
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


def reward_model(folder: Path, policy: str, name: str) -> None:
    """From the SFT model, on comparisons of the policy's own answers, with those that were made before."""
    demo.prefuse(
        "label", model_name_or_path=folder / policy, dataset_name=folder / "prompts.jsonl", num_generations=4,
        scorer=f"{RULE}:ascending", pairs="all", max_new_tokens=10, per_device_eval_batch_size=100, score_cache="none",
        output_file=folder / f"{name}.jsonl",
    )  # fmt: skip
    rows = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("compared-*.jsonl")))
    (folder / "compared.jsonl").write_text(rows, encoding="utf-8")
    demo.prefuse(
        "reward", model_name_or_path=folder / "sft", dataset_name=folder / "compared.jsonl", output_dir=folder / name,
        learning_rate=1e-3, per_device_train_batch_size=32, logging_steps=50, eval_steps=10_000, save_steps=0,
    )  # fmt: skip


def stages(folder: Path, epochs: float = 3.0, steps: int = 15) -> dict[str, float]:
    """The share of ascending answers after each stage."""
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
    for number, (before, after) in enumerate((("sft", "first"), ("first", "second"))):
        reward_model(folder, before, f"compared-{number}")
        demo.prefuse(
            "online", algorithm="iterative_dpo", beta=1.0, model_name_or_path=folder / before,
            dataset_name=folder / "prompts.jsonl", scorer=folder / f"compared-{number}", output_dir=folder / after,
            num_generations=8, per_device_train_batch_size=128, steps_per_generation=2, max_completion_length=10,
            max_steps=steps, learning_rate=5e-4, logging_steps=5, eval_strategy="no", eval_fraction=0.0, save_steps=0,
        )  # fmt: skip
        found[after] = ascending(folder, after)
    return found


def main() -> int:
    torch.set_num_threads(1)
    disable_progress_bar()
    demo.FOLDER = FOLDER
    found = stages(demo.fresh(FOLDER))
    names = {"sft": "SFT", "first": "iterative DPO by the first reward model", "second": "by the second"}
    for name, share in found.items():
        demo.console.print(f"{names[name]}: {share:.1%} of the held-out answers ascend")
    return 0 if found["sft"] + 0.1 < found["first"] and found["first"] + 0.02 < found["second"] else 1


if __name__ == "__main__":
    sys.exit(main())
