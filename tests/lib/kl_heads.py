"""Implementations, dtypes and options that the tests of `linear_kl` go through."""

import functools

import torch

import prefuse
from prefuse.bench.truth.kl_cases import NAMES

IMPLS = ["torch", "triton", "reference"]
FUSED = ["torch", "triton"]
DTYPES = {
    "torch": [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    "triton": [torch.float32, torch.bfloat16],
    "reference": [torch.float32, torch.bfloat16, torch.float64],
}
IMPL_DTYPES = [(impl, dtype) for impl in IMPLS for dtype in DTYPES[impl]]
NEEDS = {"trainable": NAMES, "frozen head": ("hidden",), "frozen trunk": ("weight",), "bias only": ("bias",)}
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"options": {"softcap": 2.0}},
    "logit_scale": {"options": {"logit_scale": 0.25}},
    "temperature": {"options": {"temperature": 0.6}},
    "the reference's own": {"ref_options": {"softcap": 3.0, "logit_scale": 1.2, "temperature": 0.7}},
    "no cap for the reference": {"options": {"softcap": 2.0}, "ref_options": {"softcap": None}},
    "all": {
        "bias": True,
        "options": {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3},
        "ref_options": {"softcap": 5.0, "temperature": 0.9},
    },
}


def head(impl):
    return functools.partial(prefuse.linear_kl, impl=impl)


def on(impl, device):
    """Where an implementation's tensors go: the portable one is tested on the CPU, where its bits are promised."""
    return device if impl == "triton" else torch.device("cpu")
