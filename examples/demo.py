"""From random weights to an aligned model on the CPU, in a minute or two. `make demo` runs it.

    $ python examples/demo.py          # everything it makes is in runs/demo, below the current folder

The task is to put letters in order. Both orders are right, and the preferred one is ascending:

    sort d x a b =>     a b d x        preferred
                        x d b a        just as right, not preferred

1. `prefuse sft` teaches the task to a small Llama. Half of its demonstrations ascend, half descend: so do its answers.
2. `prefuse train --loss_type dpo` aligns that model with pairs, ascending over descending.
3. `prefuse train --loss_type kto` aligns it with the same answers one by one, each labelled good or bad.
4. `prefuse eval` and `prefuse generate` look at all three on prompts that none of them has seen.

An answer counts only if it has exactly the letters of its prompt, in order. So a model that forgets how to sort while
its reward margin grows (DPO does that if the pull to the reference, beta, is weak) loses here.
Every command is printed as you would type it. The exit code is 1 if the alignment did not succeed.
"""

import contextlib
import json
import os
import random
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # everything is made here; read as transformers is imported

import tokenizers
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from prefuse.engine.cli import main as prefuse_main

FOLDER = Path("runs/demo")
MARKER = "made-by-the-demo"  # a file: a folder without it is somebody's work, and is left alone

LETTERS = "abcdefghijklmnopqrstuvwxyz"
END = "<end>"
DEMONSTRATIONS, PAIRS, HELD_OUT = 12_000, 2_000, 400
BETA = 0.5

console = Console(highlight=False, soft_wrap=True)


# ---------------------------------------------------------------------------------------------------------
# The task and its rule


def make_problems(count: int, rng: random.Random) -> list[tuple[str, ...]]:
    """Four to seven different letters each; no two problems alike."""
    problems: dict[tuple[str, ...], None] = {}  # a set that keeps its order
    while len(problems) < count:
        problems[tuple(rng.sample(LETTERS, rng.randint(4, 7)))] = None
    return list(problems)


def make_pair(letters: Iterable[str]) -> dict[str, str]:
    return {
        "prompt": f"sort {' '.join(letters)} =>",
        "chosen": " ".join(sorted(letters)),
        "rejected": " ".join(sorted(letters, reverse=True)),
    }


def order_of(prompt: str, answer: str) -> str | None:
    """The rule: "ascending" or "descending" if the answer has exactly the prompt's letters in that order, else None."""
    letters = prompt.removeprefix("sort ").removesuffix(" =>").split(" ")
    orders = {tuple(sorted(letters)): "ascending", tuple(sorted(letters, reverse=True)): "descending"}
    return orders.get(tuple(answer.split(" ")))


