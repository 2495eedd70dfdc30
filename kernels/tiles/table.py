"""Tile shapes of the Triton kernels: chosen by chip, dtype, path, D and V, never by N, so that a row's bits do not
depend on how many rows there are.

`tiles.toml` beside this file is the table, and says what its columns mean. The environment variable PREFUSE_TILES names
a file of one's own, whose rows go before it; `python -m prefuse.kernels.tiles.tune` measures and writes such rows.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

Chip = int | str  # 90 for sm_90, "gfx942", INTERPRETER


@dataclass(frozen=True)
class Tile:
    """One kernel's tile and schedule."""

    block_n: int  # rows of hidden
    block_v: int  # rows of the weight
    block_d: int  # depth of one step of the product
    warps: int
    stages: int
    descriptors: bool  # operands by tensor descriptor (TMA), else by pointer
    halves: bool = False  # kl: the fold works on half a tile at a time, where this is what fits the registers

    @property
    def launch(self) -> dict[str, int | bool]:
        # Fusing multiply and add is part of the numerics, so it does not follow Triton's changing default.
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


@dataclass(frozen=True)
class TileRow:
    """One row of a table: a tile, where it applies, and where it comes from (`source`)."""

    chip: Chip
    dtype: str  # one of DTYPES' values
    kernel: str  # one of KERNELS
    config: Tile
    source: str
    min_d: int = 0
    min_v: int = 0
    layer: int = 0  # among tables: SHIPPED, OWN or TRIAL

    @property
    def shared_bytes(self) -> int:
        """Shared memory that the operands' pipeline takes at least; storing the tile may need more."""
        c, width = self.config, 4 if self.dtype == "float32" else 2
        # What the matrix unit reads as it runs needs a buffer for each stage; else one stage is in registers.
        asynchronous = c.descriptors and isinstance(self.chip, int) and 90 <= self.chip < 120
        buffers = c.stages if asynchronous else max(1, c.stages - 1)
        return buffers * (c.block_n + c.block_v) * c.block_d * width

    @property
    def key(self) -> tuple:
        """No two rows of one file have the same key."""
        return (self.chip, self.dtype, self.config.descriptors, self.kernel, self.min_d, self.min_v)

    def __str__(self) -> str:
        bounds = "".join(f", {name} {x}" for name, x in (("D", self.min_d), ("V", self.min_v)) if x)
        operands = OPERANDS[self.config.descriptors]
        return f"{chip_name(self.chip)} {self.dtype} {operands}: {self.kernel}{' from' if bounds else ''}{bounds[1:]}"


INTERPRETER = 0  # the "chip" of CPU tensors under Triton's interpreter: tiny tiles, so that small tests have many
KERNELS = ("fold", "outputs", "pull softcap", "pull softcap outputs", "dlogits", "kl", "kl plain")
# A kernel without a row takes that of another.
STAND_INS = {"pull softcap": "fold", "pull softcap outputs": "outputs", "kl plain": "kl"}
DTYPES = {torch.bfloat16: "half", torch.float16: "half", torch.float32: "float32"}
OPERANDS = ("pointers", "descriptors")
# AMD's chips are not ordered by their names. These have the matrix unit of gfx942, and as much of all else.
SAME_AS = {"gfx90a": "gfx942", "gfx950": "gfx942"}
SHIPPED, OWN, TRIAL = range(3)
TABLE = Path(__file__).with_name("tiles.toml")
VARIABLE = "PREFUSE_TILES"


# ------------------------------------------------------------------------------------------------- choosing


def capability(device: torch.device) -> Chip:
    """90 for sm_90, "gfx942" on AMD, `INTERPRETER` for CPU tensors."""
    if device.type != "cuda":
        return INTERPRETER
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]  # "gfx942:sramecc+:xnack-"
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def choose(kernel: str, chip: Chip, dtype: torch.dtype, descriptors: bool, d: int, v: int) -> Tile:
    """The tile of `kernel` for a (V, D) weight on `chip`; `descriptors` says whether the operands allow them."""
    row = find(kernel, chip, dtype, descriptors, d, v)
    return Tile(16, 32, 16, 4, 1, descriptors) if row is None else row.config


