"""Gradients made in the forward, group by group: the same loss bit by bit, in three units, within the workspace."""

import pytest
import torch

import prefuse
from prefuse import AOT, DPO, IPO, KTO, SFT, ChosenNLL, Mixture, SimPO, grouped
from prefuse.bench.truth import oracle
from prefuse.bench.truth.head_cases import random_inputs
from prefuse.kernels import HeadOptions, slices
from prefuse.kernels.cost import count_cost
from prefuse.kernels.logprobs.call import prepare_call

IMPLS = ["torch", "triton"]
LENGTHS = [7, 9, 1, 12, 30, 2, 0, 5, 16, 8, 3, 11]  # six pairs
N, D, V = sum(LENGTHS), 24, 90
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
PADDED = 96  # a multiple of 8, as the stash keeps rows
TILE = 16
HEAD = {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.2}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(slices, "TILE", {"cpu": (TILE, 32), "cuda": (TILE, 32)})


def room(rows, dtype=torch.float32, impl="torch", sums=False):
    """A workspace for the weights of so many rows, and for a float32 dweight."""
    size = 4 if impl == "torch" and not torch.cuda.is_available() else dtype.itemsize
    return rows * PADDED * size + (4 * V * D if sums else 0)


def run(inputs, workspace, impl, loss=DPO(), needs=("hidden", "weight", "bias"), scale=1.0, **arguments):  # noqa: B008
    x = inputs.leaves(needs)
    arguments = {"ref_logps": -torch.rand(N, generator=torch.Generator().manual_seed(1)) * 3, **arguments}
    device = x.hidden.device
    arguments = {k: a.to(device) if isinstance(a, torch.Tensor) else a for k, a in arguments.items()}
    with count_cost() as cost:
        out = prefuse.linear_preference_loss(
            x.hidden, x.weight, x.targets, CU_SEQLENS.to(device), loss=loss, bias=x.bias, impl=impl,
            workspace=workspace, **arguments,
        )  # fmt: skip
        (out.loss * scale).backward()
    return out, {name: getattr(x, name).grad for name in needs}, cost.flops / (2 * N * D * V)


LOSSES = {
    "dpo": {"loss": DPO(label_smoothing=0.1)},
    "ipo": {"loss": IPO()},
    "kto": {"loss": KTO(undesirable_weight=1.5), "labels": torch.arange(12) % 3 > 0, "z0": 0.2},
    "sft": {"loss": SFT(), "ref_logps": None},
    "per sequence": {"loss": DPO(), "ref_logps": torch.linspace(-40, -4, 12, dtype=torch.float64)},
    "options": {"loss": DPO(), **HEAD},
    "simpo": {"loss": SimPO(), "ref_logps": None},
    "mixed": {"loss": Mixture((DPO(), ChosenNLL(torch.tensor(9.5))), (1.0, 0.3))},
    "of the whole batch": {"loss": AOT(paired=False)},
}


