"""Over-optimization, as a picture: a proxy that rises while what it stands for falls. In a minute or two on a CPU.

    python examples/overoptimization.py

    sort d x a b =>     a b d x        gold 1: the rule
                        x d b a        gold 0, as everything else

1. `prefuse sft` teaches a small Llama to sort, ascending or descending.
2. `prefuse reward` trains a reward model, the proxy, on 16 comparisons. It is right about every held-out pair of an
   ascending and a descending answer, and knows nothing of all other answers.
3. `prefuse online` optimizes against the proxy, without a pull to where it began.
4. `prefuse eval --checkpoints` scores the answers of every checkpoint by the proxy and by the rule: first both rise,
   then the model leaves what the comparisons told of, and gold falls while the proxy rises still (arXiv 2210.10760).

The picture is runs/overoptimization/over_optimization.png. The exit code is 1 unless the curves do that.
"""

import argparse
import json
import random
import sys
from pathlib import Path

import demo
import torch
from online import RULE, make_start
from transformers.utils.logging import disable_progress_bar

FOLDER = Path("runs/overoptimization")
COMPARISONS, HELD_OUT = 16, 200
LEAST_FALL = 0.3  # of gold, which is a share of answers, from its best to the last checkpoint


def write_comparisons(folder: Path) -> None:
    """Few pairs to learn the proxy from, and prompts that no run has seen."""
    pairs = demo.make_pairs(COMPARISONS + HELD_OUT, random.Random(77))
    for name, rows in ("few", pairs[:COMPARISONS]), ("held_out", pairs[COMPARISONS:]):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def train_proxy(folder: Path) -> float:
    """Its accuracy on held-out pairs."""
    demo.prefuse(
        "reward", model_name_or_path=folder / "sft", dataset_name=folder / "few.jsonl",
        eval_dataset=folder / "held_out.jsonl", output_dir=folder / "proxy", num_train_epochs=10, learning_rate=1e-3,
        per_device_train_batch_size=8, per_device_eval_batch_size=100, logging_steps=20, save_steps=0,
    )  # fmt: skip
    lines = (folder / "proxy" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "eval_accuracy" in row][-1]["eval_accuracy"]


def optimize(folder: Path, steps: int = 80) -> None:
    demo.prefuse(
        "online", algorithm="grpo", beta=0.0, model_name_or_path=folder / "sft",
        dataset_name=folder / "prompts.jsonl", scorer=folder / "proxy", output_dir=folder / "run", eval_fraction=0.0,
        num_generations=8, per_device_train_batch_size=64, max_completion_length=10, max_steps=steps,
        learning_rate=5e-4, logging_steps=20, save_steps=steps // 14, save_total_limit=0, score_cache="none",
    )  # fmt: skip


def look(folder: Path) -> list[dict[str, float]]:
    """{step, score, gold_score, sqrt_kl, ...} of the start and of every checkpoint."""
    demo.prefuse(
        "eval", checkpoints=folder / "run", eval_dataset=folder / "held_out.jsonl", scorer=folder / "proxy",
        gold_scorer=f"{RULE}:ascending", temperature=1.0, max_new_tokens=10, per_device_eval_batch_size=100,
        output_file=folder / "over_optimization.json", score_cache="none",
    )  # fmt: skip
    return json.loads((folder / "over_optimization.json").read_text(encoding="utf-8"))["checkpoints"]


def broken_claims(points: list[dict[str, float]], accuracy: float) -> list[str]:
    first, last = points[0], points[-1]
    best = max(points, key=lambda point: point["gold_score"])
    claims = {
        "the proxy is right about 95% of the held-out pairs": accuracy >= 0.95,
        "gold rises first, by 0.15 or more": best["gold_score"] >= first["gold_score"] + 0.15,
        f"gold then falls, by {LEAST_FALL} or more": last["gold_score"] <= best["gold_score"] - LEAST_FALL,
        "the proxy is higher at the end than where gold was best": last["score"] > best["score"],
        "the model at the end is further from the start than where gold was best": last["kl"] > best["kl"],
    }
    return [claim for claim, holds in claims.items() if not holds]


def run(folder: Path) -> list[str]:
    """All steps; what of the claims does not hold."""
    make_start(folder)
    write_comparisons(folder)
    accuracy = train_proxy(folder)
    optimize(folder)
    points = look(folder)
    best = max(points, key=lambda point: point["gold_score"])
    for what, point in ("at first", points[0]), ("where gold is best", best), ("at the end", points[-1]):
        demo.console.print(
            f"{what:20} step {point['step']:3}  sqrt(KL) {point['sqrt_kl']:.2f}  proxy {point['score']:.2f}  "
            f"gold {point['gold_score']:.1%}"
        )
    return broken_claims(points, accuracy)


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    demo.FOLDER = FOLDER
    broken = run(demo.fresh(FOLDER))
    for claim in broken:
        demo.console.print(f"not so: {claim}", style="bold red")
    return min(len(broken), 1)


if __name__ == "__main__":
    sys.exit(main())
