"""How a transformers causal LM is used here: its trunk gives hidden states, its head goes to the fused op.

    head = head_of(model)
    hidden = trunk_hidden(model, input_ids, attention_mask)              # (B, T, D)
    logps = prefuse.linear_logprobs(hidden[:, :-1].flatten(0, 1), head.weight, targets, **head.options())

A head is understood by its parts (weight, bias, softcap, scale), which every model names in its own way. So nothing
is taken on trust: `check_head` compares the fused log-probabilities with those of `model(...).logits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import prefuse

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class UnsupportedModel(ValueError):
    """The model's head, or the way to its trunk, is not one this library computes."""


@dataclass(frozen=True)
class Head:
    """`logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)`."""

    weight: Tensor  # (V, D)
    bias: Tensor | None = None  # (V,)
    softcap: float | None = None
    logit_scale: float = 1.0

    def options(self) -> dict:
        """Keyword arguments for `linear_logprobs` and `linear_preference_loss`."""
        return {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}

    def logits(self, hidden: Tensor) -> Tensor:  # (N, D) -> (N, V) float32
        """The logits themselves, in float32: for a few rows."""
        bias = None if self.bias is None else self.bias.float()
        logits = nn.functional.linear(hidden.float(), self.weight.float(), bias) * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal LM; raises UnsupportedModel where it is not a plain linear layer."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder: expected a decoder-only causal LM")
    layer = model.get_output_embeddings()
    if layer is None:
        raise UnsupportedModel(f"{name} has no output embeddings: expected a causal LM (AutoModelForCausalLM)")
    inner = getattr(layer, "original_module", layer)  # of peft's modules_to_save, which shows the weight in force
    if type(inner) is not nn.Linear:
        raise UnsupportedModel(
            f"the head of {name} is a {type(layer).__module__}.{type(layer).__name__}, expected torch.nn.Linear: "
            "merge adapters into the head, or load it without quantization"
        )
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModel(
            f"{name} adds an auxiliary router loss (output_router_logits is true) that would be left out: "
            "set output_router_logits to false in its config.json"
        )
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, softcap=softcap, logit_scale=_logit_scale(config))


def _logit_scale(config) -> float:
    """What the logits are multiplied by: Cohere says it so, Granite names the divisor, HyperCLOVA X reuses
    Granite's name for a factor."""
    if getattr(config, "logit_scale", None) is not None:
        return float(config.logit_scale)
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def trunk_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head, the final norm included."""
    for trunk in (model.get_decoder(), model.base_model):
        if trunk is not model:
            return trunk
    raise UnsupportedModel(f"{type(model).__name__} has no trunk to call without the head")


def trunk_hidden(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, T)
    attention_mask: Tensor | None = None,  # (B, T)
) -> Tensor:  # (B, T, D)
    """The last hidden states, as the head receives them."""
    return trunk_of(model)(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]


@torch.no_grad()
def check_head(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, T) real tokens, without padding
    impl: str = "auto",
) -> float:
    """Refuse the model if its own logits and the fused head disagree; returns the largest difference in nats.

    Compared twice: as the model is, and with hidden states scaled until the logits reach about 50. A softcap, for
    one, leaves the small logits of a fresh model almost alone and would be found only after training.
    """
    head = head_of(model)
    hidden = trunk_hidden(model, input_ids)
    loudness = 50 / head.logits(hidden[0]).abs().max().clamp(min=1e-6).item()
    worst = 0.0
    for scale in (1.0, loudness):
        hook = trunk_of(model).register_forward_hook(lambda module, args, out, scale=scale: _scaled(out, scale))
        try:
            difference, bound = _difference(model, head, input_ids, impl)
        finally:
            hook.remove()
        if not difference <= bound:  # a nan is a difference
            raise UnsupportedModel(
                f"{type(model).__name__}: log-probabilities from its logits and from its hidden states times its head "
                f"differ by {difference:.3g} nats, more than rounding explains ({bound:.1g}). Its forward does "
                "something to the logits that this library does not know, so it cannot be trained here."
            )
        worst = max(worst, difference)
    return worst


def _scaled(output, scale: float):
    output.last_hidden_state = output.last_hidden_state * scale
    return output


def _difference(model: PreTrainedModel, head: Head, input_ids: Tensor, impl: str) -> tuple[float, float]:
    """The largest difference of log-probabilities, and how large rounding alone can make it."""
    targets = input_ids[:, 1:].flatten()
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)  # (N, V)
    expected = torch.log_softmax(logits.double(), dim=-1).gather(-1, targets[:, None])[:, 0]
    hidden = trunk_hidden(model, input_ids)[:, :-1].flatten(0, 1)
    got = prefuse.linear_logprobs(hidden, head.weight, targets, **head.options(), impl=impl)
    # The model rounds each logit to its dtype, and again for a scale and a cap: an eps of the largest, in the target's
    # logit and in the logsumexp. Accumulation in another order adds some eps of float32.
    eps = max(torch.finfo(dtype).eps for dtype in (logits.dtype, head.weight.dtype))
    bound = (4 * eps + 32 * torch.finfo(torch.float32).eps) * max(1.0, logits.abs().max().item())
    return (got.double() - expected).abs().max().item(), bound