@pytest.mark.quick_cases(every=5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", LOSSES)
def test_groups_change_nothing_but_rounding(case, impl, dtype, device):
    inputs = random_inputs(N, D, V, dtype, bias=True, ignored=0.1, device=device if impl == "triton" else "cpu")
    inputs.hidden[5] *= 40  # a row that no stash can hold
    made = {}
    for name, workspace, which in (
        ("grouped", room(48, dtype, impl, sums=dtype != torch.float32), impl),
        ("whole", 1 << 40, impl),
        ("truth", 0, "reference"),
    ):
        made[name] = run(inputs, workspace, which, **LOSSES[case])
    out, whole = made["grouped"][0], made["whole"][0]
    for field in ("loss", "losses", "logps", "rewards"):
        assert torch.equal(getattr(out, field), getattr(whole, field)), field
    assert all(torch.equal(x, whole.metrics[name]) for name, x in out.metrics.items())
    for name, truth in made["truth"][1].items():
        got, kept, truth = (x.double() for x in (made["grouped"][1][name], made["whole"][1][name], truth))
        bound = 2 * (kept - truth).norm() + 4 * torch.finfo(dtype).eps * truth.norm()
        assert (got - truth).norm() <= bound, name
    assert not made["grouped"][1]["hidden"][inputs.targets == -100].any()


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rows", [32, 48, 64])
def test_groups_take_three_units(impl, rows, device):
    inputs = random_inputs(N, D, V, device=device if impl == "triton" else "cpu")
    units = {}
    for workspace in (0, room(rows), 1 << 40):
        units[workspace] = run(inputs, workspace, impl, needs=("hidden", "weight"))[2]
    padding = 1.6 if impl == "torch" else 1.0  # the portable path multiplies whole row tiles in the forward
    assert units[1 << 40] <= 3 * padding
    assert units[1 << 40] <= units[room(rows)] <= 3 * padding
    assert units[0] > 3.9


def test_the_float32_gradient_of_a_half_precision_weight_counts_against_the_workspace():
    inputs = random_inputs(N, D, V, torch.bfloat16)
    counted = []
    for workspace in (room(48), room(48, sums=True)):
        hidden, weight = inputs.leaves(("hidden", "weight")).hidden, inputs.weight.requires_grad_()
        call = prepare_call(hidden, weight, inputs.targets, None, HeadOptions(), (), "torch")
        counted.append(len(grouped.split_in_groups(call, workspace, CU_SEQLENS, 2)))
    few, enough = counted
    assert few == 0
    assert enough > 1


def test_groups_are_whole_items_as_many_as_fit():
    ends = CU_SEQLENS.tolist()
    groups = grouped.whole_items(ends, 2, 40)
    assert [g.sequences for g in groups] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert [g.tokens for g in groups] == [slice(0, 29), slice(29, 66), slice(66, 104)]
    singles = grouped.whole_items(ends, 1, 30)
    assert [x for g in singles for x in range(12)[g.sequences]] == list(range(12))
    assert all(ends[g.sequences.stop] - ends[g.sequences.start] <= 30 for g in singles)


def test_a_pair_larger_than_any_group_is_recomputed_instead():
    assert grouped.whole_items(CU_SEQLENS.tolist(), 2, 31) == []
    inputs = random_inputs(N, D, V)
    units = run(inputs, room(TILE), "torch", needs=("hidden", "weight"))[2]
    assert units > 3.9


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",), ("hidden", "weight")])
def test_only_what_wants_a_gradient_gets_one(needs):
    inputs = random_inputs(N, D, V, bias=True)
    _, grads, _ = run(inputs, room(48), "torch", needs=needs)
    _, truth, _ = run(inputs, 0, "reference", needs=needs)
    for name in needs:
        torch.testing.assert_close(grads[name], truth[name], rtol=1e-4, atol=1e-6)


def test_what_comes_from_above_scales_the_gradients():
    inputs = random_inputs(N, D, V, bias=True)
    plain, scaled = (run(inputs, room(48), "torch", scale=s)[1] for s in (1.0, 1024.0))
    for name, grad in plain.items():
        assert torch.equal(1024.0 * grad, scaled[name]), name


def test_autocast_and_float32_master_weights(device):
    """Their gradient is float32 and its own accumulator: nothing more is counted, nothing rounded to bf16."""
    inputs = random_inputs(N, D, V)
    with torch.autocast("cpu", torch.bfloat16):
        _, grads, units = run(inputs, room(48), "torch", needs=("hidden", "weight"))
    assert units < 3 * 1.6
    assert {g.dtype for g in grads.values()} == {torch.float32}
    rounded = inputs.but(hidden=inputs.hidden.bfloat16())
    _, truth, _ = run(rounded, 0, "reference", needs=("hidden", "weight"))
    bound = 2 * torch.finfo(torch.bfloat16).eps * truth["weight"].norm()
    oracle.assert_within((grads["weight"] - truth["weight"]).norm(), torch.tensor(0.0), bound.item(), "dweight")


def test_a_target_outside_the_vocabulary_is_refused():
    inputs = random_inputs(N, D, V)
    inputs.targets[3] = V
    with pytest.raises(ValueError, match=rf"targets\[3\] = {V} is outside"):
        run(inputs, room(48), "torch", needs=("hidden", "weight"))


def test_no_gradient_of_a_gradient():
    inputs = random_inputs(N, D, V).leaves(("hidden", "weight"))
    out = prefuse.linear_preference_loss(
        inputs.hidden, inputs.weight, inputs.targets, CU_SEQLENS, torch.zeros(N), workspace=room(48), impl="torch"
    )
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(out.loss, inputs.hidden, create_graph=True)
