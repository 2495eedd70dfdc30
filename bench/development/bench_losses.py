"""The losses of sequences behind given log-probabilities, under pytest-benchmark: what a step costs beside its head."""

import torch

import prefuse

LOSSES = {"DPO": prefuse.DPO(), "IPO": prefuse.IPO(), "KTO": prefuse.KTO(), "SimPO": prefuse.SimPO()}
SIZES = ((8, 512), (256, 64))  # sequences, tokens of each


def pytest_generate_tests(metafunc):
    metafunc.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
    metafunc.parametrize("name", LOSSES)


def bench_loss(benchmark, size, name):
    benchmark.group = f"{size[0]} sequences of {size[1]} tokens"
    loss, (sequences, tokens) = LOSSES[name], size
    g = torch.Generator().manual_seed(0)
    logps = (-2 * torch.rand(sequences * tokens, generator=g)).requires_grad_()
    ref_logps = logps.detach() - 0.1 if "reference" in loss.needs else None
    cu_seqlens = torch.arange(0, sequences * tokens + 1, tokens, dtype=torch.int32)
    extra = {"labels": torch.arange(sequences) % 2 == 0, "z0": 0.1} if "labels" in loss.needs else {}

    def step():
        out = prefuse.preference_loss(logps, ref_logps, cu_seqlens, loss, **extra)
        torch.autograd.grad(out.loss, logps)

    benchmark(step)
