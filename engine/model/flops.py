"""Model FLOPs utilization (MFU): the arithmetic that training needs, as a share of what the device could do.

Chowdhery et al. 2022 (PaLM), appendix B, without their attention term, so it is a little too low for long texts. Tokens
are those that run: sharing a prompt makes a run faster, not its MFU. Recomputed activations, KTO's pass over
mismatches and optimizer steps count as nothing.

What a GPU could do is what its maker says. A CPU has too many clocks for that: what it could do is the best of a few
matrix products, measured as the run begins with the threads and the dtype it has.
"""

import functools
import time

import torch
from torch import nn

from prefuse.engine.data.batches import Batch
from prefuse.engine.model.forward import LanguageModel

# Dense bfloat16 or float16 per second, by the makers' data sheets; the first name that the device's contains.
PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
    "MI300X": 1307e12,
}

PEAK_BANDWIDTH = {  # bytes of memory per second, by the same sheets
    "H100 PCIe": 2.0e12,
    "H100 NVL": 3.9e12,
    "H100": 3.35e12,
    "H200": 4.8e12,
    "B200": 8.0e12,
    "A100": 2.0e12,
    "L40S": 0.864e12,
    "MI300X": 5.3e12,
}


def peak_flops(lm: LanguageModel) -> float | None:
    """Of the device in the precision of the run, per second. None where that is not known, and for mixtures of experts,
    whose weights are not all used by a token."""
    config = lm.model.config.get_text_config()
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    half = lm.compute_dtype in (torch.bfloat16, torch.float16)
    if lm.device.type == "cpu" and not experts:
        return measured_flops(lm.compute_dtype)
    if lm.device.type != "cuda" or experts or not half:
        return None
    device = torch.cuda.get_device_name(lm.device)
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)


@functools.cache
def measured_flops(dtype: torch.dtype, size: int = 1024, rounds: int = 5) -> float:
    """The best of a few products of square matrices on the CPU, about a tenth of a second in all."""
    x = torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(rounds + 1):  # the first is for warming up
        began = time.perf_counter()
        x @ x
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds[1:])


@functools.cache
def measured_bandwidth(rows: int = 8192, columns: int = 4096, rounds: int = 3) -> float:
    """Bytes per second of the best of a few products of a matrix that no cache holds with a vector, on the CPU."""
    x, y = torch.ones(rows, columns), torch.ones(columns)
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        x @ y
        seconds.append(time.perf_counter() - began)
    return x.nbytes / min(seconds[1:])


def training_flops(lm: LanguageModel, batch: Batch) -> int:
    """Forward and backward of the tokens that run in the trunk, and of the completion's in the head: per weight and
    token 6, or 4 where the weight is frozen and has no gradient of its own."""
    trunk, frozen = trunk_weights(lm.model)
    weight = lm.head.weight
    head = (6 if weight.requires_grad else 4) * weight.numel()
    return (6 * trunk - 2 * frozen) * batch.tokens.num_tokens + head * len(batch.targets)


def trunk_weights(model: nn.Module) -> tuple[int, int]:
    """Weights that a token is multiplied by, outside of the head, and how many of them are frozen."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = model.get_output_embeddings()  # None for a model that scores
    tables |= set() if head is None else {id(p) for p in head.parameters()}
    met = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in tables]
    return sum(p.numel() for p in met), sum(p.numel() for p in met if not p.requires_grad)
