"""A data source -> named rows, as they stand in it.

Sources: a .json (a list of objects), .jsonl or .parquet file, a folder of such files, a folder written by
`datasets.save_to_disk`, or the name of a dataset on the Hugging Face hub. One without splits is read whole,
whatever `split` says: a file, one saved dataset, a folder whose files name no split. (In a folder where some
do, as "test-0.parquet" does, the others are train.)

A row is named after its place: "pairs.jsonl:17" is line 17, counted from 1; everywhere else ("pairs.json:17",
"pairs.parquet:17", "org/name:17") the number is the row's index, counted from 0.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefuse.engine.errors import UserError

Rows = list[tuple[str, Any]]  # (row name, the row as read: an object, or a BadRow for a line that does not parse)


class DataError(UserError):
    """The source as a whole cannot be used; the run stops."""


class BadRow(Exception):
    """One row cannot be used; its message is the reason. It becomes a `Skipped`."""


@dataclass(frozen=True)
class Table:
    rows: Rows
    columns: list[str]  # of all rows together


def read_table(source: str, split: str) -> Table:
    path = Path(source)
    if path.is_file():
        rows = _read_file(path, path.name)
    elif (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        rows = _read_saved(path, split)
    elif path.is_dir():
        rows = _read_folder(path, split)
    elif path.suffix in READERS or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise DataError(f"{source}: no such file or folder")
    else:
        rows = _read_hub(source, split)
    if not rows:
        raise DataError(f"{source} has no rows")
    columns = dict.fromkeys(column for _, row in rows if isinstance(row, dict) for column in row)
    return Table(rows, list(columns))


def _read_file(path: Path, name: str) -> Rows:
    if path.suffix not in READERS:
        raise DataError(f'{path}: files of type "{path.suffix}" are not read; expected one of {", ".join(READERS)}')
    try:
        return READERS[path.suffix](path, name)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _read_json(path: Path, name: str) -> Rows:
    try:
        rows = json.loads(_read_utf8(path))
    except json.JSONDecodeError as error:
        fix = ". One object per line? Then name the file .jsonl" if error.msg == "Extra data" else ""
        raise DataError(f"{path} is not valid JSON: {error}{fix}") from error
    if not isinstance(rows, list):
        raise DataError(f"{path} holds {describe(rows)}, expected a list of objects")
    return _numbered(rows, name)


def _read_jsonl(path: Path, name: str) -> Rows:
    # Only "\n" ends a line: str.splitlines also cuts at U+2028 and the like, which JSON strings may hold.
    lines = enumerate(_read_utf8(path).split("\n"), start=1)
    return [(f"{name}:{number}", _json_line(line)) for number, line in lines if line.strip()]


def _json_line(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} at column {error.colno}")


def _read_utf8(path: Path) -> str:
    data = path.read_bytes()
    if not data.strip():
        raise DataError(f"{path} is empty")
    try:
        return data.decode().removeprefix("\ufeff")  # the byte-order mark some editors write
    except UnicodeDecodeError as error:
        at, line = error.start, data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path} is not valid UTF-8: byte 0x{data[at]:02x} at offset {at} (line {line}); save it as UTF-8"
        ) from error


def _read_parquet(path: Path, name: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        return _numbered(pyarrow.parquet.ParquetFile(path).read().to_pylist(), name)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


READERS: dict[str, Callable[[Path, str], Rows]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}

# Words in a file's path that say which split it belongs to, as `datasets` reads them.
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "eval": "test", "evaluation": "test"}
SPLIT_WORDS |= dict.fromkeys(("validation", "valid", "val", "dev"), "validation")


def _read_folder(path: Path, split: str) -> Rows:
    found = map(Path, glob.glob("**", root_dir=path, recursive=True))  # leaves hidden files and folders out
    files = sorted(file for file in found if file.suffix in READERS)
    if not files:
        raise DataError(f"{path}: a folder without {', '.join(READERS)} files")
    if any(map(_split_of, files)):
        splits: dict[str, list[Path]] = {}
        for file in files:
            splits.setdefault(_split_of(file) or "train", []).append(file)
        files = _pick_split(splits, SPLIT_WORDS.get(split, split), str(path))
    return [row for file in files for row in _read_file(path / file, file.as_posix())]


def _split_of(file: Path) -> str | None:
    words = re.split(r"[^a-z0-9]+", file.as_posix().lower())
    return next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)


def _read_saved(path: Path, split: str) -> Rows:
    import datasets

    try:
        saved = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: a saved dataset that cannot be read: {error}") from error
    if isinstance(saved, datasets.DatasetDict):
        return _numbered(_pick_split(saved, split, str(path)).to_list(), f"{path.name}/{split}")
    return _numbered(saved.to_list(), path.name)


def _read_hub(name: str, split: str) -> Rows:
    import datasets

    try:
        return _numbered(datasets.load_dataset(name, split=split).to_list(), name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: no such file or folder here, and not from the hub either: {error}") from error


def _pick_split(splits: dict[str, Any], split: str, source: str) -> Any:
    if split not in splits:
        raise DataError(f'{source}: no split "{split}"; it has {", ".join(splits)}')
    return splits[split]


def _numbered(rows: list[Any], name: str) -> Rows:
    return [(f"{name}:{index}", row) for index, row in enumerate(rows)]


def describe(value: Any) -> str:
    """What a value is, in JSON's words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")
