"""Every large kernel compiles for chips that are not here: on the matrix unit, no spills, within shared memory."""

import os
import subprocess
import sys

import pytest
import torch
import triton

from aot_worker import compiling_processes
from prefuse.kernels.tiles import report
from prefuse.kernels.tiles.aot import CHIPS
from prefuse.kernels.tiles.shipped import DLOGITS_VARIANTS, FOLD_VARIANTS, KL_VARIANTS, compile_shipped, shipped, users
from prefuse.kernels.tiles.table import DTYPES, TABLE, chip_name, read

NAMES = [f"fold, {v}" for v in FOLD_VARIANTS] + [f"dlogits, {v}" for v in DLOGITS_VARIANTS]
NAMES += [f"kl {kernel}, {v}" for v in KL_VARIANTS for kernel in ("fold", "dlogits")]
# What runs most, and what has failed before: the rest of the table is compiled by the slow tests.
COMMON = ["fold, plain", "fold, softcap", "fold, pull", "dlogits, plain", "dlogits, softcap", "kl fold, plain"]
# (chip, dtype, operands by descriptor): each chip's own path, then those without rows of their own.
OWN_PATH = [(80, torch.bfloat16, False), (90, torch.bfloat16, True), (100, torch.bfloat16, True)]
EXHAUSTIVE_PATHS = [
    (90, torch.bfloat16, False),
    (90, torch.float16, True),
    (90, torch.float32, False),
    (120, torch.bfloat16, False),
    (120, torch.float32, False),
    ("gfx90a", torch.bfloat16, False),
    ("gfx950", torch.bfloat16, False),
]
DTYPE_OF = {"half": torch.bfloat16, "float32": torch.float32}


@pytest.fixture(scope="module")
def pool():
    with compiling_processes(2) as pool:
        yield pool


def check(pool, jobs):
    """jobs: (chip, dtype, operands by descriptor, name[, D, V])."""
    futures = {job: pool.submit(compile_shipped, *job) for job in jobs}
    made = {job: future.result() for job, future in futures.items()}
    # Exact float32 products are made by the ordinary units, so no matrix instruction is asked for.
    problems = {job: x.problems(matrix_unit=job[1] != torch.float32) for job, x in made.items()}
    assert not {job: found for job, found in problems.items() if found and not known(job, made[job])}
    return made


def known(job, made):
    """What triton 3.6 makes worse than 3.7 and later, and no smaller tile is worth for it."""
    if not triton.__version__.startswith("3.6."):
        return False
    chip, _, descriptors, name, *_ = job
    beside_descriptors = chip == 120 and descriptors and not made.spill_bytes and made.local_ops <= 6
    bias = (chip, name) == (90, "fold, bias") and made.spill_bytes <= 40 and made.local_ops <= 10
    only = made.shared <= CHIPS[chip].shared_limit and made.matrix_ops and not made.wgmma_serialized
    return (beside_descriptors or bias) and only


@pytest.mark.slow
def test_the_common_kernels_compile_clean(pool):
    check(pool, [(*path, name) for path in OWN_PATH for name in COMMON])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("row", read(TABLE), ids=str)
def test_every_row_compiles_clean_in_every_kernel_that_runs_with_it(pool, row):
    dtype, size = DTYPE_OF[row.dtype], (row.min_d, row.min_v)
    jobs = {(row.chip, dtype, row.config.descriptors, kernel.name, *size): kernel for kernel in users(row)}
    for job, made in check(pool, jobs).items():
        # The tuner's estimate, which must not leave out what would have fitted.
        assert row.shared_bytes <= made.shared, job


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "path",
    [(89, torch.bfloat16, False), *(pytest.param(path, marks=pytest.mark.exhaustive) for path in EXHAUSTIVE_PATHS)],
    ids=lambda path: f"{chip_name(path[0])} {path[1]} {path[2]}",
)
def test_every_variant_compiles_clean_where_another_chips_rows_hold(pool, path):
    check(pool, [(*path, name) for name in NAMES])


def test_every_variant_runs_with_a_row_that_is_compiled():
    """Else the slow tests would leave one out."""
    for chip in (80, 90, 100, 120, "gfx942"):
        for dtype in DTYPES:
            assert [kernel.name for kernel in shipped(chip, dtype)] == NAMES
    assert {kernel.name for row in read(TABLE) if row.chip == 90 for kernel in users(row)} == set(NAMES)


@pytest.mark.slow
def test_the_report_prints_every_kernel():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "prefuse.kernels.tiles.report", "--chips", "sm_80", "gfx942"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd="/", env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(name in run.stdout for name in NAMES)
    assert run.stdout.count("  clean\n") == 2 * len(NAMES)


@pytest.mark.parametrize(
    ("mode", "n", "milliseconds"),
    [
        ("no grad", 8192, 2 * 8192 * 4096 * 128256 / 989e9),
        ("lean", 8192, 4 * 2 * 8192 * 4096 * 128256 / 989e9),
        # A single row is no work for the matrix unit: what takes time is to read the head.
        ("frozen", 1, 2 * 2 * 4096 * (1 + 128256) / 3.35e9),
        ("stash", 8192, 3 * 2 * 8192 * 4096 * 128256 / 989e9),
    ],
)
def test_the_floor_is_a_roofline(mode, n, milliseconds):
    assert report.floor(90, mode, n, 4096, 128256) == pytest.approx(milliseconds)


def test_a_stash_in_a_shallow_head_is_bound_by_memory():
    n, d, v = 8192, 64, 128256
    moved = 3 * 2 * d * (n + v) + 3 * 2 * n * v
    assert report.floor(90, "stash", n, d, v) == pytest.approx(moved / 3.35e9)


@pytest.mark.parametrize("names", [["90", "gfx942"], ["sm_90", "gfx942"]])
def test_the_report_takes_chips_by_name(names, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(report, "kernel_rows", lambda chip: (asked.append(chip) or ["a kernel"], chip == 90))
    assert report.main(["--chips", *names]) == 1  # for one of them is not clean
    assert asked == [90, "gfx942"]
    assert "MI300X (1307 TFLOP/s, 5.3 TB/s)" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "message"), [("sm_70", "chip must be"), ("gfx1100", "gfx1100 is not one of sm_80, ")])
def test_the_report_refuses_other_chips(name, message, capsys):
    with pytest.raises(SystemExit):
        report.main(["--chips", name])
    assert message in capsys.readouterr().err
