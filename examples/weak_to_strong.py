"""Weak-to-strong generalization on the demo's task, in a minute or two on a CPU: `python examples/weak_to_strong.py`.

Labels of a small model train a larger one. How much of what the larger one could have learned from true labels does it
learn from weak ones (Burns et al. 2023, arXiv 2312.09390)?

    recovered gap = (strong on weak labels - weak) / (strong on true labels - weak)

1. Two Llamas learn to sort, either way: a small one from few demonstrations, a larger one from many.
2. `prefuse reward` trains the small one on a few true pairs: the weak labeller.
3. `prefuse label` lets it label pairs that nobody has labelled; `prefuse reward` trains the larger one on its labels.
4. `prefuse reward` trains the larger one on the true labels of the same pairs: the ceiling.

All three are measured on held-out pairs with true labels. The exit code is 1 unless the strong model is better than its
teacher.
"""

import json
import random
import sys
from pathlib import Path

import demo
import torch
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

FOLDER = Path("runs/weak_to_strong")
# (One layer would not do: what its last token sees depends hardly on the order of the others.)
WEAK = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip
FEW = 150  # true pairs of the weak labeller


def hard_pair(letters: list[str], rng: random.Random) -> dict[str, str]:
    """Ascending, against the same letters in any other order."""
    pair = demo.make_pair(letters)
    worse = pair["chosen"].split()
    while " ".join(worse) == pair["chosen"]:
        rng.shuffle(worse)
    return pair | {"rejected": " ".join(worse)}


def write_data(folder: Path) -> None:
    rng = random.Random(demo.SEED)
    problems = [
        pair["prompt"].removeprefix("sort ").removesuffix(" =>").split() for pair in demo.make_pairs(14_500, rng)
    ]
    pairs = [hard_pair(letters, rng) for letters in problems[:2500]]
    shown = [demo.make_pair(letters) for letters in problems[2500:]]
    rows = [{"prompt": pair["prompt"], "completion": pair[rng.choice(demo.SIDES)]} for pair in shown]
    files = {
        "held": pairs[:500], "few": pairs[500 : 500 + FEW], "pairs": pairs[1000:], "many_shown": rows,
        "few_shown": rows[:2000],
    }  # fmt: skip
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")


def make_models(folder: Path) -> None:
    tokenizer = demo.make_tokenizer()
    large = demo.make_model(tokenizer)
    config = large.config.__class__(**large.config.to_dict() | WEAK)
    torch.manual_seed(demo.SEED)
    for name, model in (("small", LlamaForCausalLM(config)), ("large", large)):
        model.save_pretrained(folder / f"{name}-base")
        tokenizer.save_pretrained(folder / f"{name}-base")
    for name, data, epochs in (("small", "few_shown", 4), ("large", "many_shown", 3)):
        demo.prefuse(
            "sft", model_name_or_path=folder / f"{name}-base", dataset_name=folder / f"{data}.jsonl",
            output_dir=folder / name, num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=4e-3,
            lr_scheduler_type="cosine", logging_steps=200, eval_steps=10_000, save_steps=0,
        )  # fmt: skip


def accuracy(folder: Path, start: str, data: str, name: str, epochs: float) -> float:
    """On the held-out pairs, of a reward model that is trained on `data`."""
    demo.prefuse(
        "reward", model_name_or_path=folder / start, dataset_name=folder / f"{data}.jsonl",
        eval_dataset=folder / "held.jsonl", output_dir=folder / name, num_train_epochs=epochs, learning_rate=1e-3,
        per_device_train_batch_size=32, per_device_eval_batch_size=100, logging_steps=20, eval_steps=10_000,
        save_steps=0,
    )  # fmt: skip
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "eval_accuracy" in row][-1]["eval_accuracy"]


def stages(folder: Path) -> dict[str, float]:
    write_data(folder)
    make_models(folder)
    weak = accuracy(folder, "small", "few", "weak", epochs=4)
    demo.prefuse(
        "label", dataset_name=folder / "pairs.jsonl", scorer=folder / "weak", output_file=folder / "weak_labels.jsonl",
        score_cache="none",
    )  # fmt: skip
    strong = accuracy(folder, "large", "weak_labels", "strong", epochs=1)
    ceiling = accuracy(folder, "large", "pairs", "ceiling", epochs=1)
    return {"weak": weak, "strong": strong, "ceiling": ceiling}


def main() -> int:
    torch.set_num_threads(1)
    disable_progress_bar()
    demo.FOLDER = FOLDER
    found = stages(demo.fresh(FOLDER))
    weak, strong, ceiling = found.values()
    demo.console.print(
        f"right about held-out pairs: weak {weak:.1%}, strong on weak labels {strong:.1%}, strong on true labels "
        f"{ceiling:.1%}; recovered gap {(strong - weak) / (ceiling - weak):.0%}"
    )
    return 0 if weak < strong <= ceiling + 0.02 and strong - weak > 0.03 else 1


if __name__ == "__main__":
    sys.exit(main())
