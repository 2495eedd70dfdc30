"""Where kernels run: on the device of their tensors, which need not be the current one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current CUDA device; PyTorch's operators run where their tensors are. So do these then.

    The first argument is a tensor, or has one that is called `hidden`.
    """

    @functools.wraps(launcher)
    def run(first: object, *args: P.args, **kwargs: P.kwargs) -> R:
        tensor = first if isinstance(first, Tensor) else first.hidden
        with torch.cuda.device_of(tensor):  # nothing to do for one of the CPU's
            return launcher(first, *args, **kwargs)

    return run
