"""What a causal LM's head computes, read from its layer: plain, behind PEFT, or refused by name.

    logits = softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap)

N tokens, D hidden size, V vocabulary, r rank of an adapter.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prefuse.kernels import linear_logprobs
from prefuse.models.probes import check_causal, quietly
from prefuse.models.trunk import UnsupportedModel, class_of, trunk_hidden, trunk_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        return self.after(nn.functional.linear(hidden.float(), self.weight.float(), bias))

    def after(self, products: Tensor) -> Tensor:
        """What comes after the matrix product: the factor and the cap."""
        logits = products * self.logit_scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# What configs call the cap and the factor of the logits. `inside` tries on the model whether that is all.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier")


def transform_of(config) -> dict:
    """`softcap` and `logit_scale` from a text config."""
    softcap = next((value for name in CAPS if (value := getattr(config, name, None))), None)
    return {"softcap": softcap, "logit_scale": _logit_scale(config)}


def _logit_scale(config) -> float:
    """What the logits are multiplied by: Cohere says it so, Granite names the divisor, HyperCLOVA X reuses
    Granite's name for a factor."""
    for name in FACTORS:
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None or hasattr(config, "dim_model_base"):
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def _before_head(config) -> float:
    """What the trunk's states are multiplied by before the head: MiniCPM divides them by their width over a base's,
    Inkling by a number."""
    divisor = getattr(config, "logits_mup_width_multiplier", None)
    if divisor is not None:
        return 1.0 / divisor
    base = getattr(config, "dim_model_base", None)
    return 1.0 if base is None else base / config.hidden_size


def _columns(weight: Tensor, config) -> int:
    """How many of the head's rows become logits: Inkling leaves out those that only pad its vocabulary."""
    return min(weight.shape[0], getattr(config, "unpadded_vocab_size", None) or weight.shape[0])


def _only(columns: int, x: Tensor | None) -> Tensor | None:
    return x if x is None or len(x) == columns else x[:columns]


# ---------------------------------------------------------------------------------------------------------
# The layer

# What stands in the name of a quantized layer's module or class, or of its weight's, and how to load it without.
QUANTIZED = {
    "bitsandbytes": 'BitsAndBytesConfig(..., llm_int8_skip_modules=["lm_head"])',
    "hqq": 'HqqConfig(..., skip_modules=["lm_head"])',
    "torchao": 'TorchAoConfig(..., modules_to_not_convert=["lm_head"])',
    "gptq": "a GPTQ checkpoint quantized with lm_head=False",
    "awq": 'AwqConfig(..., modules_to_not_convert=["lm_head"])',
    "quanto": 'QuantoConfig(..., modules_to_not_convert=["lm_head"])',
    "eetq": 'EetqConfig(..., modules_to_not_convert=["lm_head"])',
    "fp8": 'FineGrainedFP8Config(..., modules_to_not_convert=["lm_head"])',
    "compressed_tensors": 'a checkpoint whose quantization config has "lm_head" under ignore',
}

WITHOUT_ADAPTER = (
    'leave the head out of the adapter (exclude_modules=["lm_head"]), train it whole (modules_to_save=["lm_head"]), '
    "or merge the adapter (merge_and_unload())"
)


def head_layer(model: nn.Module, *, adds_router_loss: bool = False) -> nn.Module:
    """The layer that makes the logits: an `nn.Linear`, or a LoRA layer around one. Raises UnsupportedModel for others.

    `adds_router_loss`: the caller adds the router's loss where the config asks for it; else such a model is refused.

    For a head in PEFT's `modules_to_save`: the copy that runs, which is the original while adapters are off.
    """
    name = class_of(model).__name__
    if model.config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder: expected a decoder-only causal LM")
    layer = model.get_output_embeddings()
    if layer is None:
        raise UnsupportedModel(f"{name} has no output embeddings: expected a causal LM (AutoModelForCausalLM)")
    if getattr(model.config.get_text_config(), "output_router_logits", False) and not adds_router_loss:
        raise UnsupportedModel(
            f"{name} adds an auxiliary router loss (output_router_logits is true) that would be left out: "
            "set output_router_logits to false in its config.json"
        )
    layer = _running_copy(layer)
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
    _check_linear(base, name)
    if base is not layer and not is_lora(layer):
        raise UnsupportedModel(f"the head of {name} is a {_words(layer)}, expected torch.nn.Linear: {WITHOUT_ADAPTER}")
    return layer


def _running_copy(layer: nn.Module) -> nn.Module:
    if "peft" not in sys.modules:
        return layer
    from peft.utils.other import ModulesToSaveWrapper

    if not isinstance(layer, ModulesToSaveWrapper):
        return layer
    if layer.disable_adapters or not layer.active_adapters:
        return layer.original_module
    return layer.modules_to_save[layer.active_adapters[0]]


