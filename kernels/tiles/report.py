"""What the compiler makes of every large kernel, for chips that are not here, and what the head must cost there.

    python -m prefuse.kernels.tiles.report --chips sm_90 gfx942

No GPU, no driver: the kernels are compiled ahead of time, with the tiles of the table. Times are a roofline by
arithmetic (products at the chip's dense bf16 rate or operands at its memory's, whichever takes longer, and nothing
else), not measurements.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch

from prefuse.kernels.tiles.aot import CHIPS, Resources
from prefuse.kernels.tiles.heads import RELEASED_HEADS
from prefuse.kernels.tiles.shipped import Shipped, compile_shipped, shipped
from prefuse.kernels.tiles.table import OPERANDS, Chip, Tile, chip_name, parse_chip


@dataclass(frozen=True)
class DataSheet:
    gpu: str
    tflops: float  # dense bf16
    tb_per_s: float  # memory


DATA_SHEETS: dict[Chip, DataSheet] = {
    80: DataSheet("A100 80 GB SXM", 312, 2.04),
    89: DataSheet("L40S", 362, 0.864),
    90: DataSheet("H100 SXM", 989, 3.35),
    100: DataSheet("B200", 2250, 8.0),
    120: DataSheet("RTX 5090", 210, 1.79),
    "gfx942": DataSheet("MI300X", 1307, 5.3),
}
TOKENS = 8192
# Units of N * D * V multiply-adds, forward and backward together (see `portable.MODES`).
UNITS = {"no grad": 1, "frozen": 2, "stash": 3, "lean": 4}


def kernel_rows(chip: Chip) -> tuple[list[str], bool]:
    """One line for each kernel on `chip`, on its own path for operands, and whether all of them may ship."""
    lines, clean = [], True
    for kernel in shipped(chip):
        resources = compile_shipped(chip, torch.bfloat16, True, kernel.name)
        lines.append(_kernel_row(kernel, resources))
        clean = clean and not resources.problems()
    return lines, clean


def _kernel_row(kernel: Shipped, made: Resources) -> str:
    c: Tile = kernel.config
    tile = f"{c.block_n}x{c.block_v}x{c.block_d} w{c.warps} s{c.stages} {OPERANDS[c.descriptors]}"
    shared = f"{made.shared / 1024:.0f} of {CHIPS[made.arch].shared_limit / 1024:.0f} KiB"
    instructions = ", ".join(f"{count} {name}" for name, count in {**made.matrix_ops, **made.copies}.items())
    return (
        f"{kernel.name:28} {tile:33} registers {made.registers:3}  spills {made.spill_bytes}  shared {shared}  "
        f"{instructions}  {'; '.join(made.problems()) or 'clean'}"
    )


def floor_rows(chip: Chip) -> list[str]:
    """Milliseconds that each mode takes at least, by the chip's data sheet."""
    lines = []
    for name, head in RELEASED_HEADS.items():
        costs = "  ".join(f"{mode} {floor(chip, mode, TOKENS, head.d, head.v):.1f} ms" for mode in UNITS)
        lines.append(f"{name:14} {costs}")
    return lines


def floor(chip: Chip, mode: str, n: int, d: int, v: int) -> float:
    """Milliseconds: max(operations / rate, bytes / bandwidth), in bf16."""
    sheet = DATA_SHEETS[chip]
    operations = UNITS[mode] * 2 * n * d * v
    # Every product reads its operands once; a stash is written once and read twice.
    moved = UNITS[mode] * 2 * d * (n + v) + (3 * 2 * n * v if mode == "stash" else 0)
    return 1e3 * max(operations / (sheet.tflops * 1e12), moved / (sheet.tb_per_s * 1e12))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m prefuse.kernels.tiles.report", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--chips",
        type=_chip,
        nargs="+",
        default=list(DATA_SHEETS),
        metavar="CHIP",
        help=f"of {', '.join(map(chip_name, DATA_SHEETS))} (default: all)",
    )
    clean = True
    for chip in parser.parse_args(arguments).chips:
        lines, may_ship = kernel_rows(chip)
        clean = clean and may_ship
        sheet = DATA_SHEETS[chip]
        print(f"\n{chip_name(chip)}\n" + "\n".join(lines))
        print(
            f"\n  floor of {TOKENS} tokens on {sheet.gpu} ({sheet.tflops} TFLOP/s, {sheet.tb_per_s} TB/s):\n  "
            + "\n  ".join(floor_rows(chip)),
            flush=True,
        )
    return 0 if clean else 1


def _chip(name: str) -> Chip:
    """ "sm_90", "90" or "gfx942"."""
    try:
        chip = parse_chip(f"sm_{name}" if name.isdigit() else name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if chip not in DATA_SHEETS:
        raise argparse.ArgumentTypeError(f"{name} is not one of {', '.join(map(chip_name, DATA_SHEETS))}")
    return chip


if __name__ == "__main__":
    sys.exit(main())
