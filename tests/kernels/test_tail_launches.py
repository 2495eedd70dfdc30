"""How the preference losses' kernels are launched: once each way, in any order, behind the operators and the head."""

import contextlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import prefuse
from aot_worker import compiling_processes
from prefuse import DPO, IPO, KTO, SFT
from prefuse.bench.truth.head_cases import random_inputs
from prefuse.kernels import checks
from prefuse.kernels.preference import tail
from tail_cases import LENGTHS, LOSSES, assert_equal, batch, evaluate, labels_of, mismatched, offsets, ops

pytest.importorskip("triton")

import triton

from prefuse.kernels.preference import launch as triton_tail
from prefuse.kernels.tiles.shipped import TAIL_VARIANTS, compile_tail

if torch.cuda.is_available():
    program_order = contextlib.nullcontext  # the hardware's own
else:
    from strict_interpreter import program_order, sparse_tensor


# ---- one launch, any order, any batch ------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Names of the operations that torch runs, views and bookkeeping left out."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in ("detach", "slice", "unbind", "alias", "view", "_unsafe_view", "select"):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Names of the Triton kernels launched."""
    names = []
    if torch.cuda.is_available():

        def record(metadata):
            names.append(metadata.get()["name"])

        triton.knobs.runtime.launch_enter_hook.add(record)
        yield names
        triton.knobs.runtime.launch_enter_hook.remove(record)
        return
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__
    monkeypatch.setattr(
        GridExecutor, "__call__", lambda self, *a, **k: names.append(self.fn.__name__) or launch(self, *a, **k)
    )
    yield names


@pytest.mark.parametrize("loss", [DPO(0.1, 0.1), IPO(), KTO()], ids=repr)
def test_each_way_is_one_launch(loss, launches, device):
    arguments = batch(loss, LENGTHS["many"], device)
    if isinstance(loss, KTO):
        arguments["z0"] = mismatched([3, 4, 5], device)
    logps = arguments["logps"].requires_grad_()
    prefuse.preference_loss(**arguments, impl="triton").loss.backward()  # what torch does once is done
    launches.clear()
    with Calls() as forward:
        out = prefuse.preference_loss(**arguments, impl="triton")
    assert launches == ["forward_kernel"]
    assert set(forward.names) - {"ne", "diff", "any", "lt"} <= {"sub", "_to_copy", "_local_scalar_dense",
                                                                "preference_tail_forward"}  # fmt: skip
    launches.clear()
    with Calls() as backward:
        torch.autograd.grad(out.loss, logps)
    assert launches == ["backward_kernel"]
    assert set(backward.names) <= {"ones_like", "preference_tail_backward"}


