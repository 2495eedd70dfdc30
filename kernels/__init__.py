"""Operators on tensors: fused where a GPU and Triton are at hand, tiled PyTorch everywhere else."""

from .linear_kl import linear_kl
from .linear_logprobs import linear_logprobs
from .options import OUTPUTS, HeadOptions

__all__ = ["OUTPUTS", "HeadOptions", "linear_kl", "linear_logprobs"]
