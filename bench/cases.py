"""What the GPU suite checks: log-probabilities, losses, divergences and their bits.

    N tokens, D hidden, V vocabulary.

Truth and tolerances are those of the tests (truth/): float64, and plain PyTorch in the same dtype as the yardstick.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import prefuse
from prefuse.bench.gpu_inputs import Model, draw
from prefuse.bench.truth import oracle
from prefuse.bench.truth.head_cases import NEEDS, OPTIONS, Inputs, check_head, evaluate, random_inputs
from prefuse.bench.truth.kl_cases import Models, check_kl, random_models
from prefuse.bench.truth.kl_cases import evaluate as evaluate_kl
from prefuse.kernels import record_skipped_mass
from prefuse.kernels.cost import count_cost
from prefuse.kernels.logprobs.linear_logprobs import logprobs_within
from prefuse.kernels.logprobs.portable import row_tile, stash_size
from prefuse.kernels.options import HeadOptions
from prefuse.losses import Loss

Check = Callable[[], None]  # raises AssertionError
# What needs a gradient in each mode; "kept" is trainable with the forward's weights kept for the backward.
MODES = {**NEEDS, "kept": NEEDS["trainable"]}
HeadFunction = Callable[..., Tensor | tuple[Tensor, dict[str, Tensor]]]
THREE = ("trainable", "kept", "frozen head")
AMPLE = 16 << 30  # bytes of workspace: everything may be kept for the backward

head = functools.partial(prefuse.linear_logprobs, impl="triton")
divergence = functools.partial(prefuse.linear_kl, impl="triton")


def keeping_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, **options: float | None
) -> Tensor:
    """The head as `linear_preference_loss` calls it with room to spare: 3 units instead of 4."""
    return logprobs_within(AMPLE, hidden, weight, targets, bias, HeadOptions(**options), (), "triton")


# ------------------------------------------------------------------------------------------------ checks


@dataclass(frozen=True)
class Sizes:
    """(N, D, V) of the checks."""

    real: tuple[int, int, int] | None  # a released model's head
    whole: tuple[int, int, int]  # every operand may go by descriptor
    odd: tuple[int, int, int]  # no dimension is a multiple of anything: pointers and masked tails
    device: str


GPU = Sizes((1024, 2048, 128256), (640, 1024, 32768), (333, 1001, 16001), "cuda")
INTERPRETED = Sizes(None, (40, 64, 160), (19, 33, 77), "cpu")
TOY = Sizes((24, 32, 96), (24, 32, 96), (19, 33, 77), "cpu")


def real_checks(sizes: Sizes) -> Iterator[tuple[str, Check]]:
    """Each mode at the size of a released model's head."""
    for mode in THREE:
        yield f"bf16, the head of Llama-3.2-1B, {mode}", functools.partial(agrees_at_real_size, sizes, mode)
    yield "the sparse backward keeps its promise", functools.partial(keeps_its_promise, sizes)
    yield "no-grad, trainable, kept and frozen agree", functools.partial(modes_agree, sizes)
    yield "the same bits in a second run, forward and gradients", functools.partial(same_bits_again, sizes)
    yield "a row has the same bits in any batch", functools.partial(same_bits_in_any_batch, sizes)


def agrees_at_real_size(sizes: Sizes, mode: str) -> None:
    inputs = random_inputs(*sizes.real, torch.bfloat16, device=sizes.device)
    check_head(keeping_head if mode == "kept" else head, inputs, MODES[mode], False)


