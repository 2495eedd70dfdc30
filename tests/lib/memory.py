"""How much memory a call takes at its peak, to the byte, as the allocators of torch report it."""

import gc
from collections.abc import Callable

import torch
from torch.autograd.profiler import profile


def peak_bytes(run: Callable[[], object]) -> int:
    """The most that is allocated at once during `run()` beyond what was there before; on a GPU, of its memory."""
    gc.collect()  # what others left, freed meanwhile, would count against the run
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(profile_memory=True) as prof:
        run()
    events = [e for e in prof.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()  # negative where memory is freed
        peak = max(peak, allocated)
    return peak
