"""The one command for a machine with a GPU: are the kernels right there, and how fast are they beside their peers?

    prefuse bench gpu --minutes 9
    prefuse bench gpu --dry-run --minutes 1   # the same course on a CPU, at toy sizes, under Triton's interpreter
    prefuse bench gpu --interpret             # the checks alone, at small sizes, on the interpreter

Sections in order, each with its part of the minutes; what one leaves over goes to those behind it:

    environment   versions, the chip's own ceilings
    real size     every mode against float64 at the head of a released model
    first times   lean, stash, frozen, no grad and sparse at two models' heads, beside TRL and Liger
    tiles         the tiles of the two kernels that take the most time, raced at these heads
    checks, sanitizer, tail, times    everything else, the most telling first

What was measured so far is in results/<gpu>-<torch>-<triton>.json and .md after every row, and a file is always whole:
a run that is killed leaves what it had. Exits 1 if a check failed or prefuse could not be timed.

Times are medians of CUDA events after warm-up, with the L2 cache flushed and two sets of random inputs taken in turn.
TFLOP/s count 2NDV operations without gradients, 4NDV with a frozen head and 8NDV with a trainable one, for everybody;
the bare GEMMs are as many large bf16 products. Memory is the peak beyond the inputs, gradients included.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

import prefuse
from prefuse.bench import cases, peers, record
from prefuse.bench.cases import MODELS, TOKENS, Model
from prefuse.bench.record import RESULTS, environment, markdown, slug, write_result, write_text
from prefuse.bench.truth.head_cases import NEEDS, check_head, random_inputs
from prefuse.kernels.tiles import tune
from prefuse.kernels.tiles.table import allow_descriptors, capability, choose
from prefuse.kernels.tiles.write import write

SANITIZER_SECONDS = 90
LARGEST_ERROR = 1e-4  # nats a token, at the sizes of the timings


@dataclass(frozen=True)
class Machine:
    """Where the suite runs, and at which sizes."""

    device: str
    sizes: cases.Sizes
    models: list[Model]
    tokens: int
    tails: list[tuple[int, int]]
    tiles: int | None  # at most so many candidates of a kernel

    @property
    def dry(self) -> bool:
        return self.device == "cpu"


GPU = Machine("cuda", cases.GPU, MODELS, TOKENS, cases.TAILS, None)
DRY = Machine(
    "cpu", cases.TOY, [Model(model.name, 32, 160, model.softcap) for model in MODELS], 48, [(4, 8)], 1
)  # fmt: skip


class Suite:
    """The result so far, and the time that is left to its present section."""

    def __init__(self, path: Path, minutes: float, machine: Machine = GPU):
        self.path, self.machine, self.seconds = path, machine, 60 * minutes
        self.start = self.deadline = time.monotonic()
        self.deadline += self.seconds
        self.result: dict[str, Any] = {
            "environment": environment(),
            "settings": {"minutes": minutes, "device": "interpreter" if machine.dry else "cuda"},
            "sections": [],
            "checks": [],
            "sanitizer": "not run",
            "tail": [],
            "tiles": [],
            "timings": [],
        }
        self.failed = False

    def run(self, name: str, share: float, section: Callable[[Suite], None]) -> None:
        """One section, which is to end when `share` of the minutes is over."""
        self.deadline = self.start + share * self.seconds
        row = {"section": name, "began_s": round(time.monotonic() - self.start, 1), "until_s": share * self.seconds}
        self.result["sections"].append(row)
        print(f"-- {name}: {max(self.left(), 0.0):.0f} s", flush=True)
        try:
            section(self)
        except Exception as error:  # the sections behind it are worth their time all the same
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"[:1000]
            self.failed = True
        row["ended_s"] = round(time.monotonic() - self.start, 1)
        self.save()

    def left(self) -> float:
        """Seconds of the present section."""
        return self.deadline - time.monotonic()

    def save(self) -> None:
        write_result(self.path, "gpu", self.result)
        write_text(self.path.with_suffix(".md"), report(self.result))


# ------------------------------------------------------------------------------------------- environment


def run_environment(suite: Suite) -> None:
    suite.result["environment"] = environment() if suite.machine.dry else gpu_environment()


def gpu_environment() -> dict[str, Any]:
    """The chip as it is found, and what it reaches on a plain copy and a plain product."""
    properties = torch.cuda.get_device_properties(0)
    return {
        **environment(),
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "nvidia_smi": nvidia_smi(),
        **ceilings(),
    }


def nvidia_smi() -> str | None:
    fields = "driver_version,clocks.sm,clocks.mem,temperature.gpu,power.draw,power.limit"
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def ceilings() -> dict[str, float]:
    a, b, c = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(3))
    product = measure(lambda: torch.mm(a, b, out=c))["ms"]
    source, target = (torch.randint(256, (2**30,), dtype=torch.uint8, device="cuda") for _ in range(2))
    copy = measure(lambda: target.copy_(source))["ms"]
    return {"gemm_8192_tflops": 2 * 8192**3 / product / 1e9, "copy_tb_per_s": 2 * 2**30 / copy / 1e9}


# ------------------------------------------------------------------------------------------------ checks


def run_real(suite: Suite) -> None:
    """Each mode at one size as a released model has it."""
    run_checks(suite, cases.real_checks(suite.machine.sizes))


def run_rest(suite: Suite) -> None:
    run_checks(suite, cases.checks(suite.machine.sizes))


def run_checks(suite: Suite, checks: Iterable[tuple[str, cases.Check]]) -> None:
    """Every check, as far as the time goes."""
    for name, check in checks:
        if suite.left() < 0:
            suite.result["checks"].append({"check": name, "outcome": "not reached"})
            continue
        torch.manual_seed(0)
        start = time.monotonic()
        outcome, detail = run_check(check)
        suite.failed |= outcome == "FAILED"
        row = {"check": name, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}
        suite.result["checks"].append(row | ({"detail": detail} if detail else {}))
        print(f"{outcome:7} {row['seconds']:5.1f} s  {name}  {detail}", flush=True)
        suite.save()


def run_check(check: cases.Check) -> tuple[str, str]:
    try:
        check()
    except NotImplementedError as error:
        return "skipped", str(error)
    except torch.OutOfMemoryError as error:  # the float64 truth's, on a small chip
        return "skipped", str(error)
    except Exception as error:
        traceback.print_exc()
        return "FAILED", f"{type(error).__name__}: {error}"[:1000]
    return "passed", ""


def run_sanitizer(suite: Suite) -> None:
    """compute-sanitizer's memcheck over a small case of every mode, in a process of its own."""
    tool = shutil.which("compute-sanitizer")
    if suite.machine.dry or suite.left() < 10:
        suite.result["sanitizer"] = f"not run: {'no GPU' if suite.machine.dry else 'no time'}"
        return
    if tool is None:
        suite.result["sanitizer"] = "not run: compute-sanitizer is not on the PATH"
        return
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *record.again("gpu"), "--small-case"]
    limit = min(SANITIZER_SECONDS, suite.left())
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        suite.result["sanitizer"] = f"not finished in {limit:.0f} s"
        return
    output = run.stdout + run.stderr
    if run.returncode == 0 and "ERROR SUMMARY: 0 errors" in output:
        suite.result["sanitizer"] = "passed: 0 errors"
    elif "not supported" in output:
        suite.result["sanitizer"] = "not run: this device is not supported by it"
    else:
        suite.result["sanitizer"] = f"FAILED: exit code {run.returncode}\n{output[-3000:]}"
        suite.failed = True