def keeps_its_promise(sizes: Sizes, tolerance: float = 2**-6) -> None:
    """gradient_tolerance: exact log-probabilities, the share within the promise, gradients within the bounds' size."""
    n, d, v = sizes.real
    drawn = draw(Model("", d, v), n, 0, sizes.device)
    results = []
    for share in (0.0, tolerance):
        x = drawn.leaves("hidden", "weight")
        with record_skipped_mass(bounds=True) as record:
            logps = head(x.hidden, x.weight, x.targets, gradient_tolerance=share)
            logps.backward(x.grad)
        results.append((logps.detach(), x.hidden.grad.double(), x.weight.grad.double()))
    (exact, dhidden, dweight), (logps, *sparse) = results
    assert torch.equal(logps, exact), "log-probabilities differ"
    assert 0.0 <= record.share <= tolerance, f"skipped {record.share:.2e} where {tolerance:.2e} is promised"
    eps = torch.finfo(torch.bfloat16).eps
    bounds = (record.dhidden_bounds[0].norm().item(), record.dweight_bound)
    for name, truth, made, bound in zip(("hidden", "weight"), (dhidden, dweight), sparse, bounds, strict=True):
        error = (made - truth).norm().item()
        allowed = bound + 4 * eps * truth.norm().item()
        assert error <= allowed, f"d{name} is off by {error:.2e}, allowed {allowed:.2e}"


def checks(sizes: Sizes) -> Iterator[tuple[str, Check]]:
    """(name, check), the most telling first."""
    yield from agreement(sizes)
    yield (
        "the sparse backward keeps its promise, small",
        functools.partial(keeps_its_promise, replace(sizes, real=sizes.whole), 2**-3),
    )
    yield "the same bits in a second run, forward and gradients", functools.partial(same_bits_again, sizes)
    yield "a row has the same bits in any batch", functools.partial(same_bits_in_any_batch, sizes)
    yield "no-grad, trainable, kept and frozen agree", functools.partial(modes_agree, sizes)
    yield "equal policy and reference: every loss ln 2, every reward 0", functools.partial(ln_2, sizes)
    yield "1024-token log-ratio within 1e-4 nats", functools.partial(log_ratio, sizes)
    yield from losses_agree(sizes)
    for loss in TAIL_LOSSES:
        yield f"{loss}: one launch each way equals torch", functools.partial(tail_agrees, sizes, loss)
    yield from divergences_agree(sizes)
    yield "KL: equal models have none, and no gradient", functools.partial(no_divergence, sizes)
    yield "KL: the same bits in any batch", functools.partial(divergences_keep_their_bits, sizes)
    if sizes.device == "cuda":
        yield "offsets beyond 2^31", offsets


