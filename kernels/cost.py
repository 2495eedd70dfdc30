"""What the launchers did, as they report it themselves: operations and bytes, for tests and benchmarks.

    with count_cost() as cost:
        linear_logprobs(hidden, weight, targets).sum().backward()
    cost.flops / (2 * N * D * V)  # 4 units

Dispatch counters see neither inside custom operators nor `tl.dot`, so every matrix product and every large kernel says
what it does where it is launched. Bytes are what a launch must move if each of its operands is read once and each
result written once: caches are not modelled. Work on N rows or N numbers, such as the targets' own terms, is left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(eq=False)
class Cost:
    """The sum of what was reported."""

    flops: int = 0  # a multiply-add is two
    read: int = 0  # bytes
    written: int = 0  # bytes
    launches: dict[str, int] = field(default_factory=dict)  # by kind: "product", "fold", "dlogits", ...


_watchers: list[Cost] = []


@contextmanager
def count_cost() -> Iterator[Cost]:
    """Collects what is launched inside, backward passes on other threads included."""
    cost = Cost()
    _watchers.append(cost)
    try:
        yield cost
    finally:
        _watchers.remove(cost)


def counting() -> bool:
    """Whether anybody collects: to ask first spares a tile on a CPU the sums of bytes."""
    return bool(_watchers)


def report_cost(kind: str, flops: int, read: int, written: int) -> None:
    for cost in _watchers:
        cost.flops += flops
        cost.read += read
        cost.written += written
        cost.launches[kind] = cost.launches.get(kind, 0) + 1


def size(*tensors: Tensor | None) -> int:
    """Bytes of all elements."""
    return sum(0 if x is None else x.numel() * x.element_size() for x in tensors)
