"""Operators on tensors: fused where a GPU and Triton are at hand, tiled PyTorch everywhere else."""

from prefuse.kernels.kl.linear_kl import linear_kl
from prefuse.kernels.logprobs.linear_logprobs import linear_logprobs
from prefuse.kernels.options import OUTPUTS, HeadOptions

__all__ = ["OUTPUTS", "HeadOptions", "linear_kl", "linear_logprobs"]
