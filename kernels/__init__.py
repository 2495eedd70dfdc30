"""Operators on tensors: fused where a GPU and Triton are at hand, tiled PyTorch everywhere else."""

from prefuse.kernels.kl.linear_kl import linear_kl
from prefuse.kernels.logprobs.linear_logprobs import linear_logprobs
from prefuse.kernels.logprobs.sparse import SkippedMass, record_skipped_mass
from prefuse.kernels.options import OUTPUTS, HeadOptions

__all__ = ["OUTPUTS", "HeadOptions", "SkippedMass", "linear_kl", "linear_logprobs", "record_skipped_mass"]