@functools.cache
def find(kernel: str, chip: Chip, dtype: torch.dtype, descriptors: bool, d: int, v: int) -> TileRow | None:
    """The row that applies; without one None on the interpreter, RuntimeError on a GPU."""
    if isinstance(chip, int) and INTERPRETER < chip < 80:
        raise RuntimeError(f"the Triton kernels need compute capability 8.0, this device has {chip / 10}")
    names = (kernel, STAND_INS.get(kernel))
    rows = [row for row in (*_tried, *tile_rows()) if row.kernel in names and _holds(row, chip, DTYPES[dtype], d, v)]
    by_descriptor = [row for row in rows if row.config.descriptors]
    rows = by_descriptor if descriptors and by_descriptor else [row for row in rows if not row.config.descriptors]
    if not rows and chip != INTERPRETER:
        raise RuntimeError(
            f'no tile for {kernel!r} on {chip_name(chip)} in {TABLE.name}; use impl="torch", or name a table with '
            f"rows for it in {VARIABLE}"
        )

    def closeness(row: TileRow) -> tuple:
        return (row.chip == chip, row.chip, row.kernel == kernel, row.layer, row.min_d, row.min_v)

    return max(rows, key=closeness, default=None)


def _holds(row: TileRow, chip: Chip, dtype: str, d: int, v: int) -> bool:
    if isinstance(row.chip, str) or chip == INTERPRETER:
        reached = row.chip in (chip, SAME_AS.get(chip))
    else:
        reached = isinstance(chip, int) and INTERPRETER < row.chip <= chip
    return reached and row.dtype == dtype and row.min_d <= d and row.min_v <= v


def reaches(device: torch.device) -> bool:
    """Whether there are tiles for this device at all."""
    chip = capability(device)
    return any(_holds(row, chip, row.dtype, row.min_d, row.min_v) for row in tile_rows())


def fold_row_name(outputs: bool, pull: bool, softcap: bool) -> str:
    """The table's name for a forward with these needs."""
    if pull and softcap:
        return "pull softcap outputs" if outputs else "pull softcap"
    return "outputs" if outputs else "fold"


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


# -------------------------------------------------------------------------------------------------- reading


@functools.cache
def tile_rows() -> tuple[TileRow, ...]:
    """The rows of this package and of PREFUSE_TILES, read once."""
    own = os.environ.get(VARIABLE)
    if own and not Path(own).is_file():
        raise ValueError(f"{VARIABLE} names {own}, which is no file; name a table, or unset it")
    return (*read(TABLE, SHIPPED), *(read(Path(own), OWN) if own else ()))


def read(path: Path, layer: int = OWN) -> tuple[TileRow, ...]:
    """The rows of one file; ValueError names the file and the row that is wrong."""
    return parse_rows(path.read_text(encoding="utf-8"), path, layer)


def parse_rows(text: str, path: Path, layer: int = OWN) -> tuple[TileRow, ...]:
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not TOML: {error}") from error
    if set(content) != {"rows"} or not isinstance(content["rows"], list):
        raise ValueError(f"{path}: expected one list `rows = [...]`, got {sorted(content)}")
    rows: dict[tuple, TileRow] = {}
    for number, columns in enumerate(content["rows"], 1):
        try:
            row = parse_row(columns, layer)
            if row.key in rows:
                raise ValueError("an earlier row holds for the same; keep one of the two")
        except ValueError as error:
            raise ValueError(f"{path}, row {number} ({_title(columns)}): {error}") from error
        rows[row.key] = row
    return tuple(rows.values())


def _title(columns: object) -> str:
    names = ("chip", "dtype", "operands", "kernel")
    return " ".join(str(columns[name]) for name in names if name in columns) if isinstance(columns, dict) else "?"


