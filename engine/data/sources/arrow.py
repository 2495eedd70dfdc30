"""Parquet and Arrow -> rows, a batch at a time.

Two habits of these files are undone. `datasets` writes columns whose objects differ from row to row as JSON text, and
only the schema's metadata says so ("Json"). And Arrow gives every object of a list the same keys: those that a turn did
not have come back as null, and are taken out again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prefuse.engine.data.records import BadRow, DataError, without_nulls

Rows = Iterator[tuple[str, Any]]

ROWS_PER_BATCH = 1000
TEXT_KEYS = ("content", "value", "text", "prompt", "chosen", "rejected", "completion")


def read_parquet(path: Path, name: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from rows_of_batches(file.iter_batches(ROWS_PER_BATCH), file.schema_arrow, name)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from error


def read_arrow(path: Path, opener: Callable[[], BinaryIO], name: str) -> Rows:
    """Both of Arrow's formats: the stream that `datasets` writes, and the file (Feather)."""
    import pyarrow

    try:
        with opener() as stream:
            if stream.read(6) == b"ARROW1":
                with pyarrow.ipc.open_file(path) as file:
                    batches = map(file.get_batch, range(file.num_record_batches))
                    yield from rows_of_batches(batches, file.schema, name)
                return
        with opener() as stream, pyarrow.ipc.open_stream(stream) as file:
            yield from rows_of_batches(file, file.schema, name)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable Arrow file: {error}") from error


def rows_of_batches(batches: Iterable[Any], schema: Any, name: str) -> Rows:
    """Rows of pyarrow record batches (or tables) with this schema, named `name:index`."""
    texts = _json_columns(schema)
    nested = [field.name for field in schema if _has_objects(field.type)]
    index = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):  # a batch of an Arrow file may be the whole file
            for row in batch.slice(start, ROWS_PER_BATCH).to_pylist():
                yield f"{name}:{index}", _restored(row, texts, nested)
                index += 1


def _restored(row: dict[str, Any], texts: dict[str, Any], nested: list[str]) -> Any:
    for column in nested:
        row[column] = without_nulls(row[column])
    try:
        for column, feature in texts.items():
            row[column] = _decoded(row[column], feature, column)
    except (ValueError, RecursionError) as error:
        return BadRow(f"its JSON text is not valid: {error}")
    return row


def _has_objects(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_struct(kind):
        return True
    return types.is_nested(kind) and any(_has_objects(kind.field(i).type) for i in range(kind.num_fields))


# ---------------------------------------------------------------------------------------------------------
# Columns of JSON text


def _json_columns(schema: Any) -> dict[str, Any]:
    """{column: its feature as the metadata has it} for columns with a "Json" somewhere in them."""
    import pyarrow

    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (metadata.get("info") or {}).get("features") or {}
    found = {column: feature for column, feature in features.items() if _has_json(feature)}
    for field in schema:  # Arrow's own type of JSON text
        if isinstance(field.type, getattr(pyarrow, "JsonType", ())):
            found.setdefault(field.name, {"_type": "Json"})
    return {column: feature for column, feature in found.items() if column in schema.names}


def _has_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return feature.get("_type") == "Json" or any(map(_has_json, feature.values()))
    return isinstance(feature, list) and any(map(_has_json, feature))


def _decoded(value: Any, feature: Any, key: str) -> Any:
    if value is None or not _has_json(feature):
        return value
    if isinstance(feature, list):  # [feature]: how older versions write a list
        return [_decoded(part, feature[0], key) for part in value]
    if feature.get("_type") == "Json":
        if not isinstance(value, str):
            return value
        read = json.loads(value)
        # A text "12" was written as 12: where a text belongs, it is one again.
        return value if key in TEXT_KEYS and not isinstance(read, str | list | dict) else read
    if isinstance(value, list):
        return [_decoded(part, feature.get("feature"), key) for part in value]
    return {name: _decoded(part, feature.get(name), name) for name, part in value.items()}
