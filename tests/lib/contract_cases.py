"""Where each implementation of the head runs in the tests of the numerics contract."""

import functools
import math

import torch

import prefuse

IMPLS = ["torch", "triton"]
DTYPES = [torch.float32, torch.bfloat16]
LN2 = torch.tensor(math.log(2), dtype=torch.float32)


def head(impl):
    return functools.partial(prefuse.linear_logprobs, impl=impl)


def on(impl, device):
    """Where an implementation's tensors go: the portable one is tested on the CPU, where its bits are promised."""
    return device if impl == "triton" else torch.device("cpu")