def is_lora(layer: nn.Module) -> bool:
    """Whether it is PEFT's LoRA around a linear layer; exactly that class, for others compute something else."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.lora.layer import Linear

    return class_of(layer) is Linear


def _check_linear(layer: nn.Module, name: str) -> None:
    weight = getattr(layer, "weight", None)
    words, plain = _words(layer), class_of(layer) is nn.Linear
    if plain and type(weight) not in (Tensor, nn.Parameter, _dtensor()):
        words += f" with a {type(weight).__module__}.{type(weight).__name__} as its weight"
    elif plain and (weight.dtype.itemsize == 1 or not weight.is_floating_point()):
        words += f" with a weight of {weight.dtype}"
    elif plain:
        return
    family = next((family for family in QUANTIZED if family in words.lower()), None)
    if family is not None or plain:
        how = "" if family is None else f", for instance by {QUANTIZED[family]}"
        raise UnsupportedModel(f"the head of {name} is quantized ({words}): load the model with a plain head{how}")
    raise UnsupportedModel(
        f"the head of {name} is a {words}, expected torch.nn.Linear: "
        "merge adapters into the head, or load it without quantization"
    )


def _words(layer: nn.Module) -> str:
    kind = class_of(layer)
    return f"{kind.__module__}.{kind.__name__}"


def _dtensor() -> type:
    from torch.distributed.tensor import DTensor

    return DTensor


def head_of(model: nn.Module) -> Head:
    """The head of a causal LM; raises UnsupportedModel where it is not a plain linear layer."""
    layer = head_layer(model)
    if is_lora(layer):
        raise UnsupportedModel(
            f"the head of {class_of(model).__name__} has a LoRA adapter, so its weight is no single matrix: "
            f"prefuse.transformers.sequence_logps computes it; else {WITHOUT_ADAPTER}"
        )
    config = model.config.get_text_config()
    transform, columns = transform_of(config), _columns(layer.weight, config)
    transform["logit_scale"] *= _before_head(config)
    return Head(_only(columns, layer.weight), _only(columns, layer.bias), **transform)


# ---------------------------------------------------------------------------------------------------------
# The layer as one matrix product


def product_of(causal: nn.Module, layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """`as_product`, of those rows of the head that become logits."""
    hidden, weight, bias = as_product(layer, hidden)
    columns = _columns(weight, causal.config.get_text_config())
    return hidden, _only(columns, weight), _only(columns, bias)


def columns_of(causal: nn.Module, logits: Tensor) -> Tensor:  # (..., V) -> (..., those that the model keeps)
    """What a forward leaves of its head's output."""
    config = causal.config.get_text_config()
    return logits[..., : getattr(config, "unpadded_vocab_size", None) or logits.shape[-1]]


def as_product(layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """`layer(hidden) == hidden' @ weight'.T + bias'`: (N, D'), (V, D') and (V,), differentiable.

    A plain layer is that already. A head with LoRA of rank r is one of width D + r, dropout and all: its product with
    the base and that with the adapter are summed in the accumulator, so an adapter too small for the weight's last bit
    still counts, as it would not in W + s B A rounded to bf16. It costs a copy of the head.

        hidden @ W.T + s (dropout(hidden) @ A.T) @ B.T  ==  [hidden, s dropout(hidden) @ A.T] @ [W, B].T
    """
    if not is_lora(layer):
        return hidden, layer.weight, layer.bias
    base = layer.get_base_layer()
    if layer.disable_adapters and layer.merged:
        layer.unmerge()
    names = [] if layer.disable_adapters or layer.merged else layer.active_adapters
    rows, columns, bias = [hidden], [base.weight], base.bias
    for name in (name for name in names if name in layer.lora_A):
        if name in layer.lora_variant:
            raise UnsupportedModel(
                f"the head's adapter {name!r} is a {type(layer.lora_variant[name]).__name__}, expected plain LoRA: "
                f"{WITHOUT_ADAPTER}"
            )
        down, up, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        x = layer._cast_input_dtype(hidden, down.weight.dtype)
        rows.append((down(layer.lora_dropout[name](x)) * scale).to(hidden.dtype))
        columns.append(up.weight.to(base.weight.dtype))
        if up.bias is not None:
            bias = up.bias * scale if bias is None else bias + up.bias * scale
    if len(rows) == 1:
        return hidden, base.weight, base.bias
    return torch.cat(rows, dim=1), torch.cat(columns, dim=1), bias


# ---------------------------------------------------------------------------------------------------------
# Trust


@torch.no_grad()
def check_head(
    model: PreTrainedModel,
    input_ids: Tensor,  # (B, T) real tokens, without padding
    impl: str = "auto",
) -> float:
    """Refuse the model if its own logits and the fused head disagree; returns the largest difference in nats.

    They are compared twice: on the model's hidden states, and on these scaled until the logits reach about 50. A
    softcap, for example, hardly changes the small logits of a fresh model; without the scaling it would be missed.
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
    with quietly(model):
        check_causal(model, lambda ids, **inputs: trunk_hidden(model, ids, **inputs))
    return worst


def _scaled(output, scale: float):
    if isinstance(output, tuple):
        return (output[0] * scale, *output[1:])
    name = next(iter(output))  # last_hidden_state, mostly
    output[name] = output[name] * scale
    return output


def _difference(model: PreTrainedModel, head: Head, input_ids: Tensor, impl: str) -> tuple[float, float]:
    """The largest difference of log-probabilities, and how large rounding alone can make it."""
    targets = input_ids[:, 1:].flatten()
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].flatten(0, 1)  # (N, V)
    expected = torch.log_softmax(logits.double(), dim=-1).gather(-1, targets[:, None])[:, 0]
    hidden = trunk_hidden(model, input_ids)[:, :-1].flatten(0, 1)
    got = linear_logprobs(hidden, head.weight, targets, **head.options(), impl=impl)
    # The model rounds each logit to its dtype, and again for a scale and a cap: an eps of the largest, in the target's
    # logit and in the logsumexp. Accumulation in another order adds some eps of float32.
    eps = max(torch.finfo(dtype).eps for dtype in (logits.dtype, head.weight.dtype))
    bound = (4 * eps + 32 * torch.finfo(torch.float32).eps) * max(1.0, logits.abs().max().item())
    return (got.double() - expected).abs().max().item(), bound
