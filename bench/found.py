"""Records, found by what they measured, and how pages name them."""

from __future__ import annotations

from prefuse.bench.record import Record

Row = dict


class Results:
    """Records, found by what they measured."""

    def __init__(self, records: list[Record]) -> None:
        self.records = sorted(records, key=lambda record: record.environment["time"])

    def newest(self, verb: str, **settings: object) -> Record:
        """The last one of a verb whose settings have these values."""
        for record in reversed(self.records):
            if record.verb == verb and settings.items() <= record.settings.items():
                return record
        raise KeyError(f"no result of `prefuse bench {verb}` with {settings}: run it, or remove its table")

    def every(self, verb: str) -> list[Record]:
        """All of a verb, by the names of their files."""
        return sorted((record for record in self.records if record.verb == verb), key=lambda record: record.path.name)


def row(record: Record, **keys: object) -> Row:
    """The one row that has these keys."""
    (found,) = (x for x in record.rows if keys.items() <= x.items())
    return found


def link(record: Record, text: str = "numbers", up: str = "../") -> str:
    return f"[{text}]({up}bench/results/{record.path.name})"


def where(record: Record) -> str:
    """`one thread of an AMD EPYC, torch 2.13.0`"""
    device, torch = record.device, record.environment["packages"]["torch"].split("+")[0]
    threads = {1: "one thread", 2: "two threads"}.get(device["threads"], f"{device['threads']} threads")
    return (
        f"{threads} of an {device['name']}, torch {torch}"
        if device["kind"] == "cpu"
        else f"{device['name']}, torch {torch}"
    )
