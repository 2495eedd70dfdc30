"""`fully_shard` on every decoder layer, and on the root, which keeps the embeddings and the head (one parameter where
they are tied) and the final norm. Whatever reads the head runs as a forward of the root: see `where_weights_are`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import torch
from torch import Tensor, nn

from prefuse.engine.model.layers import decoder_layers
from prefuse.engine.run.ranks import Ranks
from prefuse.models.head import Head


def shard(model: nn.Module, ranks: Ranks, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Spread the weights over the ranks, in place; `dtype` is what the decoder layers compute in.

    Layers are gathered in `dtype`. The root's weights stay as they are: the embeddings begin the residual stream, which
    autocast leaves in float32, and the fused head casts its own slices. Gradients travel in float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        CPUOffloadPolicy,
        MixedPrecisionPolicy,
        OffloadPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    own = next(model.parameters()).dtype
    reduce = torch.float32 if own != torch.float32 or dtype != own else None
    options = {
        "mesh": init_device_mesh(device.type, (ranks.size,)),
        "offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda") if ranks.offload else OffloadPolicy(),
    }
    policy = functools.partial(MixedPrecisionPolicy, reduce_dtype=reduce, cast_forward_inputs=False)
    layers = decoder_layers(model)
    for layer in layers:
        fully_shard(layer, mp_policy=policy(param_dtype=None if dtype == own else dtype), **options)
    fully_shard(model, mp_policy=policy(), **options)
    for module in (*layers, model):
        module.set_gradient_divide_factor(1.0)  # sums, not means
        module.set_force_sum_reduction_for_comms(True)
    model.with_weights = types.MethodType(lambda self, function: function(), model)
    register_fsdp_forward_method(model, "with_weights")
    return model


def where_weights_are(function: Callable) -> Callable:
    """Decorates a function of (lm, ...) that reads the head. Under fsdp the function runs as a forward of the root
    module: the head's weight is a plain tensor there, and its gradient is summed over the ranks.
    Elsewhere the function runs as it is."""

    @functools.wraps(function)
    def inside(lm, *args, **kwargs):
        if not hasattr(lm.model, "with_weights"):
            return function(lm, *args, **kwargs)

        def call():
            result = function(lm, *args, **kwargs)
            return getattr(result, "loss", None), result  # the loss in sight, for the hooks of the backward

        loss, result = lm.model.with_weights(call)
        if loss is None or not loss.requires_grad:
            # Without a backward the root keeps its weights gathered. `parameters()` would then give an optimizer the
            # gathered copies, and the next forward, which gathers the shards anew, would not see its updates.
            lm.model.reshard()
        return result

    return inside


class LiveHead(Head):
    """A head that reads its layer's weight at every use: sharding and adapters exchange the tensor during a run."""

    def __init__(self, layer: nn.Linear, head: Head):
        for name, value in {"layer": layer, "softcap": head.softcap, "logit_scale": head.logit_scale}.items():
            object.__setattr__(self, name, value)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias
