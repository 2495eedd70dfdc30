"""As torch sees it: registered operators that compile, autocast, differentiate once and stay small."""

import contextlib
import functools
import math

import pytest
import torch

import prefuse
from largest_tensor import LargestTensor
from prefuse.bench.truth import oracle
from prefuse.bench.truth.head_cases import NEEDS, evaluate, random_inputs
from prefuse.kernels import slices
from prefuse.kernels.gradients import Needs
from prefuse.kernels.logprobs import portable
from prefuse.kernels.logprobs.portable import RowGrads
from prefuse.kernels.options import HeadOptions
from prefuse.kernels.tiles import table as configs

pytest.importorskip("triton")

ops = torch.ops.prefuse
IMPLS = ["torch", "triton"]


def head(impl):
    return functools.partial(prefuse.linear_logprobs, impl=impl)


# ---- registration --------------------------------------------------------------------------------

ROWS, DEPTH, VOCABULARY = 5, 16, 40  # fewer rows than a tile: what is returned was cut from something larger
# place of a shard, softcap, logit_scale, temperature, ignore_index, name of its group
SCALARS = (None, 3.0, 0.7, 1.2, -100, "")
# Returned strides must be what the fake says, whichever path made the tensor.
CASES = ["plain", "transposed", "ignored", "transposed, ignored"]


def op_inputs(impl, device, case, needs=()):
    inputs = random_inputs(ROWS, DEPTH, VOCABULARY, bias=True, device=device if impl == "triton" else "cpu")
    if "ignored" in case:
        inputs.targets[2] = -100
    if "transposed" in case:
        inputs = inputs.but(hidden=inputs.hidden.T.contiguous().T, weight=inputs.weight.T.contiguous().T)
    return inputs.leaves(needs)


@pytest.mark.quick_cases(every=4)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("impl", "outputs"), [("torch", ""), ("torch", "entropy,is_top1"), ("triton", "entropy,is_top1")]
)
@pytest.mark.parametrize("mode", portable.MODES)
def test_the_forward_passes_opcheck(mode, impl, outputs, case, device):
    x = op_inputs(impl, device, case, NEEDS["frozen head" if mode == "frozen" else "trainable"])
    # A stash is filled where rows and columns are, and no further: its tail is whatever was there before.
    tests = ["test_schema", "test_autograd_registration"] if mode == "stash" else torch.library._OPCHECK_DEFAULT_UTILS
    torch.library.opcheck(
        ops.linear_logprobs_forward,
        (x.hidden, x.weight, x.bias, x.targets, *SCALARS, outputs, mode, impl),
        test_utils=tests,
    )


EVERYTHING, ONLY_HIDDEN, ONLY_WEIGHT = Needs(True, True, True), Needs(True, False, False), Needs(False, True, False)


@pytest.mark.quick_cases(every=4)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("impl", "needs", "entropy", "mode"),
    [
        *(
            ("torch", needs, entropy, "lean")
            for needs in (EVERYTHING, ONLY_HIDDEN, ONLY_WEIGHT)
            for entropy in (False, True)
        ),
        *(("torch", needs, False, "stash") for needs in (EVERYTHING, ONLY_WEIGHT)),
        # interpreted once will do: the same code allocates in every case
        *(("triton", EVERYTHING, False, mode) for mode in ("lean", "stash")),
    ],
)
def test_the_backward_passes_opcheck(impl, needs, entropy, mode, case, device):
    x = op_inputs(impl, device, case)
    _, lse, q, extra, _, stash, scale = ops.linear_logprobs_forward(
        x.hidden, x.weight, x.bias, x.targets, *SCALARS, "entropy", mode, impl
    )
    stashed = (stash, scale) if mode == "stash" else (None, None)
    grad = torch.randn_like(lse)
    of_entropy = (grad, extra[0]) if entropy else (None, None)
    torch.library.opcheck(
        ops.linear_logprobs_backward,
        (
            *(grad, of_entropy[0], x.hidden, x.weight, x.bias, x.targets, lse, q, of_entropy[1]),
            *(*stashed, *SCALARS, *needs, impl),
        ),
    )


def test_scaling_rows_passes_opcheck():
    torch.library.opcheck(ops.scale_rows, (torch.randn(5), torch.randn(5, 16)))


# ---- torch.compile -------------------------------------------------------------------------------

LOSSES = [prefuse.DPO(), prefuse.IPO(), prefuse.KTO(), prefuse.SFT()]
CU_SEQLENS = torch.tensor([0, 3, 4, 4, 9], dtype=torch.int32)


