"""How the verbs measure: variants in turn, in a new order every round, and the most that torch's allocator held.

A ratio is the median over rounds of two times of one round, so that whatever else the machine does hits both. On a CPU
the clock counts the seconds of this process, on one thread; on a GPU it counts the device's.
"""

from __future__ import annotations

import gc
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler says on stderr that it begins and ends

Run = Callable[[], object]


def seconds_of(run: Run, device: str = "cpu") -> float:
    """CPU seconds of this process, or the GPU's seconds."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(runs: Mapping[str, Run], rounds: int, device: str = "cpu", seed: int = 0) -> dict[str, list[float]]:
    """Seconds by round of every run, each warmed up once; nobody always comes first."""
    order, shuffle = list(runs), random.Random(seed).shuffle
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(seconds_of(runs[name], device))
    return seconds


def gemms(units: int, hidden: Tensor, weight: Tensor) -> Run:  # (N, D), (V, D)
    """`units` large products of N * D * V in the inputs' dtype, into buffers made beforehand."""
    hidden, weight = hidden.detach(), weight.detach()
    z = torch.randn(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
    dhidden, dweight = torch.empty_like(hidden), torch.empty_like(weight)
    products = [
        lambda: torch.mm(hidden, weight.T, out=z),
        lambda: torch.mm(z, weight, out=dhidden),
        lambda: torch.mm(z.T, hidden, out=dweight),
        lambda: torch.mm(hidden, weight.T, out=z),
    ]
    return lambda: [product() for product in products[:units]]


def paired_ratio(seconds: Mapping[str, list[float]], name: str, base: str) -> float:
    """How many times `base` a variant took: the median over rounds."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[base], strict=True))


def resident(which: str) -> int:
    """This process's resident bytes: VmRSS now, VmHWM at their peak. (`ru_maxrss` would include what its parent held at
    the fork.)"""
    return 1024 * int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_bytes(run: Run, device: str = "cpu") -> int:
    """The most that torch's allocator held at once beyond what it had before; the same number on every machine."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        run()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()  # negative where memory is freed
        peak = max(peak, held)
    return peak
