"""Inputs of a head, and the comparison of one implementation with the truth: forward, outputs and gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefuse.bench.truth import oracle

EVERY_OPTION = {"bias": True, "softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3}
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": 0.25},
    "temperature": {"temperature": 0.6},
    "all": EVERY_OPTION,
}
# Which of the inputs need a gradient.
NEEDS = {
    "trainable": ("hidden", "weight", "bias"),
    "frozen head": ("hidden",),
    "frozen trunk": ("weight",),
    "bias only": ("bias",),
}


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    bias: Tensor | None = None  # (V,)

    def but(self, **changes) -> Inputs:
        return replace(self, **changes)

    def exact(self) -> Inputs:
        """The numbers that the operation computes with, in float64, where gradients are not rounded either."""
        bias = None if self.bias is None else self.bias.double()
        return self.but(hidden=self.hidden.double(), weight=self.weight.to(self.hidden.dtype).double(), bias=bias)

    def leaves(self, needs: tuple[str, ...]) -> Inputs:
        """Tensors of the same memory and strides whose gradients are their own."""
        fresh = {name: getattr(self, name).detach() for name in needs if getattr(self, name) is not None}
        return self.but(**{name: x.requires_grad_() for name, x in fresh.items()})


def random_inputs(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    weight_dtype: torch.dtype | None = None,
    bias: bool = False,
    ignored: float = 0.0,
    ignore_index: int = -100,
    spread: float = 2.0,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Logits of standard deviation `spread`; a share `ignored` of the rows does not count."""
    hidden = torch.randn(n, d).mul(spread * d**-0.5).to(dtype)
    weight = torch.randn(v, d).to(weight_dtype or dtype)
    targets = torch.where(torch.rand(n) < ignored, ignore_index, torch.randint(0, v, (n,)))
    made = (hidden, weight, targets, torch.randn(v) if bias else None)
    return Inputs(*(None if x is None else x.to(device) for x in made))


@dataclass
class Result:
    logps: Tensor
    outputs: dict[str, Tensor]
    grads: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {"logps": self.logps, **self.outputs, **{f"d{name}": g for name, g in self.grads.items()}}


def evaluate(head, inputs: Inputs, needs=(), grad=None, grad_entropy=None, **options) -> Result:
    """`head(hidden, weight, targets, bias=..., **options)`, then backward of (N,) `grad` and `grad_entropy`."""
    leaves = inputs.leaves(needs)
    made = head(leaves.hidden, leaves.weight, leaves.targets, bias=leaves.bias, **options)
    logps, outputs = made if isinstance(made, tuple) else (made, {})
    if needs:
        total = (logps * grad).sum()
        if grad_entropy is not None:
            total = total + (outputs["entropy"] * grad_entropy).sum()
        total.backward()
    grads = {name: getattr(leaves, name).grad for name in needs if getattr(leaves, name) is not None}
    return Result(logps.detach(), {k: x.detach() for k, x in outputs.items()}, grads)


def check_head(head, inputs: Inputs, needs=NEEDS["trainable"], entropy: bool = True, **options) -> Result:
    """Asserts that `head` agrees with the float64 truth, with bounds from the dtype; returns what it made.

    With `entropy`, all outputs are asked for and the entropy is in the loss; without, none is, so that a frozen
    head may take its own path.
    """
    n, device, dtype = len(inputs.targets), inputs.hidden.device, inputs.hidden.dtype
    grad = torch.randn(n, device=device)
    grad_entropy = torch.randn(n, device=device) if entropy else None
    asked = {"outputs": oracle.OUTPUTS} if entropy else {}
    actual = evaluate(head, inputs, needs, grad, grad_entropy, **asked, **options)

    truth = evaluate(oracle.head, inputs.exact(), needs, grad.double(), _double(grad_entropy), **options)
    # Logits are float32 from accumulator to log-probability whatever the inputs are; gradients have the inputs' dtype.
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    eager = evaluate(oracle.head, inputs, dtype=accumulator, **options)
    eager_grads = evaluate(oracle.head, inputs, needs, grad, grad_entropy, dtype=dtype, **options).grads

    largest = _largest_logit(inputs, **options)
    sizes = _gradient_sizes(inputs.exact(), grad, grad_entropy, **options) if needs else {}
    if n:
        for name in ("logps", *actual.outputs):
            made, expected, yardstick = (x.tensors()[name] for x in (actual, truth, eager))
            assert made.dtype == accumulator, name
            bound = oracle.tolerance(expected, yardstick, accumulator, largest, inputs.hidden.shape[1])
            oracle.assert_within(made, expected, 0.0 if name == "is_top1" else bound, name)
    for name, expected in truth.grads.items():
        made, original = actual.grads[name], getattr(inputs, name)
        assert made.dtype == original.dtype, name
        assert made.shape == original.shape, name
        if not n:
            assert not made.any(), name
            continue
        # Each term is rounded as a dlogit, the sum when stored; and p is off by what its logit is off.
        coarsest = max(dtype, original.dtype, key=lambda x: torch.finfo(x).eps)
        bound = oracle.tolerance(expected, eager_grads[name], coarsest, sizes[name])
        bound += 2 * torch.finfo(accumulator).eps * largest * sizes[name]
        oracle.assert_within(made, expected, bound, f"d{name}")
    return actual


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def _gradient_sizes(inputs: Inputs, grad: Tensor, grad_entropy: Tensor | None, **options) -> dict[str, float]:
    """{input: the largest root of the sum of squares of the terms that an element of its gradient is a sum of}."""
    # A bias per row and column has the dlogits as its gradient.
    bias = 0.0 if inputs.bias is None else inputs.bias
    per_logit = torch.zeros(len(inputs.targets), len(inputs.weight)).to(inputs.hidden) + bias
    inputs = inputs.but(bias=per_logit)
    dlogits = evaluate(oracle.head, inputs, ("bias",), grad.double(), _double(grad_entropy), **options).grads["bias"]
    squares = dlogits.nan_to_num().square()
    hidden = torch.where(inputs.hidden.isfinite(), inputs.hidden, 0.0)
    sums = {"hidden": squares @ inputs.weight.square(), "weight": squares.T @ hidden.square(), "bias": squares.sum(0)}
    return {name: x.max().sqrt().item() if x.numel() else 0.0 for name, x in sums.items()}


def _largest_logit(inputs: Inputs, logit_scale=1.0, temperature=1.0, **_) -> float:
    """The largest sum of |products| that a logit is made of, as it enters the softmax; at least 1."""
    keep = inputs.hidden.isfinite().all(-1, keepdim=True)
    sums = torch.where(keep, inputs.hidden, 0.0).double().abs() @ inputs.weight.double().abs().T
    if inputs.bias is not None:
        sums = sums + torch.where(inputs.bias.isfinite(), inputs.bias, 0.0).double().abs()
    return max(1.0, sums.max().item() * abs(logit_scale) / temperature) if sums.numel() else 1.0
