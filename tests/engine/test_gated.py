"""Gated layers in the cache: the bits of the layers' own forward, with less kept; layers of another kind left alone."""

import copy

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP
from transformers.models.llama.modeling_llama import LlamaMLP

from prefuse.bench.timing import peak_bytes
from prefuse.engine.model import gated

D, E, T = 24, 40, 27  # rows of 40 numbers are no whole vectors
SIZES = {"hidden_size": D, "intermediate_size": E, "num_attention_heads": 2}
LAYERS = {"silu": (LlamaMLP, LlamaConfig(**SIZES)), "gelu": (Gemma3MLP, Gemma3TextConfig(**SIZES))}


@pytest.fixture(params=LAYERS)
def layer(request):
    kind, config = LAYERS[request.param]
    torch.manual_seed(0)
    return kind(config)


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_it_has_the_bits_of_the_layers_own_forward(rows, layer, monkeypatch):
    monkeypatch.setattr(gated, "CACHE_BYTES", rows * E * 4)
    own, ours = layer, copy.deepcopy(layer)
    gated.gate_in_cache(torch.nn.Sequential(ours))
    assert "forward" in vars(ours)
    results = []
    for module in (own, ours):
        x = 3 * torch.randn(1, T, D, generator=torch.Generator().manual_seed(1))
        x.requires_grad_()
        y = module(x)
        results.append([y, *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])])
        with torch.no_grad():
            assert torch.equal(module(x), y)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_the_activation_makes_is_not_kept(layer, monkeypatch):
    monkeypatch.setattr(gated, "CACHE_BYTES", 50 * E * 4)
    x, peaks = torch.randn(1, 500, D, requires_grad=True), []
    for module in (layer, copy.deepcopy(layer)):
        if peaks:
            gated.gate_in_cache(module)

        def step(module=module):
            module(x).sum()

        peaks.append(peak_bytes(step))
    assert peaks[1] <= peaks[0] - 400 * E * 4


class Clamped(LlamaMLP):
    def forward(self, x):
        return super().forward(x).clamp(-0.01, 0.01)


def test_a_layer_that_does_more_is_left_alone():
    torch.manual_seed(0)
    layer = Clamped(LAYERS["silu"][1])
    gated.gate_in_cache(layer)
    assert "forward" not in vars(layer)


def test_numbers_that_stand_in_another_order_in_memory():
    """Rows of such a tensor are copies, which must not take what is written."""
    gate, up = (torch.randn(7, 4, 64).transpose(0, 1).requires_grad_() for _ in range(2))
    dy = torch.randn(4, 7, 64)
    y = gated._Gated.apply(gate, up, gated.ACTIVATIONS["SiLU"])
    wanted = torch.nn.functional.silu(gate) * up
    assert torch.equal(y, wanted)
    for got, want in zip(
        torch.autograd.grad(y, (gate, up), dy), torch.autograd.grad(wanted, (gate, up), dy), strict=True
    ):
        assert torch.equal(got, want)
