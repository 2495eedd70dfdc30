"""Three ways to run the same decoder layers with less memory or faster, each put around the layers of one model.

`checkpoint_layers` keeps a layer's inputs alone and runs it again in the backward. transformers has its own switch for
this, which works in training mode only; here models stay in eval mode, so that nothing drops. `compile_layers` compiles
each layer around its attention, which looks at the lengths of a flat batch and would be compiled again for every one.
`use_liger` takes Liger's kernels for what is inside a layer, without its loss: the head is fused here.
"""

import functools
import importlib
import inspect
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from prefuse.engine.config.settings import Config
from prefuse.engine.errors import UserError
from prefuse.engine.model.gated import gate_in_cache
from prefuse.models.trunk import trunk_of


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    lists = [module for module in trunk_of(model).modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


def prepare_layers(model: nn.Module, config: Config, device: torch.device) -> None:
    """As the settings have it; before the weights are spread over ranks, whose hooks go around all of this."""
    if config.torch_compile:
        compile_layers(model, config.torch_compile_backend, device)
    elif device.type == "cpu":
        gate_in_cache(model)
    if config.gradient_checkpointing:
        checkpoint_layers(model, keep_random_state=config.lora_dropout > 0)


def checkpoint_layers(model: nn.Module, keep_random_state: bool = False) -> None:
    """The same gradients, bit for bit, from less memory. Frozen embeddings are no obstacle: inputs need no gradient."""
    for layer in decoder_layers(model):
        layer.forward = _checkpointed(layer.forward, keep_random_state)


def _checkpointed(forward: Callable, keep_random_state: bool) -> Callable:
    @functools.wraps(forward)
    def again(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=keep_random_state, **kwargs)

    return again


def compile_layers(model: nn.Module, backend: str, device: torch.device) -> None:
    """All layers share what is compiled, and so do batches of any size: their dimensions are symbols."""
    _check_backend(backend, device)
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, backend=backend, dynamic=True)


def _check_backend(backend: str, device: torch.device) -> None:
    """Compiles something small, so that a missing compiler is a one-line error before the run."""
    x = torch.ones(8, device=device)
    try:
        torch.compile(_something_small, backend=backend, dynamic=True)(x)
    except Exception as error:  # each backend has its own
        cause = getattr(error, "inner_exception", error)
        fault = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
        raise UserError(
            f"torch_compile: the backend {backend} cannot compile on {device.type}: {fault}. inductor needs a C++ "
            "compiler on a CPU, and triton and a C compiler on a GPU: install it, or set torch_compile to false"
        ) from None


def _something_small(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) + 1


def use_liger(model: nn.Module, device: torch.device) -> None:
    """Liger's norms, rotary embeddings and gated layers, all that it has for the model but its losses."""
    if device.type == "cpu":
        raise UserError("use_liger_kernel: Liger's kernels run on a GPU, and the device is cpu: set it to false")
    try:
        patches = importlib.import_module("liger_kernel.transformers.monkey_patch").MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError as error:
        raise UserError(f"use_liger_kernel: {error}; pip install liger-kernel, or set it to false") from None
    kind = model.config.model_type
    if kind not in patches:
        raise UserError(f"use_liger_kernel: Liger has no kernels for models of the type {kind}: set it to false")
    parameters = inspect.signature(patches[kind]).parameters.values()
    options = {p.name for p in parameters if p.kind is not p.VAR_KEYWORD} - {"model"}
    patches[kind](model=model, **{name: "cross_entropy" not in name for name in options})
