"""The losses of `prefuse.liger` beside Liger's own of the same name: time and peak memory of one step on a CPU.

    prefuse bench losses        # 4 pairs of 512 tokens, half of them prompt, D = 512, V = 32000, in float32

A step is the loss and its gradients of hidden states and head, with a reference of the same size where there is one.
Both run once a round, in turn; a ratio is the median over rounds of the two times of one round. One thread, processor
time. Liger runs eager: its compiled form needs a C++ compiler. Peak memory is a process's own, beyond its inputs.
"lean" is `workspace=0`, which keeps nothing of the size of tokens times vocabulary, and multiplies once more.
Writes results/liger_losses-<cpu>-1threads-torch<version>.json and .md.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import subprocess
import time
from collections.abc import Callable

import torch

from prefuse.bench import record
from prefuse.bench.record import RESULTS, cpu_model, environment, markdown, slug, write_result
from prefuse.bench.timing import resident
from prefuse.engine.config.tools import ToolParser

SHAPE = (4, 512, 512, 32000)  # pairs, positions, hidden size, vocabulary
LOSSES = ("DPO", "KTO", "ORPO", "SimPO", "CPO")
VARIANTS = {  # module, options of its losses
    "prefuse": ("prefuse.liger", {}),
    "lean": ("prefuse.liger", {"workspace": 0}),
    "Liger": ("liger_kernel.chunked_loss", {}),
}


def make_step(variant: str, name: str, shape: tuple[int, int, int, int]) -> Callable[[], None]:
    """Draws the inputs; one call is one step, whose gradients are dropped as an optimizer would."""
    pairs, length, width, vocabulary = shape
    g = torch.Generator().manual_seed(0)
    # Filled in place: no temporary may raise the peak that memory is measured from.
    x, ref_x = (torch.empty(2 * pairs, length, width).normal_(generator=g) for _ in range(2))
    weight, ref_weight = (torch.empty(vocabulary, width).normal_(std=width**-0.5, generator=g) for _ in range(2))
    target = torch.randint(vocabulary, (2 * pairs, length), generator=g)
    target[:, : length // 2] = -100
    x.requires_grad_()
    weight.requires_grad_()
    module, settings = VARIANTS[variant]
    settings = settings | ({"use_ref_model": True} if name in ("DPO", "KTO") else {})
    loss = getattr(importlib.import_module(module), f"LigerFusedLinear{name}Loss")(compiled=False, **settings)
    arguments = (x, weight, target) if name == "KTO" else (weight, x, target)
    options = {"ref_input": ref_x, "ref_weight": ref_weight} if name in ("DPO", "KTO") else {}
    if name == "KTO":
        options |= {"preference_labels": torch.arange(2 * pairs) % 2 == 0, "kl": torch.zeros(1)}

    def step() -> None:
        loss(*arguments, **options)[0].backward()
        x.grad = weight.grad = None

    return step


def measure_times(name: str, rounds: int) -> dict[str, list[float]]:
    steps = {variant: make_step(variant, name, SHAPE) for variant in VARIANTS}
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for step in steps.values():
        step()  # warm-up
    for number in range(rounds):
        for variant in sorted(steps, reverse=number % 2 == 0):
            start = time.process_time()
            steps[variant]()
            times[variant].append(time.process_time() - start)
    return times


def peak_bytes(variant: str, name: str) -> int:
    command = [*record.again("losses"), "--peak", variant, name]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def print_peak(variant: str, name: str) -> None:
    make_step(variant, name, (1, 64, SHAPE[2], 512))()  # imports and BLAS workspaces are no part of the step
    step = make_step(variant, name, SHAPE)
    before = resident("VmRSS")
    step()
    print(resident("VmHWM") - before)


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peak", nargs=2, metavar=("VARIANT", "LOSS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print_peak(*args.peak)
        return
    pairs, length, width, vocabulary = SHAPE
    settings = {"pairs": pairs, "T": length, "D": width, "V": vocabulary, "dtype": "float32", "rounds": args.rounds}
    result = {"environment": environment(), "settings": settings, "losses": {}}
    gradients, rows = 4 * width * (2 * pairs * length + vocabulary), []
    path = RESULTS / f"liger_losses-{slug(cpu_model())}-1threads-torch{torch.__version__.split('+')[0]}.json"
    for name in LOSSES:
        times = measure_times(name, args.rounds)
        ratio = statistics.median(a / b for a, b in zip(times["Liger"], times["prefuse"], strict=True))
        peaks = {variant: peak_bytes(variant, name) for variant in VARIANTS}
        result["losses"][name] = {"seconds": times, "liger_over_prefuse": ratio, "peak_bytes_beyond_inputs": peaks}
        seconds = [f"{statistics.median(times[variant]):.2f}" for variant in VARIANTS]
        beyond = [f"{(peaks[variant] - gradients) / 2**20:.0f}" for variant in VARIANTS]
        rows.append([name, *seconds, f"{ratio:.2f}", *beyond])
        write_result(path, "losses", result)
    names = [*VARIANTS]
    header = ["loss", *(f"{x}, s" for x in names), "Liger / prefuse", *(f"{x}, MiB" for x in names)]
    title = (
        f"# {pairs} pairs of {length} tokens, half prompt, D = {width}, V = {vocabulary}, float32, {cpu_model()}, one "
        f"thread, torch {torch.__version__}; memory beyond inputs and gradients"
    )
    text = "\n".join([title, "", markdown(header, rows)])
    path.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
