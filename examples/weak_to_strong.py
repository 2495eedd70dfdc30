"""Weak-to-strong: labels of a small reward model train a larger one, and how much of the gap comes back is printed.

    python examples/weak_to_strong.py

Burns et al. 2023 (arXiv 2312.09390). The weak supervisor is a small reward model that saw few true preferences; the
student is larger and sees only what the supervisor says of other pairs; the ceiling is the student on true preferences.

    recovered = (student - supervisor) / (ceiling - supervisor)      of accuracies on held-out true preferences
"""

import json
import random
import sys
from pathlib import Path

import demo
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

FOLDER = Path("runs/weak_to_strong")
SIZES = {"weak": (16, 1), "strong": (96, 3)}  # hidden size, layers


def write_pairs(folder: Path) -> None:
    """True preferences: the ascending answer over one with two letters exchanged, which is hard to see."""
    rng = random.Random(demo.SEED)
    rows = []
    for pair in demo.make_pairs(3_600, rng):
        letters = pair["chosen"].split(" ")
        at = rng.randrange(len(letters) - 1)
        letters[at], letters[at + 1] = letters[at + 1], letters[at]
        rows.append({"prompt": pair["prompt"], "chosen": pair["chosen"], "rejected": " ".join(letters)})
    parts = {"few": rows[:600], "others": rows[600:3_000], "held_out": rows[3_000:]}
    for name, lines in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")


def write_models(folder: Path) -> None:
    tokenizer = demo.make_tokenizer()
    for name, (width, layers) in SIZES.items():
        torch.manual_seed(demo.SEED)
        config = LlamaConfig(
            hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers, num_attention_heads=4,
            max_position_embeddings=64, vocab_size=len(tokenizer), bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def reward_model(folder: Path, model: str, rows: str, out: str, epochs: int) -> float:
    """Its accuracy on held-out true preferences."""
    demo.prefuse(
        "reward", model_name_or_path=folder / model, dataset_name=folder / f"{rows}.jsonl",
        eval_dataset=folder / "held_out.jsonl", output_dir=folder / out, num_train_epochs=epochs,
        per_device_train_batch_size=32, learning_rate=3e-3, logging_steps=50, eval_steps=10_000, save_steps=0,
    )  # fmt: skip
    lines = [json.loads(line) for line in (folder / out / "metrics.jsonl").read_text().splitlines()]
    return next(line["eval_accuracy"] for line in reversed(lines) if "eval_accuracy" in line)


def main() -> int:
    torch.set_num_threads(1)
    disable_progress_bar()
    demo.FOLDER = FOLDER
    folder = demo.fresh(FOLDER)
    write_pairs(folder)
    write_models(folder)
    supervisor = reward_model(folder, "weak", "few", "supervisor", 10)
    demo.prefuse(
        "label", dataset_name=folder / "others.jsonl", scorer=folder / "supervisor", score_cache="none",
        output_file=folder / "weak_labels.jsonl",
    )  # fmt: skip
    trust = json.loads((folder / "weak_labels.trust.json").read_text(encoding="utf-8"))
    student = reward_model(folder, "strong", "weak_labels", "student", 4)
    ceiling = reward_model(folder, "strong", "others", "ceiling", 4)
    recovered = (student - supervisor) / (ceiling - supervisor)
    demo.console.print(
        f"supervisor {supervisor:.1%} (its labels agree with the truth in {trust['given_agreement']:.1%}), student "
        f"{student:.1%}, ceiling {ceiling:.1%}: {recovered:.0%} of the gap is recovered"
    )
    return int(not supervisor < ceiling)


if __name__ == "__main__":
    sys.exit(main())
