"""The three stages of RLHF on the demo's sorting task, in a minute or two on a CPU: `python examples/rlhf.py`.

    sort d x a b =>     a b d x        preferred
                        x d b a        as correct, not preferred

1. `prefuse sft` teaches a small Llama to sort. Half of what it is shown descends, and so do half of its answers.
2. `prefuse reward` trains a reward model from that one on pairs: ascending over descending, and sorted over unsorted.
3. `prefuse online --algorithm iterative_dpo` samples answers, which the reward model scores, and learns best against
   worst, round by round; each round's reference is the policy as the round began. Nobody shows it an answer.

Stage 3 is done twice, so that it can be seen to go on: the second run starts from the first one's model. The rule
itself judges held-out prompts after each stage. The exit code is 1 unless each stage is better than the one before.
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
    """Demonstrations in either order; pairs by the preference; prompts alone, and those that are held out."""
    rng = random.Random(demo.SEED)
    pairs = demo.make_pairs(300 + 600 + 2000 + 12_000, rng)
    held, asked, compared, shown = pairs[:300], pairs[300:900], pairs[900:2900], pairs[2900:]
    for pair in compared[::2]:  # half of them: a wrong answer loses to a right one
        letters = pair["chosen"].split()
        rng.shuffle(letters)
        pair["rejected"] = " ".join(letters) if letters != pair["chosen"].split() else pair["rejected"]
    files = {
        "held": [{"prompt": pair["prompt"]} for pair in held],
        "prompts": [{"prompt": pair["prompt"]} for pair in asked],
        "pairs": compared,
        "demonstrations": [{"prompt": pair["prompt"], "completion": pair[rng.choice(demo.SIDES)]} for pair in shown],
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


def stages(folder: Path, epochs: float = 2.0, steps: int = 20) -> dict[str, float]:
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
    demo.prefuse(
        "reward", model_name_or_path=folder / "sft", dataset_name=folder / "pairs.jsonl", output_dir=folder / "reward",
        learning_rate=1e-3, per_device_train_batch_size=32, logging_steps=50, eval_steps=10_000, save_steps=0,
    )  # fmt: skip
    found = {"sft": ascending(folder, "sft")}
    for before, after in (("sft", "first"), ("first", "second")):
        demo.prefuse(
            "online", algorithm="iterative_dpo", beta=0.5, model_name_or_path=folder / before,
            dataset_name=folder / "prompts.jsonl", scorer=folder / "reward", output_dir=folder / after,
            num_generations=8, per_device_train_batch_size=128, steps_per_generation=2, max_completion_length=10,
            max_steps=steps, learning_rate=5e-4, logging_steps=10, eval_strategy="no", eval_fraction=0.0, save_steps=0,
        )  # fmt: skip
        found[after] = ascending(folder, after)
    return found


def main() -> int:
    torch.set_num_threads(1)
    disable_progress_bar()
    demo.FOLDER = FOLDER
    found = stages(demo.fresh(FOLDER))
    names = {"sft": "SFT", "first": "online DPO by the reward model", "second": "and once more"}
    for name, share in found.items():
        demo.console.print(f"{names[name]}: {share:.1%} of the held-out answers ascend")
    return 0 if found["sft"] + 0.1 < found["first"] and found["first"] + 0.02 < found["second"] else 1


if __name__ == "__main__":
    sys.exit(main())