def small_case() -> None:
    for dtype, mode in itertools.product((torch.bfloat16, torch.float32), ("trainable", "frozen head")):
        for shape in ((130, 96, 700), (33, 65, 301)):
            inputs = random_inputs(*shape, dtype, bias=True, ignored=0.2, device="cuda")
            check_head(cases.head, inputs, NEEDS[mode], entropy=mode == "trainable", softcap=3.0)
    cases.tail_agrees(cases.GPU, cases.TAIL_LOSSES[-1])


# -------------------------------------------------------------------------------------------------- tail


def run_tail(suite: Suite) -> None:
    """Everything behind the log-probabilities, forward and backward: the host's launches are part of its time."""
    losses = (prefuse.DPO(), prefuse.IPO(), prefuse.KTO())
    for loss, (sequences, tokens) in itertools.product(losses, suite.machine.tails):
        if suite.left() < 0:
            return
        arguments = cases.preferences(loss, torch.full((sequences,), tokens), suite.machine.device)
        for impl in ("triton", "torch"):
            row = {"loss": type(loss).__name__, "sequences": sequences, "tokens": tokens, "impl": impl}

            def step(impl: str = impl, arguments: dict[str, Any] = arguments) -> None:
                torch.autograd.grad(prefuse.preference_loss(**arguments, impl=impl).loss, arguments["logps"])

            try:
                row |= measure(step)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                suite.failed = True
            suite.result["tail"].append(row)
            suite.save()
            print(f"tail, {row['loss']}, {sequences} x {tokens}, {impl}: {_ms_or_error(row)}", flush=True)


