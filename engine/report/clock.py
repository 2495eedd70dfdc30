"""Where the time of a run goes: the seconds of each part, which the end of the run shows as a table.

    with clock.part("data"):
        ...

Parts may be nested: a second counts for the innermost part. But everything inside "reference" and "evaluation" counts
for these two. On a GPU the marks are CUDA events, so that nothing waits for the device until the table is made.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")

PARTS = {
    "trunk": "decoder layers, forward and backward",
    "head": "fused head and loss, forward and backward",
    "reference": "log-probabilities of the reference",
    "sampling": "answers sampled and scored",
    "evaluation": "held-out rows",
    "data": "reading rows and making batches",
    "optimizer": "summing and clipping gradients, and the step",
    "checkpoints": "writing checkpoints and the model",
    "other": "loading, logging and the rest",
}
WHOLE = ("reference", "sampling", "evaluation")  # their trunk and head are not those of training
MOST_MARKS = 4096  # CUDA events that are kept before the completed ones are added up


class Clock:
    """One for a process, which has one run at a time."""

    def __init__(self) -> None:
        self.restart(torch.device("cpu"))

    def restart(self, device: torch.device) -> None:
        """Forget everything; the time from here on is that of a new run on `device`."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.device = device
        self.current = "other"
        self._passed: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._since = self._mark()

    def use(self, device: torch.device) -> None:
        """From here on the work is done on `device`."""
        self.to(self.current)
        self._add_up(wait=True)
        self.device = device
        self._since = self._mark()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        before = self.current
        self.to(before if before in WHOLE else name)
        try:
            yield
        finally:
            self.to(before)

    def to(self, name: str) -> None:
        """What comes now is part `name`."""
        now = self._mark()
        if isinstance(now, float):
            self.seconds[self.current] += now - self._since
        else:
            self._passed.append((self.current, self._since, now))
            if len(self._passed) > MOST_MARKS:
                self._add_up(wait=False)
        self.current, self._since = name, now

    def shares(self) -> list[tuple[str, float, float]]:
        """(part, seconds, share of all) of the parts that took any time, in the order of PARTS."""
        self.to(self.current)
        self._add_up(wait=True)
        total = sum(self.seconds.values()) or 1.0
        return [(name, self.seconds[name], self.seconds[name] / total) for name in PARTS if self.seconds[name] > 0]

    def _mark(self) -> "float | torch.cuda.Event":
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _add_up(self, wait: bool) -> None:
        if wait and self._passed:
            self._passed[-1][2].synchronize()
        while self._passed and self._passed[0][2].query():
            name, began, ended = self._passed.popleft()
            self.seconds[name] += began.elapsed_time(ended) / 1000


clock = Clock()


def timed(items: Iterable[T], name: str) -> Iterator[T]:
    """Yields the items; the time that each takes to arrive counts for part `name`."""
    iterator = iter(items)
    while True:
        with clock.part(name):
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item