class Model(torch.nn.Module):
    """A trunk of one layer, a head, and a loss: as much of a training step as has the operators in it."""

    def __init__(self, loss, impl="torch", frozen=False):
        super().__init__()
        self.trunk = torch.nn.Linear(6, DEPTH)
        self.head = torch.nn.Linear(DEPTH, VOCABULARY)
        self.head.requires_grad_(not frozen)
        self.loss, self.impl = loss, impl
        paired = isinstance(loss, prefuse.KTO)
        self.options = {"labels": torch.tensor([True, False, False, True]), "z0": 0.1} if paired else {}

    def forward(self, x, targets, ref_logps):
        out = prefuse.linear_preference_loss(
            self.trunk(x), self.head.weight, targets, CU_SEQLENS, ref_logps if self.loss.uses_reference else None,
            self.loss, bias=self.head.bias, softcap=5.0, impl=self.impl, **self.options,
        )  # fmt: skip
        return out.loss, out.rewards, out.metrics


def training_steps(model, step, steps=2):
    """Losses and parameters of a few steps of gradient descent on the same numbers."""
    x, targets = torch.randn(9, 6), torch.randint(0, VOCABULARY, (9,))
    targets[5] = -100
    ref_logps = -torch.rand(9) * 4
    losses = []
    for _ in range(steps):
        loss, _, metrics = step(x, targets, ref_logps)
        assert all(value.shape == (2,) for value in metrics.values())
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.5 * p.grad
                    p.grad = None
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in model.parameters())]


def check_compiled(make, **options):
    results = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = make()
        torch._dynamo.reset()
        step = torch.compile(model, fullgraph=True, **options) if compiled else model
        results.append(training_steps(model, step))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen head"])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
