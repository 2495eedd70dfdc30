"""Times of prefuse and its peers on a GPU, at the heads of released models; in a dry run, one call each."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import triton

from prefuse.bench import peers
from prefuse.bench.gpu_inputs import Model, TimedInputs, draw
from prefuse.bench.gpu_suite import Suite
from prefuse.bench.timing import gemms

LARGEST_ERROR = 1e-4  # nats a token, at the sizes of the timings
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
    drawn: tuple[Model | None, list[TimedInputs]] = (None, [])
    machine = suite.machine
    for model, mode, variant in jobs:
        if "lost_device" in suite.result:
            return
        if suite.left() < 0:
            print("out of time: the rest is not measured")
            return
        if drawn[0] != model:
            drawn = (None, [])  # frees the last model's inputs before the next are drawn
            drawn = (model, [draw(model, machine.tokens, seed, machine.device) for seed in range(2)])
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


def time_gemms(units: int, batches: list[TimedInputs]) -> dict[str, float]:
    return measure(gemms(units, batches[0].hidden, batches[0].weight))


def time_variant(name: str, mode: str, batches: list[TimedInputs]) -> dict[str, float]:
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
def largest_error(variant: peers.Variant, x: TimedInputs, rows: int = 128) -> float:
    """|error| of the first rows' log-probabilities, against float64."""
    hidden = x.hidden[:rows].double()
    z = torch.cat([hidden @ part.double().T for part in x.weight.split(16384)], 1)
    if x.softcap is not None:
        z = x.softcap * torch.tanh(z / x.softcap)
    truth = torch.log_softmax(z, -1).gather(1, x.targets[:rows, None])[:, 0]
    return (variant(x)[:rows].double() - truth).abs().max().item()
