"""JSON in every layout that files have: lines, an array, lines of arrays, objects one after another, or one document.

An array of turns in the place of a row is the conversation of a row: {"messages": [...]}.

A document is an object that holds the rows: {"data": [...]}, {"train": [...], "test": [...]}, {"prompt": [...],
"chosen": [...]} or, as pandas writes it, {"prompt": {"0": ...}}. Lines and arrays are read as they come, a document
whole. One row that cannot be parsed (or is nested too deeply, or has a number of thousands of digits) is a BadRow; only
in an array or a document, where the next row's start is unknown, a syntax error stops the run.
"""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from prefuse.engine.data.records import BadRow, DataError

Opener = Callable[[], BinaryIO]
Rows = Iterator[tuple[str, Any]]

CHUNK = 1 << 20  # characters
CHECKED = 100  # lines of a file that are looked at for keys that stand twice
ROW_LISTS = ("data", "rows", "examples", "instances", "items", "records")


def read_json(path: Path, opener: Opener, name: str, suffix: str, split: str) -> Rows:
    """The first character is [ or {."""
    layout = _layout(opener, suffix)
    if layout == "lines":
        yield from _read_lines(path, opener, name)
    elif layout == "arrays":
        for row, value in _read_lines(path, opener, name):
            yield from _rows_of_line(row, value)
    elif layout == "values":
        yield from ((row, _as_row(value)) for row, value in _numbered(_read_values(path, opener), name))
    else:
        yield from _read_document(path, opener, name, suffix, split)


def _as_row(value: Any) -> Any:
    is_conversation = isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value)
    return {"messages": value} if is_conversation and all({"role", "from"} & set(turn) for turn in value) else value


def _rows_of_line(name: str, value: Any) -> Rows:
    """A conversation, or several rows, in one line."""
    row = _as_row(value)
    if isinstance(row, list) and row and all(isinstance(part, dict) for part in row):
        yield from ((f"{name}.{index}", part) for index, part in enumerate(row))
    else:
        yield name, row


def _layout(opener: Opener, suffix: str) -> str:
    """ "lines": one object each. "arrays": one array each. "values": an array, or objects that span lines. "document":
    one object."""
    with opener() as stream:
        lines = (line for line in map(_without_mark, stream) if line.strip())
        first = next(lines)
        second = next(lines, None)
        if first.lstrip().startswith(b"["):
            line = first.decode(errors="replace").strip()
            if second is None or _end_of_value(line, 0) != len(line):
                return "values"
            if second.lstrip().startswith(b"["):
                return "arrays"
            value = _parse_line(first)  # in lines of rows it may be nested too deeply, or be no row
            holds_rows = isinstance(value, list) and any(isinstance(part, dict) for part in value)
            return "lines" if second.lstrip().startswith(b"{") and not holds_rows else "values"
        if second is None:
            value = _parse_line(first)
            holds_rows = isinstance(value, BadRow) or any(isinstance(part, list | dict) for part in value.values())
            return "document" if holds_rows and _is_document(value, suffix) else "lines"
        if isinstance(_parse_line(first), dict) or isinstance(_parse_line(second), dict):
            return "lines"
        rest = [second, *(line for line, _ in zip(lines, range(20), strict=False))]
        if suffix in (".jsonl", ".ndjson") and sum(line.lstrip().startswith(b"{") for line in rest) > len(rest) / 2:
            return "lines"
    return "document"


def _is_document(value: Any, suffix: str) -> bool:
    """Whether the only line of a file is an object that holds rows, rather than being a row."""
    if isinstance(value, BadRow):
        return suffix == ".json"
    return _rows_of_document(value, "train", "") is not None


# ---------------------------------------------------------------------------------------------------------
# Lines


def _read_lines(path: Path, opener: Opener, name: str) -> Rows:
    """Only "\\n" ends a line: str.splitlines also cuts at U+2028 and the like, which JSON strings may hold."""
    with opener() as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = _without_mark(line)
            if not line.strip():
                continue
            try:
                text = line.decode()
            except UnicodeDecodeError:
                raise not_utf8(path, opener) from None
            yield f"{name}:{number}", _parse_line(text) if number > CHECKED else _parse_row(text, f"{name}:{number}")


def _parse_row(text: str, row: str) -> Any:
    """A line whose object may not name a column twice: of two values json.loads keeps the last."""
    names: list[str] = []

    def noted(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names[:] = [name for name, _ in pairs]  # those of the outermost object come last
        return dict(pairs)

    value = _parse_line(text, object_pairs_hook=noted)
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f'{row} names "{twice[0]}" twice: one of two values would be lost. Fix: give each its own name')
    return value


def _without_mark(line: bytes) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8)  # the byte-order mark some editors write


def _parse_line(line: str | bytes, **options: Any) -> Any:
    try:
        return json.loads(line, **options)
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError:
        return BadRow("not valid UTF-8")
    except (RecursionError, ValueError) as error:
        return _unreadable(error)


def _unreadable(error: Exception) -> BadRow:
    if isinstance(error, RecursionError):
        return BadRow("it is nested too deeply to be read")
    return BadRow("it holds a number of more than 4300 digits")  # CPython's limit, the one other ValueError of json


def not_utf8(path: Path, opener: Opener) -> DataError:
    """Where the file stops being UTF-8. It is read once more, to count bytes and lines."""
    decoder, offset, line = codecs.getincrementaldecoder("utf-8")(), 0, 1
    with opener() as stream:
        for part in stream:
            try:
                decoder.decode(part)
            except UnicodeDecodeError as error:
                byte = part[error.start]
                return DataError(
                    f"{path} is not valid UTF-8: byte 0x{byte:02x} at offset {offset + error.start} (line {line}); "
                    "save it as UTF-8"
                )
            offset, line = offset + len(part), line + 1
    return DataError(f"{path} is not valid UTF-8: it ends in the middle of a character; save it as UTF-8")


# ---------------------------------------------------------------------------------------------------------
# Values one after another, in an array or not


def _read_values(path: Path, opener: Opener) -> Iterator[Any]:
    with opener() as stream, io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
        try:
            yield from _Values(text).read()
        except UnicodeDecodeError:
            raise not_utf8(path, opener) from None
        except json.JSONDecodeError as error:
            raise DataError(f"{path} is not valid JSON: {error}") from error


class _Values:
    """A window of the text, moved on as values are read from it."""

    def __init__(self, text: io.TextIOWrapper):
        self.text = text
        self.window, self.at, self.ended = "", 0, False
        self.lines, self.columns = 0, 0  # before the window

    def read(self) -> Iterator[Any]:
        in_array = self._next_character() == "["
        self.at += in_array
        expects_value = True  # in an array: no comma has been missed
        while character := self._next_character():
            if in_array and character == "]":
                self.at += 1
                if self._next_character():
                    self._fail("Extra data")
                return
            if character == ",":
                if expects_value:
                    self._fail("Expecting value")
                self.at, expects_value = self.at + 1, True
                continue
            if in_array and not expects_value:
                self._fail("Expecting ',' delimiter")
            yield self._value()
            expects_value = False
        if in_array:
            self._fail("Expecting ',' delimiter" if not expects_value else "Expecting value")

    def _value(self) -> Any:
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.window, self.at)
            except json.JSONDecodeError as error:
                behind = error.pos - self.at  # reading on moves the window
                if self._more():
                    continue
                self._fail(error.msg, self.at + behind)
            except (RecursionError, ValueError) as error:
                end = _end_of_value(self.window, self.at)
                if end is None and self._more():
                    continue
                if end is None:
                    self._fail("Unterminated value")
                value = _unreadable(error)
            if end == len(self.window) and self._more():  # a number may go on
                continue
            self.at = end
            return value

    def _next_character(self) -> str:
        """The next character that is not blank, "" at the end."""
        while True:
            found = re.compile(r"\S").search(self.window, self.at)
            if found:
                self.at = found.start()
                return found.group()
            self.at = len(self.window)
            if not self._more():
                return ""

    def _more(self) -> bool:
        """Reads on, twice as far each time: a value longer than a chunk is not parsed once for each chunk."""
        if self.ended:
            return False
        gone, rest = self.window[: self.at], self.window[self.at :]
        newlines = gone.count("\n")
        self.lines += newlines
        self.columns = len(gone) - gone.rfind("\n") - 1 if newlines else self.columns + len(gone)
        chunk = self.text.read(max(CHUNK, len(rest)))
        self.ended = not chunk
        self.window, self.at = rest + chunk, 0
        return not self.ended

    def _fail(self, message: str, position: int | None = None) -> None:
        position = self.at if position is None else position
        error = json.JSONDecodeError(message, self.window, position)
        error.args = (
            f"{message}: line {error.lineno + self.lines} "
            f"column {error.colno + (self.columns if error.lineno == 1 else 0)}",
        )
        raise error


def _end_of_value(text: str, start: int) -> int | None:
    """Where the object or array that begins at `start` ends, without parsing it; None if it does not."""
    depth = 0
    for part in re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL).finditer(text, start):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(part.group(), 0)
        if depth == 0:
            return part.end()
    return None


# ---------------------------------------------------------------------------------------------------------
# One document


def _read_document(path: Path, opener: Opener, name: str, suffix: str, split: str) -> Rows:
    values = list(_read_values(path, opener))
    if len(values) != 1 or not isinstance(values[0], dict):
        yield from _numbered(iter(values), name)
        return
    rows = _rows_of_document(values[0], split, str(path))
    if rows is None:  # it is a row itself
        rows = [values[0]]
    yield from _numbered(iter(rows), name)


def _rows_of_document(document: dict[str, Any], split: str, source: str) -> list[Any] | None:
    """The rows that an object holds; None if it holds none in a way that is known."""
    lists = {key: value for key, value in document.items() if isinstance(value, list)}
    of_objects = {key for key, value in lists.items() if value and all(isinstance(row, dict) for row in value)}
    for key in ROW_LISTS:
        if key in lists and (key in of_objects or not lists[key]):
            return [row["row"] if set(row) >= {"row_idx", "row"} else row for row in lists[key]]
    if document and of_objects == set(document) and not (set(document) & _CONVERSATIONS):
        if source and split not in document:
            raise DataError(f'{source}: no split "{split}"; it has {", ".join(document)}')
        return document.get(split, [])
    if len(lists) > 1 and len(lists) == len(document) and len({len(value) for value in lists.values()}) == 1:
        if not of_objects:  # columns; lists of objects would be the turns of one row
            return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
    if document and all(isinstance(value, dict) and value for value in document.values()):
        keys = {tuple(value) for value in document.values()}
        if len(keys) == 1 and all(key.isdigit() for key in next(iter(keys))):
            return [{column: document[column][key] for column in document} for key in next(iter(keys))]
    return None


_CONVERSATIONS = {  # columns of turns: a file with one row of them is no table of splits
    "messages", "conversations", "conversation", "contents", "dialog", "dialogue", "context", "context_messages",
    "prompt_messages", "history", "chosen", "rejected", "prompt",
}  # fmt: skip


def _numbered(rows: Iterator[Any], name: str) -> Rows:
    return ((f"{name}:{index}", row) for index, row in enumerate(rows))
