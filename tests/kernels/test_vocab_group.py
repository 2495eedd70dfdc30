"""A head spread over ranks gives every rank the numbers of the whole one: see tests/lib/vocab_worker.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "lib" / "vocab_worker.py"
QUICK = ("torch", 2)
EVERY = [("torch", 1), QUICK, ("torch", 3), ("triton", 2), ("triton", 3)]
RANKS = [pytest.param(*one, marks=() if one == QUICK else pytest.mark.slow) for one in EVERY]
CHECKS = ["check_values_and_gradients", "check_bits", "check_losses", "check_errors"]


@pytest.mark.parametrize(("impl", "ranks"), RANKS)
def test_ranks_that_share_a_head_agree_with_the_whole(impl, ranks, tmp_path):
    command = [sys.executable, str(WORKER)]
    workers = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), str(tmp_path / "store"), impl],
            env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    output = [worker.communicate(timeout=280) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * ranks, "\n".join(err for _, err in output)
    assert output[0][0].splitlines() == [f"{check} passed" for check in CHECKS]
