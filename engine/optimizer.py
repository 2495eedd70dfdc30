"""AdamW with its parameter groups, and the learning rate over the steps."""

import math

import torch
from torch import nn

from prefuse.engine.config import Config


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.AdamW:
    """Weight decay falls on matrices; norms and biases, all of one dimension, have none."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
    )


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
