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
import itertools
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import triton

import prefuse
from prefuse.bench import cases, record
from prefuse.bench.gpu_report import ms_or_error, report
from prefuse.bench.gpu_suite import DRY, GPU, Suite
from prefuse.bench.gpu_tiles import run_tiles
from prefuse.bench.gpu_times import measure, run_first_times, run_times
from prefuse.bench.record import RESULTS, environment, slug
from prefuse.bench.truth.head_cases import NEEDS, check_head, random_inputs

SANITIZER_SECONDS = 90


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
            print(f"tail, {row['loss']}, {sequences} x {tokens}, {impl}: {ms_or_error(row)}", flush=True)


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
