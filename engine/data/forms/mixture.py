"""Several sources as one, each read in its own form, one behind the other: a mixture, named as TRL names it.

    datasets:
      - path: helpful.jsonl
        fraction: 0.7
      - path: harmless
        split: train
        fraction: 0.3

With fractions (for all of them or for none), each source gives the first rows of its share: the mixture is as large as
it can be without any row twice.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from prefuse.engine.data.forms.form import Form, Tally
from prefuse.engine.data.records import DataError
from prefuse.engine.data.sources import Source, open_source

KEYS = ("path", "name", "data_dir", "split", "columns", "fraction")


@dataclass(frozen=True)
class Part:
    """One source of a mixture. `columns`: the only ones to look at."""

    path: str
    name: str | None = None
    data_dir: str | None = None
    split: str | None = None
    columns: list[str] | None = None
    fraction: float | None = None

    @property
    def place(self) -> str:
        return f"{self.path}/{self.data_dir}" if self.data_dir else self.path


def mixture_parts(datasets: Any) -> list[Part]:
    """Of dicts, of paths, or of "path=a.jsonl,fraction=0.7"; checked."""
    parts = [_part(entry) for entry in datasets]
    if not parts:
        raise DataError("datasets is an empty list; expected the sources of a mixture")
    fractions = [part.fraction for part in parts]
    if any(fraction is not None for fraction in fractions) and None in fractions:
        raise DataError("datasets: fraction must be given for all of the sources or for none")
    if any(fraction is not None and not 0 < fraction < float("inf") for fraction in fractions):
        raise DataError(f"datasets: a fraction must be above 0, got {', '.join(map(str, fractions))}")
    return parts


def _part(entry: Any) -> Part:
    if isinstance(entry, str):
        pairs = [word.partition("=") for word in entry.split(",")] if entry.startswith("path=") else []
        entry = {key: value for key, _, value in pairs} if pairs else {"path": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or set(entry) - set(KEYS):
        raise DataError(f"datasets has the entry {entry!r:.120}; expected a path, and perhaps {', '.join(KEYS[1:])}")
    if entry.get("fraction") is not None:
        try:
            entry = entry | {"fraction": float(entry["fraction"])}
        except (TypeError, ValueError):
            raise DataError(f"datasets: fraction {entry['fraction']!r} is not a number") from None
    return Part(**entry)


def name_of(source: Any) -> str:
    """What to call a source, or a mixture, in messages."""
    return source if isinstance(source, str) else " + ".join(part.path for part in mixture_parts(source))


def sources_of(parts: list[Part], split: str) -> list[Source]:
    """Each part's rows, cut to its share."""
    sources = []
    for part in parts:
        source = open_source(part.place, part.split or split, part.name)
        sources.append(_of_columns(source, part.columns) if part.columns else source)
    if parts[0].fraction is None:
        return sources
    shares = [part.fraction / sum(part.fraction for part in parts) for part in parts]  # type: ignore[misc]
    counts = [sum(1 for _ in source.rows()) for source in sources]
    size = min(count / share for count, share in zip(counts, shares, strict=True))
    return [_first(source, round(share * size)) for source, share in zip(sources, shares, strict=True)]


def _first(source: Source, count: int) -> Source:
    return replace(source, rows=lambda: itertools.islice(source.rows(), count))


def _of_columns(source: Source, columns: list[str]) -> Source:
    def rows() -> Iterator[tuple[str, Any]]:
        for name, row in source.rows():
            kept = {column: row.get(column) for column in columns} if isinstance(row, dict) else row
            yield name, kept

    return replace(source, rows=rows)


class MixedTally(Tally):
    """The sums over the forms of a mixture."""

    def __init__(self, forms: list[Form]):
        self.forms = forms

    @property
    def notes(self) -> Counter[str]:  # type: ignore[override]
        return sum((form.tally.notes for form in self.forms), Counter())

    @property
    def rows(self) -> int:  # type: ignore[override]
        return sum(form.tally.rows for form in self.forms)


def mixed_form(forms: list[Form]) -> Form:
    """The forms as one, for messages; each reads its own rows."""
    kinds = {form.kind == "pair" for form in forms}
    if len(kinds) > 1:
        names = " and ".join(dict.fromkeys(str(form) for form in forms))
        raise DataError(f"a mixture of pairs and of other rows ({names}) cannot be read as one: convert them first")
    became = dict.fromkeys(role for form in forms for role in form.became)
    name = " + ".join(dict.fromkeys(str(form) for form in forms))
    return replace(forms[0], name=name, became=tuple(became), tally=MixedTally(forms))
