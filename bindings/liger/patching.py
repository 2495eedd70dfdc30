"""`patch()` puts this library's losses in the place of liger_kernel's, for a trainer that imports them from there.

Liger's arguments have changed their order: `alpha` came into the middle of DPO's with 0.8.1, and 0.6.2 to 0.8.0 are
called by the positions of their own.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable

from prefuse.liger import losses
from prefuse.liger.callers import say_if_trl_never_calls

# Ours -> where Liger's own stands.
_HOMES = {
    "LigerFusedLinearDPOLoss": "liger_kernel.chunked_loss.dpo_loss",
    "LigerFusedLinearKTOLoss": "liger_kernel.chunked_loss.kto_loss",
    "LigerFusedLinearORPOLoss": "liger_kernel.chunked_loss.orpo_loss",
    "LigerFusedLinearSimPOLoss": "liger_kernel.chunked_loss.simpo_loss",
    "LigerFusedLinearCPOLoss": "liger_kernel.chunked_loss.cpo_loss",
    "liger_fused_linear_dpo": "liger_kernel.chunked_loss.functional",
    "liger_fused_linear_kto": "liger_kernel.chunked_loss.functional",
    "liger_fused_linear_orpo": "liger_kernel.chunked_loss.functional",
    "liger_fused_linear_simpo": "liger_kernel.chunked_loss.functional",
    "liger_fused_linear_cpo": "liger_kernel.chunked_loss.functional",
    "LigerFusedLinearCrossEntropyLoss": "liger_kernel.transformers.fused_linear_cross_entropy",
}
_swapped: list[tuple[object, str, object]] = []  # (module, name, Liger's)


def patch() -> None:
    """Put the losses of this module in the place of liger_kernel's, in every module that has imported them by name.

    Objects made before keep Liger's losses: call this before a trainer is made. A second call patches later modules.

    Raises:
        ImportError: liger_kernel is not installed.
        RuntimeError: its losses take arguments that these do not know; nothing is changed then.
    """
    theirs = {name: _of_liger(name) for name in _HOMES}
    ours = {name: _called_as(name, original) for name, original in theirs.items()}
    for module in list(sys.modules.values()):
        namespace = getattr(module, "__dict__", {})
        for name, original in theirs.items():
            if namespace.get(name) is original:
                _swapped.append((module, name, original))
                setattr(module, name, ours[name])
    say_if_trl_never_calls()


def unpatch() -> None:
    """Put Liger's losses back wherever `patch` replaced them."""
    while _swapped:
        module, name, original = _swapped.pop()
        setattr(module, name, original)


def _of_liger(name: str) -> object:
    """Liger's own, whether or not it is replaced at the moment."""
    try:
        module = importlib.import_module(_HOMES[name])
    except ImportError as error:
        raise ImportError(f"prefuse.liger.patch() needs liger_kernel: {error}") from error
    for swapped, swapped_name, original in _swapped:
        if swapped is module and swapped_name == name:
            return original
    return getattr(module, name)


def _called_as(name: str, original: object) -> object:
    """Ours, called by the positions of the installed Liger's arguments, where those are others than here."""
    mine = getattr(losses, name)
    if not isinstance(original, type):  # the bound `apply` of an autograd function, whose first argument is ctx
        order = _order(name, original.__self__.forward, mine, mine_is_bound=True)
        return mine if order is None else functools.wraps(mine)(_by_name(mine, order))
    orders = {way: _order(name, getattr(original, way), getattr(mine, way)) for way in ("__init__", "forward")}
    if not any(orders.values()):
        return mine
    methods = {way: _by_name(getattr(mine, way), ["self", *order]) for way, order in orders.items() if order}
    return type(name, (mine,), {**methods, "__module__": mine.__module__, "__doc__": mine.__doc__})


def _by_name(function: Callable, order: list[str]) -> Callable:
    return lambda *args, **named: function(**dict(zip(order, args, strict=False)), **named)


def _order(name: str, theirs: Callable, own: Callable, mine_is_bound: bool = False) -> list[str] | None:
    """The names of Liger's arguments; None if they are the first of ours. All must be known, with the same defaults."""
    first = list(inspect.signature(theirs).parameters.values())[1:]  # without self, or ctx
    second = list(inspect.signature(own).parameters.values())[0 if mine_is_bound else 1 :]
    known = {p.name: p.default for p in second}
    for parameter in first:
        if parameter.name not in known or known[parameter.name] != parameter.default:
            raise RuntimeError(
                f"prefuse.liger.patch() does not know the argument {parameter} of this liger_kernel's {name}: "
                "it knows those of liger_kernel 0.6.2 to 0.8.5. Nothing was patched"
            )
    order = [parameter.name for parameter in first]
    return None if order == [p.name for p in second[: len(first)]] else order
