"""A data source -> named rows, as they stand in it, one after another.

Sources: a file (JSON in any layout, JSON lines, CSV, TSV, Parquet, Arrow, plain or compressed), a folder of such files,
a folder written by `datasets.save_to_disk`, or the name of a dataset on the Hugging Face hub. One without splits is
read whole, whatever `split` says.

A row is named after its place: "pairs.jsonl:17" is line 17, counted from 1; everywhere else ("pairs.json:17",
"pairs.parquet:17", "org/name:17") the number is the row's index, counted from 0.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefuse.engine.data.records import DataError
from prefuse.engine.data.sources.arrow import ROWS_PER_BATCH, rows_of_batches
from prefuse.engine.data.sources.files import is_data_file, read_file
from prefuse.engine.data.sources.folders import files_of_split, pick, refuse_what_is_no_file
from prefuse.engine.errors import UserError
from prefuse.engine.hub import require_repository

Rows = Iterator[tuple[str, Any]]


@dataclass(frozen=True)
class Source:
    name: str
    files: tuple[Path, ...]  # what it is read from, for whoever keeps results
    rows: Callable[[], Rows]  # a fresh pass


def open_source(source: str, split: str = "train", config: str | None = None) -> Source:
    """Raises DataError for what is not there; what cannot be read shows as the rows come."""
    path = Path(source)
    try:
        is_file, is_folder, exists = path.is_file(), path.is_dir(), path.exists() or path.is_symlink()
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL
        raise DataError(f"{source!r:.200}: no such file or folder: {error}") from error
    if is_file:
        return Source(source, (path,), lambda: read_file(path, path.name, split))
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return _saved(path, split)
    if is_folder:
        files = files_of_split(path, split, config)
        return Source(source, tuple(path / file for file in files), lambda: _read_files(path, files, split))
    if exists:
        refuse_what_is_no_file(path)
    if is_data_file(path) or not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source):
        raise DataError(f"{source}: no such file or folder")
    return _of_hub(source, split, config)


def _read_files(folder: Path, files: list[Path], split: str) -> Rows:
    for file in files:
        yield from read_file(folder / file, file.as_posix(), split)


def _saved(path: Path, split: str) -> Source:
    import datasets

    try:
        saved = datasets.load_from_disk(path)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path}: a saved dataset that cannot be read: {error}") from error
    name = path.name
    if isinstance(saved, datasets.DatasetDict):
        saved, name = pick(saved, split, str(path)), f"{path.name}/{split}"
    files = tuple(Path(file["filename"]) for file in saved.cache_files)
    return Source(str(path), files, lambda: _rows_of_dataset(saved, name))


def _of_hub(name: str, split: str, config: str | None) -> Source:
    loaded = load_from_hub(name, split, config)
    files = tuple(Path(file["filename"]) for file in loaded.cache_files)  # where datasets keeps it
    return Source(name, files, lambda: _rows_of_dataset(loaded, name))


@functools.lru_cache(maxsize=16)  # who asks for the files and who asks for the rows, once
def load_from_hub(name: str, split: str, config: str | None = None) -> Any:
    import datasets

    try:
        require_repository(name, "dataset")
    except UserError as error:
        raise DataError(str(error)) from None
    try:
        return datasets.load_dataset(name, name=config, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{name}: no such file or folder here, and not from the hub either: {error}") from error


def _rows_of_dataset(dataset: Any, name: str) -> Rows:
    tables = dataset.with_format("arrow").iter(ROWS_PER_BATCH)
    schema = dataset.features.arrow_schema
    return rows_of_batches(tables, schema, name)
