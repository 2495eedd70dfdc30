"""`linear_logprobs` with a `gradient_tolerance`: the exact forward with a column statistic, and the sparse backward.

N tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefuse.kernels import checks
from prefuse.kernels.gradients import Needs
from prefuse.kernels.logprobs import sparse
from prefuse.kernels.logprobs.call import HeadCall, implementation, refuse_double_backward
from prefuse.kernels.logprobs.portable import RowGrads, empty_forward
from prefuse.kernels.logprobs.sparse import ColumnStatistic
from prefuse.kernels.slices import kept_rows
from prefuse.kernels.vocab import Whole


@torch.compiler.disable
def sparse_logprobs(
    call: HeadCall, outputs: tuple[str, ...], guess: Tensor | None, meter: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(N,) log-probabilities and (len(outputs), N), whose backward is sparse up to `call.gradient_tolerance`."""
    checks.check_targets(call.targets, Whole(), len(call.weight), call.options.ignore_index)
    return _SparseLogprobs.apply(call.hidden, call.weight, call.bias, call, outputs, guess, meter)


class _SparseLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, call, outputs, guess, meter):
        rows = kept_rows(call.targets != call.options.ignore_index)
        rows = torch.arange(len(hidden), device=hidden.device) if rows is None else rows
        ctx.statistic = ColumnStatistic(hidden[rows], len(weight), None if guess is None else guess.detach()[rows])
        result = empty_forward(hidden, weight, outputs, "lean", hidden.dtype)
        if len(rows):
            with torch.autocast(hidden.device.type, enabled=False):
                kept = implementation(call.impl).forward(
                    hidden[rows], weight, bias, call.targets[rows], call.options, outputs, "lean",
                    statistic=ctx.statistic,
                )  # fmt: skip
            for name in ("logps", "lse", "q"):
                getattr(result, name)[rows] = getattr(kept, name)
            result.extra[:, rows] = kept.extra
        ctx.call = call._replace(hidden=None, weight=None, bias=None)
        ctx.outputs, ctx.meter = outputs, meter
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, rows, result.logps, result.lse, result.q, result.extra.clone())
        return result.logps.clone(), result.extra

    @staticmethod
    def backward(ctx, grad, grad_extra):
        if torch.is_grad_enabled():
            refuse_double_backward()
        hidden, weight, bias, rows, logps, lse, q, extra = ctx.saved_tensors
        call, needs = ctx.call, Needs(*ctx.needs_input_grad[:3])
        entropy = ctx.outputs.index("entropy") if "entropy" in ctx.outputs and grad_extra is not None else None
        if grad is None and entropy is None:
            return (None,) * 7
        grad = torch.zeros_like(logps) if grad is None else grad
        row = RowGrads(grad, lse, q, *((None, None) if entropy is None else (grad_extra[entropy], extra[entropy])))
        module, targets = implementation(call.impl), call.targets
        with torch.autocast(hidden.device.type, enabled=False):
            if entropy is not None:  # whose gradient has a mass of its own: exact
                grads = module.backward(hidden, weight, bias, targets, row, call.options, needs)
            else:
                grads = sparse.backward(
                    module, hidden[rows], weight, bias, targets[rows], row[rows], logps[rows], call.options, needs,
                    ctx.statistic, call.gradient_tolerance, ctx.meter,
                )  # fmt: skip
                if needs.hidden and len(rows) < len(hidden):
                    dhidden = torch.zeros_like(hidden).index_copy_(0, rows, grads.hidden)
                    grads = grads._replace(hidden=dhidden)
        return *grads, None, None, None, None
