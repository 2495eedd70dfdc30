"""What every test relies on: where kernels run, no network, seeded generators, poisoned fresh memory."""

import os
import random
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

# Kernels run for real on a GPU, and interpreted, on CPU tensors, elsewhere. Triton reads this on import.
if not HAS_GPU:
    assert "triton" not in sys.modules
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
CACHE = tempfile.TemporaryDirectory(prefix="prefuse-cache-")  # nothing of a test goes to the user's
os.environ["PREFUSE_CACHE"] = CACHE.name
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else it warns in every fork

# A shell that starts the tests in the background, or nohup, has them ignored, and runs respect that.
for number, handler in (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# The root's kernels/ would shadow the package `kernels` of others.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT]  # "" is the current folder

if not HAS_GPU:
    import strict_interpreter

    strict_interpreter.install()


# torch's own opcheck reads it, from torch 2.14 on.
OPCHECK_WARNS = "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning"


@pytest.hookimpl(tryfirst=True)  # before pytest takes the slow ones out
def pytest_collection_modifyitems(items):
    _mark_slow_cases(items)
    for item in items:
        if "opcheck" in item.name:
            item.add_marker(pytest.mark.filterwarnings(OPCHECK_WARNS))
        if not HAS_GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch.cuda.is_available() is False"))


def _mark_slow_cases(items):
    """Of the cases of a test with `quick_cases(every=n)` the first and each n-th after it stay in `make test`."""
    cases = Counter()
    for item in items:
        if marker := item.get_closest_marker("quick_cases"):
            function = item.nodeid.split("[")[0]
            if cases[function] % marker.kwargs["every"]:
                item.add_marker(pytest.mark.slow)
            cases[function] += 1


@pytest.fixture(scope="session")
def device():
    """Where kernel tests put their tensors."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Fills what torch.empty and its kin return, so that memory read before it is written shows.

    (torch.use_deterministic_algorithms does it too, but hides what is not deterministic as well.)
    """

    def poisoned(allocate):
        def allocate_and_poison(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            tensor.detach().fill_(_poison(tensor.dtype))
            return tensor

        return allocate_and_poison

    for owner, names in (torch, ["empty", "empty_like", "empty_strided"]), (torch.Tensor, ["new_empty"]):
        for name in names:
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def _poison(dtype):
    """NaN where there is one, else the value least likely to be a good index or count."""
    if dtype == torch.bool:
        return True
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return torch.iinfo(dtype).max
