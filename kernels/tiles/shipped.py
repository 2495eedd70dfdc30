"""Every large kernel as the launcher would build it: signature and constants for a chip, a dtype and a set of options.

For compiling ahead of time: the tests hold each of these to no spills, and the report prints them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from prefuse.kernels.kl import device as kl_device
from prefuse.kernels.kl import launch as kl_launch
from prefuse.kernels.launch import tile_args
from prefuse.kernels.logprobs import device as logprobs_device
from prefuse.kernels.preference import device as preference_device
from prefuse.kernels.preference import launch as preference_launch
from prefuse.kernels.tiles.aot import Resources, compile_for, resources
from prefuse.kernels.tiles.table import DTYPES, Chip, Tile, TileRow, choose, fold_row_name, trial

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
# Of both heads, the policy's and the reference's.
KL_VARIANTS = {
    "plain": {},
    "softcap": {"SOFTCAP": True, "REF_SOFTCAP": True},
    "bias": {"HAS_BIAS": True, "REF_HAS_BIAS": True},
    "softcap, bias": {"SOFTCAP": True, "REF_SOFTCAP": True, "HAS_BIAS": True, "REF_HAS_BIAS": True},
}
FOLD_FLAGS = ("HAS_BIAS", "SOFTCAP", "RESCUE", "PULL", "ENTROPY", "SQUARES", "MEAN", "TOP1")
DLOGITS_FLAGS = ("HAS_BIAS", "SOFTCAP", "ENTROPY")
KL_FLAGS = ("HAS_BIAS", "SOFTCAP", "REF_HAS_BIAS", "REF_SOFTCAP")


@dataclass(frozen=True)
class Shipped:
    """What `aot.compile_for` needs to build one kernel as the launcher would."""

    name: str
    kernel: object
    config: Tile
    signature: dict[str, str]
    constants: dict[str, object]
    aligned: tuple[str, ...]
    launch: dict[str, object]


def shipped(
    chip: Chip, dtype: torch.dtype = torch.bfloat16, descriptors: bool = True, d: int = 4096, v: int = 128256
) -> Iterator[Shipped]:
    """Every kernel in every variant for a (V, D) head on `chip`, with operands by descriptor where it has them."""

    def config(kernel: str) -> Tile:
        return choose(kernel, chip, dtype, descriptors, d, v)

    for variant, flags in FOLD_VARIANTS.items():
        kernel = fold_row_name(bool(ALL_OUTPUTS.keys() & flags.keys()), "PULL" in flags, "SOFTCAP" in flags)
        yield _fold(f"fold, {variant}", flags, config(kernel), dtype)
    for variant, flags in DLOGITS_VARIANTS.items():
        yield _dlogits(f"dlogits, {variant}", flags, config("dlogits"), dtype)
    for variant, flags in KL_VARIANTS.items():
        kernel = "kl" if flags else "kl plain"
        yield _kl_fold(f"kl fold, {variant}", flags, config(kernel), dtype)
        yield _kl_dlogits(f"kl dlogits, {variant}", flags, config(kernel), dtype)


def users(row: TileRow) -> list[Shipped]:
    """The kernels that run with this row where it holds: all of them must be clean."""
    dtype = next(dtype for dtype, name in DTYPES.items() if name == row.dtype)
    with trial(row):
        made = list(shipped(row.chip, dtype, row.config.descriptors, row.min_d, row.min_v))
    return [kernel for kernel in made if kernel.config is row.config]


def compile_shipped(
    chip: Chip,
    dtype: torch.dtype,
    descriptors: bool,
    name: str,
    d: int = 4096,
    v: int = 128256,
    tried: tuple[TileRow, ...] = (),
) -> Resources:
    """What the compiler makes of one of them. (By name, so that a worker process can be told which.)"""
    with trial(*tried):
        kernel = next(k for k in shipped(chip, dtype, descriptors, d, v) if k.name == name)
    return resources(
        compile_for(kernel.kernel, kernel.signature, kernel.constants, kernel.aligned, chip, **kernel.launch)
    )


def _fold(name: str, flags: dict[str, bool], config: Tile, dtype: torch.dtype) -> Shipped:
    vectors = {"bias": f"*{TYPES[dtype]}", "y": "*i32", "z2_y": "*fp32", "far": "*i32", "parts": "*fp32"}
    pulls = _loadable(config, dtype, config.block_n, config.block_v) if "PULL" in flags else "*fp32"
    signature = {**_operands(config, dtype), **vectors, "pulls": pulls}
    aligned = ("N", "V", "D", "plane", "row", "stride_hn", "stride_wv", "stride_pn")
    sizes = ("first", "first_segment", "segments", *aligned)
    constants = dict.fromkeys(FOLD_FLAGS, False) | flags | {"SEGMENTS": 33}
    return _shipped(name, logprobs_device.fold_kernel, config, signature, sizes, constants, aligned)


def _dlogits(name: str, flags: dict[str, bool], config: Tile, dtype: torch.dtype) -> Shipped:
    vectors = {"bias": f"*{TYPES[dtype]}", "y": "*i32"}
    vectors |= dict.fromkeys(("lse", "grad", "grad_entropy", "entropy"), "*fp32")
    out = _loadable(config, dtype, config.block_n, config.block_v)
    signature = {**_operands(config, dtype), **vectors, "dz": out}
    sizes = ("N", "C", "D", "first", "stride_hn", "stride_wv", "stride_dz")
    constants = dict.fromkeys(DLOGITS_FLAGS, False) | flags
    return _shipped(name, logprobs_device.dlogits_kernel, config, signature, sizes, constants, sizes)


def _kl_fold(name: str, flags: dict[str, bool], config: Tile, dtype: torch.dtype) -> Shipped:
    signature = {**_both_heads(config, dtype), "parts": "*fp32"}
    aligned = ("N", "V", "D", "REF_D", "plane", "row", *KL_STRIDES)
    sizes = ("first", "first_segment", "segments", *aligned)
    constants = dict.fromkeys(KL_FLAGS, False) | flags | {"SEGMENTS": 33, "HALVES": config.halves}
    return _kl_shipped(name, kl_device.kl_fold_kernel, config, signature, sizes, constants, aligned)


def _kl_dlogits(name: str, flags: dict[str, bool], config: Tile, dtype: torch.dtype) -> Shipped:
    vectors = {"y": "*i32", **dict.fromkeys(("lse", "anchor", "mean", "grad"), "*fp32")}
    out = _loadable(config, dtype, config.block_n, config.block_v)
    signature = {**_both_heads(config, dtype), **vectors, "dz": out}
    sizes = ("N", "C", "D", "REF_D", *KL_STRIDES, "stride_dz")
    constants = dict.fromkeys(KL_FLAGS, False) | flags
    return _kl_shipped(name, kl_device.kl_dlogits_kernel, config, signature, sizes, constants, sizes)


KL_STRIDES = ("stride_hn", "stride_wv", "stride_ref_hn", "stride_ref_wv")


def _both_heads(config: Tile, dtype: torch.dtype) -> dict[str, str]:
    own = {**_operands(config, dtype), "bias": f"*{TYPES[dtype]}"}
    return own | {f"ref_{name}": kind for name, kind in own.items()}


def _kl_shipped(name, kernel, config: Tile, signature, sizes, constants, aligned) -> Shipped:
    signature = {**signature, "ref_k_in": "fp32", "ref_k_out": "fp32"}
    constants = {**constants, "stride_ref_hd": 1, "stride_ref_wd": 1}
    made = _shipped(name, kernel, config, signature, sizes, constants, aligned)
    return replace(made, launch={k: v for k, v in kl_launch.launch_args(config).items() if k in config.launch})


def _shipped(name, kernel, config: Tile, signature, sizes, constants, aligned) -> Shipped:
    signature = {**signature, **dict.fromkeys(sizes, "i32"), "k_in": "fp32", "k_out": "fp32"}
    tile = {k: v for k, v in tile_args(config).items() if k not in config.launch}
    pointers = tuple(n for n, t in signature.items() if t.startswith("*"))
    constants = {**constants, "stride_hd": 1, "stride_wd": 1, **tile}  # the JIT makes constants of unit strides
    return Shipped(name, kernel, config, signature, constants, (*pointers, *aligned), config.launch)


def _operands(config: Tile, dtype: torch.dtype) -> dict[str, str]:
    return {
        "h": _loadable(config, dtype, config.block_n, config.block_d),
        "w": _loadable(config, dtype, config.block_v, config.block_d),
    }


def _loadable(config: Tile, dtype: torch.dtype, rows: int, columns: int) -> str:
    return f"tensordesc<{TYPES[dtype]}[{rows}, {columns}]>" if config.descriptors else f"*{TYPES[dtype]}"


def compile_tail(chip: int | str, name: str) -> Resources:
    """What the compiler makes of one of TAIL_VARIANTS: no tile to choose, and no matrix product in it."""
    flags = TAIL_VARIANTS[name]
    if flags is None:
        kernel, flags = preference_device.backward_kernel, {"BLOCK": preference_launch.BLOCKS[False]["BLOCK"]}
        signature = {"grad": "*fp32", "slopes": "*fp64", "cu_seqlens": "*i32", "out": "*fp32"}
        signature |= dict.fromkeys(("N", "S", "STEPS"), "i32")
    else:
        kernel = preference_device.forward_kernel
        plain = {"LOSS": "dpo", "SMOOTHED": False, "AVERAGE": False, "Z0": "number", "ITEMS": False, "PER_TOKEN": True}
        flags = {**plain, "KL_PER_TOKEN": False, **preference_launch.BLOCKS[False], **flags}
        singles = ("logps", "ref_logps", "kl_logps", "kl_ref_logps", "total", "losses", "rewards")
        doubles = ("z0_at", "items_at", "ratios", "sums", "metrics", "slopes")
        integers = {"cu_seqlens": "*i32", "counts": "*i64", "labels": "*u8", "kl_cu_seqlens": "*i32", "arrived": "*i32"}
        signature = dict.fromkeys(singles, "*fp32") | dict.fromkeys(doubles, "*fp64") | integers
        signature |= dict.fromkeys(("N", "S", "kl_N", "K"), "i32")
        signature |= {p.name: p.annotation_type for p in kernel.params if p.annotation_type}  # float64 if annotated so
        assert signature["beta"] == "fp64", "a Python float is launched as a float32 unless its parameter is annotated"
    pointers = [name for name, kind in signature.items() if kind.startswith("*")]
    return resources(compile_for(kernel, signature, flags, pointers, chip, **preference_launch.LAUNCH))
