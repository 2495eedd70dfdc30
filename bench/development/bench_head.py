"""The head's passes under pytest-benchmark, grouped so that the bare products stand beside what is made of them.

pytest bench/development --benchmark-autosave            # before a change
pytest bench/development --benchmark-compare             # after it: beside the last saved run
pytest bench/development --benchmark-compare --benchmark-compare-fail=min:10%
"""

import functools

import torch

from prefuse.bench.head import GEMMS, leaves, one_step
from prefuse.bench.implementations import LOSSES, MODES, UNITS, draw, reference
from prefuse.bench.timing import gemms

SHAPE, TOKENS = (256, 256, 8000), 64
NAMES = (GEMMS, "prefuse", "TRL", "HALOs, DPO repository (eager)")


def pytest_generate_tests(metafunc):
    cases = [(mode, loss) for mode in MODES for loss in LOSSES if mode != "no grad" or loss == "logps"]
    metafunc.parametrize(("mode", "loss_type"), cases)
    metafunc.parametrize("name", NAMES)


@functools.cache
def inputs():
    torch.set_num_threads(1)
    x = draw(*SHAPE, TOKENS, torch.float32, "cpu")
    for name in NAMES[1:]:
        reference(name, x)
    return x


def bench_step(benchmark, mode, loss_type, name):
    benchmark.group = f"{mode}, {loss_type}"
    x = leaves(inputs(), mode)
    benchmark(
        gemms(UNITS[mode], x.hidden, x.weight) if name == GEMMS else functools.partial(one_step, name, x, loss_type)
    )
