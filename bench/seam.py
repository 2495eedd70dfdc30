"""TRL's DPO trainer on a CPU, with its own head and with prefuse's: time of a step, peak memory, and the loss.

    prefuse bench seam                     # V = 32000, D = 512, batches of 2 pairs of 2 x 512 tokens, float32
    prefuse bench seam --threads 1 --clock cpu --rounds 3

A Llama with random weights, TRL's defaults otherwise (checkpointing, AdamW, a reference model); and the same with LoRA,
where the head is frozen and the adapters off are the reference. Every variant trains in a process of its own, in turns;
a ratio is the median over rounds of the step times of one round. Memory is the process's peak beyond what it had before
the first step: activations, the head's own, and as much for all variants of gradients and optimizer states. The losses
must agree. Writes results/trl_seam-<cpu>-<threads>threads-torch<version>.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable

import torch

from prefuse.bench import record
from prefuse.bench.record import RESULTS, cpu_model, environment, markdown, slug, write_result
from prefuse.bench.timing import resident
from prefuse.engine.config.tools import ToolParser

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
WARM_UP = 1  # steps


def enabled(workspace: int = 0) -> contextlib.AbstractContextManager:
    import prefuse.trl

    return prefuse.trl.enabled(workspace=workspace)


def trls_trainer() -> type:
    from trl import DPOTrainer

    return DPOTrainer


def our_trainer() -> type:
    from prefuse.trl import DPOTrainer

    return DPOTrainer


# name: (what is in force while it trains, the trainer's class)
VARIANTS: dict[str, tuple[Callable[[], contextlib.AbstractContextManager], Callable[[], type]]] = {
    "TRL": (contextlib.nullcontext, trls_trainer),
    "TRL, prefuse.trl.enable()": (enabled, trls_trainer),
    "TRL, prefuse.trl.enable(workspace=1 << 30)": (lambda: enabled(1 << 30), trls_trainer),
    "prefuse.trl.DPOTrainer": (contextlib.nullcontext, our_trainer),
}
KEEPING = "TRL, prefuse.trl.enable(workspace=1 << 30)"  # of no use where the head is frozen
TUNED = {"all weights": list(VARIANTS), "LoRA": [name for name in VARIANTS if name != KEEPING]}


# ---------------------------------------------------------------------------------------------- one variant


def tokenizer_of(vocabulary: int):
    """A word for every id, so that lengths are what they are meant to be."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0", unk_token="w1")


