"""The transformers model that computes: found inside its wrappers, of a known version, and run without its head.

    hidden = trunk_hidden(causal_lm_of(model), input_ids, attention_mask)      # (B, T, D)

B rows of T tokens, D hidden size.
"""

from __future__ import annotations

import re
import sys
import weakref
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The versions this was written against, as pyproject.toml has them: from, and below.
VERSIONS = {"transformers": ((5, 23), (6, 0)), "peft": ((0, 21), (1, 0))}

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose libraries are of such a version


class UnsupportedModel(ValueError):
    """The model's head, or the way to its trunk, is not one this library computes."""


class UnsupportedVersion(ImportError):
    """A library is installed in a version this one was not written for."""


def class_of(module: nn.Module) -> type:
    """Its class, before `fully_shard` put one of its own in front."""
    from torch.distributed.fsdp import FSDPModule

    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


# Wrappers that are refused, and what to use instead.
REFUSED = {
    "DataParallel": "use DistributedDataParallel",
    "FullyShardedDataParallel": "use fully_shard (FSDP2)",
    "DeepSpeedEngine": "use DistributedDataParallel or fully_shard (FSDP2)",
}


def causal_lm_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside DistributedDataParallel, torch.compile and PEFT."""
    kind = class_of(model)
    if kind.__name__ in REFUSED:
        raise UnsupportedModel(
            f"a model in {kind.__module__}.{kind.__name__} cannot run here: {REFUSED[kind.__name__]}"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return causal_lm_of(model.module)
    if kind.__name__ == "OptimizedModule":
        return causal_lm_of(model._orig_mod)
    if "peft" in sys.modules:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            if model.active_peft_config.is_prompt_learning:
                raise UnsupportedModel(
                    f"{model.active_peft_config.peft_type.value} adds tokens of its own to every sequence: expected "
                    "adapters in layers, as of LoRA, or none"
                )
            return causal_lm_of(model.get_base_model())
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a causal LM of transformers, or one in DistributedDataParallel, torch.compile or PEFT, got "
            f"{kind.__module__}.{kind.__name__}; with hidden states of any other model use prefuse.padded.batch_logps "
            "or prefuse.linear_logprobs"
        )
    return model


def check_versions(model: nn.Module) -> None:
    """Raises UnsupportedVersion for a transformers or PEFT that this was not written for."""
    if model in _checked:
        return
    for library, (first, last) in VERSIONS.items():
        used = library in sys.modules and any(type(m).__module__.split(".")[0] == library for m in model.modules())
        if not used:
            continue
        version = sys.modules[library].__version__
        major, minor = map(int, re.match(r"(\d+)\.(\d+)", version).groups())
        if not first <= (major, minor) < last:
            low, high = (".".join(map(str, x)) for x in (first, last))
            raise UnsupportedVersion(
                f"{library} {version} is installed, but prefuse needs {library} >= {low}, < {high}: "
                f"pip install '{library}>={low},<{high}'"
            )
    _checked.add(model)


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head, the final norm included."""
    head = model.get_output_embeddings()
    for trunk in (model.get_decoder(), model.base_model, getattr(model, "model", None)):
        if trunk is not None and trunk is not model and trunk is not head:
            return trunk
    raise UnsupportedModel(f"{type(model).__name__} has no trunk to call without the head")


def trunk_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
) -> Tensor:  # (B, T, D)
    """The last hidden states, as the head receives them."""
    return trunk_of(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
