"""Tile shapes of the Triton kernels: chosen by chip, dtype and path, never by N, so that a row's bits do not depend on
how many rows there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """One kernel's tile and schedule."""

    block_n: int  # rows of hidden
    block_v: int  # rows of the weight
    block_d: int  # depth of one step of the product
    warps: int
    stages: int
    descriptors: bool  # operands by tensor descriptor (TMA), else by pointer

    @property
    def launch(self) -> dict[str, int | bool]:
        # Fusing multiply and add is part of the numerics, so it does not follow Triton's changing default.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


INTERPRETER = 0  # the "chip" of CPU tensors under Triton's interpreter: tiny tiles, so that small tests have many

# bf16 and fp16: (capability from, operands by descriptor) -> kernel -> tile.
# "fold" also pulls for a frozen head, with the same bits; "outputs" folds optional outputs too, and "pull softcap"
# takes a slope: both need registers for it. Each compiles without spills in all of its variants (see `shipped`),
# which the tests hold it to.
HALF_PRECISION = {
    (80, False): {
        "fold": Config(128, 128, 64, 8, 3, False),
        "outputs": Config(128, 64, 64, 8, 3, False),
        "dlogits": Config(128, 128, 64, 8, 3, False),
    },
    (90, True): {
        "fold": Config(128, 256, 64, 8, 3, True),
        "outputs": Config(128, 128, 64, 8, 3, True),
        "pull softcap": Config(128, 128, 64, 8, 3, True),
        "dlogits": Config(128, 256, 64, 8, 3, True),
    },
    (100, False): {
        "fold": Config(128, 64, 64, 8, 3, False),
        "outputs": Config(128, 64, 64, 8, 3, False),
        "dlogits": Config(128, 128, 64, 8, 3, False),
    },
    (100, True): {
        "fold": Config(128, 128, 64, 8, 4, True),
        "outputs": Config(128, 64, 64, 8, 3, True),
        "dlogits": Config(128, 256, 64, 8, 3, True),
    },
    (120, True): {  # a consumer chip: 99 KiB of shared memory
        "fold": Config(128, 128, 64, 8, 3, True),
        "outputs": Config(128, 64, 64, 8, 3, True),
        "dlogits": Config(128, 128, 64, 8, 2, True),
    },
}
# float32 is multiplied by the ordinary units, exactly ("ieee"): small tiles, for accumulators compete with operands.
FULL_PRECISION = Config(64, 64, 16, 8, 2, False)


def capability(device: torch.device) -> int:
    """90 for sm_90; `INTERPRETER` for CPU tensors; AMD chips take sm_80's pointer path."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(kernel: str, chip: int, dtype: torch.dtype, descriptors: bool) -> Config:
    """The tile of `kernel` on `chip`; `descriptors` says whether the operands allow them."""
    if chip == INTERPRETER:
        return Config(16, 32, 16, 4, 1, descriptors)
    if dtype == torch.float32:
        return FULL_PRECISION
    if chip < 80:
        raise RuntimeError(f"the Triton kernels need compute capability 8.0, this device has {chip / 10}")
    descriptors = descriptors and chip >= 90
    table = HALF_PRECISION[max(key for key in HALF_PRECISION if key[0] <= chip and key[1] == descriptors)]
    return table["fold"] if kernel == "pull softcap" and kernel not in table else table[kernel]


def fold_kernel(outputs: bool, pull: bool, softcap: bool) -> str:
    """The table's name for a forward with these needs."""
    if outputs:
        return "outputs"
    return "pull softcap" if pull and softcap else "fold"


def segments(device: torch.device, tiles: int) -> int:
    """Vocabulary segments of the forward: enough to fill the chip at few rows, a number that never depends on N."""
    if device.type != "cuda":
        return min(3, tiles)
    return min(max(1, torch.cuda.get_device_properties(device).multi_processor_count // 4), tiles)


def allow_descriptors(*operands: Tensor) -> bool:
    """Tensor descriptors want unit inner stride, and 16-byte aligned bases and rows."""
    return all(
        x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0 for x in operands
    )
