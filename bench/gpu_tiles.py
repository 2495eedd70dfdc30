"""The tiles of the two hottest kernels, raced on a GPU at the heads of released models."""

from __future__ import annotations

import contextlib
import itertools
import time
from pathlib import Path
from typing import Any

import torch

from prefuse.bench.gpu_inputs import Model
from prefuse.bench.gpu_suite import Suite
from prefuse.bench.gpu_times import first_jobs, measure
from prefuse.kernels.tiles import tune
from prefuse.kernels.tiles.table import allow_descriptors, capability, choose
from prefuse.kernels.tiles.write import write

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