def test_a_training_step_compiles_without_a_graph_break(loss, frozen):
    check_compiled(lambda: Model(loss, frozen=frozen), backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen head"])
def test_a_training_step_compiles_with_the_default_backend(frozen):
    check_compiled(lambda: Model(prefuse.DPO(), frozen=frozen))


def test_a_compiled_head_takes_any_number_of_rows():
    compiled = torch.compile(head("torch"), fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 8, 300):
        x = random_inputs(n, DEPTH, VOCABULARY).leaves(("hidden", "weight"))
        logps = compiled(x.hidden, x.weight, x.targets)
        assert torch.equal(logps, head("torch")(x.hidden, x.weight, x.targets))
        logps.sum().backward()
        assert x.hidden.grad.shape == (n, DEPTH)


# ---- autocast and grad mode ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("impl", IMPLS)
def test_under_autocast_the_op_computes_in_its_dtype(impl, needs, dtype, device):
    place = device if impl == "triton" else torch.device("cpu")
    inputs = random_inputs(18, DEPTH, VOCABULARY, bias=True, device=place)
    grad = torch.randn(18, device=place)
    rounded = evaluate(head(impl), inputs.but(hidden=inputs.hidden.to(dtype)), NEEDS[needs], grad)
    with torch.autocast(place.type, dtype=dtype):
        made = evaluate(head(impl), inputs, NEEDS[needs], grad)
    assert torch.equal(made.logps, rounded.logps)
    for name, x in made.grads.items():
        assert x.dtype == torch.float32, name  # as its master is
        torch.testing.assert_close(x, rounded.grads[name].float(), rtol=2**-7, atol=0)


def test_a_backward_outside_of_autocast_is_the_same():
    inputs = random_inputs(18, DEPTH, VOCABULARY).leaves(("hidden", "weight"))
    grads = []
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logps = prefuse.linear_logprobs(inputs.hidden, inputs.weight, inputs.targets)
            if inside:
                grads.append(torch.autograd.grad(logps.sum(), [inputs.hidden, inputs.weight]))
        if not inside:
            grads.append(torch.autograd.grad(logps.sum(), [inputs.hidden, inputs.weight]))
    for inside, outside in zip(*grads, strict=True):
        assert torch.equal(inside, outside)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_autocast_leaves_float64_alone(impl):
    inputs = random_inputs(18, DEPTH, VOCABULARY, torch.float64)
    expected = evaluate(head(impl), inputs).logps
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(evaluate(head(impl), inputs).logps, expected)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
def test_without_grad_mode_there_is_no_graph_and_no_direction(impl, device):
    place = device if impl == "triton" else "cpu"
    inputs = random_inputs(18, DEPTH, VOCABULARY, device=place)
    expected = evaluate(head(impl), inputs).logps
    leaves = inputs.leaves(("hidden", "weight"))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            logps = head(impl)(leaves.hidden, leaves.weight, leaves.targets)
        assert not logps.requires_grad
        assert torch.equal(logps, expected)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_frozen_head_with_outputs_still_has_its_gradient(impl, device):
    """The entropy asked for, but in no loss: the direction made in the forward must do."""
    inputs = random_inputs(18, DEPTH, VOCABULARY, device=device if impl == "triton" else "cpu")
    grad = torch.randn(18, device=inputs.hidden.device)
    made = evaluate(head(impl), inputs, NEEDS["frozen head"], grad, outputs=oracle.OUTPUTS).grads["hidden"]
    alone = evaluate(head(impl), inputs, NEEDS["frozen head"], grad).grads["hidden"]
    torch.testing.assert_close(made, alone)


def test_a_tied_embedding_gets_both_of_its_gradients():
    weight = torch.randn(VOCABULARY, DEPTH, requires_grad=True)
    tokens, targets = torch.randint(0, VOCABULARY, (9,)), torch.randint(0, VOCABULARY, (9,))

    def gradient(run):
        run(torch.nn.functional.embedding(tokens, weight), weight, targets).sum().backward()
        made, weight.grad = weight.grad, None
        return made

    torch.testing.assert_close(gradient(head("torch")), gradient(lambda *x: oracle.head(*x)[0].float()))


# ---- second derivatives --------------------------------------------------------------------------


@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
def test_a_second_derivative_is_refused(needs):
    x = random_inputs(5, DEPTH, VOCABULARY).leaves(NEEDS[needs])
    logps = prefuse.linear_logprobs(x.hidden, x.weight, x.targets, impl="torch")
    (first,) = torch.autograd.grad(logps.sum(), x.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*impl=\"reference\""):
        first.square().sum().backward()


def test_the_reference_has_second_derivatives():
    x = random_inputs(5, 3, 7, torch.float64).leaves(("hidden", "weight"))

    def logps(h, w):
        return prefuse.linear_logprobs(h, w, x.targets, impl="reference")

    assert torch.autograd.gradgradcheck(logps, (x.hidden, x.weight))


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("needs", [EVERYTHING, ONLY_HIDDEN])
def test_no_tensor_grows_with_tokens_times_vocabulary(impl, needs, device, monkeypatch):
    """Called beneath the operators, where a dispatch mode sees every tensor that is made."""
    from prefuse.kernels import launch
    from prefuse.kernels.logprobs import launch as triton_head

    n, d, v = (130, 3, 500) if impl == "torch" else (66, 3, 300)
    monkeypatch.setattr(slices, "TILE", {"cpu": (16, 32), "cuda": (16, 32)})
    monkeypatch.setattr(slices, "BUFFER_BYTES", 16 * 32 * 4)
    monkeypatch.setattr(launch, "SLICE", 64)
    monkeypatch.setattr(launch, "BUFFER_BYTES", 16 * 64 * 4)
    x = random_inputs(n, d, v, device=device if impl == "triton" else "cpu")
    module = {"torch": portable, "triton": triton_head}[impl]
    mode = "frozen" if needs == ONLY_HIDDEN else "lean"
    options = HeadOptions()
    with LargestTensor() as watch:
        made = module.forward(x.hidden, x.weight, None, x.targets, options, mode=mode)
        row = RowGrads(torch.ones_like(made.lse), made.lse, made.q, None, None)
        module.backward(x.hidden, x.weight, None, x.targets, row, options, needs._replace(bias=False))
    # The head itself, its gradient, and tiles; all logits would be n * v.
    assert watch.largest <= 4 * max(v * d, 16 * 64) < n * v
    assert math.prod(made.logps.shape) == n


# ---- several GPUs --------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter's launches")
def test_kernels_launch_on_the_device_of_their_tensors(device, monkeypatch):
    """Whatever the current device is: Triton launches there, and would be given another GPU's addresses."""
    from triton.runtime.interpreter import GridExecutor

    guarded, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        guarded.append(tensor.device)
        yield
        guarded.pop()

    launch = GridExecutor.__call__

    def watched(self, *tensors, **options):
        assert guarded, f"{self.fn.__name__} is launched on whatever device is the current one"
        launched.append(self.fn.__name__)
        return launch(self, *tensors, **options)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(GridExecutor, "__call__", watched)
    cu_seqlens, ref_logps = torch.tensor([0, 2, 6], device=device), torch.zeros(6, device=device)
    for workspace in (0, 1 << 20):
        x = random_inputs(6, 16, 40, device=device).leaves(NEEDS["trainable"])
        out = prefuse.linear_preference_loss(
            x.hidden, x.weight, x.targets, cu_seqlens, ref_logps, prefuse.DPO(), workspace=workspace, impl="triton"
        )
        out.loss.backward()
    x = random_inputs(6, 16, 40, device=device).leaves(NEEDS["trainable"])
    prefuse.linear_kl(x.hidden, x.weight, x.hidden.detach(), x.weight.detach(), impl="triton").sum().backward()
    kernels = {"fold_kernel", "dlogits_kernel", "kl_fold_kernel", "kl_dlogits_kernel", "forward_kernel"}
    assert kernels | {"backward_kernel"} <= set(launched)


@pytest.mark.parametrize(
    ("chip", "reached"), [(75, False), (80, True), (121, True), ("gfx1100", False), ("gfx950", True)]
)
def test_auto_is_triton_where_there_are_tiles(chip, reached, monkeypatch):
    monkeypatch.setattr(configs, "capability", lambda device: chip)
    assert configs.reaches(torch.device("cuda")) is reached
