"""Finds the fastest tile of each kernel on this GPU for one head, and writes it down as rows of a table.

    python -m prefuse.kernels.tiles.tune --head-dims 4096 128256       # hidden size, vocabulary -> ./prefuse-tiles.toml
    PREFUSE_TILES=prefuse-tiles.toml python train.py             # runs with them

Candidates that cannot fit shared memory, or that the compiler would spill, are left out before anything runs; the rest
run whole passes of the head in turn, round after round, so that a drifting clock slows all of them alike. A candidate
wins if it makes the same numbers as the present row, is faster by more than 1% in the same rounds, and compiles clean
in every variant that its row would serve. Nothing is tuned at run time: a table changes only here.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from prefuse.kernels.kl.linear_kl import linear_kl
from prefuse.kernels.logprobs.linear_logprobs import linear_logprobs
from prefuse.kernels.options import OUTPUTS
from prefuse.kernels.tiles.table import (
    DTYPES,
    INTERPRETER,
    KERNELS,
    SAME_AS,
    TABLE,
    VARIABLE,
    Chip,
    Tile,
    TileRow,
    allow_descriptors,
    capability,
    chip_name,
    choose,
    find,
    trial,
)
from prefuse.kernels.tiles.write import write

MARGIN = 0.01  # of the time: what a new tile must save
DROP = 1.25  # times the fastest: out of the race after SCREENING rounds
SCREENING, ROUNDS = 2, 9


@dataclass
class RaceInputs:
    """The inputs that every candidate runs on."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    grad: Tensor  # (N,)

    @classmethod
    def random(cls, n: int, d: int, v: int, dtype: torch.dtype, device: torch.device) -> RaceInputs:
        """Logits of standard deviation 2."""
        draw = torch.Generator(device).manual_seed(0)
        hidden = torch.randn(n, d, generator=draw, device=device).mul(2 * d**-0.5).to(dtype)
        weight = torch.empty(v, d, dtype=dtype, device=device).normal_(generator=draw)
        targets = torch.randint(v, (n,), generator=draw, device=device)
        return cls(hidden, weight, targets, torch.randn(n, generator=draw, device=device))

    @property
    def size(self) -> tuple[int, int]:
        """(D, V)."""
        return self.hidden.shape[1], len(self.weight)

    def run(self, needs: tuple[str, ...] = (), **options) -> list[Tensor]:
        """One pass, and with `needs` its backward: log-probabilities, outputs, gradients."""
        leaves = {name: getattr(self, name).detach().requires_grad_(name in needs) for name in ("hidden", "weight")}
        made = linear_logprobs(leaves["hidden"], leaves["weight"], self.targets, impl="triton", **options)
        logps, outputs = made if isinstance(made, tuple) else (made, {})
        grads = torch.autograd.grad(logps, [leaves[name] for name in needs], self.grad) if needs else ()
        return [x.detach() for x in (logps, *outputs.values(), *grads)]

    def divergence(self, **options) -> list[Tensor]:
        """`linear_kl` from what the same head says after other rows, and its backward."""
        hidden, weight = (x.detach().requires_grad_() for x in (self.hidden, self.weight))
        kl = linear_kl(hidden, weight, self.hidden.flip(0), self.weight, impl="triton", **options)
        return [kl.detach(), *torch.autograd.grad(kl, (hidden, weight), self.grad)]


# What a kernel's tile is timed on: passes that spend their time in it.
WORKLOADS: dict[str, Callable[[RaceInputs], list[Tensor]]] = {
    "fold": lambda head: head.run() + head.run(("hidden",)),
    "outputs": lambda head: head.run(outputs=OUTPUTS),
    "pull softcap": lambda head: head.run(("hidden",), softcap=30.0),
    "pull softcap outputs": lambda head: head.run(("hidden",), softcap=30.0, outputs=OUTPUTS),
    "dlogits": lambda head: head.run(("hidden", "weight")),
    "kl": lambda head: head.divergence(softcap=30.0),
    "kl plain": lambda head: head.divergence(),
}


# ----------------------------------------------------------------------------------------------- candidates


