"""The portable head on a CPU beside its own bare matrix products and its peers.

    prefuse bench cpuhead                      # N = 2048, D = 1024, V = 32000 in float32, with peak memory
    prefuse bench cpuhead --preset small --rounds 15

Every variant runs once a round, in an order that changes from round to round; a ratio is the median over rounds of the
two times of one round, so that whatever else the machine does hits both. Rates count 2NDV operations for the forward,
6NDV for forward and backward; "8NDV" counts the recomputed product too. Peak memory is measured in a process per
variant. A last table says what prefuse's own time is made of, by torch's profiler.

Writes results/cpu_head-<cpu>-<threads>-torch<version>.json and .md.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import prefuse
from prefuse.bench import record
from prefuse.bench.record import RESULTS, cpu_model, environment, markdown, slug, write_result
from prefuse.bench.timing import resident
from prefuse.engine.config.tools import ToolParser
from prefuse.kernels import slices
from prefuse.kernels.logprobs.linear_logprobs import logprobs_within
from prefuse.kernels.options import HeadOptions

PRESETS = {"tiny": (256, 128, 2000), "small": (512, 512, 8000), "head": (2048, 1024, 32000)}  # (N, D, V)
KEEPING = "prefuse, 3 units"
# The floors, and how near prefuse means to come to the first.
OWN, LARGE = "bare GEMMs, own tiles", "bare GEMMs, large"
GOALS = {"forward": 0.97, "forward+backward": 0.95}
# What an operator of torch does there; any other, and the time between two of them, is "the rest".
PARTS = {
    "matrix products": ("mm", "addmm_", "addmm"),
    "exponentials": ("exp_", "exp"),
    "subtracting, multiplying, adding up": ("sub_", "mul_", "sum", "add_", "sub", "mul", "add"),
    "targets' columns": ("_index_put_impl_", "index_put_", "index", "copy_"),
}


@dataclass
class TimedHead:
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    grad: Tensor  # (N,) dL/dlogp

    @staticmethod
    def draw(n: int, d: int, v: int) -> TimedHead:
        g = torch.Generator().manual_seed(0)
        # Filled in place: no temporary may raise the peak that memory is measured from. Logits of deviation 3.
        hidden = torch.empty(n, d).normal_(generator=g).requires_grad_()
        weight = torch.empty(v, d).normal_(std=3 / d**0.5, generator=g).requires_grad_()
        targets = torch.randint(v, (n,), generator=g)
        return TimedHead(hidden, weight, targets, torch.empty(n).normal_(generator=g))


Logps = Callable[[Tensor, Tensor, Tensor], Tensor]


def prefuse_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return prefuse.linear_logprobs(hidden, weight, targets, impl="torch")


def keeping_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As `linear_preference_loss` has them with room to spare: the backward recomputes nothing."""
    return logprobs_within(1 << 40, hidden, weight, targets, None, HeadOptions(), (), "torch")


def trl_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]


def naive_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]


def torch_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions()
    return -linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)


LOGPS: dict[str, Logps] = {
    "prefuse": prefuse_logps,
    KEEPING: keeping_logps,
    "TRL": trl_logps,
    "full logits": naive_logps,
    "F.linear_cross_entropy": torch_logps,
}


def run_logps(name: str, x: TimedHead, backward: bool) -> None:
    """One step of a variant that computes log-probabilities; gradients are dropped, as an optimizer would."""
    if not backward:
        with torch.no_grad():
            LOGPS[name](x.hidden, x.weight, x.targets)
        return
    LOGPS[name](x.hidden, x.weight, x.targets).backward(x.grad)
    x.hidden.grad = x.weight.grad = None


