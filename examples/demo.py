"""From random weights to an aligned model on the CPU, in a minute or two: `make demo`. What it makes is in runs/demo.

The task is to put letters in order. Two orders are right, and the ascending one is preferred:

    sort d x a b =>     a b d x        preferred
                        x d b a        as correct, not preferred

1. `prefuse sft` teaches a small Llama the task. Half of what it is shown descends, and so do half of its answers.
2. `prefuse train --loss_type dpo` aligns that model with pairs: ascending over descending.
3. `prefuse train --loss_type kto` aligns it with the same answers one by one, each labelled good or bad.
4. `prefuse eval` and `prefuse generate` look at all three, on letters that none of them has seen together.
5. `prefuse reward` trains a reward model on the same pairs, which then judges what the three models wrote.

A generated answer counts only if it holds exactly the letters of its prompt, in order. So a model that forgets how to
sort while its reward margin grows fails here (DPO does that with a weak pull to the reference: try BETA = 0.1).
Every command is printed as you would type it. The exit code is 1 if the models do not do what is claimed at the end.
"""

import contextlib
import json
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is downloaded; transformers reads this as it is imported

import torch
from rich.console import Console
from rich.table import Column, Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from prefuse.engine import cli
from prefuse.models.score import sequence_scores
from prefuse.packing import pack

FOLDER = Path("runs/demo")
MARKER = "made-by-the-demo"  # a file in it: a folder that lacks it is somebody's work, and is left alone

SIDES = ("chosen", "rejected")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
DEMONSTRATIONS, PAIRS, HELD_OUT = 24_000, 2_000, 1_000  # prompts for sft, for dpo and kto, and for the table
BETA = 1.0
SEED = 0

console = Console(highlight=False, soft_wrap=True)

# ---- The task and its rule ----


def make_pairs(count: int, rng: random.Random) -> list[dict[str, str]]:
    """Four to seven letters each. No two pairs have the same ones, so no answer can be known from another pair."""
    problems = {}
    while len(problems) < count:
        letters = rng.sample(LETTERS, rng.randint(4, 7))
        problems.setdefault(frozenset(letters), letters)
    return [make_pair(letters) for letters in problems.values()]


def make_pair(letters: list[str]) -> dict[str, str]:
    prompt, ascending = f"sort {' '.join(letters)} =>", sorted(letters)
    return {"prompt": prompt, "chosen": " ".join(ascending), "rejected": " ".join(reversed(ascending))}


def order_of(prompt: str, answer: str) -> str | None:
    """The rule: "ascending" or "descending" if the answer has exactly the prompt's letters in that order, else None."""
    pair = make_pair(prompt.removeprefix("sort ").removesuffix(" =>").split(" "))
    return {pair["chosen"]: "ascending", pair["rejected"]: "descending"}.get(answer.strip())  # it keeps its blank


def write_data(folder: Path) -> None:
    """Four files, each in a form that prefuse reads."""
    rng = random.Random(SEED)
    pairs = make_pairs(HELD_OUT + PAIRS + DEMONSTRATIONS, rng)
    held_out, training, shown = pairs[:HELD_OUT], pairs[HELD_OUT : HELD_OUT + PAIRS], pairs[HELD_OUT + PAIRS :]
    labelled = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in training
        for side in SIDES
    ]
    rng.shuffle(labelled)
    demonstrations = [{"prompt": pair["prompt"], "completion": pair[rng.choice(SIDES)]} for pair in shown]
    files = {"demonstrations": demonstrations, "pairs": training, "labelled": labelled, "held_out": held_out}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