REQUIRED = ("chip", "dtype", "operands", "kernel", "tile", "warps", "stages", "source")
OPTIONAL = ("min_d", "min_v", "halves")


def parse_row(columns: dict[str, object], layer: int) -> TileRow:
    """One row from its columns."""
    if not isinstance(columns, dict):
        raise ValueError(f"expected {{ chip = ..., ... }}, got {columns!r}")
    missing, unknown = set(REQUIRED) - set(columns), set(columns) - {*REQUIRED, *OPTIONAL}
    if missing or unknown:
        found = [f"missing {sorted(missing)}"] * bool(missing) + [f"unknown {sorted(unknown)}"] * bool(unknown)
        raise ValueError(f"expected columns {list(REQUIRED)}, perhaps {list(OPTIONAL)}: {', '.join(found)}")
    for name, known in (("dtype", DTYPES.values()), ("operands", OPERANDS), ("kernel", KERNELS)):
        if columns[name] not in known:
            raise ValueError(f"{name} must be one of {list(dict.fromkeys(known))}, got {columns[name]!r}")
    chip, descriptors = parse_chip(columns["chip"]), columns["operands"] == "descriptors"
    if descriptors and (isinstance(chip, str) or INTERPRETER < chip < 90):
        raise ValueError(f"{columns['chip']} has no tensor descriptors; its operands are pointers")
    tile = columns["tile"]
    if not isinstance(tile, list) or len(tile) != 3 or not all(_power_of_two(x, 16, 1024) for x in tile):
        raise ValueError(f"tile must be three powers of two from 16 to 1024, got {tile!r}")
    if not _power_of_two(columns["warps"], 1, 32):
        raise ValueError(f"warps must be a power of two up to 32, got {columns['warps']!r}")
    for name, least in (("stages", 1), ("min_d", 0), ("min_v", 0)):
        if type(columns.get(name, least)) is not int or columns.get(name, least) < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {columns[name]!r}")
    source = columns["source"]
    if not isinstance(source, str) or not (source == "compiled" or source.startswith("measured on ")):
        raise ValueError(f'source must be "compiled" or "measured on <gpu>, ...", got {source!r}')
    halves = columns.get("halves", False)
    if type(halves) is not bool:
        raise ValueError(f"halves must be true or false, got {halves!r}")
    config = Tile(*tile, columns["warps"], columns["stages"], descriptors, halves)
    bounds = (columns.get("min_d", 0), columns.get("min_v", 0))
    return TileRow(chip, columns["dtype"], columns["kernel"], config, source, *bounds, layer)


def _power_of_two(x: object, least: int, most: int) -> bool:
    return type(x) is int and least <= x <= most and x & (x - 1) == 0


def parse_chip(name: object) -> Chip:
    """ "sm_90" -> 90, "gfx942" -> "gfx942"."""
    if name == "interpreter":
        return INTERPRETER
    if isinstance(name, str) and re.fullmatch(r"gfx[0-9a-f]+", name):
        return name
    if isinstance(name, str) and (found := re.fullmatch(r"sm_(\d+)", name)) and int(found[1]) >= 80:
        return int(found[1])
    raise ValueError(f"chip must be sm_<80 or more>, gfx<arch> or interpreter, got {name!r}")


def chip_name(chip: Chip) -> str:
    """90 -> "sm_90"."""
    return chip if isinstance(chip, str) else f"sm_{chip}" if chip else "interpreter"


# --------------------------------------------------------------------------------------------------- trying

_tried: tuple[TileRow, ...] = ()


@contextlib.contextmanager
def trial(*rows: TileRow) -> Iterator[None]:
    """Rows that go before every table's for a while: the tuner's candidates."""
    global _tried
    before, _tried = _tried, tuple(replace(row, layer=TRIAL) for row in rows)
    find.cache_clear()
    try:
        yield
    finally:
        _tried = before
        find.cache_clear()