# ----------------------------------------------------------------------------------------------- timings


Job = tuple[Model, str, str]  # model, mode, variant


def first_jobs(models: list[Model]) -> list[Job]:
    """Two heads of 7 to 8 billion weights: every mode of prefuse, beside TRL and Liger."""
    main = [model for model in models if model.name in ("Llama-3-8B", "Qwen2.5-7B")]
    return [
        (model, mode, variant)
        for mode, model, variant in itertools.product(reversed(peers.MODES), main, ["bare GEMMs", *peers.FIRST])
        if mode in peers.MODES_OF.get(variant, peers.MODES)
    ]


def other_jobs(models: list[Model]) -> list[Job]:
    """The rest, the most telling first; at last prefuse's own once more, for the drift of the clock."""

    def rows(models: list[Model], variants: Iterable[str]) -> list[Job]:
        return [
            (model, mode, variant)
            for model, mode, variant in itertools.product(models, peers.MODES, variants)
            if mode in peers.MODES_OF.get(variant, peers.MODES)
        ]

    main, rest, first = models[:1], models[1:], ["bare GEMMs", *peers.FIRST]
    done = first_jobs(models)
    return [
        *(job for job in rows(rest, first) if job not in done), *rows(main, peers.OTHERS), *rows(main, peers.SLOW),
        *rows(rest, peers.OTHERS), *rows(rest, peers.SLOW), *rows(main, ["prefuse"]),
    ]  # fmt: skip


def run_first_times(suite: Suite) -> None:
    run_jobs(suite, first_jobs(suite.machine.models))


def run_times(suite: Suite) -> None:
    run_jobs(suite, other_jobs(suite.machine.models))


def run_jobs(suite: Suite, jobs: list[Job]) -> None:
    drawn: tuple[Model | None, list[cases.TimedInputs]] = (None, [])
    machine = suite.machine
    for model, mode, variant in jobs:
        if "lost_device" in suite.result:
            return
        if suite.left() < 0:
            print("out of time: the rest is not measured")
            return
        if drawn[0] != model:
            drawn = (None, [])  # frees the last model's inputs before the next are drawn
            drawn = (model, [cases.draw(model, machine.tokens, seed, machine.device) for seed in range(2)])
        torch._dynamo.reset()  # else a compiled peer runs into its recompilation limit and goes on as eager
        if variant == "bare GEMMs":
            for units in peers.GEMM_UNITS[mode]:
                time_it = functools.partial(time_gemms, units, drawn[1])
                add_row(suite, model, mode, f"{variant} ({units})", time_it)
        else:
            add_row(suite, model, mode, variant, functools.partial(time_variant, variant, mode, drawn[1]))
        try:
            synchronize()
        except RuntimeError as error:  # an illegal access leaves the process without a device
            suite.result["lost_device"] = f"after {model.name}, {mode}, {variant}: {error}".splitlines()[0]
            print(suite.result["lost_device"])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def add_row(suite: Suite, model: Model, mode: str, variant: str, time_it: Callable[[], dict]) -> None:
    """One timing, or the error that stood in its way."""
    tokens = suite.machine.tokens
    row = {"model": model.name, "N": tokens, "D": model.d, "V": model.v, "mode": mode, "variant": variant}
    here = {r["variant"]: r for r in suite.result["timings"] if (r["model"], r["mode"]) == (model.name, mode)}
    if variant in here:
        row["variant"] += " (again)"
    try:
        row |= time_it()
        row["tflops"] = peers.MODES[mode][1] * 2 * tokens * model.d * model.v / row["ms"] / 1e9
        floor = here.get(f"bare GEMMs ({peers.GEMM_UNITS[mode][0]})", {}).get("ms")
        row["gemm_share"] = floor / row["ms"] if floor else None
        suite.failed |= variant == "prefuse" and not row["largest_error_nats"] < LARGEST_ERROR
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        suite.failed |= variant.startswith("prefuse")
    suite.result["timings"].append(row)
    suite.save()
    time_or_error = row.get("error") or f"{row['ms']:8.2f} ms"
    print(f"{model.name:14} {mode:10} {row['variant']:24} {time_or_error}", flush=True)


def time_gemms(units: int, batches: list[cases.TimedInputs]) -> dict[str, float]:
    return measure(peers.gemms(units, batches[0]))


def time_variant(name: str, mode: str, batches: list[cases.TimedInputs]) -> dict[str, float]:
    variant, needs = peers.VARIANTS[name], peers.MODES[mode][0]
    sets = [batch.leaves(*needs) for batch in batches]
    leaves = [x for batch in sets for x in (batch.hidden, batch.weight)]
    turns = itertools.cycle(sets)

    def run() -> None:
        peers.step(variant, next(turns))

    def clear() -> None:
        for x in leaves:
            x.grad = None

    began = time.monotonic()
    run()  # compiles
    synchronize()
    row = {"first_call_s": round(time.monotonic() - began, 2)}
    clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
        clear()
    row |= measure(run, leaves)
    if name not in peers.MODES_OF:
        row["largest_error_nats"] = largest_error(variant, sets[0])
    return row


def measure(run: Callable[[], Any], leaves: list[torch.Tensor] | None = None) -> dict[str, float]:
    """Median and 20% to 80% of the milliseconds of one call."""
    if not torch.cuda.is_available():  # a dry run: one call, whose time means nothing
        began = time.perf_counter()
        run()
        return dict.fromkeys(("ms", "ms_low", "ms_high"), 1000 * (time.perf_counter() - began))
    ms, low, high = triton.testing.do_bench(run, warmup=50, rep=400, grad_to_none=leaves, quantiles=[0.5, 0.2, 0.8])
    return {"ms": ms, "ms_low": low, "ms_high": high}


@torch.no_grad()
def largest_error(variant: peers.Variant, x: cases.TimedInputs, rows: int = 128) -> float:
    """|error| of the first rows' log-probabilities, against float64."""
    hidden = x.hidden[:rows].double()
    z = torch.cat([hidden @ part.double().T for part in x.weight.split(16384)], 1)
    if x.softcap is not None:
        z = x.softcap * torch.tanh(z / x.softcap)
    truth = torch.log_softmax(z, -1).gather(1, x.targets[:rows, None])[:, 0]
    return (variant(x)[:rows].double() - truth).abs().max().item()


# ------------------------------------------------------------------------------------------------- tiles


HOTTEST = ("dlogits", "fold")  # the backward's kernel and the forward's


