"""The one command for a machine with a GPU: are the kernels right there, and how fast are they beside their peers?

    prefuse bench gpu --minutes 9
    prefuse bench gpu --interpret        # the checks alone, at small sizes, on a CPU under Triton's interpreter

In order: the environment and the chip's own ceilings; every kernel, mode and option against float64; compute-sanitizer
where it is on the PATH; the loss behind the log-probabilities in one launch and in torch; then timings of the head, the
most telling first, until the minutes are spent. What was measured so far is in results/<gpu>-<torch>-<triton>.json and
.md after every row. Exits 1 if a check failed or prefuse could not be timed.

Times are medians of CUDA events after warm-up, with the L2 cache flushed and two sets of random inputs taken in turn.
TFLOP/s count 2NDV operations without gradients, 4NDV with a frozen head and 8NDV with a trainable one, for everybody;
the bare GEMMs are as many large bf16 products. Memory is the peak beyond the inputs, gradients included.
"""

from __future__ import annotations

import argparse
import functools
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

if "--interpret" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it as it is imported

import torch
import triton

import prefuse
from prefuse.bench import cases, peers, record
from prefuse.bench.cases import MODELS, TOKENS, Model
from prefuse.bench.record import RESULTS, environment, markdown, slug, write_json
from prefuse.bench.truth.head_cases import NEEDS, check_head, random_inputs

CHECKS_SHARE = 0.5  # of the minutes
SANITIZER_SECONDS = 90
LARGEST_ERROR = 1e-4  # nats a token, at the sizes of the timings


class Suite:
    """The result so far, and the time that is left."""

    def __init__(self, path: Path, minutes: float):
        self.path, self.start, self.seconds = path, time.monotonic(), 60 * minutes
        self.result: dict[str, Any] = {
            "environment": {},
            "checks": [],
            "sanitizer": "not run",
            "tail": [],
            "timings": [],
        }
        self.failed = False

    def left(self, share: float = 1.0) -> float:
        return self.start + share * self.seconds - time.monotonic()

    def save(self) -> None:
        write_json(self.path, self.result)
        self.path.with_suffix(".md").write_text(report(self.result))


# ------------------------------------------------------------------------------------------- environment


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


def run_checks(suite: Suite, sizes: cases.Sizes) -> None:
    """Every check, as far as its share of the minutes goes."""
    for name, check in cases.checks(sizes):
        if suite.left(CHECKS_SHARE) < 0:
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


def run_tail(suite: Suite, device: str = "cuda") -> None:
    """Everything behind the log-probabilities, forward and backward: the host's launches are part of its time."""
    for loss, (sequences, tokens) in itertools.product((prefuse.DPO(), prefuse.IPO(), prefuse.KTO()), cases.TAILS):
        arguments = cases.preferences(loss, torch.full((sequences,), tokens), device)
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
            print(f"tail, {row['loss']}, {sequences} x {tokens}, {impl}: {_ms_or_error(row)}", flush=True)


# ----------------------------------------------------------------------------------------------- timings


def jobs() -> list[tuple[Model, str, str]]:
    """(model, mode, variant), the most telling first."""

    def rows(models: list[Model], variants: Iterable[str]) -> list[tuple[Model, str, str]]:
        return [
            (model, mode, variant)
            for model, mode, variant in itertools.product(models, peers.MODES, variants)
            if mode in peers.MODES_OF.get(variant, peers.MODES)
        ]

    main, rest, first = MODELS[:1], MODELS[1:], ["bare GEMMs", *peers.FIRST]
    return [
        *rows(main, first), *rows(rest, first), *rows(main, peers.OTHERS), *rows(main, peers.SLOW),
        *rows(rest, peers.OTHERS), *rows(rest, peers.SLOW), *rows(main, ["prefuse"]),
    ]  # fmt: skip


def run_timings(suite: Suite) -> None:
    drawn: tuple[Model | None, list[cases.Batch]] = (None, [])
    for model, mode, variant in jobs():
        if suite.left() < 0:
            print("out of time: the rest is not measured")
            return
        if drawn[0] != model:
            drawn = (None, [])  # frees the last model's inputs before the next are drawn
            drawn = (model, [cases.draw(model, TOKENS, seed) for seed in range(2)])
        torch._dynamo.reset()  # else a compiled peer runs into its recompilation limit and goes on as eager
        if variant == "bare GEMMs":
            for units in peers.GEMM_UNITS[mode]:
                add_row(suite, model, mode, f"{variant} ({units})", functools.partial(time_gemms, units, drawn[1]))
        else:
            add_row(suite, model, mode, variant, functools.partial(time_variant, variant, mode, drawn[1]))
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:  # an illegal access leaves the process without a device
            suite.result["lost_device"] = f"after {model.name}, {mode}, {variant}: {error}".splitlines()[0]
            print(suite.result["lost_device"])
            return


