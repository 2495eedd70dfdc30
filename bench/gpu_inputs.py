"""Heads of released models, and data as a trained model's: what the GPU suite times."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefuse.kernels.tiles.heads import RELEASED_HEADS


@dataclass(frozen=True)
class Model:
    """A head as a released model has it."""

    name: str
    d: int
    v: int
    softcap: float | None = None


_TIMED = ("Llama-3-8B", "Qwen2.5-0.5B", "Gemma-2-2B", "Llama-3.2-1B", "Qwen2.5-7B")
MODELS = [Model(name, RELEASED_HEADS[name].d, RELEASED_HEADS[name].v, RELEASED_HEADS[name].softcap) for name in _TIMED]
TOKENS = 8192
SEQUENCE = 1024
# Of the tail's timings: (sequences, tokens of each).
TAILS = [(8, 1024), (64, 512), (2048, 128)]


@dataclass
class TimedInputs:
    """One set of inputs of a timing."""

    hidden: Tensor  # (N, D) bf16
    weight: Tensor  # (V, D) bf16
    targets: Tensor  # (N,)
    grad: Tensor  # (N,) float32, dL/dlogp
    cu_seqlens: Tensor  # (N / SEQUENCE + 1,)
    softcap: float | None = None

    def leaves(self, *needs: str) -> TimedInputs:
        fresh = {name: getattr(self, name).detach().requires_grad_(name in needs) for name in ("hidden", "weight")}
        return replace(self, **fresh)


def draw(model: Model, n: int, seed: int, device: str = "cuda") -> TimedInputs:
    """Logits as a trained model's: unigram frequencies of Zipf, deviation 2 around them, the target near the top.

    The shape of the softmax matters to peers that skip tiles, and repeated targets to the gradient of the weight.
    """
    g = torch.Generator(device).manual_seed(seed)
    rank = torch.randperm(model.v, generator=g, device=device) + 1
    log_frequency = -rank.float().log()
    targets = torch.multinomial(log_frequency.exp(), n, replacement=True, generator=g)
    weight = torch.empty(model.v, model.d, device=device).normal_(std=model.d**-0.5, generator=g)
    hidden = torch.empty(n, model.d, device=device).normal_(std=2.0, generator=g)
    # One coordinate carries the frequencies.
    hidden[:, 0], weight[:, 0] = 4.0, log_frequency / 4
    z_target = 4.0 + 3.0 * torch.randn(n, device=device, generator=g)
    own = weight[targets]
    hidden += ((z_target - (hidden * own).sum(-1)) / own.square().sum(-1))[:, None] * own
    grad = torch.randn(n, device=device, generator=g) / n
    cu_seqlens = torch.arange(0, n + 1, min(SEQUENCE, n // 2), device=device, dtype=torch.int32)
    return TimedInputs(hidden.bfloat16(), weight.bfloat16(), targets, grad, cu_seqlens, model.softcap)
