"""CSV and TSV: the first line names the columns, an empty cell is no value.

Messages stand in such files as text, as JSON or as Python writes lists; a cell that is a list of turns is read as one.
"""

from __future__ import annotations

import ast
import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prefuse.engine.data.records import BadRow, DataError
from prefuse.engine.data.sources.json_text import not_utf8

NO_COMMA = re.compile(r"\}\s*\n\s*\{")
LONGEST_CELL = 1 << 27  # characters; csv's own limit is 131,072


def read_table_text(path: Path, opener: Callable[[], BinaryIO], name: str, suffix: str) -> Iterator[tuple[str, Any]]:
    """Rows are named by their index, for a cell may span lines."""
    csv.field_size_limit(LONGEST_CELL)
    with opener() as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        try:
            yield from _rows(path, text, name, suffix)
        except UnicodeDecodeError:
            raise not_utf8(path, opener) from None


def _rows(path: Path, text: io.TextIOWrapper, name: str, suffix: str) -> Iterator[tuple[str, Any]]:
    first = text.readline()
    text.seek(0)
    reader = csv.reader(text, delimiter=_delimiter(first, suffix), strict=True)
    try:
        header = next(reader)
    except (csv.Error, StopIteration) as error:
        raise DataError(f"{path}: its first line names no columns: {error}") from error
    header = [name or f"Unnamed: {place}" for place, name in enumerate(header)]  # pandas writes its index so
    if len(set(header)) < len(header):
        raise DataError(f"{path}: its first line must name each column once; it has {', '.join(map(repr, header))}")
    for index in itertools.count():
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield f"{name}:{index}", BadRow(f"not a valid line: {error}")
            continue
        if not cells:
            continue
        if len(cells) != len(header):
            yield f"{name}:{index}", BadRow(f"it has {len(cells)} cells, the first line has {len(header)}")
            continue
        yield f"{name}:{index}", {column: _cell(cell) for column, cell in zip(header, cells, strict=True)}


def _delimiter(first: str, suffix: str) -> str:
    """By the name, unless the first line has only the other one."""
    usual, other = ("\t", ",") if suffix == ".tsv" else (",", "\t")
    if usual not in first and suffix == ".csv" and ";" in first and "\t" not in first:
        return ";"
    return other if usual not in first and other in first else usual


def _cell(text: str) -> Any:
    """A string, nothing, or a list of turns."""
    if not re.match(r"\s*\[\s*\{", text):
        return text or None
    value = json_or_python(text)
    return value if isinstance(value, list) and all(isinstance(turn, dict) for turn in value) else text


def json_or_python(text: str) -> Any:
    """What a text is as JSON, or as Python or numpy write lists of objects (numpy without a comma between two)."""
    ways = (json.loads, text), (ast.literal_eval, text), (ast.literal_eval, NO_COMMA.sub("}, {", text))
    for parse, written in ways:
        try:
            return parse(written)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None
