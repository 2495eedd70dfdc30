"""Processes in which Triton compiles: the tests' own process has its interpreter on, which excludes that."""

import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def compiling_processes(count: int = 1) -> ProcessPoolExecutor:
    """Functions submitted to it are found by their module's name, so they stand in tests/lib or in the package."""
    return ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_interpreter_off)


def _interpreter_off():
    os.environ.pop("TRITON_INTERPRET", None)
