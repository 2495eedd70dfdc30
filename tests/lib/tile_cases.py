"""Rows of a table of tiles, good and bad."""

import pytest
import torch

from prefuse.kernels.tiles import table as configs
from prefuse.kernels.tiles.table import Tile, TileRow, read

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the chip of CPU tensors under the interpreter")
GOOD = {
    "chip": "sm_90",
    "dtype": "half",
    "operands": "descriptors",
    "kernel": "fold",
    "tile": [64, 64, 64],
    "warps": 4,
    "stages": 2,
    "source": "compiled",
}
SHIPPED = read(configs.TABLE)


def toml(*rows):
    """A table file's text."""
    lines = ["  {" + ", ".join(f"{k} = {v!r}" for k, v in row.items()) + "}," for row in rows]
    return "\n".join(["rows = [", *lines, "]"])


def interpreter_row(kernel, tile, min_d=0, min_v=0, descriptors=True, dtype="float32"):
    return TileRow(0, dtype, kernel, Tile(*tile, 4, 1, descriptors), "compiled", min_d, min_v)