def add_row(suite: Suite, model: Model, mode: str, variant: str, time_it: Callable[[], dict]) -> None:
    """One timing, or the error that stood in its way."""
    row = {"model": model.name, "N": TOKENS, "D": model.d, "V": model.v, "mode": mode, "variant": variant}
    here = {r["variant"]: r for r in suite.result["timings"] if (r["model"], r["mode"]) == (model.name, mode)}
    if variant in here:
        row["variant"] += " (again)"
    try:
        row |= time_it()
        row["tflops"] = peers.MODES[mode][1] * 2 * TOKENS * model.d * model.v / row["ms"] / 1e9
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


def time_gemms(units: int, batches: list[cases.Batch]) -> dict[str, float]:
    return measure(peers.gemms(units, batches[0]))


def time_variant(name: str, mode: str, batches: list[cases.Batch]) -> dict[str, float]:
    variant, needs = peers.VARIANTS[name], peers.MODES[mode][0]
    sets = [batch.leaves(*needs) for batch in batches]
    leaves = [x for batch in sets for x in (batch.hidden, batch.weight)]
    turns = itertools.cycle(sets)

    def run() -> None:
        peers.step(variant, next(turns))

    def clear() -> None:
        for x in leaves:
            x.grad = None

    torch.cuda.empty_cache()
    run()  # compile
    clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    clear()
    row = {**measure(run, leaves), "peak_mib": peak / 2**20}
    if name not in peers.MODES_OF:
        row["largest_error_nats"] = largest_error(variant, sets[0])
    return row


def measure(run: Callable[[], Any], leaves: list[torch.Tensor] | None = None) -> dict[str, float]:
    """Median and 20% to 80% of the milliseconds of one call."""
    ms, low, high = triton.testing.do_bench(run, warmup=50, rep=400, grad_to_none=leaves, quantiles=[0.5, 0.2, 0.8])
    return {"ms": ms, "ms_low": low, "ms_high": high}


@torch.no_grad()
def largest_error(variant: peers.Variant, x: cases.Batch, rows: int = 128) -> float:
    """|error| of the first rows' log-probabilities, against float64."""
    hidden = x.hidden[:rows].double()
    z = torch.cat([hidden @ part.double().T for part in x.weight.split(16384)], 1)
    if x.softcap is not None:
        z = x.softcap * torch.tanh(z / x.softcap)
    truth = torch.log_softmax(z, -1).gather(1, x.targets[:rows, None])[:, 0]
    return (variant(x)[:rows].double() - truth).abs().max().item()


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
            title = f"## {model.name}, {mode} (N = {TOKENS}, D = {model.d}, V = {model.v})"
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


SECTIONS = {
    "checks": functools.partial(run_checks, sizes=cases.GPU),
    "sanitizer": run_sanitizer,
    "tail": run_tail,
    "timings": run_timings,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="stop measuring after this long (default 9)")
    parser.add_argument("--interpret", action="store_true", help="the checks alone, on a CPU, at small sizes")
    parser.add_argument("--only", choices=SECTIONS, help="one section alone")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results (default bench/results)")
    parser.add_argument("--small-case", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small_case:
        small_case()
        return
    if not args.interpret and not torch.cuda.is_available():
        parser.error("no GPU here: torch.cuda.is_available() is False (--interpret runs the checks on a CPU)")

    chip = "interpreter" if args.interpret else torch.cuda.get_device_name()
    versions = f"torch{torch.__version__.split('+')[0]}-triton{triton.__version__}"
    only = f"-{args.only}" if args.only else ""
    suite = Suite(args.out / f"{slug(chip)}-{versions}{only}.json", args.minutes)
    if args.interpret:
        sys.path.append(str(record.CHECKOUT.parents[1] / "tests" / "lib"))
        import strict_interpreter

        strict_interpreter.install()
        suite.result["environment"] = environment()
        run_checks(suite, cases.INTERPRETED)
    else:
        suite.result["environment"] = gpu_environment()
        suite.save()
        for name, section in SECTIONS.items():
            if args.only in (None, name):
                section(suite)
                suite.save()
        suite.result["environment"]["nvidia_smi_after"] = nvidia_smi()
    suite.save()
    print(f"\n{report(suite.result)}\nwritten to {suite.path}")
    sys.exit(int(suite.failed))


if __name__ == "__main__":
    main()
