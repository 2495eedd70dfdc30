"""Rows of integers of unequal length, end to end in one array: token ids, and texts as UTF-8 bytes.

A row is a span of `values`, so choosing rows and repeating them copies none.

R rows, T values.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

BLOCK_ROWS = 4096  # rows gathered at once: bounds the memory of what is made of them


@dataclass(frozen=True, eq=False)
class Ragged(Sequence):
    values: np.ndarray  # (T,) integers
    starts: np.ndarray  # (R,) int64
    lengths: np.ndarray  # (R,) int64

    @classmethod
    def of(cls, rows: Iterable[Sequence[int]]) -> Ragged:
        builder = RaggedBuilder("i")
        for row in rows:
            builder.append(row)
        return builder.finish()

    @classmethod
    def end_to_end(cls, values: np.ndarray, lengths: np.ndarray) -> Ragged:
        """All of `values`, cut into rows of these lengths."""
        return cls(values, np.cumsum(lengths) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Any) -> Any:  # int -> list[int], slice -> Ragged
        if isinstance(index, slice):
            return Ragged(self.values, self.starts[index], self.lengths[index])
        return self.array(index).tolist()

    def array(self, index: int) -> np.ndarray:  # (length of the row,)
        start = self.starts[index]
        return self.values[start : start + self.lengths[index]]

    def take(self, indices: np.ndarray) -> Ragged:
        """The rows at `indices`, which may repeat; their values are shared."""
        taken = Ragged(self.values, self.starts[indices], self.lengths[indices])
        if "same" in self.__dict__:
            taken.__dict__["same"] = number_by_first(self.same[indices])
        return taken

    def replaced(self, indices: np.ndarray, rows: Ragged) -> Ragged:
        """A copy with other rows at `indices`."""
        starts, lengths = self.starts.copy(), self.lengths.copy()
        starts[indices], lengths[indices] = len(self.values) + rows.starts, rows.lengths
        return Ragged(np.concatenate([self.values, rows.values]), starts, lengths)

    def places(self) -> np.ndarray:  # (sum of lengths,) int64
        """Where in `values` each value of the rows is, row by row."""
        return ranges(self.starts, self.lengths)

    def whole(self) -> bool:
        """Whether the rows are all of `values`, in order."""
        return len(self.values) == self.lengths.sum() and bool(
            (np.cumsum(self.lengths) - self.lengths == self.starts).all()
        )

    def joined(self) -> np.ndarray:  # (sum of lengths,)
        """The values of the rows, end to end."""
        return self.values if self.whole() else self.values[self.places()]

    @cached_property
    def same(self) -> np.ndarray:  # (R,) int64
        """A number for each row, the same for equal rows: distinct rows are numbered as they first appear."""
        numbers: dict[bytes, int] = {}
        digests = (hashlib.blake2b(self.array(i).tobytes(), digest_size=16).digest() for i in range(len(self)))
        return np.fromiter((numbers.setdefault(digest, len(numbers)) for digest in digests), np.int64, len(self))


class RaggedBuilder:
    """Rows that come one by one. `typecode`: of `array`, "i" for token ids and "B" for bytes."""

    def __init__(self, typecode: str):
        self.values = array(typecode)
        self.lengths = array("q")

    def append(self, row: Iterable[int]) -> None:
        before = len(self.values)
        self.values.extend(row)
        self.lengths.append(len(self.values) - before)

    def finish(self) -> Ragged:
        return Ragged.end_to_end(as_numpy(self.values), as_numpy(self.lengths))


class Texts(Sequence):
    """Strings as UTF-8 bytes: a third of the memory of Python's."""

    def __init__(self, data: Ragged):
        self.data = data

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        builder = RaggedBuilder("B")
        for text in texts:
            builder.append(encode(text))
        return cls(builder.finish())

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> str:
        return self.data.array(index).tobytes().decode("utf-8", "surrogatepass")


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")  # a file's name may be no Unicode text


def as_numpy(values: array) -> np.ndarray:
    """The same memory."""
    return np.frombuffer(values, dtype=values.typecode) if values else np.empty(0, dtype=values.typecode)


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:  # (R,), (R,) -> (sum of lengths,)
    """start, start + 1, ... of each row, `length` many."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - lengths), lengths)


def number_by_first(numbers: np.ndarray) -> np.ndarray:  # (R,) -> (R,) int64
    """Numbers that are equal where `numbers` are, counted from 0 in the order in which they first appear."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def framed(parts: Sequence[Ragged]) -> Iterator[np.ndarray]:  # int64, of a block of rows each
    """Each part's first row with its length before it, then each part's second row, ...: what a digest goes over."""
    for start in range(0, len(parts[0]), BLOCK_ROWS):
        block = [part[start : start + BLOCK_ROWS] for part in parts]
        lengths = np.stack([part.lengths for part in block], axis=1).ravel()
        places = np.cumsum(lengths + 1) - (lengths + 1)
        out = np.empty(int((lengths + 1).sum()), np.int64)
        out[places] = lengths
        for number, part in enumerate(block):
            out[ranges(places[number :: len(parts)] + 1, part.lengths)] = part.joined()
        yield out


def framed_rows(parts: Sequence[Ragged]) -> Iterator[bytes]:
    """What `framed` says of each row."""
    sizes = 8 * sum(part.lengths + 1 for part in parts)
    blocks = (memoryview(block.tobytes()) for block in framed(parts))
    for start, block in zip(range(0, len(sizes), BLOCK_ROWS), blocks, strict=True):
        at = 0
        for size in sizes[start : start + BLOCK_ROWS].tolist():
            yield block[at : at + size]
            at += size
