"""What every mode multiplies, moves and holds: the cost table, counted by the launchers and measured."""

import pytest
import torch

import prefuse
from prefuse.bench.timing import peak_bytes
from prefuse.bench.truth.head_cases import random_inputs
from prefuse.kernels import HeadOptions, slices
from prefuse.kernels.cost import Cost, count_cost
from prefuse.kernels.logprobs.linear_logprobs import logprobs_within

IMPLS = ["torch", "triton"]
AMPLE = 1 << 40
# mode -> units of N * D * V multiply-adds, workspace, what wants a gradient
MODES = {
    "no grad": (1, 0, ()),
    "frozen": (2, AMPLE, ("hidden",)),
    "stash": (3, AMPLE, ("hidden", "weight")),
    "lean": (4, 0, ("hidden", "weight")),
    "lean, trunk frozen": (3, 0, ("weight",)),
    "stash, trunk frozen": (2, AMPLE, ("weight",)),
}


def step(inputs, mode, impl) -> Cost:
    _, workspace, needs = MODES[mode]
    x = inputs.leaves(needs)
    with count_cost() as cost, torch.set_grad_enabled(bool(needs)):
        logps = logprobs_within(workspace, x.hidden, x.weight, x.targets, None, HeadOptions(), (), impl)
        if needs:
            logps.sum().backward()
    return cost


def batch(impl, device, n, d=16, v=300):
    return random_inputs(n, d, v, torch.bfloat16, device=device if impl == "triton" else "cpu")


@pytest.mark.quick_cases(every=4)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("impl", IMPLS)
def test_every_mode_multiplies_what_the_table_says(impl, mode, device):
    n, d, v = (512, 16, 300) if impl == "torch" else (48, 16, 300)  # whole tiles of rows: padding is multiplied too
    cost = step(batch(impl, device, n, d, v), mode, impl)
    assert cost.flops == MODES[mode][0] * 2 * n * d * v


def test_the_counter_sees_only_what_is_launched_inside(device):
    inputs = batch("triton", device, n=16, v=40)
    with count_cost() as outer:
        first = step(inputs, "no grad", "triton")
        step(inputs, "lean", "triton")
    step(inputs, "lean", "triton")
    assert first.launches == {"fold": 1}
    assert outer.flops == 5 * first.flops
    assert outer.launches["fold"] == 2


def test_a_forward_writes_nothing_that_grows_with_the_vocabulary(device):
    small, large = (step(batch("triton", device, 32, v=v), "no grad", "triton") for v in (300, 600))
    assert small.written == large.written <= 32 * 4 * 3 * 33  # planes, segments
    assert large.read - small.read == 300 * 16 * 2  # the other half of the weight, once


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["frozen", "stash", "lean"])
def test_the_tiles_pass_memory_once_out_and_once_for_each_product(mode, device):
    """Half-precision numbers of (N, V): no float32 ones, and no more passes than products need."""
    n, d = 64, 16
    bytes_per_logit = []
    for part in ("written", "read"):
        small, large = (getattr(step(batch("triton", device, n, d, v), mode, "triton"), part) for v in (320, 640))
        bytes_per_logit.append((large - small) / (n * 320))
    per_row = d / n  # what W and dW add for every logit
    written, read = bytes_per_logit
    assert 2 <= written <= 2 + 4 * 9 / 32 + 4 * per_row  # tiles, their sums, dW
    assert read >= 2 * {"frozen": 1, "stash": 2, "lean": 2}[mode]
    assert read <= 2 * {"frozen": 1, "stash": 2, "lean": 2}[mode] + 16 * per_row + 1


# ---- memory --------------------------------------------------------------------------------------


@pytest.fixture
def _small_tiles(monkeypatch):
    monkeypatch.setattr(slices, "TILE", {"cpu": (32, 64), "cuda": (32, 64)})
    monkeypatch.setattr(slices, "BUFFER_BYTES", 4 * 32 * 64)


def peak(mode, n, d, v, dtype=torch.float32) -> int:
    inputs = random_inputs(n, d, v, dtype)
    return peak_bytes(lambda: step(inputs, mode, "torch"))


@pytest.mark.quick_cases(every=3)
@pytest.mark.usefixtures("_small_tiles")
@pytest.mark.parametrize("mode", ["no grad", "frozen", "lean"])
def test_memory_beyond_gradients_is_flat_in_the_vocabulary(mode):
    n, d, v = 128, 32, 2000
    gradients = {"no grad": 0, "frozen": 0, "lean": 4 * d}[mode]  # of each row of the weight
    small, large = (peak(mode, n, d, size) - gradients * size for size in (v, 3 * v))
    assert abs(large - small) < 4 * 64 * d + 8 * v  # a slice of the weight; never 4 N bytes for each column
    assert large < 4 * n * 3 * v / 4


@pytest.mark.usefixtures("_small_tiles")
def test_half_precision_weights_have_no_float32_copy_of_their_gradient():
    n, d, v = 64, 64, 4000
    assert peak("lean", n, d, v, torch.bfloat16) < 2 * v * d + 4 * v * d / 4


@pytest.mark.usefixtures("_small_tiles")
def test_what_is_kept_for_the_backward_is_what_the_workspace_counts():
    n, d, v = 128, 8, 4000
    kept = 4 * n * v  # float32 on a CPU
    assert kept < peak("stash", n, d, v) < 1.2 * kept + 4 * v * d
    inputs = random_inputs(n, d, v).leaves(("hidden", "weight"))
    cu_seqlens = torch.arange(0, n + 1, 16, dtype=torch.int32)

    def grouped(workspace):
        out = prefuse.linear_preference_loss(
            inputs.hidden, inputs.weight, inputs.targets, cu_seqlens, torch.zeros(n), workspace=workspace, impl="torch"
        )
        out.loss.backward()
        inputs.hidden.grad = inputs.weight.grad = None

    assert peak_bytes(lambda: grouped(kept // 4)) < 1.2 * kept / 4 + 2 * 4 * v * d
