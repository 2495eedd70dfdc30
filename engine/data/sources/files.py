"""One file -> its rows, one after another. What the file holds is told by its first bytes, not by its name."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prefuse.engine.data.records import DataError
from prefuse.engine.data.sources.arrow import read_arrow, read_parquet
from prefuse.engine.data.sources.json_text import read_json
from prefuse.engine.data.sources.tables import read_table_text

Rows = Iterator[tuple[str, Any]]  # (row name, the row as read: an object, or a BadRow where it cannot be read)

DATA = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
HEAD = 4096  # bytes looked at


def is_data_file(path: Path) -> bool:
    """By the name: which files of a folder are read."""
    name = path.with_suffix("") if path.suffix.lower() in COMPRESSED else path
    return name.suffix.lower() in DATA


def read_file(path: Path, name: str, split: str) -> Rows:
    """The rows of a file, named `name:number`. `split` matters where a JSON document holds several."""
    try:
        yield from _read(path, name, split)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read(path: Path, name: str, split: str) -> Rows:
    with path.open("rb") as stream:
        head = stream.read(HEAD)
    if head.startswith(b"PAR1"):
        yield from read_parquet(path, name)
        return
    opener = _opener(path, head)
    with opener() as stream:
        head = stream.read(HEAD)
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        yield from read_arrow(path, opener, name)
        return
    _refuse_what_is_no_data(path, head)
    suffix = next((suffix.lower() for suffix in reversed(path.suffixes) if suffix.lower() not in COMPRESSED), "")
    start = _first_characters(opener)
    if not start:
        raise DataError(f"{path} is empty")
    if start[0] in "[{":
        yield from read_json(path, opener, name, suffix, split)
    elif suffix in (".csv", ".tsv"):
        yield from read_table_text(path, opener, name, suffix)
    elif suffix in (".json", ".jsonl", ".ndjson"):
        raise DataError(f"{path} is not valid JSON: it begins with {start[:20]!r}, expected [ or {{")
    else:
        raise DataError(
            f"{path}: nothing that is read begins with {start[:20]!r}; expected JSON, JSON lines, CSV or TSV (by these "
            "names), Parquet or Arrow, plain or compressed as gzip, zstd, bzip2 or xz"
        )


def _opener(path: Path, head: bytes) -> Callable[[], BinaryIO]:
    """Opens the file's bytes, uncompressed."""
    if head.startswith(b"\x1f\x8b"):
        return lambda: gzip.open(path, "rb")
    if head.startswith(b"BZh"):
        return lambda: bz2.open(path, "rb")
    if head.startswith(b"\xfd7zXZ\x00"):
        return lambda: lzma.open(path, "rb")
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        import pyarrow

        return lambda: io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return lambda: path.open("rb")


def _refuse_what_is_no_data(path: Path, head: bytes) -> None:
    start = head.lstrip().lower()
    if start.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a Git LFS pointer, not the data itself; fetch it with `git lfs pull`")
    if start.startswith((b"<!doctype", b"<html")):
        raise DataError(
            f"{path} is an HTML page, not data: the download has gone wrong (a log-in page, or no raw link)"
        )
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or head[:1] == b"\x00" or head[1:2] == b"\x00":
        raise DataError(f"{path} is UTF-16 (or UTF-32), not UTF-8; save it as UTF-8")
    if head.startswith(b"PK\x03\x04"):
        raise DataError(f"{path} is a ZIP archive (or a spreadsheet); unpack it, or save the sheet as CSV")


def _first_characters(opener: Callable[[], BinaryIO]) -> str:
    """The first characters that are not blank, behind a byte-order mark; "" in a file of blanks."""
    with opener() as stream:
        first = True
        while chunk := stream.read(HEAD):
            if first:
                chunk, first = chunk.removeprefix(b"\xef\xbb\xbf"), False
            if chunk.strip():
                return chunk.lstrip().decode(errors="replace")[:100]
    return ""
