"""Rows of a table of tiles as text: a line each, put in place of those of the same key."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from prefuse.kernels.tiles.table import OPERANDS, OWN, VARIABLE, TileRow, chip_name, parse_row, parse_rows

HEADER = f"""# Tiles measured by `python -m prefuse.kernels.tiles.tune`; {VARIABLE} names this file to programs.
# The columns are those of prefuse/kernels/tiles/tiles.toml.
rows = [
]
"""


def line_of(row: TileRow) -> str:
    """The row as a line of a table."""
    c, quoted = row.config, json.dumps
    tile = f"[{c.block_n}, {c.block_v}, {c.block_d}],"
    rest = "halves = true, " * c.halves
    rest += "".join(f"{name} = {x}, " for name, x in (("min_d", row.min_d), ("min_v", row.min_v)) if x)
    return (
        f"  {{ chip = {quoted(chip_name(row.chip)) + ',':9} dtype = {quoted(row.dtype) + ',':10} "
        f"operands = {quoted(OPERANDS[c.descriptors]) + ',':14} kernel = {quoted(row.kernel) + ',':23} "
        f"tile = {tile:15} warps = {c.warps}, stages = {c.stages}, {rest}source = {quoted(row.source)} }},"
    )


def write(path: Path, rows: Iterable[TileRow]) -> None:
    """Puts rows into a table file: in place of those of the same key, else beside their like. Comments stay."""
    text = path.read_text(encoding="utf-8") if path.exists() else HEADER
    expected = {row.key: row for row in parse_rows(text, path)}
    lines = text.splitlines()
    for row in rows:
        expected[row.key] = replace(row, layer=OWN)
        keys = [_key(line) for line in lines]
        if row.key in keys:
            lines[keys.index(row.key)] = line_of(row)
        else:
            lines.insert(_place(row, keys, lines), line_of(row))
    text = "\n".join(lines) + "\n"
    if not _holds_exactly(text, expected, path):
        raise ValueError(f"{path}: rows can only be put in where each one, and the last bracket, has a line of its own")
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)  # whole or not at all


def _holds_exactly(text: str, expected: dict[tuple, TileRow], path: Path) -> bool:
    try:
        return {row.key: row for row in parse_rows(text, path)} == expected
    except ValueError:
        return False


def _key(line: str) -> tuple | None:
    line = line.strip().removesuffix(",")
    try:
        return parse_row(tomllib.loads(f"row = {line}")["row"], OWN).key if line.startswith("{") else None
    except ValueError:  # a part of a row
        return None


def _place(row: TileRow, keys: list[tuple | None], lines: list[str]) -> int:
    """Where a new row goes: after those of its kernel, else of its path, else of its chip, else last."""
    for length in (4, 3, 1):
        alike = [i for i, key in enumerate(keys) if key and key[:length] == row.key[:length]]
        if alike:
            return alike[-1] + 1
    return max((i for i, line in enumerate(lines) if line.strip() == "]"), default=len(lines))
