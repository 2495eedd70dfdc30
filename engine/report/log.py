"""What a run tells: a line per log step on the screen, the same as JSON in metrics.jsonl, a summary at the end."""

import json
import logging
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

import prefuse
from prefuse.engine.report.screen import console, printable
from prefuse.engine.run.files import json_text, write_whole

if TYPE_CHECKING:
    from prefuse.engine.report.trackers import Trackers

logger = logging.getLogger(__name__)

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 20  # of progress, where there is no terminal

SHOWN = (  # on the screen, as far as a run has them
    "loss",
    "reward",
    "reward_std",
    "gold",
    "frac_reward_zero_std",
    "completions/mean_length",
    "entropy",
    "accuracy",
    "margin",
    "mean_reward",
    "ece",
    "length_correlation",
    "rewards/accuracies",
    "rewards/ties",
    "rewards/margins",
    "kl",
    "kl_to_ref",
    "grad_norm",
    "head/skipped_mass",
    "learning_rate",
    "tokens_per_second",
    "samples_per_second",
    "pairs_per_second",
    "tokens_saved",
    "mfu",
)


def add_metrics(totals: dict[str, Tensor], metrics: dict[str, Tensor]) -> None:
    """Add [sum, count] per name; nothing waits for the device."""
    for name, value in metrics.items():
        totals[name] = totals[name] + value.double() if name in totals else value.double()


class Window:
    """Sums since the last log line. They stay on the device until `means` waits for it, once."""

    def __init__(self, peak_flops: float | None = None, item: str = "sample") -> None:
        self.peak_flops = peak_flops  # of the device, per second, if it is known
        self.item = item  # "pair" where a sample is one
        self.clear()

    def clear(self) -> None:
        self.totals: dict[str, Tensor] = {}
        self.tokens = self.samples = self.flops = 0
        self.restart_clock()

    def restart_clock(self) -> None:
        self.started = time.perf_counter()

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def add(self, metrics: dict[str, Tensor]) -> None:
        add_metrics(self.totals, metrics)

    def count(self, tokens: int, samples: int, flops: float) -> None:
        """What all ranks have done since the last log line, for the rates."""
        self.tokens += tokens
        self.samples += samples
        self.flops += flops

    def means(self) -> dict[str, float]:
        """The mean of each metric, and rates since the last log line."""
        seconds = time.perf_counter() - self.started
        rates = {"tokens_per_second": self.tokens / seconds, "samples_per_second": self.samples / seconds}
        rates |= {f"{self.item}s_per_second": self.samples / seconds}
        if self.peak_flops is not None:
            mfu = self.flops / seconds / self.peak_flops
            if mfu > 1:
                logger.warning(
                    "mfu is left out from here on: the device did more than the %.3g operations a second that were "
                    "measured as its peak, so that is not known", self.peak_flops,
                )  # fmt: skip
                self.peak_flops = None
            else:
                rates["mfu"] = mfu
        return prefuse.reduce_metrics(self.totals) | rates

    def state(self) -> dict[str, list[float]]:
        return {name: value.tolist() for name, value in self.totals.items()}

    def restore(self, state: dict[str, list[float]], device: torch.device) -> None:
        self.totals = {k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in state.items()}


class MetricsLog:
    """metrics.jsonl: one JSON object a line; NaN and infinity are written as null.

    A resumed run keeps the `lines` that its checkpoint knew, and writes the others again. Of several ranks only the
    main one `writes`.
    """

    def __init__(self, path: Path, lines: int = 0, writes: bool = True, trackers: "Trackers | None" = None):
        self.path = path
        self.lines = lines
        self.trackers = trackers
        self._file = None
        if writes:
            kept = read_metrics(path)[:lines]
            write_whole(path, "".join(json_text(row) + "\n" for row in kept))
            self._file = path.open("a", encoding="utf-8")  # still this file if the folder is moved

    def write(self, step: int, epoch: float, metrics: dict[str, float]) -> None:
        self.lines += 1
        if self._file is None:
            return
        self._file.write(json_text({"step": step, "epoch": round(epoch, 4), **metrics}) + "\n")
        self._file.flush()
        if self.trackers is not None:
            self.trackers.write(step, epoch, metrics)

    def close(self) -> None:
        if self.trackers is not None:
            self.trackers.close()
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut off by a crash is left out."""
    rows = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict):
            break
        rows.append(row)
    return rows


def say(message: str) -> None:
    console.print(printable(message), markup=False)


def say_metrics(step: int, total: int, metrics: dict[str, float], prefix: str = "") -> None:
    values = {name: metrics[prefix + name] for name in SHOWN if prefix + name in metrics}
    if not values.get("rewards/ties"):
        values.pop("rewards/ties", None)
    shown = [f"{name} {value:.4g}" for name, value in values.items()]
    say(f"{prefix.rstrip('_') or 'step'} {step}/{total}  " + "  ".join(shown))


def progress_bar() -> Progress:
    """On a terminal only; in a file or a pipe the log lines are enough."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def progress(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """The items, and how many are done and how long the others will take: a bar on a terminal, else now and then a
    line."""
    began = said = time.monotonic()
    with progress_bar() as bar:
        task = bar.add_task(what, total=total)
        for done, item in enumerate(items):
            now = time.monotonic()
            if done and now - said > SECONDS_BETWEEN_LINES and not console.is_terminal:
                left = (now - began) / done * (total - done)
                say(f"  {what}: {done} of {total} batches, about {duration(left)} left")
                said = now
            yield item
            bar.update(task, completed=done + 1)


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_table(title: str, header: list[str], rows: list[list[str]], lines: bool = True) -> None:
    grid = Table(*header, title=Text(printable(title)), show_lines=lines)
    for row in rows:
        grid.add_row(*(Text(printable(cell)) for cell in row))
    console.print(grid, soft_wrap=False)