def run_tiles(suite: Suite) -> None:
    """The two hottest kernels at the two heads of `first_jobs`; rows that win are written beside the result."""
    path = suite.path.with_suffix(".tiles.toml")
    heads = list(dict.fromkeys(model for model, *_ in first_jobs(suite.machine.models)))
    work = list(itertools.product(HOTTEST, heads))
    with contextlib.nullcontext() if suite.machine.dry else tune.compilers() as pool:
        for i, (kernel, model) in enumerate(work):
            seconds = suite.left() / (len(work) - i)
            if seconds < 0:
                return
            row = {"kernel": kernel, "model": model.name, "D": model.d, "V": model.v}
            try:
                row |= tune_one(suite, kernel, model, pool, seconds, path)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:1000]
            suite.result["tiles"].append(row)
            suite.save()
            print(f"tiles of {kernel} at {model.name}: {row.get('error') or row['winner']}", flush=True)


def tune_one(suite: Suite, kernel: str, model: Model, pool: Any, seconds: float, path: Path) -> dict[str, Any]:
    machine, began = suite.machine, time.monotonic()
    head = tune.RaceInputs.random(machine.tokens, model.d, model.v, torch.bfloat16, torch.device(machine.device))
    timer = tune.cuda_timer if not machine.dry else lambda run: measure(run)["ms"]
    tiles = None
    if machine.dry:
        chip, descriptors = capability(head.hidden.device), allow_descriptors(head.hidden, head.weight)
        tiles = [choose(kernel, chip, torch.bfloat16, descriptors, model.d, model.v)] * machine.tiles
    tuned = tune.tune_kernel(
        kernel, head, tiles, timer=timer, pool=pool,
        time_left=lambda share: time.monotonic() < began + share * seconds,
    )  # fmt: skip
    row = tune.measured(tuned, False, f"{torch.cuda.get_device_name() if not machine.dry else 'the interpreter'}")
    if row is not None:
        write(path, [row])
    return {
        "timed": sum(bool(x.ms) for x in tuned.entrants),
        "winner": "no time" if row is None else str(row.config),
        "table": tune.entrants_table(tuned),
    }


# ------------------------------------------------------------------------------------------------ report


def report(result: dict[str, Any]) -> str:
    env, lines = result["environment"], []
    packages = ", ".join(f"{name} {version}" for name, version in env.get("packages", {}).items())
    lines += [f"# {env.get('gpu') or env.get('cpu')}", "", f"{env.get('time')}; {packages}", ""]
    if "gemm_8192_tflops" in env:
        lines += [
            f"8192^3 bf16 product {env['gemm_8192_tflops']:.0f} TFLOP/s, copy {env['copy_tb_per_s']:.2f} TB/s",
            "",
        ]
    outcomes = [row["outcome"] for row in result["checks"]]
    counts = ", ".join(f"{outcomes.count(x)} {x}" for x in ("passed", "FAILED", "skipped", "not reached"))
    lines += [f"Lost the device {result['lost_device']}.", ""] if "lost_device" in result else []
    lines += [f"Checks: {counts}. compute-sanitizer: {result['sanitizer']}.", ""]
    lines += [f"* {row['outcome']}: {row['check']}" for row in result["checks"] if row["outcome"] != "passed"]
    for row in result["sections"]:
        ended = f"{row['ended_s']:.0f} s" if "ended_s" in row else "not ended"
        lines += [f"* section {row['section']}: {row['began_s']:.0f} s to {ended} {row.get('error', '')}".rstrip()]
    for row in result["tiles"]:
        lines += [
            "",
            f"## Tiles of {row['kernel']}, {row['model']}",
            "",
            "```",
            row.get("error") or row["table"],
            "```",
        ]
    if result["tail"]:
        lines += [
            "",
            "## Behind the log-probabilities: loss, metrics and gradient",
            "",
            tail_table(result["tail"]),
        ]
    for model, mode in itertools.product(MODELS, peers.MODES):
        rows = [row for row in result["timings"] if (row["model"], row["mode"]) == (model.name, mode)]
        if rows:
            first = rows[0]
            title = f"## {model.name}, {mode} (N = {first['N']}, D = {first['D']}, V = {first['V']})"
            lines += ["", title, "", timing_table(rows)]
    return "\n".join(lines) + "\n"