class OwnGemms:
    """The matrix products of the portable path and nothing else: same tiles, same order, buffers made beforehand."""

    def __init__(self, x: TimedHead):
        self.hidden, self.weight = x.hidden.detach(), x.weight.detach()
        self.rows, self.columns = slices.TILE["cpu"]
        self.tile = torch.empty(self.rows, self.columns)
        block = max(self.rows, slices.BUFFER_BYTES // (4 * self.columns) // self.rows * self.rows)
        self.buffer = torch.zeros(min(block, len(self.hidden)), self.columns)
        self.dhidden, self.dweight = torch.zeros_like(self.hidden), torch.zeros_like(self.weight)

    def run(self, backward: bool) -> None:
        for w in self.weight.split(self.columns):
            for x in self.hidden.split(self.rows):
                torch.mm(x, w.T, out=self.tile[: len(x), : len(w)])
        if not backward:
            return
        for w, dw in zip(self.weight.split(self.columns), self.dweight.split(self.columns), strict=True):
            dz = self.buffer[:, : len(w)]
            for i, (block, dblock) in enumerate(zip(*self._blocks(), strict=True)):
                for x, z in zip(block.split(self.rows), dz[: len(block)].split(self.rows), strict=True):
                    torch.mm(x, w.T, out=z)
                dblock.addmm_(dz[: len(block)], w)
                torch.addmm(dw, dz[: len(block)].T, block, beta=float(i > 0), out=dw)

    def _blocks(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self.hidden.split(len(self.buffer)), self.dhidden.split(len(self.buffer))


class LargeGemms:
    """Three products over the whole `(N, V)` matrix, buffers made beforehand."""

    def __init__(self, x: TimedHead):
        self.hidden, self.weight = x.hidden.detach(), x.weight.detach()
        self.z = torch.zeros(len(self.hidden), len(self.weight))
        self.dhidden, self.dweight = torch.zeros_like(self.hidden), torch.zeros_like(self.weight)

    def run(self, backward: bool) -> None:
        torch.mm(self.hidden, self.weight.T, out=self.z)
        if backward:
            torch.mm(self.z, self.weight, out=self.dhidden)
            torch.mm(self.z.T, self.hidden, out=self.dweight)


# -------------------------------------------------------------------------------------------------- time


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure_times(
    x: TimedHead, rounds: int, clock: Callable[[], float], peers: bool = True
) -> dict[str, dict[str, list[float]]]:
    """{"forward" | "forward+backward": {variant: seconds of each round}}"""
    steps: dict[str, Callable[[bool], None]] = {OWN: OwnGemms(x).run}
    if peers:
        steps[LARGE] = LargeGemms(x).run
    for name in available() if peers else ["prefuse"]:
        steps[name] = lambda backward, name=name: run_logps(name, x, backward)
    shuffle = random.Random(0).shuffle
    times: dict[str, dict[str, list[float]]] = {}
    for backward, kind in ((False, "forward"), (True, "forward+backward")):
        order = [name for name in steps if backward or name != KEEPING]  # a forward alone keeps nothing
        times[kind] = {name: [] for name in order}
        for name in order:
            steps[name](backward)  # warm-up
        for _ in range(rounds):
            shuffle(order)
            for name in order:
                start = clock()
                steps[name](backward)
                times[kind][name].append(clock() - start)
    return times


def available() -> list[str]:
    missing = set() if hasattr(torch.nn.functional, "linear_cross_entropy") else {"F.linear_cross_entropy"}
    return [name for name in LOGPS if name not in missing]


def summarize(times: dict[str, list[float]], flops: float) -> dict[str, dict[str, float]]:
    """Medians, quartiles, rates, and the paired ratio of every variant's time to prefuse's."""
    rows = {}
    for name, seconds in times.items():
        ratios = [other / ours for other, ours in zip(seconds, times["prefuse"], strict=True)]
        low, middle, high = statistics.quantiles(seconds, n=4)
        r_low, r_middle, r_high = statistics.quantiles(ratios, n=4)
        rows[name] = {
            "seconds": middle, "seconds_quartiles": [low, high], "fastest": min(seconds),
            "gflops": flops / middle / 1e9,
            "time_over_prefuse": r_middle, "time_over_prefuse_quartiles": [r_low, r_high],
        }  # fmt: skip
    return rows


def measure_shares(x: TimedHead, rounds: int) -> dict[str, dict[str, float]]:
    """{"forward" | "forward+backward": {part: its share of prefuse's time}}, by torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    shares = {}
    for backward, kind in ((False, "forward"), (True, "forward+backward")):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(rounds):
                run_logps("prefuse", x, backward)
        seconds = dict.fromkeys((*PARTS, "the rest"), 0.0)
        for event in profiler.key_averages():
            name = event.key.removeprefix("aten::")
            part = next((part for part, names in PARTS.items() if name in names), "the rest")
            seconds[part] += event.self_cpu_time_total
        shares[kind] = {part: value / sum(seconds.values()) for part, value in seconds.items()}
    return shares


# ------------------------------------------------------------------------------------------------ memory


def peak_bytes(name: str, shape: tuple[int, int, int], backward: bool) -> int:
    """Peak resident memory of one step beyond its inputs, in a process of its own."""
    sizes = ["--shape", *map(str, shape), "--threads", str(torch.get_num_threads())]
    command = [*record.again("cpuhead"), "--peak", name, *sizes, *["--backward"] * backward]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def print_peak(name: str, shape: tuple[int, int, int], backward: bool) -> None:
    small = TimedHead.draw(64, shape[1], 512)
    run_logps(name, small, backward)  # imports, threads and BLAS workspaces are no part of the step
    x = TimedHead.draw(*shape)
    before = resident("VmHWM")
    run_logps(name, x, backward)
    print(resident("VmHWM") - before)


def measure_memory(n: int, d: int, v: int) -> list[dict]:
    """Every variant at (N, D, V); prefuse also at twice N and twice V, where only its gradients may grow."""
    cases = [(name, (n, d, v)) for name in available()]
    cases += [("prefuse", (2 * n, d, v)), ("prefuse", (n, d, 2 * v))]
    rows = []
    for name, shape in cases:
        gradients = 4 * shape[1] * (shape[0] + shape[2])
        both = peak_bytes(name, shape, True)
        rows.append(
            {
                "variant": name, "shape": shape, "forward": peak_bytes(name, shape, False), "forward+backward": both,
                "forward+backward beyond gradients": both - gradients,
            }
        )  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------ report


def time_table(summary: dict[str, dict[str, dict]]) -> str:
    rows = []
    for kind, variants in summary.items():
        for name, row in variants.items():
            low, high = row["seconds_quartiles"]
            r_low, r_high = row["time_over_prefuse_quartiles"]
            rows.append(
                [
                    kind, name, f"{1e3 * row['seconds']:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})",
                    f"{row['gflops']:.0f}", f"{row['time_over_prefuse']:.3f} ({r_low:.3f}-{r_high:.3f})",
                ]
            )  # fmt: skip
    return markdown(["pass", "variant", "ms (quartiles)", "GFLOP/s", "time / prefuse's"], rows)


def memory_table(rows: list[dict]) -> str:
    keys = ("forward", "forward+backward", "forward+backward beyond gradients")
    cells = [
        [row["variant"], "x".join(map(str, row["shape"])), *(f"{row[key] / 2**20:.0f}" for key in keys)] for row in rows
    ]
    return markdown(["variant", "N x D x V", *(f"{key} (MiB)" for key in keys)], cells)


def share_table(shares: dict[str, dict[str, float]]) -> str:
    rows = [[part, *(f"{shares[kind][part]:.1%}" for kind in shares)] for part in (*PARTS, "the rest")]
    return markdown(["where prefuse's time goes", *shares], rows)


def verdict(summary: dict[str, dict[str, dict]]) -> list[str]:
    lines = []
    for kind, goal in GOALS.items():
        share = summary[kind][OWN]["time_over_prefuse"]
        trl = ""
        if "TRL" in summary[kind]:
            trl = f", {summary[kind]['TRL']['time_over_prefuse']:.2f}x TRL's (goal 2x)"
        lines.append(f"{kind}: {share:.1%} of its own bare GEMMs' speed (goal {goal:.0%}){trl}")
    return lines


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="head")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("N", "D", "V"), help="instead of a preset")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: torch's own choice")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: for --threads 1 on a busy machine")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-peers", action="store_true", help="prefuse and its own bare GEMMs alone")
    parser.add_argument("--peak", choices=LOGPS, help=argparse.SUPPRESS)
    parser.add_argument("--backward", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    n, d, v = args.shape or PRESETS[args.preset]
    torch.set_num_threads(args.threads)
    if args.clock == "cpu" and args.threads > 1:
        parser.error("--clock cpu adds up the threads, waiting ones too: use it with --threads 1")
    if args.peak:
        print_peak(args.peak, (n, d, v), args.backward)
        return

    settings = {"N": n, "D": d, "V": v, "dtype": "float32", "rounds": args.rounds, "clock": args.clock}
    result = {"environment": environment(), "settings": settings}
    x = TimedHead.draw(n, d, v)
    times = measure_times(x, args.rounds, CLOCKS[args.clock], not args.no_peers)
    summary = {
        kind: summarize(times[kind], flops * n * d * v) for kind, flops in (("forward", 2), ("forward+backward", 6))
    }
    # What a path that recomputes its logits really multiplies.
    for name in ("prefuse", OWN, *(() if args.no_peers else ("TRL",))):
        row = summary["forward+backward"][name]
        row["gflops_8NDV"] = row["gflops"] * 8 / 6
    result["times"] = summary
    result["shares"] = measure_shares(x, min(args.rounds, 3))
    result["load_average_after"] = [round(x, 2) for x in os.getloadavg()]
    report = [time_table(summary), "", *verdict(summary), "", share_table(result["shares"])]
    if not args.no_memory:
        result["peak_bytes_beyond_inputs"] = measure_memory(n, d, v)
        report += ["", memory_table(result["peak_bytes_beyond_inputs"])]
    load = f"load average {result['environment']['load_average'][0]} before, {result['load_average_after'][0]} after"
    threads = torch.get_num_threads()
    where = f"{cpu_model()}, {threads} threads, torch {torch.__version__}"
    title = f"# N = {n}, D = {d}, V = {v}, float32, {where}, {args.clock} time, {load}"
    text = "\n".join([title, "", *report])
    shape = "" if (n, d, v) == PRESETS["head"] else f"-{n}x{d}x{v}"
    path = RESULTS / f"cpu_head-{slug(cpu_model())}-{threads}threads-torch{torch.__version__.split('+')[0]}{shape}.json"
    write_result(path, "cpuhead", result)
    path.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
