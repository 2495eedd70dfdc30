"""What the compiler makes of every large kernel, for chips that are not here, and what the head must cost there.

    python -m prefuse.kernels.report --chips 80 90 100

No GPU, no driver: the kernels are compiled ahead of time. Times are a floor by arithmetic (products at the chip's dense
bf16 rate, nothing else), not measurements.
"""

from __future__ import annotations

import argparse
import sys

import torch

from .aot import CHIPS
from .shipped import compile_shipped, shipped

# Dense bf16 TFLOP/s of the data sheets: A100, L40S, H100/H200 SXM, B200, RTX 5090.
PEAK_TFLOPS = {80: 312, 89: 362, 90: 989, 100: 2250, 120: 210}
# (hidden size, vocabulary) of heads people train.
HEADS = {
    "Llama-3-8B": (4096, 128256),
    "Llama-3.2-1B": (2048, 128256),
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Gemma-2-2B": (2304, 256000),
}
TOKENS = 8192
# Units of N * D * V multiply-adds, forward and backward together (see `portable.MODES`).
UNITS = {"no grad": 1, "frozen": 2, "stash": 3, "lean": 4}


def kernel_rows(chip: int) -> tuple[list[str], bool]:
    """One line for each kernel on `chip`, on its own path for operands, and whether all of them may ship."""
    descriptors = chip >= 90
    lines, clean = [], True
    for kernel in shipped(chip, torch.bfloat16, descriptors):
        made, c = compile_shipped(chip, torch.bfloat16, descriptors, kernel.name), kernel.config
        problems = made.problems()
        clean = clean and not problems
        limit = CHIPS[chip].shared_limit
        tile = f"{c.block_n}x{c.block_v}x{c.block_d} w{c.warps} s{c.stages}"
        lines.append(
            f"{kernel.name:28} {tile:21} registers {made.registers:3}  spills {made.spill_bytes or 0}  "
            f"shared {made.shared / 1024:.0f} of {limit / 1024:.0f} KiB  {dict(made.matrix_ops)}  "
            f"tensor copies {made.tma_loads}/{made.tma_stores}  {'; '.join(problems) or 'clean'}"
        )
    return lines, clean


def floor_rows(chip: int) -> list[str]:
    """Milliseconds that the products of each mode take at the chip's peak."""
    lines = []
    for name, (depth, vocabulary) in HEADS.items():
        unit = 2 * TOKENS * depth * vocabulary / (PEAK_TFLOPS[chip] * 1e12) * 1e3
        costs = "  ".join(f"{mode} {units * unit:.1f} ms" for mode, units in UNITS.items())
        lines.append(f"{name:14} {costs}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m prefuse.kernels.report", description=__doc__.splitlines()[0])
    parser.add_argument("--chips", type=int, nargs="+", default=sorted(PEAK_TFLOPS), choices=sorted(PEAK_TFLOPS))
    clean = True
    for chip in parser.parse_args().chips:
        lines, may_ship = kernel_rows(chip)
        clean = clean and may_ship
        print(f"\nsm_{chip}\n" + "\n".join(lines))
        print(
            f"\n  floor at {PEAK_TFLOPS[chip]} TFLOP/s, {TOKENS} tokens:\n  " + "\n  ".join(floor_rows(chip)),
            flush=True,
        )
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