def agreement(sizes: Sizes) -> Iterator[tuple[str, Check]]:
    """Log-probabilities, outputs and gradients against float64, for every mode and option."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32

    def case(name: str, shape: tuple[int, int, int], dtype: torch.dtype = bf16, options: str = "plain", **how):
        mode, entropy = how.pop("mode", "trainable"), how.pop("entropy", False)
        chosen, called = dict(OPTIONS[options]), keeping_head if mode == "kept" else head
        made = functools.partial(
            random_inputs, *shape, dtype, bias=chosen.pop("bias", False), device=sizes.device, **how
        )
        return name, lambda: check_head(called, made(), MODES[mode], entropy, **chosen)

    for mode in (*THREE, "frozen trunk"):
        yield case(f"bf16, {mode}", sizes.whole, mode=mode)
    for options, mode in itertools.product(OPTIONS, THREE):
        if options != "plain":
            yield case(f"bf16, {options}, {mode}", sizes.whole, options=options, mode=mode)
    yield case("bf16, bias only", sizes.whole, options="bias", mode="bias only")
    for options in ("plain", "softcap", "all"):
        yield case(f"bf16, {options}, all outputs, entropy in the loss", sizes.whole, options=options, entropy=True)
    for options, mode in itertools.product(("plain", "softcap"), ("trainable", "frozen head")):
        yield (
            f"bf16, {options}, outputs without entropy, {mode}",
            functools.partial(outputs_without_entropy, sizes, options, mode),
        )
    for options, mode in itertools.product(("plain", "all"), THREE):
        yield case(f"bf16, odd sizes, {options}, {mode}", sizes.odd, options=options, mode=mode)
    for dtype, mode in itertools.product((fp16, fp32), ("trainable", "frozen head")):
        yield case(f"{str(dtype)[6:]}, {mode}", sizes.whole, dtype, mode=mode)
    for mode in THREE:
        yield case(f"bf16, float32 weight, {mode}", sizes.whole, weight_dtype=fp32, mode=mode)
        yield case(f"bf16, a third of the rows ignored, {mode}", sizes.whole, ignored=0.3, mode=mode)
        # Targets e^60 and more under the largest logit: the rows that are folded a second time.
        yield case(f"bf16, logits of deviation 30, {mode}", sizes.whole, spread=30.0, mode=mode)
        yield f"bf16, targets of probability up to 0.99999, {mode}", functools.partial(confident, sizes, mode)
    yield case("bf16, logits of deviation 30, entropy in the loss", sizes.odd, spread=30.0, entropy=True)


def outputs_without_entropy(sizes: Sizes, options: str, mode: str) -> None:
    outputs = tuple(name for name in oracle.OUTPUTS if name != "entropy")
    inputs = random_inputs(*sizes.whole, torch.bfloat16, device=sizes.device)
    check_head(functools.partial(head, outputs=outputs), inputs, NEEDS[mode], entropy=False, **OPTIONS[options])


def confident(sizes: Sizes, mode: str) -> None:
    """Half of the rows lean on their target, up to p = 0.99999."""
    inputs = random_inputs(*sizes.whole, torch.bfloat16, device=sizes.device)
    own = inputs.weight[inputs.targets].double()
    x = inputs.hidden.double()
    others = torch.logsumexp(x @ inputs.weight.double().T, -1)
    p = torch.linspace(0.5, 0.99999, len(x), dtype=torch.float64, device=sizes.device)
    wanted = others + torch.log(p / (1 - p))
    leaning = x + ((wanted - (x * own).sum(-1)) / own.square().sum(-1))[:, None] * own
    hidden = torch.where(torch.arange(len(x), device=sizes.device)[:, None] % 2 == 0, leaning, x).to(torch.bfloat16)
    check_head(keeping_head if mode == "kept" else head, inputs.but(hidden=hidden), MODES[mode], entropy=False)


def same_bits_again(sizes: Sizes) -> None:
    inputs = random_inputs(*sizes.odd, torch.bfloat16, device=sizes.device)
    # Few distinct targets: many rows add to one row of dweight.
    inputs = inputs.but(targets=inputs.targets % 7)
    grad = torch.randn(len(inputs.targets), device=sizes.device)
    for mode in THREE:
        called = keeping_head if mode == "kept" else head
        first, second = (evaluate(called, inputs, MODES[mode], grad).tensors() for _ in range(2))
        for name, x in first.items():
            assert torch.equal(x, second[name]), f"{mode}: {name} differs"


def same_bits_in_any_batch(sizes: Sizes) -> None:
    for shape, needs in itertools.product((sizes.whole, sizes.odd), ((), NEEDS["frozen head"])):
        inputs = random_inputs(*shape, torch.bfloat16, device=sizes.device)
        n = len(inputs.targets)

        def logps(rows: Tensor, inputs: Inputs = inputs, needs: tuple[str, ...] = needs) -> Tensor:
            batch = inputs.but(hidden=inputs.hidden[rows], targets=inputs.targets[rows])
            return evaluate(head, batch, needs, torch.ones(len(rows), device=sizes.device)).logps

        expected = logps(torch.arange(n, device=sizes.device))
        order = torch.randperm(n).to(sizes.device)
        assert torch.equal(logps(order), expected[order]), "permuted"
        parts = torch.arange(n, device=sizes.device).split([1, n // 3, n - 1 - n // 3])
        assert torch.equal(torch.cat([logps(part) for part in parts]), expected), "split"


def modes_agree(sizes: Sizes) -> None:
    for options in ({}, {"softcap": 3.0}):
        inputs = random_inputs(*sizes.whole, torch.bfloat16, device=sizes.device)
        ones = torch.ones(len(inputs.targets), device=sizes.device)
        no_grad = evaluate(head, inputs, **options).logps
        for mode in THREE:
            logps = evaluate(keeping_head if mode == "kept" else head, inputs, MODES[mode], ones, **options).logps
            difference = (logps - no_grad).abs().max().item()
            assert difference <= (2e-6 if options else 0.0), f"{mode}, {options}: off by {difference:.2e} nats"


def ln_2(sizes: Sizes) -> None:
    inputs, cu_seqlens = _pairs(sizes)
    ref_logps = evaluate(head, inputs).logps
    for mode in ("trainable", "frozen head"):
        x = inputs.leaves(NEEDS[mode])
        out = prefuse.linear_preference_loss(x.hidden, x.weight, x.targets, cu_seqlens, ref_logps, impl="triton")
        assert torch.equal(out.losses, torch.full_like(out.losses, 2.0).log()), f"{mode}: {out.losses}"
        assert not out.rewards.any(), mode


def log_ratio(sizes: Sizes) -> None:
    _, d, v = sizes.whole
    policy = random_inputs(1024, d, v, torch.bfloat16, spread=4.0, device=sizes.device)
    moved = policy.hidden.float() * (1 + 0.02 * torch.randn(1024, d).to(sizes.device))
    reference = policy.but(hidden=moved.to(torch.bfloat16))
    made = (evaluate(head, policy).logps.double() - evaluate(head, reference).logps.double()).sum()
    truth = (evaluate(oracle.head, policy).logps - evaluate(oracle.head, reference).logps).sum()
    assert (made - truth).abs().item() <= 1e-4, f"off by {(made - truth).item():.2e} nats"


def losses_agree(sizes: Sizes) -> Iterator[tuple[str, Check]]:
    """`linear_preference_loss` against the materializing implementation, for every loss and mode."""
    for loss in (prefuse.DPO(label_smoothing=0.1), prefuse.IPO(), prefuse.KTO(desirable_weight=0.7), prefuse.SFT()):
        for mode in THREE:
            name = f"{type(loss).__name__} through linear_preference_loss, {mode}"
            yield name, functools.partial(loss_agrees, sizes, loss, mode)
    for loss in (prefuse.DPO(), prefuse.KTO()):
        yield f"{type(loss).__name__} in groups of whole pairs", functools.partial(groups_agree, sizes, loss)


def groups_agree(sizes: Sizes, loss: Loss) -> None:
    """Three units within a workspace that holds half of the rows: the truth's gradients, and no room taken beyond."""
    tile = row_tile(torch.empty(0, device=sizes.device))
    n, (_, d, v) = 4 * tile, sizes.whole
    inputs = random_inputs(n, d, v, torch.bfloat16, device=sizes.device)
    cu_seqlens = torch.arange(0, n + 1, tile // 4, dtype=torch.int32, device=sizes.device)
    half = stash_size(2 * tile, v, inputs.hidden) * 2 + 4 * v * d
    with count_cost() as cost:
        check_loss(inputs, cu_seqlens, loss, MODES["trainable"], half)
    units = cost.flops / (2 * n * d * v) - loss.uses_reference  # whose log-probabilities are one
    assert units == 3, f"{units:.2f} units, expected 3"


def loss_agrees(sizes: Sizes, loss: Loss, mode: str) -> None:
    inputs, cu_seqlens = _pairs(sizes)
    check_loss(inputs, cu_seqlens, loss, MODES[mode], AMPLE if mode == "kept" else 0)


def check_loss(inputs: Inputs, cu_seqlens: Tensor, loss: Loss, needs: tuple[str, ...], workspace: int) -> None:
    """`linear_preference_loss` and its gradients against the materializing implementation."""
    ref_logps = evaluate(head, inputs).logps - 0.1 if "reference" in loss.needs else None
    labels = torch.arange(len(cu_seqlens) - 1, device=cu_seqlens.device) % 3 > 0
    extra = {name: value for name, value in {"labels": labels, "z0": 0.05}.items() if name in loss.needs}

    def run(x: Inputs, **implementation):
        out = prefuse.linear_preference_loss(
            x.hidden, x.weight, x.targets, cu_seqlens, ref_logps, loss, **extra, **implementation
        )
        out.loss.backward()
        return out

    made = inputs.leaves(needs)
    out = run(made, impl="triton", workspace=workspace)
    true = inputs.exact().leaves(needs)
    expected_losses = run(true, impl="reference").losses
    oracle.assert_within(out.losses, expected_losses.double(), 1e-4, "losses")
    for name in needs:
        if (expected := getattr(true, name)) is None:
            continue
        error = (getattr(made, name).grad.double() - expected.grad).norm() / expected.grad.norm()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps, f"d{name}: relative error {error:.2e}"


TAIL_LOSSES = (
    prefuse.DPO(),
    prefuse.DPO(0.3, label_smoothing=0.2),
    prefuse.IPO(),
    prefuse.IPO(average=False),
    prefuse.KTO(0.3, desirable_weight=1.3),
)


def preferences(loss: Loss, lengths: Tensor, device: str) -> dict[str, Any]:
    """Arguments of `preference_loss` for sequences of these lengths; KTO's z0 from as many mismatched ones."""

    def packed(shift: float) -> tuple[Tensor, Tensor, Tensor]:
        ref_logps = -5 * torch.rand(int(lengths.sum()))
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
        return tuple(
            x.to(device) for x in (ref_logps + shift + 0.3 * torch.randn(len(ref_logps)), ref_logps, cu_seqlens)
        )

    arguments = dict(zip(("logps", "ref_logps", "cu_seqlens"), packed(0.0), strict=True))
    arguments["logps"].requires_grad_()
    if "z0" in loss.needs:
        arguments |= {"labels": torch.rand(len(lengths)).to(device) < 0.6, "z0": prefuse.Mismatched(*packed(0.1))}
    return {"loss": loss, **arguments}


def tail_agrees(sizes: Sizes, loss: Loss) -> None:
    """To rounding in float64, whichever program was the last to arrive, and the same bits every time."""
    count, longest = (4096, 300) if sizes.device == "cuda" else (26, 40)
    arguments = preferences(loss, torch.randint(0, longest, (count,)), sizes.device)

    def run(impl: str) -> dict[str, Tensor]:
        out = prefuse.preference_loss(**arguments, impl=impl)
        (gradient,) = torch.autograd.grad(out.loss, arguments["logps"])
        numbers = {"loss": out.loss, "losses": out.losses, "logps": out.logps, "rewards": out.rewards}
        return {**numbers, **out.metrics, "gradient": gradient}

    made, truth = run("triton"), run("torch")
    for name, x in truth.items():
        rtol = 1e-12 if x.dtype == torch.float64 else torch.finfo(torch.float32).eps
        torch.testing.assert_close(made[name], x, rtol=rtol, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    for _ in range(20 if sizes.device == "cuda" else 1):
        again = run("triton")
        for name, x in made.items():
            assert torch.equal(again[name], x), f"{name} differs in another run"


def divergences_agree(sizes: Sizes) -> Iterator[tuple[str, Check]]:
    """`linear_kl` and its gradients against float64."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    every = {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3}

    def case(name: str, shape: tuple[int, int, int], dtype: torch.dtype = bf16, mode: str = "trainable", **how):
        made = functools.partial(random_models, *shape, dtype, device=sizes.device, **how)
        return f"KL, {name}", lambda: check_kl(divergence, made(), NEEDS[mode])

    for mode in ("trainable", "frozen head"):
        yield case(f"bf16, {mode}", sizes.whole, mode=mode)
    yield case("bf16, a smaller reference", sizes.whole, ref_d=sizes.whole[1] // 2)
    yield case("bf16, softcap", sizes.whole, options={"softcap": 3.0})
    yield case("bf16, bias", sizes.whole, bias=True)
    yield case("bf16, all options, the reference's own", sizes.whole, bias=True, options=every,
               ref_options={"softcap": None, "temperature": 0.9})  # fmt: skip
    yield case("bf16, odd sizes", sizes.odd, bias=True, options=every, ref_d=sizes.odd[1] + 8)
    yield case("bf16, float32 weights", sizes.whole, weight_dtype=fp32)
    yield case("bf16, a third of the rows masked", sizes.whole, masked=0.3)
    yield case("bf16, logits of deviation 30", sizes.whole, spread=30.0)
    for dtype in (fp16, fp32):
        yield case(str(dtype)[6:], sizes.whole, dtype)
    for apart in (1e-3, 1e-2, 0.1):
        yield case(f"float32, a reference {apart:g} of the policy away", sizes.whole, fp32, apart=apart)


def no_divergence(sizes: Sizes) -> None:
    for shape, options in itertools.product((sizes.whole, sizes.odd), ({}, {"softcap": 3.0})):
        models = random_models(*shape, torch.bfloat16, device=sizes.device, options=options)
        models = models.but(ref_hidden=models.hidden.clone(), ref_weight=models.weight.clone())
        grad = torch.ones(shape[0], device=sizes.device)
        for name, x in evaluate_kl(divergence, models, NEEDS["trainable"], grad).tensors().items():
            assert not x.any(), f"{name}: {x.abs().max().item():.2e}"


def divergences_keep_their_bits(sizes: Sizes) -> None:
    for shape in (sizes.whole, sizes.odd):
        models = random_models(*shape, torch.bfloat16, device=sizes.device)
        n = shape[0]

        def kl(rows: Tensor, models: Models = models) -> Tensor:
            return evaluate_kl(divergence, models.rows(rows)).kl

        everything = torch.arange(n, device=sizes.device)
        expected, order = kl(everything), torch.randperm(n).to(sizes.device)
        assert torch.equal(kl(everything), expected), "a second run"
        assert torch.equal(kl(order), expected[order]), "permuted"
        parts = everything.split([1, n // 3, n - 1 - n // 3])
        assert torch.equal(torch.cat([kl(part) for part in parts]), expected), "split"


def offsets() -> None:
    """A weight of more than 2^31 elements, forward and the gradients of its last rows."""
    n, d, v = 64, 8192, 2**31 // 8192 + 100
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        raise NotImplementedError("needs 40 GiB of free GPU memory")
    g = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(n, d, device="cuda", dtype=torch.bfloat16, generator=g) * 0.02
    weight = torch.empty(v, d, device="cuda", dtype=torch.bfloat16).normal_(generator=g)
    targets = v - 1 - torch.arange(n, device="cuda")
    hidden.requires_grad_()
    weight.requires_grad_()
    logps = head(hidden, weight, targets)
    logps.sum().backward()
    with torch.no_grad():
        x = hidden.double()
        z = torch.cat([x @ part.double().T for part in weight.split(8192)], 1)
        log_p = torch.log_softmax(z, -1)
        truth = log_p.gather(1, targets[:, None])[:, 0]
        oracle.assert_within(logps, truth, 1e-5, "logps")
        dz = (torch.nn.functional.one_hot(targets, v) - log_p.exp())[:, -200:]
        expected = dz.T @ x
        error = (weight.grad[-200:].double() - expected).norm() / expected.norm()
        assert error <= 2 * torch.finfo(torch.bfloat16).eps, f"dweight: relative error {error:.2e}"


def _pairs(sizes: Sizes) -> tuple[Inputs, Tensor]:
    """Inputs of N tokens in four pairs of unequal lengths, and their cu_seqlens (9,)."""
    n = sizes.whole[0]
    cuts = [0, n // 10, n // 4, n // 4 + 1, n // 2, n // 2 + n // 9, n - n // 5, n - 2, n]
    inputs = random_inputs(*sizes.whole, torch.bfloat16, device=sizes.device)
    return inputs, torch.tensor(cuts, dtype=torch.int32, device=sizes.device)
