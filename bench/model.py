"""A whole model's step with its own logits and without them: `fuse_loss` and `sequence_logps` on a CPU.

    prefuse bench model --clock cpu

A Llama of about 5 million weights in its layers under a vocabulary of 32000, four rows of 256 tokens of which half
count. "loss" is forward and backward of the model's own loss, "log-probabilities" of the sum over sequences, as a DPO
step needs it for each of its two sides. The variants take turns in one process; memory is the peak of a fresh process
per variant, beyond model and gradients. Writes results/model_loss-<cpu>-<threads>-torch<version>.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from prefuse.bench import record
from prefuse.bench.record import RESULTS, cpu_model, environment, markdown, slug, write_result
from prefuse.bench.timing import resident
from prefuse.engine.config.tools import ToolParser
from prefuse.transformers import fuse_loss, sequence_logps

VOCABULARY, ROWS, TOKENS = 32000, 4, 256
SHAPE = {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 4, "num_attention_heads": 5}


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE))


def batch(tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (ROWS, tokens), generator=torch.Generator().manual_seed(1))
    return ids, ids.masked_fill(torch.arange(tokens) < tokens // 2, -100)


def logps_of_logits(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # (B,)
    logps = model(ids).logits[:, :-1].log_softmax(-1)
    targets = labels[:, 1:]
    return (logps.gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)).sum(-1)


VARIANTS = {
    "loss, transformers": lambda model, ids, labels: model(ids, labels=labels).loss,
    "loss, fuse_loss": lambda model, ids, labels: model(ids, labels=labels).loss,
    "loss, fuse_loss(workspace=0)": lambda model, ids, labels: model(ids, labels=labels).loss,
    "log-probabilities, logits": lambda model, ids, labels: -logps_of_logits(model, ids, labels).sum(),
    "log-probabilities, sequence_logps": lambda model, ids, labels: -sequence_logps(model, ids, labels).sum(),
}


def model_for(name: str) -> LlamaForCausalLM:
    if "fuse_loss" not in name:
        return build()
    return fuse_loss(build(), workspace=0 if "workspace=0" in name else None)


def step(name: str, model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> float:
    loss = VARIANTS[name](model, ids, labels)
    loss.backward()
    return loss.item()


def print_peak(name: str) -> None:
    """Peak resident bytes of one step, after a small one has made the gradients."""
    model = model_for(name)
    step(name, model, *batch(8))
    before = resident("VmHWM")
    step(name, model, *batch())
    print(resident("VmHWM") - before)


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine that is busy")
    parser.add_argument("--peak", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print_peak(arguments.peak)
        return
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
    models = {name: model_for(name) for name in VARIANTS}
    losses = {name: step(name, model, *batch()) for name, model in models.items()}  # also the warm-up
    for kind in ("loss", "log-probabilities"):
        same = [loss for name, loss in losses.items() if name.startswith(kind)]
        assert max(same) - min(same) < 1e-5 * same[0], losses
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(arguments.rounds):
        for name, model in models.items():
            start = clock()
            step(name, model, *batch())
            seconds[name].append(clock() - start)
    memory = {}
    for name in VARIANTS:
        command = [*record.again("model"), "--threads", str(arguments.threads), "--peak", name]
        memory[name] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])
    result = {
        "environment": environment(),
        "settings": {k: v for k, v in vars(arguments).items() if k != "peak"}
        | {"model": SHAPE, "vocabulary": VOCABULARY, "rows": ROWS, "tokens": TOKENS},
        "variants": {name: {"seconds": statistics.median(seconds[name]), "all_seconds": seconds[name],
                            "peak_bytes": memory[name]} for name in VARIANTS},
    }  # fmt: skip
    name = f"model_loss-{slug(cpu_model())}-{arguments.threads}threads-torch{torch.__version__.split('+')[0]}"
    rows = [[name, f"{statistics.median(seconds[name]):.2f}", f"{memory[name] / 2**20:.0f}"] for name in VARIANTS]
    text = markdown(["forward and backward", f"s ({arguments.clock} time)", "peak MiB"], rows) + "\n"
    write_result(RESULTS / f"{name}.json", "model", result)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
