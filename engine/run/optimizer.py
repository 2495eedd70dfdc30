"""AdamW, torch's or that of bitsandbytes, with its parameter groups, and the learning rate over the steps."""

import importlib
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from prefuse.engine.config.settings import BITSANDBYTES, Config
from prefuse.engine.errors import UserError


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Weight decay falls on matrices; norms and biases, all of one dimension, have none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    make = adamw_of(config.optim)
    if config.optim != "adamw_torch":
        _try_out(make, config.optim, parameters[0].device)
    return make(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


def adamw_of(name: str) -> Callable[..., torch.optim.Optimizer]:
    """transformers' names. Paged states lie in memory that the GPU shares with the CPU."""
    if name not in BITSANDBYTES:
        return partial(torch.optim.AdamW, fused=True) if name == "adamw_torch_fused" else torch.optim.AdamW
    try:
        library = importlib.import_module("bitsandbytes.optim")  # no dependency: for those who have it
    except ImportError as error:
        raise UserError(f"optim {name}: {error}; pip install bitsandbytes, or take optim adamw_torch") from None
    return partial(library.AdamW, optim_bits=32 if "32bit" in name else 8, is_paged="paged" in name)


def _try_out(make: Callable[..., torch.optim.Optimizer], name: str, device: torch.device) -> None:
    """One step of something small: where an optimizer cannot run, it says so only when it is used."""
    p = nn.Parameter(torch.ones(128, 128, device=device))  # large enough for states of 8 bits
    p.grad = torch.ones_like(p)
    try:
        make([p], lr=1.0).step()
    except Exception as error:  # each library has its own
        fault = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"optim {name} cannot run on {device.type}: {fault}; take optim adamw_torch") from None
    if not (p < 1).all():
        raise UserError(f"optim {name} does not move a weight on {device.type}: take optim adamw_torch")


def learning_rate(step: int, total_steps: int, config: Config) -> float:
    """The rate of optimizer step 0, 1, ..., total_steps - 1: up to the peak, then down as the schedule says.

    The first step already moves and the last one still does: no step is spent at a rate of 0.
    """
    warmup = config.warmup_steps or math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1 - progress)
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate
