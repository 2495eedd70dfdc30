"""Where the GPU suite runs, what it has found so far, and the time that is left to its present section."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefuse.bench import cases
from prefuse.bench.gpu_inputs import MODELS, TAILS, TOKENS, Model
from prefuse.bench.gpu_report import report
from prefuse.bench.record import environment, write_result, write_text


@dataclass(frozen=True)
class Machine:
    """Where the suite runs, and at which sizes."""

    device: str
    sizes: cases.Sizes
    models: list[Model]
    tokens: int
    tails: list[tuple[int, int]]
    tiles: int | None  # at most so many candidates of a kernel

    @property
    def dry(self) -> bool:
        return self.device == "cpu"


GPU = Machine("cuda", cases.GPU, MODELS, TOKENS, TAILS, None)
DRY = Machine(
    "cpu", cases.TOY, [Model(model.name, 32, 160, model.softcap) for model in MODELS], 48, [(4, 8)], 1
)  # fmt: skip


class Suite:
    """The result so far, and the time that is left to its present section."""

    def __init__(self, path: Path, minutes: float, machine: Machine = GPU):
        self.path, self.machine, self.seconds = path, machine, 60 * minutes
        self.start = self.deadline = time.monotonic()
        self.deadline += self.seconds
        self.result: dict[str, Any] = {
            "environment": environment(),
            "settings": {"minutes": minutes, "device": "interpreter" if machine.dry else "cuda"},
            "sections": [],
            "checks": [],
            "sanitizer": "not run",
            "tail": [],
            "tiles": [],
            "timings": [],
        }
        self.failed = False

    def run(self, name: str, share: float, section: Callable[[Suite], None]) -> None:
        """One section, which is to end when `share` of the minutes is over."""
        self.deadline = self.start + share * self.seconds
        row = {"section": name, "began_s": round(time.monotonic() - self.start, 1), "until_s": share * self.seconds}
        self.result["sections"].append(row)
        print(f"-- {name}: {max(self.left(), 0.0):.0f} s", flush=True)
        try:
            section(self)
        except Exception as error:  # the sections behind it are worth their time all the same
            traceback.print_exc()
            row["error"] = f"{type(error).__name__}: {error}"[:1000]
            self.failed = True
        row["ended_s"] = round(time.monotonic() - self.start, 1)
        self.save()

    def left(self) -> float:
        """Seconds of the present section."""
        return self.deadline - time.monotonic()

    def save(self) -> None:
        write_result(self.path, "gpu", self.result)
        write_text(self.path.with_suffix(".md"), report(self.result))
