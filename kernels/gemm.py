"""Matrix products that accumulate in float32, on every device.

bf16 and fp16 operands go to the tensor cores with a float32 result on CUDA. A CPU without bf16 units multiplies
bf16 four times slower than float32, and has no `out_dtype`, so there the operands are raised to float32 tile by tile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefuse.kernels.cost import counting, report_cost, size

HALF = (torch.bfloat16, torch.float16)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` rounded to the compute dtype, in the type this device multiplies: half types only on CUDA."""
    x = x.to(dtype)
    return x if x.is_cuda else x.to(accumulator_dtype(dtype))


def narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 result as the next operand: rounded to `dtype` only where that is what the device multiplies."""
    return x.to(dtype) if x.is_cuda else x


def mm(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """`out = a @ b` with a float32 (float64) result."""
    if counting():
        report_cost("product", 2 * a.shape[0] * a.shape[1] * b.shape[1], size(a, b), size(out))
    if a.dtype == b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.dtype in HALF and a.is_cuda:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def addmm_(acc: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`acc += a @ b`, rounded nowhere but in `acc`."""
    if counting():
        report_cost("product", 2 * a.shape[0] * a.shape[1] * b.shape[1], size(a, b, acc), size(acc))
    if a.dtype in HALF and a.is_cuda:
        return torch.addmm(acc, a, b, out_dtype=acc.dtype, out=acc)
    return acc.addmm_(a.to(acc.dtype), b.to(acc.dtype))