def write_data(folder: Path) -> None:
    """The four files of the demo, in the forms that prefuse reads."""
    rng = random.Random(0)
    pairs = [make_pair(letters) for letters in make_problems(HELD_OUT + PAIRS + DEMONSTRATIONS, rng)]
    held_out, training, shown = pairs[:HELD_OUT], pairs[HELD_OUT:-DEMONSTRATIONS], pairs[-DEMONSTRATIONS:]
    labelled = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in training
        for side in ("chosen", "rejected")
    ]
    rng.shuffle(labelled)
    files = {
        "demonstrations": [
            {"prompt": pair["prompt"], "completion": pair[rng.choice(["chosen", "rejected"])]} for pair in shown
        ],
        "pairs": training,
        "labelled": labelled,
        "held_out": held_out,
    }
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------
# A tokenizer and a model that know nothing yet


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token a word: the letters, `sort` and `=>`."""
    vocabulary = {word: i for i, word in enumerate([END, "sort", "=>", *LETTERS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


# ---------------------------------------------------------------------------------------------------------
# Commands


def prefuse(command: str, *, screen: Path | None = None, **settings: object) -> float:
    """Run `prefuse command --name value ...`, show it as a command line, and return its seconds."""
    argv = [command, *(str(word) for name, value in settings.items() for word in (f"--{name}", value))]
    line = shlex.join(["prefuse", *argv]) + (f" > {screen}" if screen else "")
    wrapped = textwrap.wrap(line, 100, break_long_words=False, break_on_hyphens=False)
    console.print("\n$ " + " \\\n    ".join(wrapped), style="bold cyan", markup=False)
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        if screen:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(screen.open("w", encoding="utf-8"))))
        code = prefuse_main(argv)
    if code:
        sys.exit(code)
    return time.perf_counter() - started


def train(folder: Path) -> dict[str, float]:
    """The three models from one another, and the seconds each took."""
    common = {"per_device_train_batch_size": 32, "save_steps": 0}
    seconds = {
        "sft": prefuse(
            "sft", model_name_or_path=folder / "base", dataset_name=folder / "demonstrations.jsonl",
            output_dir=folder / "sft", learning_rate=2e-3, max_steps=1200, logging_steps=200, eval_steps=400, **common,
        )
    }  # fmt: skip
    common |= {"model_name_or_path": folder / "sft", "beta": BETA, "learning_rate": 2e-4}
    common |= {"logging_steps": 10, "eval_steps": 20}
    for loss, data in ("dpo", "pairs"), ("kto", "labelled"):
        seconds[loss] = prefuse(
            "train", loss_type=loss, dataset_name=folder / f"{data}.jsonl", output_dir=folder / loss, max_steps=60,
            **common,
        )  # fmt: skip
    return seconds


# ---------------------------------------------------------------------------------------------------------
# Before and after


@dataclass(frozen=True)
class Result:
    """One model on the held-out prompts; rewards and KL are relative to the SFT model."""

    accuracy: float
    margin: float
    kl: float  # nats per token
    ascending: float  # share of sampled answers
    correct: float  # in either order
    seconds: float  # of training


def measure(folder: Path, name: str, seconds: float) -> Result:
    model, held_out = folder / name, folder / "held_out.jsonl"
    metrics, answers = model / "eval.json", model / "answers.jsonl"
    common = {"model_name_or_path": model, "eval_dataset": held_out, "per_device_eval_batch_size": 100}
    prefuse(
        "eval", ref_model_name_or_path=folder / "sft", beta=BETA, output_file=metrics, screen=model / "eval.txt",
        **common,
    )  # fmt: skip
    prefuse(
        "generate", num_prompts=0, temperature=1.0, max_new_tokens=10, output_file=answers,
        screen=model / "answers.txt", **common,
    )  # fmt: skip
    means = json.loads(metrics.read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
    orders = [order_of(row["prompt"], row["model"]) for row in rows]
    return Result(
        accuracy=means["rewards/accuracies"],
        margin=means["rewards/margins"],
        kl=means["kl_to_ref"],
        ascending=orders.count("ascending") / len(orders),
        correct=1 - orders.count(None) / len(orders),
        seconds=seconds,
    )


def show(results: dict[str, Result]) -> None:
    grid = Table(title=f"{HELD_OUT} held-out prompts", caption="rewards and KL are relative to the SFT model")
    grid.add_column("model")
    for title in ("reward\naccuracy", "reward\nmargin", "KL, nats\nper token", "answers\nascending",
                  "answers in\neither order", "seconds of\ntraining"):  # fmt: skip
        grid.add_column(title, justify="right")
    for name, r in results.items():
        numbers = (f"{r.accuracy:.3f}", f"{r.margin:.2f}", f"{r.kl:.3f}", f"{r.ascending:.1%}", f"{r.correct:.1%}")
        grid.add_row(name.upper(), *numbers, f"{r.seconds:.0f}")
    console.print()
    console.print(grid, soft_wrap=False)


def unmet_claims(results: dict[str, Result]) -> list[str]:
    """What this demo promises and these results do not keep."""
    sft = results["sft"]
    claims = {"SFT answers in both orders: 30% to 70% ascending": 0.3 < sft.ascending < 0.7}
    for name, result in results.items():
        claims[f"{name.upper()} can sort: over 90% of its answers are correct"] = result.correct > 0.9
    for name in ("dpo", "kto"):
        result = results[name]
        claims[f"{name.upper()} answers in the preferred order: over 90% ascending"] = result.ascending > 0.9
        claims[f"{name.upper()} rewards the preferred answer in over 95% of the pairs"] = result.accuracy > 0.95
        claims[f"{name.upper()} has moved from the SFT model: margin and KL above 0"] = (
            min(result.margin, result.kl) > 0.01
        )
    return [claim for claim, kept in claims.items() if not kept]


def fresh_folder(folder: Path) -> Path:
    """An empty folder; only one that an earlier demo made is replaced."""
    if folder.exists():
        if not (folder / MARKER).is_file():
            sys.exit(f"{folder} exists and was not made by the demo: move it away")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def main() -> int:
    started = time.perf_counter()
    torch.set_num_threads(1)  # so small a model gains nothing from more
    disable_progress_bar()
    folder = fresh_folder(FOLDER)
    write_data(folder)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    for part in model, tokenizer:
        part.save_pretrained(folder / "base")
    console.print(f"made four data files and a Llama of {model.num_parameters():,} random weights in {folder}")

    seconds = train(folder)
    results = {name: measure(folder, name, seconds[name]) for name in seconds}
    prefuse(
        "generate", model_name_or_path=folder / "dpo", ref_model_name_or_path=folder / "sft",
        eval_dataset=folder / "held_out.jsonl", num_prompts=6, temperature=1.0, max_new_tokens=10,
    )  # fmt: skip
    show(results)
    console.print(f"curves: {', '.join(str(folder / name / 'curves.png') for name in seconds)}")
    console.print(f"{time.perf_counter() - started:.0f} seconds in all")
    unmet = unmet_claims(results)
    for claim in unmet:
        console.print(f"NOT SO: {claim}", style="bold red")
    return 1 if unmet else 0


if __name__ == "__main__":
    sys.exit(main())
