"""One rank of a head that is spread over several: what tests/kernels/test_vocab_group.py runs in processes."""

import re
import sys
from itertools import product

import pytest
import torch
import torch.distributed as dist

import prefuse
import strict_interpreter
from prefuse.bench.truth import oracle
from prefuse.bench.truth.head_cases import EVERY_OPTION, NEEDS, check_head, evaluate, random_inputs
from prefuse.engine.run.ranks import leave
from prefuse.kernels import slices

N, D, V = 37, 24, 70
SHARDS = {1: [70], 2: [31, 39], 3: [9, 1, 60]}  # rows of the weight on each rank


def own_rows() -> slice:
    sizes = SHARDS[dist.get_world_size()]
    first = sum(sizes[: dist.get_rank()])
    return slice(first, first + sizes[dist.get_rank()])


def sharded(impl: str):
    """`linear_logprobs` of the whole head, of which this rank uses its own rows."""

    def head(hidden, weight, targets, *, bias=None, **options):
        for x in (weight, bias):
            if x is not None and x.requires_grad:  # so that the comparison sees every rank's rows
                x.register_hook(lambda grad: _sum(grad))
        mine = own_rows()
        group = dist.group.WORLD
        bias = None if bias is None else bias[mine]
        return prefuse.linear_logprobs(
            hidden, weight[mine], targets, bias=bias, impl=impl, vocab_group=group, **options
        )

    return head


def _sum(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def inputs_of(dtype=torch.float32, far=True, **options):
    torch.manual_seed(3)  # the same on every rank
    inputs = random_inputs(N, D, V, dtype, **{"bias": True, "ignored": 0.1, **options})
    if far:
        inputs.hidden[::5] *= 60.0
    return inputs


def check_values_and_gradients(impl: str) -> None:
    dtypes = {"torch": (torch.float32, torch.bfloat16, torch.float64), "triton": (torch.float32, torch.bfloat16)}[impl]
    needs = ("trainable", "frozen head", "frozen trunk")
    for dtype, need, entropy in product(dtypes, needs, (False, True)):
        options = {k: v for k, v in EVERY_OPTION.items() if k != "bias"} if entropy else {}
        check_head(sharded(impl), inputs_of(dtype), NEEDS[need], entropy=entropy, **options)
    check_head(sharded(impl), inputs_of(bias=False, far=False), softcap=2.0)


def check_bits(impl: str) -> None:
    """The same on every rank, whatever the mode is and whichever rows share the batch."""
    inputs = inputs_of(torch.bfloat16)
    made = evaluate(sharded(impl), inputs, outputs=oracle.OUTPUTS)
    for name, x in made.tensors().items():
        everyone = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, x)
        assert all(torch.equal(x, other) for other in everyone), name
    grad = torch.ones(N)
    for needs in ("trainable", "frozen head"):
        result = evaluate(sharded(impl), inputs, NEEDS[needs], grad)
        assert torch.equal(result.logps, made.logps), needs
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    permuted = inputs.but(hidden=inputs.hidden[order], targets=inputs.targets[order])
    assert torch.equal(evaluate(sharded(impl), permuted).logps, made.logps[order])


def check_losses(impl: str) -> None:
    """`linear_preference_loss`, with its weights kept for the backward, equals that of the whole head."""
    cu_seqlens = torch.tensor([0, 10, 19, 25, 37], dtype=torch.int32)
    ref = -torch.rand(N, generator=torch.Generator().manual_seed(2)) * 5
    for dtype, workspace in product((torch.float32, torch.bfloat16), (0, None)):
        inputs, results = inputs_of(dtype), []
        for group in (dist.group.WORLD, None):
            x = inputs.leaves(("hidden", "weight", "bias"))
            mine = own_rows() if group else slice(None)
            out = prefuse.linear_preference_loss(
                x.hidden, x.weight[mine], x.targets, cu_seqlens, ref, prefuse.IPO(), bias=x.bias[mine], impl=impl,
                workspace=workspace, vocab_group=group,
            )  # fmt: skip
            out.loss.backward()
            summed = [_sum(g) for g in (x.weight.grad, x.bias.grad)] if group else [x.weight.grad, x.bias.grad]
            results.append((out, [x.hidden.grad, *summed]))
        (out, grads), (whole, expected) = results
        torch.testing.assert_close(out.logps, whole.logps, rtol=1e-6, atol=1e-5)
        for got, wanted in zip(grads, expected, strict=True):
            bound = 4 * torch.finfo(dtype).eps * wanted.double().norm()
            assert (got.double() - wanted.double()).norm() <= bound


def check_errors(impl: str) -> None:
    inputs = inputs_of()
    inputs.targets[4] = V
    for wrong, message in (
        (lambda: evaluate(sharded(impl), inputs), f"targets[4] = {V} is outside the vocabulary [0, {V})"),
        (lambda: evaluate(sharded("reference"), inputs_of()), "takes the whole head"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            wrong()


def main(rank: int, ranks: int, store: str, impl: str) -> None:
    strict_interpreter.install()  # with TRITON_INTERPRET=1, before the kernels are imported
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    slices.TILE = {"cpu": (16, 32), "cuda": (16, 32)}
    for check in (check_values_and_gradients, check_bits, check_losses, check_errors):
        check(impl)
        if rank == 0:
            print(check.__name__, "passed", flush=True)
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
