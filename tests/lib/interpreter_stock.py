"""Triton's own CPU interpreter, and the one way this project changes it.

It is a debugging aid and promises no fidelity; the modules beside this one repair it. Tried with triton 3.6,
3.7 and 3.9: what differs between them is said where it matters.
"""

from triton import language as tl
from triton.runtime import interpreter

if not isinstance(tl.standard._sum_combine, interpreter.InterpretedFunction):
    raise ImportError("the interpreter is off: set TRITON_INTERPRET=1 before the first import of triton")

_repairs = []


def repair(owner):
    """Decorator: the function, which receives the stock one first, becomes `owner`'s method of that name on
    install_repairs()."""

    def register(repaired):
        stock = getattr(owner, repaired.__name__, None)  # None: some version of Triton lacks it

        def method(self, *args, **kwargs):
            return repaired(stock, self, *args, **kwargs)

        _repairs.append((owner, repaired.__name__, method))
        return repaired

    return register


def install_repairs():
    for owner, name, method in _repairs:
        setattr(owner, name, method)