def tail_table(rows: list[dict[str, Any]]) -> str:
    lines = [[row["loss"], f"{row['sequences']} x {row['tokens']}", row["impl"], _ms_or_error(row)] for row in rows]
    return markdown(["loss", "sequences x tokens", "impl", "time"], lines)


def _ms_or_error(row: dict[str, Any]) -> str:
    return row.get("error") or f"{row['ms']:.3f} ms ({row['ms_low']:.3f}-{row['ms_high']:.3f})"


def timing_table(rows: list[dict[str, Any]]) -> str:
    def cell(row: dict[str, Any], key: str, form: str) -> str:
        return format(row[key], form) if row.get(key) is not None else ""

    columns = {
        "ms": lambda r: r["error"] if "error" in r else f"{r['ms']:.2f} ({r['ms_low']:.2f}-{r['ms_high']:.2f})",
        "TFLOP/s": lambda r: cell(r, "tflops", ".0f"),
        "of bare GEMMs": lambda r: cell(r, "gemm_share", ".0%"),
        "peak MiB": lambda r: cell(r, "peak_mib", ".0f"),
        "error (nats)": lambda r: cell(r, "largest_error_nats", ".1e"),
    }
    return markdown(["variant", *columns], [[r["variant"], *(column(r) for column in columns.values())] for r in rows])


# -------------------------------------------------------------------------------------------------- main


# Section -> the part of the minutes that is over when it ends, and what it does.
SECTIONS: dict[str, tuple[float, Callable[[Suite], None]]] = {
    "environment": (0.5 / 9, run_environment),
    "real size": (2.5 / 9, run_real),
    "first times": (5.5 / 9, run_first_times),
    "tiles": (7.5 / 9, run_tiles),
    "checks": (8.2 / 9, run_rest),
    "sanitizer": (8.4 / 9, run_sanitizer),
    "tail": (8.6 / 9, run_tail),
    "times": (1.0, run_times),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="stop measuring after this long (default 9)")
    parser.add_argument("--interpret", action="store_true", help="the checks alone, on a CPU, at small sizes")
    parser.add_argument("--dry-run", action="store_true", help="the whole course on a CPU, at toy sizes")
    parser.add_argument("--only", choices=SECTIONS, help="one section alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default bench/results)")
    parser.add_argument("--small-case", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small_case:
        small_case()
        return
    on_cpu = args.interpret or args.dry_run
    if on_cpu and os.environ.get("TRITON_INTERPRET") != "1":  # which Triton reads as it is imported
        os.environ |= {"TRITON_INTERPRET": "1", "TORCHDYNAMO_DISABLE": "1"}  # (peers that compile take a minute)
        command = [*record.again("gpu"), *sys.argv[1:]]
        os.execv(command[0], command)
    if not on_cpu and not torch.cuda.is_available():
        parser.error("no GPU here: torch.cuda.is_available() is False (--dry-run and --interpret run on a CPU)")

    chip = "dry-run" if args.dry_run else "interpreter" if args.interpret else torch.cuda.get_device_name()
    versions = f"torch{torch.__version__.split('+')[0]}-triton{triton.__version__}"
    only = f"-{slug(args.only)}" if args.only else ""
    suite = Suite(args.out / f"{slug(chip)}-{versions}{only}.json", args.minutes, DRY if on_cpu else GPU)
    if on_cpu:
        sys.path.append(str(record.CHECKOUT.parents[1] / "tests" / "lib"))
        import strict_interpreter

        strict_interpreter.install()
    if args.interpret:
        run_environment(suite)
        run_checks(suite, cases.checks(cases.INTERPRETED))
    else:
        for name, (share, section) in SECTIONS.items():
            if args.only in (None, name):
                suite.run(name, 1.0 if args.only else share, section)
        if not on_cpu:
            suite.result["environment"]["nvidia_smi_after"] = nvidia_smi()
    suite.save()
    print(f"\n{report(suite.result)}\nwritten to {suite.path}")
    sys.exit(int(suite.failed))


if __name__ == "__main__":
    main()