def pairs(count: int, tokens: int, vocabulary: int):
    """Half of each sequence is prompt."""
    from datasets import Dataset

    g = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(2, vocabulary, (length,), generator=g).tolist())

    sides = ("chosen", "rejected")
    rows = [
        {"prompt": text(tokens // 2)} | {side: f" {text(tokens - tokens // 2 - 1)} w0" for side in sides}
        for _ in range(count)
    ]
    return Dataset.from_list(rows)


def model_of(settings: argparse.Namespace):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=settings.vocabulary, hidden_size=settings.hidden, intermediate_size=settings.hidden * 11 // 4,
        num_hidden_layers=settings.layers, num_attention_heads=settings.hidden // 64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def run_variant(settings: argparse.Namespace) -> dict:
    """{"seconds": of each step, "losses": of each step, "peak": bytes beyond what was there before}"""
    import datasets
    from transformers import TrainerCallback
    from trl import DPOConfig

    clock = CLOCKS[settings.clock]
    datasets.disable_progress_bars()
    context, trainer_class = VARIANTS[settings.variant]
    marks: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            marks.append(clock())

        def on_step_end(self, *_, **__):
            marks.append(clock())

    with tempfile.TemporaryDirectory() as folder, context():
        model, extra = model_of(settings), {}
        if settings.tuned == "LoRA":
            from peft import LoraConfig

            extra["peft_config"] = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
        else:
            extra["ref_model"] = model_of(settings)
        config = DPOConfig(
            output_dir=folder, max_steps=settings.steps + WARM_UP, per_device_train_batch_size=settings.pairs,
            max_length=settings.tokens, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
            logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = trainer_class()(
            model=model, args=config, train_dataset=pairs(4 * settings.pairs, settings.tokens, settings.vocabulary),
            processing_class=tokenizer_of(settings.vocabulary), callbacks=[Watch()], **extra,
        )  # fmt: skip
        before = resident("VmRSS")
        trainer.train()
    seconds = [end - start for start, end in zip(marks[::2], marks[1::2], strict=True)][WARM_UP:]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return {"seconds": seconds, "losses": [float(x) for x in losses], "peak": resident("VmHWM") - before}


# ------------------------------------------------------------------------------------------------ all of them


def measure(settings: argparse.Namespace) -> dict[str, dict[str, list[dict]]]:
    """{tuned: {variant: one result per round}}, the variants in turns."""
    results = {tuned: {name: [] for name in names} for tuned, names in TUNED.items()}
    for _ in range(settings.rounds):
        for tuned, variants in results.items():
            for name, rows in variants.items():
                command = [*record.again("seam"), *sys.argv[1:], "--variant", name, "--tuned", tuned]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                rows.append(json.loads(output.splitlines()[-1]))
                print(f"{tuned}, {name}: {statistics.median(rows[-1]['seconds']):.2f} s", file=sys.stderr)
    return results


def summarize(results: dict[str, dict[str, list[dict]]]) -> list[dict]:
    rows = []
    for tuned, variants in results.items():
        reference = variants["TRL"]
        for name, rounds in variants.items():
            for row in rounds:
                off = max(abs(a - b) for a, b in zip(row["losses"], reference[0]["losses"], strict=True))
                assert off < 1e-4, f"{tuned}, {name}: losses differ from TRL's by {off}"
            seconds = [statistics.median(row["seconds"]) for row in rounds]
            # Of one round, so that what else the machine does hits both.
            speed = [statistics.median(a["seconds"]) / s for a, s in zip(reference, seconds, strict=True)]
            rows.append(
                {
                    "trained": tuned, "variant": name, "seconds": statistics.median(seconds),
                    "speed": statistics.median(speed), "peak_bytes": max(row["peak"] for row in rounds),
                    "first_loss": rounds[0]["losses"][0], "last_loss": rounds[0]["losses"][-1],
                }
            )  # fmt: skip
    return rows


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=2, help="in a batch")
    parser.add_argument("--tokens", type=int, default=512, help="of a sequence: prompt and one side")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for --threads 1 on a busy machine")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--tuned", choices=TUNED, help=argparse.SUPPRESS)
    settings = parser.parse_args()
    if settings.clock == "cpu" and settings.threads > 1:
        parser.error("--clock cpu adds up the threads, waiting ones too: use it with --threads 1")
    torch.set_num_threads(settings.threads)
    if settings.variant:
        warnings.simplefilter("ignore", FutureWarning)
        print(json.dumps(run_variant(settings)))
        return

    results = measure(settings)
    rows = summarize(results)
    cells = [
        [
            f"{row['trained']}: {row['variant']}", f"{row['seconds']:.2f}", f"{row['speed']:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}", f"{row['last_loss']:.6f}",
        ]
        for row in rows
    ]  # fmt: skip
    table = markdown(["trained: head", "s per step", "speed / TRL's", "peak MiB", "last loss"], cells)
    shape = f"V = {settings.vocabulary}, D = {settings.hidden}, {settings.layers} layers, "
    shape += f"{settings.pairs} pairs of 2 x {settings.tokens} tokens"
    where = (
        f"{cpu_model()}, {settings.threads} threads, torch {torch.__version__}, TRL {importlib.metadata.version('trl')}"
    )
    text = f"# DPO, {shape}, float32, {where}, {settings.clock} time\n\n{table}\n"
    name = f"trl_seam-{slug(cpu_model())}-{settings.threads}threads-torch{torch.__version__.split('+')[0]}"
    found = {"environment": environment(), "settings": vars(settings), "rows": rows, "rounds": results}
    write_result(RESULTS / f"{name}.json", "seam", found)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