@pytest.mark.quick_cases(every=4)
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_any_order_of_arrival_has_the_same_bits(loss, device):
    """Another program is the last, and adds everything up."""
    arguments = batch(loss, LENGTHS["many"], device)
    if isinstance(loss, KTO):
        arguments["z0"] = mismatched(LENGTHS["unequal"], device)
    runs = []
    for seed in (None, 1, 2):
        with program_order(seed):
            runs.append(evaluate("triton", arguments))
    for other in runs[1:]:
        for name, x in runs[0].items():
            assert torch.equal(other[name], x), name


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_sequence_has_the_same_bits_in_any_batch(loss, device):
    """Alone or beside others, first or last: losses, sums, rewards, gradients."""
    lengths = LENGTHS["many"]
    arguments = batch(loss, lengths, device)
    whole = evaluate("triton", arguments, num_items=5)
    cuts, group = offsets(lengths).tolist(), 1 if isinstance(loss, KTO) else 2
    for s in (0, 6, 24):
        part = slice(cuts[s], cuts[s + group])
        own = {**arguments, "cu_seqlens": offsets(lengths[s : s + group]).to(device)}
        own |= {name: arguments[name][part] for name in ("logps", "ref_logps")}
        if group == 1:
            own["labels"] = arguments["labels"][s : s + 1]
        alone = evaluate("triton", own, num_items=5)
        assert torch.equal(alone["gradient"], whole["gradient"][part])
        assert torch.equal(alone["losses"], whole["losses"][s // group : s // group + 1])
        for name in ("logps", "rewards"):
            assert torch.equal(alone[name], whole[name][s : s + group])


def test_a_large_batch_in_the_real_kernels_steps(device, monkeypatch):
    monkeypatch.setitem(triton_tail.BLOCKS, True, triton_tail.BLOCKS[False])
    count = 4096 if torch.cuda.is_available() else 530  # several steps of pairs, or one and a rest
    lengths = [s % 3 for s in range(count)]
    arguments = batch(IPO(), lengths, device)
    made, expected = evaluate("triton", arguments), evaluate("torch", arguments)
    assert_equal(made, expected, scale=40)


# ---- memory --------------------------------------------------------------------------------------


def forward_at(logps, ref_logps, cu_seqlens):
    """The launcher by itself: nothing looks at the offsets before it."""
    counts = cu_seqlens.diff().long()
    outputs = tail._empty_outputs(logps, counts, "dpo")
    triton_tail.forward(
        logps, ref_logps, cu_seqlens, counts, None, None, None, None, 0.0, 1.0, "dpo", 0.1, 0.0, False, (1.0, 1.0),
        True, False, outputs,
    )  # fmt: skip
    return outputs


@pytest.mark.skipif(torch.cuda.is_available(), reason="sparse memory is the interpreter's")
def test_offsets_beyond_two_to_the_31():
    first = 2**31 + 7
    values, refs = torch.randn(9), torch.randn(9)
    cu_seqlens = first + torch.tensor([0, 4, 9])

    def at_the_end(x):
        memory = sparse_tensor(torch.zeros(2), (first + 8,)).as_strided((first + 9,), (1,))
        memory[first:] = x
        return memory

    made = forward_at(at_the_end(values), at_the_end(refs), cu_seqlens)
    expected = forward_at(values, refs, cu_seqlens - first)
    for x, y in zip(made, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("wrong", [[0, 4, 100], [-9, 4, 9], [0, 100, 4]], ids=repr)
def test_offsets_that_nobody_checked_never_lead_out_of_bounds(wrong, device):
    """On CUDA they are not looked at, for that would wait for them."""
    values, cu_seqlens = torch.randn(9, device=device), torch.tensor(wrong, dtype=torch.int32, device=device)
    slopes = forward_at(values, values + 1, cu_seqlens)[-1]
    grad = triton_tail.backward(torch.ones((), device=device), slopes, cu_seqlens, 9)
    assert grad.isfinite().all()


def test_a_token_outside_of_every_sequence_has_no_gradient(device):
    slopes = torch.tensor([2.0, 3.0], dtype=torch.float64, device=device)
    cu_seqlens = torch.tensor([2, 4, 5], dtype=torch.int32, device=device)
    grad = triton_tail.backward(torch.ones((), device=device), slopes, cu_seqlens, 7)
    assert grad.tolist() == [0, 0, 2, 2, 3, 0, 0]


# ---- which implementation ------------------------------------------------------------------------


class Doubled(DPO):
    """Another equation under a known name."""

    def losses(self, seq):
        return 2 * super().losses(seq)


@pytest.mark.parametrize("loss", [SFT(), Doubled()], ids=repr)
def test_a_loss_that_the_kernel_does_not_know_runs_in_torch(loss, launches, device):
    arguments = batch(loss, LENGTHS["unequal"], device)
    if isinstance(loss, SFT):
        arguments["ref_logps"] = None
    made, expected = (evaluate(impl, arguments) for impl in ("triton", "torch"))
    assert not launches
    assert all(torch.equal(made[name], x) for name, x in expected.items())
    if isinstance(loss, Doubled):
        arguments["loss"] = DPO()
        torch.testing.assert_close(made["losses"], 2 * evaluate("torch", arguments)["losses"])


@pytest.mark.parametrize(("impl", "launched"), [("auto", 0), ("torch", 0), ("reference", 0), ("triton", 1)])
def test_only_who_asks_for_the_kernel_on_a_cpu_gets_it(impl, launched, launches):
    if torch.cuda.is_available():
        pytest.skip("about CPU tensors where the kernels are interpreted")
    prefuse.preference_loss(**batch(DPO(), [2, 3], "cpu"), impl=impl)
    assert len(launches) == launched


@pytest.mark.gpu
def test_on_a_gpu_the_kernel_runs_by_itself(launches):
    prefuse.preference_loss(**batch(DPO(), [2, 3], "cuda"))
    assert launches == ["forward_kernel"]


@pytest.mark.gpu
@pytest.mark.parametrize("z0", [0.3, torch.tensor(0.3)], ids=repr)
def test_nobody_waits_for_the_gpu(z0):
    arguments, others = batch(KTO(), LENGTHS["many"], "cuda", z0=z0), mismatched([3, 4], "cuda")
    for each in (z0, others):  # compile
        evaluate("triton", {**arguments, "z0": each})
    torch.cuda.set_sync_debug_mode("error")
    try:
        evaluate("triton", arguments, num_items=torch.tensor(7, device="cuda"))
        evaluate("triton", {**arguments, "z0": others})
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_asking_for_what_cannot_run_raises(monkeypatch, device):
    arguments = batch(DPO(), [2, 3], device)
    with pytest.raises(ValueError, match=r"impl must be one of \['auto', 'triton', 'torch', 'reference'\], got 'cuda'"):
        prefuse.preference_loss(**arguments, impl="cuda")
    with pytest.raises(RuntimeError, match='impl="triton" has no float64; use impl="torch" or "reference"'):
        prefuse.preference_loss(**{**arguments, "logps": arguments["logps"].double()}, impl="triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
        with pytest.raises(RuntimeError, match='impl="triton" needs CUDA tensors, got cpu; use impl="torch"'):
            prefuse.preference_loss(**arguments, impl="triton")


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_what_does_not_fit_is_refused(impl, device):
    arguments = batch(KTO(), [2, 3], device)
    good = mismatched([3, 4], device)
    for wrong, message in [
        (good._replace(ref_logps=good.ref_logps[:5]), r"expected ref_logps \(7,\) per token or \(2,\) per sequence"),
        (good._replace(logps=good.logps[None]), r"expected logps \(N,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            prefuse.preference_loss(**{**arguments, "z0": wrong}, impl=impl)
    wrong = good._replace(ref_logps=good.ref_logps.to("meta"))
    with pytest.raises(TypeError, match=f"z0.ref_logps is on meta but logps is on {device.type}.*; move one of them"):
        prefuse.preference_loss(**{**arguments, "z0": wrong}, impl=impl)
    for name in ("ref_logps", "labels"):
        with pytest.raises(TypeError, match=f"{name} is on meta but logps is on {device.type}.*; move one of them"):
            prefuse.preference_loss(**{**arguments, name: arguments[name].to("meta")}, impl=impl)


def test_a_second_derivative_is_refused(device):
    arguments = batch(DPO(), [2, 3], device)
    logps = arguments["logps"].requires_grad_()
    out = prefuse.preference_loss(**arguments, impl="triton")
    (first,) = torch.autograd.grad(out.loss, logps, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative in Triton.*impl=\"torch\""):
        first.square().sum().backward()


# ---- as torch sees it ----------------------------------------------------------------------------


@pytest.mark.quick_cases(every=4)
@pytest.mark.parametrize("loss", ["dpo", "ipo", "kto"])
@pytest.mark.parametrize("given", ["numbers", "tensors"])
def test_the_operators_pass_opcheck(loss, given, device):
    arguments = batch(DPO(), LENGTHS["unequal"], device)
    logps, ref_logps, cu_seqlens = (arguments[name] for name in ("logps", "ref_logps", "cu_seqlens"))
    labels = labels_of(8).to(device) if loss == "kto" else None
    others = mismatched([3, 4], device) if loss == "kto" and given == "tensors" else (None, None, None)
    items = torch.tensor(3, device=device) if given == "tensors" else None
    torch.library.opcheck(
        ops.preference_tail_forward,
        (
            *(logps.requires_grad_(), ref_logps, cu_seqlens, cu_seqlens.diff().long(), labels, None, *others, items),
            *(0.2, 4.0, loss, 0.1, 0.1, True, 1.2, 0.8, True, True),
        ),
    )


def test_the_backward_passes_opcheck(device):
    cu_seqlens = offsets([2, 0, 3]).to(device)
    slopes = torch.randn(3, dtype=torch.float64, device=device)
    torch.library.opcheck(ops.preference_tail_backward, (torch.tensor(2.0, device=device), slopes, cu_seqlens, 5))


@pytest.mark.quick_cases(every=4)
@pytest.mark.parametrize("given", ["numbers", "tensors", "mismatched"])
@pytest.mark.parametrize("loss", [DPO(0.1, 0.1), KTO()], ids=repr)
def test_a_training_step_compiles_without_a_graph_break(loss, given, device, monkeypatch):
    """So nothing is taken off the device on the way, either. On a GPU as it is; elsewhere a graph cannot ask whether
    the interpreter is on, so that is answered beforehand."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(checks, "resolve", lambda impl, x: impl)
    arguments = batch(loss, [3, 1, 5, 2], device)
    del arguments["logps"]
    if given != "numbers":
        arguments["num_items"] = torch.tensor(7, device=device)
    if given != "numbers" and isinstance(loss, KTO):
        arguments["z0"] = torch.tensor(0.3) if given == "tensors" else mismatched([3, 4], device)
    inputs = random_inputs(11, 12, 50, device=device)

    def step(hidden, weight):
        out = prefuse.linear_preference_loss(hidden, weight, inputs.targets, **arguments, impl="triton")
        return out.loss, out.rewards, out.metrics

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        x = inputs.leaves(("hidden", "weight"))
        loss_value, rewards, metrics = run(x.hidden, x.weight)
        loss_value.backward()
        results.append([loss_value, rewards, *metrics.values(), x.hidden.grad, x.weight.grad])
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)


# ---- with the head in front ----------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_behind_the_head_ignored_tokens_count_nowhere(loss, device):
    lengths = [3, 1, 5, 2]
    inputs = random_inputs(11, 12, 50, device=device)
    inputs.targets[[0, 3, 7]] = -100  # the second sequence is ignored whole
    arguments = batch(loss, lengths, device)
    del arguments["logps"]
    arguments["ref_logps"][[0, 3, 7]] = math.nan
    results = []
    for impl in ("triton", "torch"):
        x = inputs.leaves(("hidden", "weight"))
        out = prefuse.linear_preference_loss(x.hidden, x.weight, x.targets, **arguments, impl=impl)
        out.loss.backward()
        assert not x.hidden.grad[[0, 3, 7]].any()
        results.append([out.loss, out.losses, out.logps, out.rewards, *out.metrics.values(), x.hidden.grad])
    for made, expected in zip(*results, strict=True):
        torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-6)


# ---- chips that are not here ---------------------------------------------------------------------


def check_compiled(chips, names):
    with compiling_processes() as pool:
        jobs = {(chip, name): pool.submit(compile_tail, chip, name) for chip in chips for name in names}
        problems = {job: future.result().problems(matrix_unit=False) for job, future in jobs.items()}
    assert not {job: found for job, found in problems.items() if found}


@pytest.mark.slow
def test_the_common_variants_compile_without_spills():
    check_compiled([90], ["tail, dpo", "tail, kto, mismatched", "tail, backward"])


@pytest.mark.slow
def test_every_variant_compiles_without_spills_on_every_chip():
    check_compiled([80, 89, 90, 100, 120, "gfx942"], TAIL_VARIANTS)