def candidates(present: TileRow, shared_limit: float) -> list[TileRow]:
    """Rows like this one with tiles worth a try, those that ask least of the memory first: they fit shared memory, and
    leave registers beside their accumulators."""
    full = present.dtype == "float32"
    # float32 is multiplied by the ordinary units on NVIDIA: smaller tiles, fewer accumulators.
    sides, depths, least = ((32, 64, 128), (16, 32), 16) if full else ((64, 128, 256), (32, 64, 128), 32)
    lanes, descriptors = 64 if isinstance(present.chip, str) else 32, present.config.descriptors
    accumulators = 2 if present.kernel in ("kl", "kl plain") else 1
    halves = (False, True)[:accumulators]
    shapes = itertools.product(sides, sides, depths, (4, 8), (2, 3, 4), [descriptors], halves)
    tiles = [
        c
        for c in itertools.starmap(Tile, shapes)
        if least <= accumulators * c.block_n * c.block_v / (lanes * c.warps) <= 128
        and c.block_n * c.block_v > sides[0] ** 2
    ]
    rows = [replace(present, config=c) for c in sorted(tiles, key=lambda c: 1 / c.block_n + 1 / c.block_v)]
    return [row for row in rows if row.shared_bytes <= shared_limit]


def problems(row: TileRow, dtype: torch.dtype, name: str) -> list[str]:
    """What the compiler says against one kernel with this row. Not beside the interpreter: see `compilers`."""
    from prefuse.kernels.tiles.shipped import compile_shipped

    try:
        made = compile_shipped(row.chip, dtype, row.config.descriptors, name, row.min_d, row.min_v, (row,))
    except Exception as error:  # shapes that the compiler or the assembler refuses
        return [f"{type(error).__name__}: {error}".splitlines()[0]]
    return made.problems(matrix_unit=dtype != torch.float32)


def compiled_as(chip: Chip) -> Chip:
    """The chip to compile for ahead of time: itself, or the nearest one known."""
    from prefuse.kernels.tiles.aot import CHIPS

    older = [known for known in CHIPS if isinstance(chip, int) and isinstance(known, int) and known <= chip]
    nearest = chip if chip in CHIPS else SAME_AS.get(chip, max(older, default=None))
    if nearest is None:
        raise RuntimeError(f"cannot tune for {chip_name(chip)}: its resources are not known, only {list(CHIPS)}")
    return nearest


@contextlib.contextmanager
def compilers(count: int | None = None) -> Iterator[Executor]:
    """Processes that compile, without the interpreter, which may be on in this one."""
    context = get_context("spawn")
    with ProcessPoolExecutor(count or min(os.cpu_count() or 1, 16), context, _interpreter_off) as pool:
        yield pool


def _interpreter_off() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


# -------------------------------------------------------------------------------------------------- racing


@dataclass
class Entrant:
    """One candidate, its milliseconds in each round, and why it is out."""

    row: TileRow
    ms: list[float]
    out: str = ""

    def ratio(self, other: Entrant) -> float:
        """Median of this one's time over the other's in the same rounds."""
        return statistics.median(mine / yours for mine, yours in zip(self.ms, other.ms, strict=False))


Timer = Callable[[Callable[[], object]], float]


def cuda_timer(run: Callable[[], object]) -> float:
    """Median milliseconds of three calls, after one to warm up."""
    run()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    marks[0].record()
    for mark in marks[1:]:
        run()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks))


def race(entrants: list[Entrant], time_one: Callable[[TileRow], float], time_left: Callable[[float], bool]) -> None:
    """Times all that are still in, in turn, each round in the opposite order; the first is the present row.

    `time_left(share)` says whether that share of the time is not yet spent: the first round, which compiles, gets half.
    """
    for turn in range(ROUNDS):
        running = [x for x in entrants if not x.out]
        for x in running if turn % 2 == 0 else reversed(running):
            if not time_left(1.0 if turn else 0.5):
                if not x.ms and x is not entrants[0]:
                    x.out = "not reached"
                continue
            try:
                x.ms.append(time_one(x.row))
            except Exception as error:  # out of resources, for example: not this one
                x.out = f"{type(error).__name__}: {error}".splitlines()[0]
        if turn + 1 == SCREENING:
            timed = [x for x in entrants if x.ms and not x.out]
            best = min((statistics.median(x.ms) for x in timed), default=math.inf)
            for x in timed:
                if x is not entrants[0] and statistics.median(x.ms) > DROP * best:
                    x.out = "slower"


def difference(made: list[Tensor], expected: list[Tensor], d: int) -> str:
    """Why these are not the same numbers, up to rounding; else nothing."""
    for i, (a, b) in enumerate(zip(made, expected, strict=True)):
        eps = torch.finfo(a.dtype).eps
        # Sums of D terms in another order; a half gradient is rounded as a dlogit and when stored.
        bound = (math.sqrt(d) * eps if a.dtype == torch.float32 else 2 * eps) * max(b.abs().max().item(), 1e-30)
        error = (a.float() - b.float()).abs().max().item()
        if not error <= bound:
            return f"result {i} is off by {error:.1e}, allowed {bound:.1e}"
    return ""


