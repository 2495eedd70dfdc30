"""Every large kernel compiles for chips that are not here: on the matrix unit, no spills, within shared memory."""

import os
import subprocess
import sys

import pytest
import torch

from aot_worker import compiling_processes
from prefuse.kernels.shipped import DLOGITS_VARIANTS, FOLD_VARIANTS, KL_VARIANTS, compile_shipped

NAMES = [f"fold, {v}" for v in FOLD_VARIANTS] + [f"dlogits, {v}" for v in DLOGITS_VARIANTS]
NAMES += [f"kl {kernel}, {v}" for v in KL_VARIANTS for kernel in ("fold", "dlogits")]
# What runs most, and what has failed before: the rest of the table is compiled by the slow test.
COMMON = ["fold, plain", "fold, softcap", "fold, pull", "dlogits, plain", "dlogits, softcap", "kl fold, plain"]
# (chip, dtype, operands by descriptor): each chip's own path, then the paths it takes for other operands.
OWN_PATH = [(80, torch.bfloat16, False), (90, torch.bfloat16, True), (100, torch.bfloat16, True)]
OTHER_PATHS = [
    (90, torch.bfloat16, False),
    (100, torch.bfloat16, False),
    (90, torch.float16, True),
    (89, torch.bfloat16, False),
    (120, torch.bfloat16, True),
]


@pytest.fixture(scope="module")
def pool():
    with compiling_processes(2) as pool:
        yield pool


def check(pool, paths, names):
    jobs = {
        (chip, name, dtype, descriptors): pool.submit(compile_shipped, chip, dtype, descriptors, name)
        for chip, dtype, descriptors in paths
        for name in names
    }
    problems = {job: future.result().problems() for job, future in jobs.items()}
    assert not {job: found for job, found in problems.items() if found}


def test_the_common_kernels_compile_clean(pool):
    check(pool, OWN_PATH, COMMON)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_variant_compiles_clean_on_every_path(pool):
    check(pool, OWN_PATH, [name for name in NAMES if name not in COMMON])
    check(pool, OTHER_PATHS, NAMES)


@pytest.mark.slow
def test_the_report_prints_every_kernel_and_fails_on_a_problem():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "prefuse.kernels.report", "--chips", "80"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd="/", env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(name in run.stdout for name in NAMES)
    assert run.stdout.count("clean") == len(NAMES)


@pytest.mark.slow
def test_float32_compiles_without_spills(pool):
    """Exact float32 products are made by the ordinary units, so no matrix instruction is asked for."""
    jobs = [pool.submit(compile_shipped, 90, torch.float32, False, name) for name in NAMES]
    assert not [found for job in jobs if (found := job.result().problems(matrix_unit=False))]
