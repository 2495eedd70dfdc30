"""The head of a loss: every implementation x shape x dtype x mode x loss, first checked, then measured.

    prefuse bench head                                                         # a small head, two dtypes, minutes
    prefuse bench head --shapes 512x576x49152 --dtypes float32 --losses dpo --modes trainable
    prefuse bench head --device cuda --shapes 8192x4096x128256 --dtypes bfloat16 --tokens 1024

An implementation whose loss, log-probabilities or gradients are wrong against the float64 oracle gets no time: its row
says what was off. "Wrong" is more than four times the error of plain PyTorch in the same dtype, so rounding logits to
bf16 is not. Times are of forward, and backward where something needs a gradient, in turn, warm. `ratio_to_gemms` is to
one large product for each unit of a head that keeps no logits (no grad 1, frozen 2, trainable 4 products of N D V);
TFLOP/s count the same (8 NDV operations where all is trained), so a head that keeps its logits can be below 1. Memory
is the allocator's peak beyond the inputs, gradients included. `log_ratio_error_nats` is the mean over sequences of
|log-ratio - float64's|.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from prefuse.bench.implementations import (
    BETA,
    IMPLEMENTATIONS,
    LOSSES,
    MODES,
    UNITS,
    Z0,
    Absent,
    HeadInputs,
    absence,
    applies,
    compute,
    draw,
    loss_of_logps,
    reference,
    sequence_sums,
)
from prefuse.bench.record import RESULTS, cpu_model, environment, slug, version_of, write_result
from prefuse.bench.timing import gemms, interleaved, paired_ratio, peak_bytes
from prefuse.bench.truth import oracle
from prefuse.engine.config.tools import ToolParser

GEMMS = "bare GEMMs"
TIMES_WORSE = 4  # than plain PyTorch in the same dtype: what counts as wrong
Row = dict[str, Any]


class Wrong(Exception):
    """What is off, and by how much."""


@dataclass
class Truth:
    """Float64 numbers of one set of inputs, and how far plain PyTorch in their dtype is from them."""

    x: HeadInputs
    logps: Tensor  # (N,) float64
    ratios: Tensor  # (S,) float64, log-ratios
    grads: Callable[[str], dict[str, Tensor]]  # by loss
    loss: Callable[[str], float]
    eager: dict[str, dict[str, float]]  # by loss: {"logps" | "loss" | "hidden" | "weight": error}


def truth_of(x: HeadInputs, losses: tuple[str, ...]) -> Truth:
    hidden, weight = (part.double().requires_grad_() for part in (x.hidden, x.weight))
    logps = oracle.head(hidden, weight, x.targets)[0]
    with torch.no_grad():
        ref_logps = oracle.head(x.ref_hidden.double(), x.ref_weight.double(), x.targets)[0]

    @functools.cache
    def grads(loss_type: str) -> dict[str, Tensor]:
        leaf = logps.detach().requires_grad_()
        (given,) = torch.autograd.grad(loss_of_logps(loss_type, leaf, ref_logps, exact), leaf)
        found = torch.autograd.grad(logps, (hidden, weight), given, retain_graph=True)
        return dict(zip(("hidden", "weight"), found, strict=True))

    def loss(loss_type: str) -> float:
        sums, refs = (sequence_sums(part.detach(), x.tokens).tolist() for part in (logps, ref_logps))
        if loss_type == "dpo":  # the oracle's own equations, on Python's numbers
            ratios = [a - b for a, b in zip(sums, refs, strict=True)]
            return statistics.mean(oracle.dpo(*pair, BETA) for pair in zip(ratios[0::2], ratios[1::2], strict=True))
        if loss_type == "kto":
            each = zip(sums, refs, x.desirable.tolist(), strict=True)
            return statistics.mean(oracle.kto(a - b, good, Z0, BETA) for a, b, good in each)
        return loss_of_logps(loss_type, logps.detach(), ref_logps, exact).item()

    exact = replace(x, grad=x.grad.double())
    ratios = sequence_sums((logps - ref_logps).detach(), x.tokens)
    truth = Truth(x, logps.detach(), ratios, grads, loss, {})
    reference("HALOs, DPO repository (eager)", x)
    for loss_type in losses:
        truth.eager[loss_type] = errors("HALOs, DPO repository (eager)", truth, "trainable", loss_type)
    return truth


def leaves(x: HeadInputs, mode: str) -> HeadInputs:
    fresh = {name: getattr(x, name).detach().requires_grad_(name in MODES[mode]) for name in ("hidden", "weight")}
    return replace(x, **fresh)


def one_step(name: str, x: HeadInputs, loss_type: str) -> tuple[Tensor, Tensor | None]:
    """Forward, and backward if anything needs a gradient, which is dropped before the next."""
    x.hidden.grad = x.weight.grad = None
    with torch.set_grad_enabled(x.hidden.requires_grad):
        loss, said = compute(name, x, loss_type)
        if x.hidden.requires_grad:
            loss.backward()
    return loss.detach(), said


def errors(name: str, truth: Truth, mode: str, loss_type: str) -> dict[str, float]:
    """Of loss, log-probabilities or log-ratios, and gradients (relative)."""
    x = leaves(truth.x, mode)
    loss, said = one_step(name, x, loss_type)
    found = {"loss": abs(loss.item() - truth.loss(loss_type))}
    if loss_type == "logps":
        found["logps"] = (said.double() - truth.logps).abs().max().item()
        ratios = sequence_sums(said.double() - truth.x.ref_logps[name].double(), x.tokens)
        found["ratios"] = (ratios - truth.ratios).abs().mean().item()
    elif said is not None:
        found["ratios"] = (said - truth.ratios).abs().mean().item()
    for part in MODES[mode]:
        expected = truth.grads(loss_type)[part]
        found[part] = ((getattr(x, part).grad.double() - expected).norm() / expected.norm()).item()
    return found


def checked(name: str, truth: Truth, mode: str, loss_type: str) -> dict[str, float]:
    """The errors; Wrong where one is out of what the dtype explains."""
    found, eager = errors(name, truth, mode, loss_type), truth.eager[loss_type]
    eps = torch.finfo(truth.x.hidden.dtype).eps
    largest = truth.logps.abs().max().item()
    floors = {"loss": 1e-4 + eps, "logps": 8 * eps * largest, "ratios": 1e-3, "hidden": 4 * eps, "weight": 4 * eps}
    for part, error in found.items():
        allowed = TIMES_WORSE * eager.get(part, 0.0) + floors[part]
        if not error <= allowed:
            raise Wrong(f"wrong {part}: off by {error:.2e}, allowed {allowed:.2e}")
    return found


def same_bits(name: str, truth: Truth, mode: str, loss_type: str) -> bool:
    """Two steps: loss and gradients."""
    runs = []
    for _ in range(2):
        x = leaves(truth.x, mode)
        loss, said = one_step(name, x, loss_type)
        runs.append([loss, *(x for x in (said, x.hidden.grad, x.weight.grad) if x is not None)])
    return all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@torch.no_grad()
def same_in_any_batch(name: str, x: HeadInputs) -> bool | None:
    """Log-probabilities of rows in another order, and in unequal parts."""
    path = IMPLEMENTATIONS[name].path
    if path is None:
        return None
    n = len(x.targets)
    whole, order = path(x.hidden, x.weight, x.targets), torch.randperm(n, generator=torch.Generator().manual_seed(1))
    parts = torch.arange(n).split([1, n // 3, n - 1 - n // 3])
    made = [torch.cat([path(x.hidden[i], x.weight, x.targets[i]) for i in some]) for some in ([order], parts)]
    return torch.equal(made[0], whole[order.to(whole.device)]) and torch.equal(made[1], whole)


def first_line(error: Exception) -> str:
    return str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {error}".splitlines()[0][:200]


def measure_group(truth: Truth, key: Row, names: list[str], rounds: int) -> tuple[list[Row], dict[str, list[float]]]:
    """One shape, dtype, mode and loss: rows of all implementations, timed in turn; and their seconds by round."""
    mode, loss_type, device = key["mode"], key["loss_type"], truth.x.hidden.device.type
    rows, runs = [], {GEMMS: gemms(UNITS[mode], truth.x.hidden, truth.x.weight)}
    for name in names:
        row: Row = {**key, "implementation": name}
        rows.append(row)
        try:
            reference(name, truth.x)
            found = checked(name, truth, mode, loss_type)
            torch._dynamo.reset()
            row["deterministic"] = same_bits(name, truth, mode, loss_type)
            if loss_type == "logps":
                row |= {"batch_invariant": same_in_any_batch(name, truth.x), "error_nats_max": found["logps"]}
            x = leaves(truth.x, mode)
            step = functools.partial(one_step, name, x, loss_type)
            row["peak_mib"] = peak_bytes(step, device) / 2**20
        except Exception as error:  # a peer that fails is a line, and no more
            row["error"] = str(error) if isinstance(error, Wrong) else first_line(error)
            print(f"{key} {name}: {row['error']}", flush=True)
            continue
        row |= {"log_ratio_error_nats": found["ratios"]} if "ratios" in found else {}
        row |= {"gradient_error": max(found[part] for part in MODES[mode])} if MODES[mode] else {}
        runs[name] = step
    seconds = interleaved(runs, rounds, device)
    flops = 2 * UNITS[mode] * truth.x.hidden.numel() * len(truth.x.weight)
    for row in [row for row in rows if row["implementation"] in seconds]:
        own = sorted(seconds[row["implementation"]])
        middle = statistics.median(own)
        row |= {"ms": 1e3 * middle, "ms_low": 1e3 * own[0], "ms_high": 1e3 * own[-1], "tflops": flops / middle / 1e12,
                "ratio_to_gemms": paired_ratio(seconds, row["implementation"], GEMMS)}  # fmt: skip
    middle = statistics.median(seconds[GEMMS])
    bare = {"ms": 1e3 * middle, "tflops": flops / middle / 1e12, "ratio_to_gemms": 1.0}
    return [{**key, "implementation": GEMMS, **bare}, *rows], seconds


def measure(arguments: argparse.Namespace, save: Callable[[list[Row], dict], None]) -> None:
    rows: list[Row] = []
    by_round: dict[str, dict[str, list[float]]] = {}
    names = [name for name in arguments.implementations if absence(name) is None]
    for shape, dtype in itertools.product(arguments.shapes, arguments.dtypes):
        n, d, v = shape
        x = draw(n, d, v, arguments.tokens, getattr(torch, dtype), arguments.device, arguments.seed)
        truth = truth_of(x, arguments.losses)
        for mode, loss_type in itertools.product(arguments.modes, arguments.losses):
            if mode == "no grad" and loss_type != "logps":
                continue  # nothing but the log-probabilities is computed there
            key = {"shape": f"{n}x{d}x{v}", "dtype": dtype, "mode": mode, "loss_type": loss_type}
            chosen = [name for name in names if applies(name, loss_type)]
            if mode != "trainable":
                chosen = [name for name in chosen if name not in ("prefuse, kept", "prefuse, workspace=0")]
            made, seconds = measure_group(truth, key, chosen, arguments.rounds)
            rows += made
            by_round[" ".join(key.values())] = seconds
            for row in made:
                print(f"{' '.join(key.values())} {row['implementation']}: {row.get('error') or row['ratio_to_gemms']}")
            save(rows, by_round)


def peers(names: list[str], rows: list[Row]) -> dict[str, dict[str, str | None]]:
    """Version of each, or why it was measured nowhere."""
    found = {}
    for name in names:
        own = [row for row in rows if row["implementation"] == name]
        reason = absence(name)
        if reason is None and own and all("error" in row for row in own):
            reason = own[0]["error"]
        if reason is None and not own:
            reason = "none of the losses asked for is its"
        found[name] = {"version": version_of(IMPLEMENTATIONS[name].package), "absent": reason}
    return found


def shape_of(text: str) -> tuple[int, int, int]:
    n, d, v = map(int, text.split("x"))
    return n, d, v


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", type=shape_of, nargs="+", metavar="NxDxV", default=[(512, 256, 16000)])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32", "bfloat16"))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=tuple(MODES))
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES)
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--tokens", type=int, default=64, help="of a sequence; two sequences are a pair (default 64)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; its clock adds threads up (default 1)")
    parser.add_argument("--name", default="", help="a word for the name of the result's file")


def device_environment(device: str) -> dict[str, Any]:
    found = environment()
    return found | {"gpu": torch.cuda.get_device_name()} if device != "cpu" else found


def result_path(verb: str, arguments: argparse.Namespace) -> Any:
    device = torch.cuda.get_device_name() if arguments.device != "cpu" else f"{cpu_model()}-{arguments.threads}threads"
    named = f"-{slug(arguments.name)}" if arguments.name else ""
    return RESULTS / f"{verb}{named}-{slug(device)}-torch{torch.__version__.split('+')[0]}.json"


def main() -> int:
    parser = ToolParser(description=__doc__.splitlines()[0])
    add_arguments(parser)
    arguments = parser.parse_args()
    if any(n % (2 * arguments.tokens) for n, _, _ in arguments.shapes):
        parser.error(
            f"N must be pairs of sequences of --tokens {arguments.tokens}: a multiple of {2 * arguments.tokens}"
        )
    torch.set_num_threads(arguments.threads)
    settings = vars(arguments) | {"shapes": ["x".join(map(str, shape)) for shape in arguments.shapes]}
    found = {"environment": device_environment(arguments.device), "settings": settings, "table": []}

    def save(rows: list[Row], by_round: dict) -> None:
        found.update(table=rows, seconds_by_round=by_round)
        looked = peers(arguments.implementations, rows)
        write_result(result_path("head", arguments), "head", found, seed=arguments.seed, peers=looked)

    measure(arguments, save)
    ours = [row for row in found["table"] if row["implementation"].startswith("prefuse")]
    return int(any("error" in row for row in ours))
