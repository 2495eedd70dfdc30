"""Inputs of two heads, and the comparison of one implementation of their divergence with the truth."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from prefuse.bench.truth import oracle

NAMES = ("hidden", "weight", "bias")


@dataclass(frozen=True)
class Models:
    """Policy and reference."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    ref_hidden: Tensor  # (N, ref D)
    ref_weight: Tensor  # (V, ref D)
    bias: Tensor | None = None  # (V,)
    ref_bias: Tensor | None = None  # (V,)
    mask: Tensor | None = None  # (N,)
    options: dict = field(default_factory=dict)
    ref_options: dict = field(default_factory=dict)

    def but(self, **changes) -> Models:
        return replace(self, **changes)

    def rows(self, index) -> Models:
        mask = None if self.mask is None else self.mask[index]
        return self.but(hidden=self.hidden[index], ref_hidden=self.ref_hidden[index], mask=mask)

    def keywords(self) -> dict:
        optional = {name: getattr(self, name) for name in ("bias", "ref_bias", "mask")}
        return {**optional, **self.options, "ref_options": self.ref_options}


def random_models(
    n: int,
    d: int,
    v: int,
    dtype: torch.dtype = torch.float32,
    *,
    ref_d: int | None = None,
    apart: float | None = None,
    weight_dtype: torch.dtype | None = None,
    bias: bool = False,
    masked: float = 0.0,
    spread: float = 2.0,
    device: torch.device | str = "cpu",
    options: dict | None = None,
    ref_options: dict | None = None,
) -> Models:
    """Logits of standard deviation `spread`. With `apart`, the reference is the policy moved by that part of itself,
    else drawn by itself."""
    ref_d = ref_d or d
    hidden, weight = torch.randn(n, d).mul(spread * d**-0.5), torch.randn(v, d)
    if apart is None:
        ref_hidden, ref_weight = torch.randn(n, ref_d).mul(spread * ref_d**-0.5), torch.randn(v, ref_d)
    else:
        ref_hidden, ref_weight = hidden + apart * torch.randn(n, d).mul(spread * d**-0.5), weight
    biases = (torch.randn(v), torch.randn(v)) if bias else (None, None)
    mask = torch.rand(n) >= masked if masked else None
    weights = (x.to(weight_dtype or dtype) for x in (weight, ref_weight))
    weight, ref_weight = weights
    tensors = (hidden.to(dtype), weight, ref_hidden.to(dtype), ref_weight, *biases, mask)
    return Models(*(None if x is None else x.to(device) for x in tensors), options or {}, ref_options or {})


@dataclass
class KLResult:
    kl: Tensor
    grads: dict[str, Tensor]

    def tensors(self) -> dict[str, Tensor]:
        return {"kl": self.kl, **{f"d{name}": g for name, g in self.grads.items()}}


def evaluate(linear_kl, models: Models, needs=(), grad: Tensor | None = None) -> KLResult:
    """`linear_kl(hidden, weight, ref_hidden, ref_weight, **keywords)`, then backward of (N,) `grad`."""
    fresh = {n: getattr(models, n).detach().requires_grad_() for n in needs if getattr(models, n) is not None}
    m = models.but(**fresh)
    kl = linear_kl(m.hidden, m.weight, m.ref_hidden, m.ref_weight, **m.keywords())
    if needs:
        kl.backward(grad)
    return KLResult(kl.detach(), {name: x.grad for name, x in fresh.items()})


