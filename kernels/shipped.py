"""Every large kernel as the launcher would build it: signature and constants for a chip, a dtype and a set of options.

For compiling ahead of time: the tests hold each of these to no spills, and the report prints them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from . import triton_head, triton_kernels, triton_tail
from .aot import Resources, compile_for, resources
from .configs import Config, choose, fold_kernel

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ALL_OUTPUTS = {"ENTROPY": True, "SQUARES": True, "MEAN": True, "TOP1": True}
# Options that change the code: a name, and the constants that differ from plain.
FOLD_VARIANTS = {
    "plain": {},
    "softcap": {"SOFTCAP": True},
    "bias": {"HAS_BIAS": True},
    "entropy": {"ENTROPY": True},
    "rescue": {"RESCUE": True},
    "pull": {"PULL": True},
    "pull, softcap": {"PULL": True, "SOFTCAP": True},
    "pull, bias": {"PULL": True, "HAS_BIAS": True},
    "pull, softcap, all outputs": {"PULL": True, "SOFTCAP": True, **ALL_OUTPUTS},
    "all outputs": ALL_OUTPUTS,
    "softcap, all outputs": {"SOFTCAP": True, **ALL_OUTPUTS},
}
DLOGITS_VARIANTS = {
    "plain": {},
    "softcap": {"SOFTCAP": True},
    "bias": {"HAS_BIAS": True},
    "entropy": {"ENTROPY": True},
    "softcap, entropy": {"SOFTCAP": True, "ENTROPY": True},
}
# The tail's: constants that differ from a plain DPO's.
TAIL_VARIANTS = {
    "tail, dpo": {},
    "tail, dpo, smoothed": {"SMOOTHED": True, "ITEMS": True},
    "tail, ipo": {"LOSS": "ipo", "PER_TOKEN": False},
    "tail, ipo, average": {"LOSS": "ipo", "AVERAGE": True},
    "tail, kto": {"LOSS": "kto"},
    "tail, kto, tensors": {"LOSS": "kto", "Z0": "tensor", "ITEMS": True},
    "tail, kto, mismatched": {"LOSS": "kto", "Z0": "mismatched", "KL_PER_TOKEN": True},
    "tail, backward": None,
}
FOLD_FLAGS = ("HAS_BIAS", "SOFTCAP", "RESCUE", "PULL", "ENTROPY", "SQUARES", "MEAN", "TOP1")
DLOGITS_FLAGS = ("HAS_BIAS", "SOFTCAP", "ENTROPY")


@dataclass(frozen=True)
class Shipped:
    """What `aot.compile_for` needs to build one kernel as the launcher would."""

    name: str
    kernel: object
    config: Config
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[str, ...]


def shipped(chip: int, dtype: torch.dtype = torch.bfloat16, descriptors: bool = True) -> Iterator[Shipped]:
    """Fold and dlogits in every variant for `chip` (90 is sm_90), with operands by descriptor where it has them."""
    for variant, flags in FOLD_VARIANTS.items():
        kernel = fold_kernel(bool(ALL_OUTPUTS.keys() & flags.keys()), "PULL" in flags, "SOFTCAP" in flags)
        yield _fold(f"fold, {variant}", flags, choose(kernel, chip, dtype, descriptors), dtype)
    for variant, flags in DLOGITS_VARIANTS.items():
        yield _dlogits(f"dlogits, {variant}", flags, choose("dlogits", chip, dtype, descriptors), dtype)


def compile_shipped(chip: int, dtype: torch.dtype, descriptors: bool, name: str) -> Resources:
    """What the compiler makes of one of them. (By name, so that a worker process can be told which.)"""
    kernel = next(k for k in shipped(chip, dtype, descriptors) if k.name == name)
    compiled = compile_for(
        kernel.kernel, kernel.signature, kernel.constants, kernel.aligned, chip, **kernel.config.launch
    )
    return resources(compiled)


def _fold(name: str, flags: dict[str, bool], config: Config, dtype: torch.dtype) -> Shipped:
    vectors = {"bias": f"*{TYPES[dtype]}", "y": "*i32", "z2_y": "*fp32", "far": "*i32", "parts": "*fp32"}
    pulls = _loadable(config, dtype, config.block_n, config.block_v) if "PULL" in flags else "*fp32"
    signature = {**_operands(config, dtype), **vectors, "pulls": pulls}
    aligned = ("N", "V", "D", "plane", "row", "stride_hn", "stride_wv", "stride_pn")
    sizes = ("first", "first_segment", "segments", *aligned)
    constants = dict.fromkeys(FOLD_FLAGS, False) | flags | {"SEGMENTS": 33}
    return _shipped(name, triton_kernels.fold_kernel, config, signature, sizes, constants, aligned)


def _dlogits(name: str, flags: dict[str, bool], config: Config, dtype: torch.dtype) -> Shipped:
    vectors = {"bias": f"*{TYPES[dtype]}", "y": "*i32"}
    vectors |= dict.fromkeys(("lse", "grad", "grad_entropy", "entropy"), "*fp32")
    out = _loadable(config, dtype, config.block_n, config.block_v)
    signature = {**_operands(config, dtype), **vectors, "dz": out}
    sizes = ("N", "C", "D", "first", "stride_hn", "stride_wv", "stride_dz")
    constants = dict.fromkeys(DLOGITS_FLAGS, False) | flags
    return _shipped(name, triton_kernels.dlogits_kernel, config, signature, sizes, constants, sizes)


def _shipped(name, kernel, config: Config, signature, sizes, constants, aligned) -> Shipped:
    signature = {**signature, **dict.fromkeys(sizes, "i32"), "k_in": "fp32", "k_out": "fp32"}
    tile = {k: v for k, v in triton_head.tile_args(config).items() if k not in config.launch}
    pointers = tuple(n for n, t in signature.items() if t.startswith("*"))
    constants = {**constants, "stride_hd": 1, "stride_wd": 1, **tile}  # the JIT makes constants of unit strides
    return Shipped(name, kernel, config, signature, constants, (*pointers, *aligned))


def _operands(config: Config, dtype: torch.dtype) -> dict[str, str]:
    return {
        "h": _loadable(config, dtype, config.block_n, config.block_d),
        "w": _loadable(config, dtype, config.block_v, config.block_d),
    }


def _loadable(config: Config, dtype: torch.dtype, rows: int, columns: int) -> str:
    return f"tensordesc<{TYPES[dtype]}[{rows}, {columns}]>" if config.descriptors else f"*{TYPES[dtype]}"


def compile_tail(chip: int | str, name: str) -> Resources:
    """What the compiler makes of one of TAIL_VARIANTS: no tile to choose, and no matrix product in it."""
    flags = TAIL_VARIANTS[name]
    if flags is None:
        kernel, flags = triton_tail.backward_kernel, {"BLOCK": triton_tail.BLOCKS[False]["BLOCK"]}
        signature = {"grad": "*fp32", "slopes": "*fp64", "cu_seqlens": "*i32", "out": "*fp32"}
        signature |= dict.fromkeys(("N", "S", "STEPS"), "i32")
    else:
        kernel = triton_tail.forward_kernel
        plain = {"LOSS": "dpo", "SMOOTHED": False, "AVERAGE": False, "Z0": "number", "ITEMS": False, "PER_TOKEN": True}
        flags = {**plain, "KL_PER_TOKEN": False, **triton_tail.BLOCKS[False], **flags}
        singles = ("logps", "ref_logps", "kl_logps", "kl_ref_logps", "total", "losses", "rewards")
        doubles = ("z0_at", "items_at", "ratios", "sums", "metrics", "slopes")
        integers = {"cu_seqlens": "*i32", "counts": "*i64", "labels": "*u8", "kl_cu_seqlens": "*i32", "arrived": "*i32"}
        signature = dict.fromkeys(singles, "*fp32") | dict.fromkeys(doubles, "*fp64") | integers
        signature |= dict.fromkeys(("N", "S", "kl_N", "K"), "i32")
        signature |= {p.name: p.annotation_type for p in kernel.params if p.annotation_type}  # float64 if annotated so
        assert signature["beta"] == "fp64", "a Python float is launched as a float32 unless its parameter is annotated"
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    return resources(compile_for(kernel, signature, flags, pointers, chip, **triton_tail.LAUNCH))
