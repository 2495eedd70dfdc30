"""What a set of rows is like: counts, lengths, duplicates, contradictions, balance. Numbers, no printing."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from prefuse.engine.data.records import Record, Skipped, Text


@dataclass
class Stats:
    records: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    first_skipped: dict[str, str] = field(default_factory=dict)  # reason -> the first row that has it
    set_aside: set[str] = field(default_factory=set)  # those reasons that are stated rules
    prompts: int = 0  # distinct
    duplicates: int = 0  # records that an earlier one equals
    contradictions: int = 0  # pairs whose reverse, or labelled answers whose other label, is there too
    equal_sides: int = 0
    labels: Counter[bool] = field(default_factory=Counter)
    lengths: dict[str, array] = field(default_factory=dict)  # "prompt", "chosen", ... -> one number a record
    gaps: array = field(default_factory=lambda: array("d"))  # score of chosen less that of rejected

    def count_skipped(self, skipped: Iterable[Skipped]) -> None:
        """Rows that are too long have one reason, however long each is."""
        self.skipped.clear()
        for skip in skipped:
            reason = re.sub(r"has \d+ tokens", "has too many tokens", skip.reason)
            self.skipped[reason] += 1
            self.first_skipped.setdefault(reason, skip.row)
            if skip.by_rule:
                self.set_aside.add(reason)

    @property
    def longer_chosen(self) -> tuple[int, int, int]:
        """Pairs whose chosen side is longer, as long, shorter."""
        both = list(zip(self.lengths.get("chosen", ()), self.lengths.get("rejected", ()), strict=True))
        longer, shorter = sum(a > b for a, b in both), sum(a < b for a, b in both)
        return longer, len(both) - longer - shorter, shorter


def measure_rows(outcomes: Iterable[Record | Skipped], length: Callable[[Text], int]) -> Stats:
    """One pass. What was seen is kept as 16-byte digests."""
    stats, prompts, seen, verdicts, skipped = Stats(), set(), set(), {}, []
    for outcome in outcomes:
        if isinstance(outcome, Skipped):
            skipped.append(outcome)
            continue
        stats.records += 1
        prompts.add(short_digest(outcome.prompt))
        identity = identity_of(outcome)
        stats.duplicates += identity in seen
        seen.add(identity)
        case, verdict = judgement_of(outcome)
        if verdict is not None:
            verdicts.setdefault(case, Counter())[verdict] += 1
        stats.equal_sides += len(outcome.sides) == 2 and len(set(map(short_digest, outcome.sides.values()))) == 1
        if outcome.label is not None:
            stats.labels[outcome.label] += 1
        for part, text in (("prompt", outcome.prompt), *outcome.sides.items()):
            stats.lengths.setdefault(part, array("q")).append(length(text))
        if outcome.scores and len(outcome.scores) == 2:
            stats.gaps.append(outcome.scores["chosen"] - outcome.scores["rejected"])
    stats.count_skipped(skipped)
    stats.prompts = len(prompts)
    stats.contradictions = sum(count.total() for count in verdicts.values() if len(count) > 1)
    return stats


def short_digest(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def identity_of(record: Record) -> bytes:
    """Two records with one identity are duplicates."""
    return short_digest([record.prompt, list(record.sides.items()), record.label])


def judgement_of(record: Record) -> tuple[bytes, Any]:
    """(what is judged, the judgement): of a pair its two answers in either order, and which is the chosen one."""
    sides = [short_digest(text) for text in record.sides.values()]
    if len(sides) == 2:
        return short_digest(record.prompt) + b"".join(sorted(sides)), sides[0]
    return short_digest(record.prompt) + b"".join(sides), record.label


def characters(text: Text) -> int:
    """The length of a text, or of the contents of turns."""
    if isinstance(text, str):
        return len(text)
    return sum(len(turn.get("content") or "") for turn in text)


def quantiles(values: Iterable[float], shares: tuple[float, ...] = (0, 0.5, 0.9, 0.99, 1)) -> list[float]:
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in shares] if ordered else []
