"""Fixtures that several files of tests/bindings share."""

import json

import pytest
import torch

import ranks


@pytest.fixture(scope="module")
def theirs():
    """liger_kernel's own losses, eager."""
    return pytest.importorskip("liger_kernel.chunked_loss")


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """{case: what two ranks found}; they start once for all cases."""
    folder = tmp_path_factory.mktemp("wrapped")
    ranks.run(2, folder, ranks.LIB / "wrapped_worker.py", "out", timeout=280)
    return json.loads((folder / "out.json").read_text())


@pytest.fixture
def alone():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """name -> folder"""
    import trainer_runs

    folder = tmp_path_factory.mktemp("models")
    return {name: trainer_runs.save(folder, name) for name in trainer_runs.MODELS} | {
        "other": trainer_runs.save(tmp_path_factory.mktemp("other"), "llama", seed=1)
    }