# ---- A tokenizer, and a model that knows nothing yet ----


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word: the letters, `sort` and `=>`."""
    words = ["<end>", "sort", "=>", *LETTERS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=32,
        vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# ---- The runs ----


def prefuse(command: str, *, screen: Path | None = None, **settings: object) -> float:
    """Show `prefuse command --name value ... [> screen]`, do what it does, and return the seconds it took."""
    flags = [(f"--{name}", str(value)) for name, value in settings.items()]
    shown = [f"prefuse {command}", *map(" ".join, flags), *([f"> {screen}"] if screen else [])]
    lines = [" ".join(shown[i : i + 3]) for i in range(0, len(shown), 3)]
    console.print("\n$ " + " \\\n    ".join(lines), style="bold", markup=False)
    started = time.perf_counter()
    with screen.open("w", encoding="utf-8") if screen else contextlib.nullcontext(sys.stdout) as out:
        with contextlib.redirect_stdout(out):
            if code := cli.main([command, *(word for flag in flags for word in flag)]):
                sys.exit(code)
    return time.perf_counter() - started


def train(folder: Path) -> dict[str, float]:
    """sft from the random weights, dpo and kto from sft. Returns the seconds of each."""
    sft = prefuse(
        "sft", model_name_or_path=folder / "base", dataset_name=folder / "demonstrations.jsonl",
        output_dir=folder / "sft", num_train_epochs=4, per_device_train_batch_size=64, learning_rate=4e-3,
        lr_scheduler_type="cosine", logging_steps=200, eval_steps=400, save_steps=0,
    )  # fmt: skip
    dpo, kto = (
        prefuse(
            "train", loss_type=loss, beta=BETA, model_name_or_path=folder / "sft", dataset_name=folder / data,
            output_dir=folder / loss, per_device_train_batch_size=32, learning_rate=3e-4,
            logging_steps=10, eval_steps=30, save_steps=0,
        )
        for loss, data in (("dpo", "pairs.jsonl"), ("kto", "labelled.jsonl"))
    )  # fmt: skip
    return {"sft": sft, "dpo": dpo, "kto": kto}


# ---- The reward model ----


def train_reward_model(folder: Path) -> float:
    """From sft, on the pairs; returns its accuracy on the held-out pairs."""
    prefuse(
        "reward", model_name_or_path=folder / "sft", dataset_name=folder / "pairs.jsonl",
        eval_dataset=folder / "held_out.jsonl", output_dir=folder / "reward", learning_rate=1e-3,
        per_device_train_batch_size=32, per_device_eval_batch_size=100, logging_steps=20, save_steps=0,
    )  # fmt: skip
    lines = (folder / "reward" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "eval_accuracy" in row][-1]["eval_accuracy"]


@torch.no_grad()
def agreement(folder: Path, names: list[str]) -> tuple[float, int]:
    """How often it prefers the answer that the rule prefers, among all pairs of answers of two models to one held-out
    prompt of which the rule prefers one; and how many these pairs are."""
    model = AutoModelForSequenceClassification.from_pretrained(folder / "reward").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "reward")
    written = {name: (folder / name / "answers.jsonl").read_text(encoding="utf-8").splitlines() for name in names}
    right = total = 0
    for lines in zip(*written.values(), strict=True):
        rows = [json.loads(line) for line in lines]
        rule = [order_of(row["prompt"], row["model"]) == "ascending" for row in rows]
        if len(set(rule)) == 1:
            continue
        answers = [tokenizer(f"{row['model']}<end>")["input_ids"] for row in rows]
        scores = sequence_scores(model, pack([(tokenizer(rows[0]["prompt"])["input_ids"], answers)])).tolist()
        better, worse = (
            [s for s, good in zip(scores, rule, strict=True) if good is wanted] for wanted in (True, False)
        )
        right += sum(a > b for a in better for b in worse)
        total += len(better) * len(worse)
    return right / max(total, 1), total


# ---- Before and after ----


@dataclass(frozen=True)
class Result:
    """One model on the held-out prompts; rewards and KL are relative to the SFT model."""

    accuracy: float
    margin: float
    kl: float  # nats per token
    ascending: float  # share of the generated answers, sampled at temperature 1
    correct: float  # share in either order
    seconds: float  # of training


def measure(folder: Path, name: str, seconds: float) -> Result:
    model = folder / name
    common = {"model_name_or_path": model, "eval_dataset": folder / "held_out.jsonl", "per_device_eval_batch_size": 100}
    prefuse(
        "eval", **common, ref_model_name_or_path=folder / "sft", beta=BETA, output_file=model / "eval.json",
        screen=model / "eval.txt",
    )  # fmt: skip
    prefuse(
        "generate", **common, num_prompts=0, temperature=1.0, max_new_tokens=10, output_file=model / "answers.jsonl",
        screen=model / "answers.txt",
    )  # fmt: skip
    means = json.loads((model / "eval.json").read_text(encoding="utf-8"))
    answers = [json.loads(line) for line in (model / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    orders = [order_of(answer["prompt"], answer["model"]) for answer in answers]
    return Result(
        accuracy=means["rewards/accuracies"],
        margin=means["rewards/margins"],
        kl=means["kl_to_ref"],
        ascending=orders.count("ascending") / len(orders),
        correct=1 - orders.count(None) / len(orders),
        seconds=seconds,
    )


def show(results: dict[str, Result]) -> None:
    rows = {
        name.upper(): {
            "reward\naccuracy": f"{result.accuracy:.3f}",
            "reward\nmargin": f"{result.margin:.2f}",
            "KL, nats\nper token": f"{result.kl:.3f}",
            "answers\nascending": f"{result.ascending:.1%}",
            "in either\norder": f"{result.correct:.1%}",
            "seconds of\ntraining": f"{result.seconds:.0f}",
        }
        for name, result in results.items()
    }
    columns = (Column(title, justify="right") for title in rows["SFT"])
    caption = "Rewards and KL are relative to SFT, whose own rewards are 0: ties, no wins."
    grid = Table("model", *columns, title=f"{HELD_OUT} held-out prompts", caption=caption)
    for name, row in rows.items():
        grid.add_row(name, *row.values())
    console.print("", grid, soft_wrap=False)


def broken_claims(results: dict[str, Result]) -> list[str]:
    claims = {"SFT has learnt both orders: 30% to 70% of its answers ascend": 0.3 < results["sft"].ascending < 0.7}
    for name, result in results.items():
        claims[f"{name.upper()} can sort: over 90% of its answers are correct"] = result.correct > 0.9
        if name != "sft":
            claims[f"{name.upper()} answers as preferred: over 90% ascend"] = result.ascending > 0.9
            claims[f"{name.upper()} rewards what is preferred in over 95% of pairs"] = result.accuracy > 0.95
    return [claim for claim, holds in claims.items() if not holds]


def fresh(folder: Path) -> Path:
    """The folder, empty. It is emptied only if an earlier demo made it."""
    if any(folder.glob("*")) and not (folder / MARKER).is_file():
        sys.exit(f"{folder} was not made by the demo: move it away")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def main() -> int:
    started = time.perf_counter()
    torch.set_num_threads(1)  # so small a model loses time with more, most of all on a busy machine
    disable_progress_bar()
    folder = fresh(FOLDER)
    write_data(folder)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    console.print(f"made four data files and a Llama of {model.num_parameters():,} random weights in {folder}")

    seconds = train(folder)
    results = {name: measure(folder, name, seconds[name]) for name in seconds}
    prefuse(
        "generate", model_name_or_path=folder / "dpo", ref_model_name_or_path=folder / "sft",
        eval_dataset=folder / "held_out.jsonl", num_prompts=6, temperature=1.0, max_new_tokens=10,
    )  # fmt: skip
    judge = train_reward_model(folder), *agreement(folder, list(results))
    show(results)
    console.print(
        f"The reward model is right about {judge[0]:.1%} of the held-out pairs, and prefers what the rule prefers in "
        f"{judge[1]:.1%} of {judge[2]} pairs of answers that the models wrote."
    )
    curves = " ".join(str(folder / name / "curves.png") for name in [*seconds, "reward"])
    console.print(f"{time.perf_counter() - started:.0f} seconds in all; curves: {curves}")
    runs = " ".join(str(folder / name) for name in seconds)
    console.print(f"one page about the runs: {Path(sys.executable).with_name('prefuse')} report {runs}", soft_wrap=True)
    broken = broken_claims(results)
    broken += ["the reward model agrees with the rule in over 90% of both"] if min(judge[:2]) <= 0.9 else []
    for claim in broken:
        console.print(f"not so: {claim}", style="bold red")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