# -------------------------------------------------------------------------------------------------- tuning


@dataclass
class Tuned:
    """What came of one kernel: every entrant, the present row first, and the row to write."""

    kernel: str
    entrants: list[Entrant]
    winner: Entrant | None


def tune_kernel(
    kernel: str,
    head: RaceInputs,
    tiles: Iterable[Tile] | None = None,
    *,
    timer: Timer = cuda_timer,
    pool: Executor | None = None,  # None: nothing is compiled ahead of time
    time_left: Callable[[float], bool] = lambda share: True,
) -> Tuned:
    """Races `tiles` (default: `candidates`) against the present row."""
    (d, v), dtype, chip = head.size, head.hidden.dtype, capability(head.hidden.device)
    descriptors = allow_descriptors(head.hidden, head.weight)
    present = TileRow(chip, DTYPES[dtype], kernel, choose(kernel, chip, dtype, descriptors, d, v), "compiled", d, v)
    if tiles is None:
        rows = candidates(present, _shared_limit(chip))
    else:
        rows = [replace(present, config=tile) for tile in tiles]
    entrants = [Entrant(row, []) for row in dict.fromkeys([present, *rows])]
    if pool is not None:
        _drop_unclean(entrants[1:], dtype, pool, time_left)

    expected = WORKLOADS[kernel](head)

    def time_one(row: TileRow) -> float:
        with trial(row):
            if wrong := difference(WORKLOADS[kernel](head), expected, d):
                raise ArithmeticError(wrong)
            return timer(lambda: WORKLOADS[kernel](head))

    race(entrants, time_one, time_left)
    return Tuned(kernel, entrants, _winner(entrants, dtype, pool))


def _drop_unclean(
    entrants: list[Entrant], dtype: torch.dtype, pool: Executor, time_left: Callable[[float], bool]
) -> None:
    """Compiles the plainest kernel of each row, in a quarter of the time. `_winner` compiles the other variants."""
    from prefuse.kernels.tiles.shipped import users

    rows = [_ahead(x.row) for x in entrants]
    jobs = [pool.submit(problems, row, dtype, users(row)[0].name) for row in rows]
    for x, job in zip(entrants, jobs, strict=True):
        if not time_left(0.25) and job.cancel():
            x.out = "not reached"
        else:
            x.out = "; ".join(job.result())


def _winner(entrants: list[Entrant], dtype: torch.dtype, pool: Executor | None) -> Entrant | None:
    """The fastest that is clean in all of its variants, if it beats the present row by MARGIN. None: too few rounds."""
    present = entrants[0]
    if len(present.ms) < SCREENING or present.out:
        return None
    timed = [x for x in entrants[1:] if len(x.ms) >= SCREENING and not x.out]
    faster = [x for x in timed if x.ratio(present) < 1 - MARGIN]
    for x in sorted(faster, key=lambda x: x.ratio(present)):
        x.out = "" if pool is None else _problems_of_all(x.row, dtype, pool)
        if not x.out:
            return x
    return present


def _problems_of_all(row: TileRow, dtype: torch.dtype, pool: Executor) -> str:
    from prefuse.kernels.tiles.shipped import users

    row = _ahead(row)
    jobs = [pool.submit(problems, row, dtype, kernel.name) for kernel in users(row)]
    return "; ".join(dict.fromkeys(found for job in jobs for found in job.result()))


def _ahead(row: TileRow) -> TileRow:
    return replace(row, chip=compiled_as(row.chip))


def _shared_limit(chip: Chip) -> float:
    from prefuse.kernels.tiles.aot import CHIPS

    return math.inf if chip == INTERPRETER else CHIPS[compiled_as(chip)].shared_limit


def own_kernels(chip: Chip, dtype: torch.dtype, descriptors: bool, d: int, v: int) -> list[str]:
    """The kernels that have a row of their own. A kernel that runs with a stand-in's row is not tuned by itself."""
    rows = {kernel: find(kernel, chip, dtype, descriptors, d, v) for kernel in KERNELS}
    return [kernel for kernel, row in rows.items() if row is None or row.kernel == kernel]


