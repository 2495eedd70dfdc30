"""A transformers causal LM run by its own forward, with something else in place of its head.

    logps = run_with_head(model, causal, layer, lambda hidden: ..., input_ids=input_ids)

The logits of a forward are the last thing that a model makes and the largest. Here the model runs as it always does,
wrappers and all; at its head it hands over the hidden states, and gets a few numbers back in place of the logits.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from prefuse.models.head import Head, is_lora, transform_of
from prefuse.models.trunk import UnsupportedModel, class_of

# ---------------------------------------------------------------------------------------------------------
# The model's own forward, with another head


def run_with_head(
    model: nn.Module,
    causal: nn.Module,
    layer: nn.Module,
    compute: Callable[[Tensor], Tensor],  # hidden states as the head gets them -> (K,)
    **inputs,
) -> Tensor:  # (K,)
    """`compute(hidden)`, run where `model(**inputs)` runs its head; the model makes no logits.

    There the weights are whole under `fully_shard`, autocast is the model's, and what comes out passes the hooks of
    every wrapper.
    """
    made = []

    def forward(*args, **kwargs) -> Tensor:  # (1, K + probes, 1)
        _running.add(causal)
        try:
            made.append(in_place_of_head(causal, layer, compute, lambda: before(*args, **kwargs))[0])
        finally:
            _running.discard(causal)
        return made[-1]

    before = causal.forward
    with _replaced(causal, _outside_graphs(forward, inner=False)):
        result = model(**inputs)
    if not made:
        raise UnsupportedModel(
            f"{type(model).__name__} did not call the forward of its {class_of(causal).__name__}: give the model inside"
        )
    _reshard(model, result)
    # fully_shard may cast what its root returns, to bf16; its hooks are on the tensor that went in. (DDP's are on the
    # one that comes out.)
    result = made[0] if result.dtype != made[0].dtype else result
    return result[0, : result.shape[1] - len(PROBES), 0]


_running: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose head is another at this moment


def is_running(causal: nn.Module) -> bool:
    """Whether `run_with_head` has replaced the model's head already."""
    return causal in _running


def in_place_of_head(
    causal: nn.Module, layer: nn.Module, compute: Callable[[Tensor], Tensor], forward: Callable[[], object]
) -> tuple[Tensor, object]:  # (1, K + probes, 1), what `forward` returned
    """Run `forward()`, in which the model calls its head once: in its place runs `compute`.

    As logits the model gets `compute`'s numbers with PROBES behind them. What its forward does to logits it does to
    these, so that the first time shows whether that is what its config says.
    """
    made = []

    def head(hidden: Tensor) -> Tensor:
        _check_weight(causal, layer)
        result = compute(hidden)
        made.append(torch.cat([result[None, :, None], result.new_tensor(PROBES)[None, :, None]], dim=1))
        # Of a head that is a unit of fully_shard, the hooks of the backward go to what it returns.
        return made[-1] if hasattr(layer, "reshard") else made[-1].detach()

    with _replaced(layer, _outside_graphs(head, inner=True)):
        output = forward()
    if len(made) != 1 or made[0]._version:
        what = "changed its head's output in place" if made else "did not call it"
        raise UnsupportedModel(
            f"{class_of(causal).__name__} was to call its head ({type(layer).__name__}) once, and "
            f"{what if len(made) < 2 else f'called it {len(made)} times'}: this is not computed here; call the trunk "
            "yourself and use prefuse.linear_logprobs"
        )
    _check_transform(causal, output)
    return made[0], output


# Logits small and large: a factor, a cap or a cast that a config does not tell of shows in some of them.
PROBES = (-200.0, -30.0, -5.0, -1.0, -0.25, 0.0, 0.5, 1.0, 7.0, 60.0, 200.0)
_known: weakref.WeakKeyDictionary[nn.Module, dict] = weakref.WeakKeyDictionary()  # models found to do as they say


def _check_transform(causal: nn.Module, output: object) -> None:
    """Refuse the model if its forward did something to the logits that its config does not tell of."""
    transform = transform_of(causal.config.get_text_config())
    if _known.get(causal) == transform:
        return
    got = getattr(output, "logits", output[0] if isinstance(output, tuple) else None)
    fits = isinstance(got, Tensor) and got.dim() == 3 and got.shape[0] == got.shape[2] == 1
    if fits:
        got = got.detach()[0, -len(PROBES) :, 0]
        expected = Head(got, **transform).after(got.new_tensor(PROBES, dtype=torch.float64))
        fits = bool(((got - expected).abs() <= 4 * torch.finfo(got.dtype).eps * expected.abs().clamp(min=1)).all())
    if not fits:
        raise UnsupportedModel(
            f"the forward of {class_of(causal).__name__} does something to its logits that its config does not tell of "
            f"(known here are {transform}), so their log-probabilities cannot be computed without them"
        )
    _known[causal] = transform


def _check_weight(causal: nn.Module, layer: nn.Module) -> None:
    """Whether the weight is there, now that the model runs."""
    weight = (layer.get_base_layer() if is_lora(layer) else layer).weight
    name = f"the head of {class_of(causal).__name__}"
    if hasattr(weight, "full_tensor"):
        raise UnsupportedModel(
            f"{name} is a DTensor inside the model's forward: expected a whole weight. Leave it out of the "
            "tensor-parallel plan; under fully_shard, call the root module, or wrap the head with the root"
        )
    if weight.is_meta or weight.numel() == 0:
        raise UnsupportedModel(
            f"{name} has no weight here ({'offloaded' if weight.is_meta else 'partitioned, as by DeepSpeed ZeRO-3'}): "
            "keep it on the device that runs the model, or shard the model by fully_shard (FSDP2)"
        )


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """The module with another forward, for as long as this lasts; libraries too put one in the instance."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _outside_graphs(function: Callable, inner: bool) -> Callable:
    """`function` out of torch.compile's sight, and with `inner` what it calls as well."""
    if "torch._dynamo" not in sys.modules:
        return function
    return torch.compiler.disable(function, recursive=inner)


def _reshard(model: nn.Module, result: Tensor) -> None:
    """The root of `fully_shard` keeps its weights gathered for a backward that does not come without gradients. Left
    so, an optimizer made now would get those copies, and the next forward would not see what it did to the shards."""
    if hasattr(model, "reshard") and not result.requires_grad:
        model.reshard()
