"""A Triton CPU interpreter strict enough to gate kernels on.

    os.environ["TRITON_INTERPRET"] = "1"     # before the first import of triton
    import strict_interpreter
    strict_interpreter.install()             # once; every kernel launched from here on is checked

    with strict_interpreter.program_order(seed=7):   # another order of programs; None: ascending
        kernel[grid](...)

What the stock interpreter lets pass, and what becomes of it here. Tensors are on the CPU.

| in a kernel                                     | stock interpreter       | here                          |
|-------------------------------------------------|-------------------------|-------------------------------|
| bfloat16 arithmetic, comparison, dot, reduction | computes on the bits    | right                         |
| cast to bfloat16                                | truncates               | nearest, ties to even         |
| fma; maximum of a NaN and a number (before 3.9) | rounds twice; NaN       | once; the number, as on a GPU |
| tl.dot with K below 16                          | runs                    | refused as the compiler does  |
| device_assert, overflow of an int32 offset      | ignored                 | KernelAssertion               |
| lane masked off by a load without `other`       | zero                    | NaN, or a far-out integer     |
| access outside of the pointer's own tensor      | reads it, overwrites it | OutOfBounds                   |
| two programs at one place, not both reading,    | works, in rising order  | Race; the order is shuffled   |
| and no release and acquire between them         |                         |                               |
| two lanes storing different values to one place | the last one wins       | Race                          |
| grid y or z above 65535                         | runs                    | ValueError                    |

A kernel's failure surfaces as itself, not inside of Triton's InterpreterError.

Not seen here: the reduced precision of TF32 and of approximate exp and log; 32-bit overflow between loop
indices and constants, which are Python integers; a missing barrier inside of one program; all that the
compiler refuses, for which there is ahead-of-time compilation (prefuse.kernels.tiles.aot).
"""

import contextlib
import random

import numpy as np
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import min_dot_size
from triton.runtime.errors import InterpreterError

from interpreter_memory import (
    KernelFault,
    OutOfBounds,
    Race,
    begin_launch,
    sparse_tensor,
    tensor_arguments,
)
from interpreter_stock import install_repairs, interpreter, repair

__all__ = [
    "KernelAssertion",
    "KernelFault",
    "OutOfBounds",
    "Race",
    "install",
    "program_order",
    "sparse_tensor",
]

Builder = interpreter.InterpreterBuilder

_order_seed: int | None = 0


class KernelAssertion(KernelFault, AssertionError):
    """A tl.device_assert that failed, or Triton's own for the overflow of an integer."""


def install():
    """Checks every kernel launched from now on. Again is harmless."""
    install_repairs()
    builder = interpreter.interpreter_builder
    builder.options = interpreter.InterpreterOptions(debug=True)  # device_assert, and with it sanitize_overflow
    builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 90, 32))


@contextlib.contextmanager
def program_order(seed: int | None):
    """Runs the programs of each launch in the order of this seed, 0 elsewhere; None is ascending."""
    global _order_seed
    before, _order_seed = _order_seed, seed
    try:
        yield
    finally:
        _order_seed = before


@repair(interpreter.GridExecutor)
def __call__(stock, self, *args, **kwargs):
    begin_launch(tensor_arguments(self.arg_names[: len(args)] + list(kwargs), [*args, *kwargs.values()]))
    try:
        with np.errstate(all="ignore"):  # infinities and NaNs are values to a GPU
            return stock(self, *args, **kwargs)
    except InterpreterError as error:
        fault = error
    finally:
        begin_launch([])
    while isinstance(fault, InterpreterError) and fault.__cause__ is not None:
        fault = fault.__cause__
    raise fault


@repair(interpreter)
def _patch_lang_tensor(stock, tensor, scope):
    """The bound of a loop in triton 3.6: int() of an array of one element, which NumPy 2.4 refuses."""
    stock(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


@repair(Builder)
def set_grid_dim(stock, self, x, y, z):
    if y > 65535 or z > 65535:
        raise ValueError(f"grid {(x, y, z)}: CUDA takes at most 65535 programs on axes y and z")
    self.order = list(range(x * y * z))
    if _order_seed is not None:
        random.Random(_order_seed).shuffle(self.order)
    return stock(self, x, y, z)


@repair(Builder)
def set_grid_idx(stock, self, x, y, z):
    _, height, depth = self.grid_dim
    turn = self.order[(x * height + y) * depth + z]
    return stock(self, turn // (height * depth), turn // depth % height, turn % depth)


@repair(Builder)
def create_assert(stock, self, condition, message):
    if not np.all(condition.data):
        raise KernelAssertion(f"{message} (program {self.grid_idx})")