def both_logits(m: Models, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, V) of policy and reference, made in `dtype`; rows that do not count are made of zeros."""
    keep = torch.ones_like(m.hidden[:, 0], dtype=torch.bool) if m.mask is None else m.mask
    hidden, ref_hidden = (torch.where(keep[:, None], x, 0.0) for x in (m.hidden, m.ref_hidden))
    z = oracle.logits(hidden, m.weight, m.bias, **m.options, dtype=dtype)
    options = m.options | m.ref_options
    return z, oracle.logits(ref_hidden, m.ref_weight, m.ref_bias, **options, dtype=dtype)


def exact(m: Models) -> Models:
    """The numbers that the operation computes with, in float64, where gradients are not rounded either."""
    changes = {name: getattr(m, name).to(m.hidden.dtype).double() for name in ("weight", "ref_weight")}
    changes |= {name: getattr(m, name).double() for name in ("hidden", "ref_hidden")}
    changes |= {name: x.double() for name in ("bias", "ref_bias") if (x := getattr(m, name)) is not None}
    return m.but(**changes)


def from_definition(dtype: torch.dtype):
    """The oracle with the arguments of `linear_kl`, in `dtype`."""

    def linear_kl(hidden, weight, ref_hidden, ref_weight, *, bias, ref_bias, mask, ref_options, **options):
        m = Models(hidden, weight, ref_hidden, ref_weight, bias, ref_bias, mask, options, ref_options)
        kl = oracle.kl(*both_logits(m, dtype))
        return kl if mask is None else torch.where(mask, kl, 0.0)

    return linear_kl


def check_kl(linear_kl, models: Models, needs=NAMES, grad: Tensor | None = None) -> KLResult:
    """Asserts that `linear_kl` agrees with the float64 truth, as far as logits in float32 can; returns what it made."""
    m, dtype, n = models, models.hidden.dtype, len(models.hidden)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    grad = torch.randn(n, device=m.hidden.device).to(accumulator) if grad is None else grad
    needs = tuple(name for name in needs if getattr(m, name) is not None)
    made = evaluate(linear_kl, m, needs, grad)
    truth = evaluate(from_definition(torch.float64), exact(m), needs, grad.double())
    assert made.kl.dtype == accumulator
    assert made.kl.shape == (n,)
    for name, x in made.grads.items():
        assert (x.dtype, x.shape) == (getattr(m, name).dtype, getattr(m, name).shape), name
    if n == 0:
        assert not any(x.any() for x in made.grads.values())
        return made
    assert not (made.kl < 0).any(), made.kl.min()

    keep = torch.ones(n, dtype=torch.bool, device=m.hidden.device) if m.mask is None else m.mask
    z, ref_z = both_logits(exact(m), torch.float64)
    off = _logit_error(m, accumulator, z, ref_z)
    p, r = z.softmax(-1), ref_z.softmax(-1)
    # c = log(p / r) - KL, so dKL/dz = p c and dKL/d ref_z = r - p
    c = torch.where(p > 0, torch.log_softmax(z, -1) - torch.log_softmax(ref_z, -1) - truth.kl[:, None], 0.0)
    eps = torch.finfo(accumulator).eps
    sensitivity = (p * c).abs().sum(-1) + (p - r).abs().sum(-1)
    bound = off * sensitivity + off**2 + 16 * eps * truth.kl
    error = (made.kl.double() - truth.kl).abs()
    finite = truth.kl.isfinite()
    assert torch.equal(made.kl[~finite].double(), truth.kl[~finite])
    assert not made.kl[finite].isnan().any()
    worst = torch.where(finite & keep, error - bound, 0.0).argmax()
    assert (error <= bound)[finite].all(), f"kl[{worst}]: off by {error[worst]:.3g}, allowed {bound[worst]:.3g}"
    assert not made.kl[~keep].any()

    # Each term of a gradient is rounded as a dlogit and the sum when stored, as eager's are; and p and c are off by
    # what the logits are off.
    eager = evaluate(from_definition(dtype), m, needs, grad.to(dtype)).grads
    weights = torch.where(keep, grad.double().abs(), 0.0)[:, None] * _slope(m)
    rounded, noise = weights * (p * c).abs(), weights * p * (1 + c.abs()) * 2 * off
    hidden, weight = torch.where(keep[:, None], exact(m).hidden, 0.0), exact(m).weight
    for name, x in made.grads.items():
        coarsest = max(dtype, getattr(m, name).dtype, key=lambda t: torch.finfo(t).eps)
        if name == "hidden":
            size, blur = (rounded**2 @ weight**2).sqrt(), noise @ weight.abs()
        elif name == "weight":
            size, blur = (rounded.T**2 @ hidden**2).sqrt(), noise.T @ hidden.abs()
        else:
            size, blur = (rounded**2).sum(0).sqrt(), noise.sum(0)
        expected = truth.grads[name]
        bound = oracle.tolerance(expected, eager[name], coarsest, size.max().item()) + blur.max().item()
        oracle.assert_within(x, expected, bound, f"d{name}")
    return made


def _slope(m: Models) -> float:
    return abs(m.options.get("logit_scale", 1.0)) / m.options.get("temperature", 1.0)


def _logit_error(m: Models, accumulator: torch.dtype, z: Tensor, ref_z: Tensor) -> float:
    """What a logit may be off: twice what plain products are, and a last bit or two of the largest."""
    rounded = both_logits(m, accumulator)
    finite = [x.isfinite() for x in (z, ref_z)]
    errors = [(a.double() - b)[f].abs().max() for a, b, f in zip(rounded, (z, ref_z), finite, strict=True) if f.any()]
    largest = max([x[f].abs().max().item() for x, f in zip((z, ref_z), finite, strict=True) if f.any()] + [1.0])
    return 2 * max(e.item() for e in errors) + 4 * torch.finfo(accumulator).eps * largest
