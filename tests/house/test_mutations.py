"""Bugs of the kinds that such systems really had, planted one at a time: each is killed by the test that it names.

Every file of tests/mutations is one bug. To add one, name in it what it replaces and the test that must fail; if no
test does, the suite lacks one.
"""

from pathlib import Path

import pytest
import torch

from mutate import Mutation, run_tests

FILES = sorted((Path(__file__).parents[1] / "mutations").glob("*.toml"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the tests that are named run interpreted"),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_planted_bug_is_killed(path, tmp_path):
    mutation = Mutation.read(path)
    mutation.plant(tmp_path)
    result = run_tests(tmp_path, [mutation.killed_by], timeout=250)
    assert result.returncode == 1, f"survived: {mutation.why}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    assert f"FAILED {mutation.killed_by}" in result.stdout, result.stdout[-2000:]


def test_there_are_enough_of_them():
    assert len(FILES) >= 20