def measured(tuned: Tuned, any_size: bool, where: str) -> TileRow | None:
    """The winner as a row to write."""
    if tuned.winner is None:
        return None
    row, rivals = tuned.winner.row, sum(bool(x.ms) for x in tuned.entrants)
    source = f"measured on {where}: D {row.min_d}, V {row.min_v}, fastest of {rivals}"
    return replace(row, source=source, **({"min_d": 0, "min_v": 0} if any_size else {}))


def entrants_table(tuned: Tuned) -> str:
    """A table of those that ran, the fastest first."""
    present = tuned.entrants[0]
    timed = sorted((x for x in tuned.entrants if x.ms), key=lambda x: statistics.median(x.ms))
    lines = [f"\n{tuned.kernel}: {len(timed)} timed, {len(tuned.entrants) - len(timed)} left out"]
    for x in timed:
        c = x.row.config
        marks = ["present"] * (x is present) + ["winner"] * (x is tuned.winner) + [x.out] * bool(x.out)
        against = f"{x.ratio(present):6.3f}x" if present.ms else ""
        lines.append(
            f"  {c.block_n:3} x {c.block_v:3} x {c.block_d:3}  warps {c.warps}  stages {c.stages}  "
            f"{statistics.median(x.ms):9.3f} ms {against}  {', '.join(marks)}"
        )
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------- main


def arguments_of(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m prefuse.kernels.tiles.tune", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--head-dims", type=int, nargs=2, required=True, metavar=("D", "V"), help="hidden size and vocabulary")
    add("--dtype", choices=[str(x).removeprefix("torch.") for x in DTYPES], default="bfloat16", help="default bfloat16")
    add("--tokens", type=int, default=8192, help="rows of hidden to time with (default 8192)")
    add("--minutes", type=float, default=10, help="stop after this long (default 10)")
    add("--kernels", nargs="+", choices=KERNELS, help="these alone (default: all with a row of their own)")
    add("--any-size", action="store_true", help="write rows for every D and V, not from these on")
    out = parser.add_mutually_exclusive_group()
    out.add_argument("--out", type=Path, default=Path("prefuse-tiles.toml"), help="default ./prefuse-tiles.toml")
    out.add_argument("--write", action="store_true", help="into the package's own table instead")
    args = parser.parse_args(argv)
    if min(*args.head_dims, args.tokens) < 1 or not args.minutes > 0:
        parser.error("--head-dims, --tokens and --minutes must be positive")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments_of(argv)
    if not torch.cuda.is_available():
        print("tuning needs a GPU, and torch.cuda.is_available() is False; nothing was written", file=sys.stderr)
        return 2
    import triton

    device = torch.device("cuda")
    head = RaceInputs.random(args.tokens, *args.head_dims, getattr(torch, args.dtype), device)
    gpu = torch.cuda.get_device_name(device)
    where = f"{gpu}, torch {torch.__version__}, triton {triton.__version__}, {datetime.date.today()}"
    with compilers() as pool:
        return tune(head, args, where, pool, cuda_timer)


def tune(head: RaceInputs, args: argparse.Namespace, where: str, pool: Executor | None, timer: Timer) -> int:
    """Every kernel in its share of the time; each one's row is written as soon as it is known."""
    path, end = TABLE if args.write else args.out, time.monotonic() + 60 * args.minutes
    try:
        write(path, [])  # a file that cannot be written fails now, not after minutes
    except (OSError, ValueError) as error:
        print(f"cannot write {path}: {error}", file=sys.stderr)
        return 2
    chip, descriptors = capability(head.hidden.device), allow_descriptors(head.hidden, head.weight)
    kernels = args.kernels or own_kernels(chip, head.hidden.dtype, descriptors, *head.size)
    unmeasured = []
    for i, kernel in enumerate(kernels):
        seconds = (end - time.monotonic()) / (len(kernels) - i)
        tuned = tune_kernel(kernel, head, timer=timer, pool=pool, time_left=_clock(seconds))
        print(entrants_table(tuned), flush=True)
        row = measured(tuned, args.any_size, where)
        if row is None:
            unmeasured.append(kernel)
            continue
        write(path, [row])
    print(f"\nwritten to {path}" + ("" if args.write else f"; use it with {VARIABLE}={path}"))
    if unmeasured:
        print(f"no time for {', '.join(unmeasured)}: give more --minutes, or fewer --kernels", file=sys.stderr)
    return int(bool(unmeasured))


def _clock(seconds: float) -> Callable[[float], bool]:
    start = time.monotonic()
    return lambda share: time.monotonic() < start + share * seconds


if __name__ == "__main__":
    sys.exit(main())
