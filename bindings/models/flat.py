"""The way of flat batches, whose groups share a prompt, into the models of transformers.

    hidden = packed_hidden(model, pack(groups))     # (N, D): the states that predict the completion tokens

A model keeps its code: transformers lets attention functions be registered by name. `use_packed_attention` switches a
model's trunk to `shared_prefix_attention`, and hands all other calls to the implementation that was there before; so
generation and padded batches stay what they were, bit by bit, and gradient checkpointing, which runs layers again in
the backward, finds the same function there. `check_packing` compares the two on the model itself, since no list of
architectures is complete.

In exact arithmetic a token's hidden state does not depend on the other groups of its batch, nor on its siblings. Its
last bits may: matrix products over another number of rows round otherwise, as in padded batches of another size.

H query heads, K key and value heads, d per head; T tokens of a flat batch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prefuse.kernels.attention.gather import Gather, gather
from prefuse.kernels.attention.segments import Segments
from prefuse.kernels.attention.shared_prefix import shared_prefix_attention
from prefuse.models.probes import bound_of, moved, probe_ids, quietly
from prefuse.models.trunk import UnsupportedModel, trunk_hidden, trunk_of
from prefuse.packing import Packed, Padded, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "prefuse_packed_"  # and the implementation for all other calls: prefuse_packed_sdpa
BEFORE = ("sdpa", "eager")  # what a model may have had

_running: ContextVar[Segments | None] = ContextVar("segments of the flat batch that a trunk is running", default=None)


@dataclass(frozen=True)
class PackedMask:
    """What layers get as their attention mask in a flat batch."""

    segments: Segments
    window: int | None


def completion_hidden(model: PreTrainedModel, tokens: Packed | Padded) -> Tensor:  # (N, D)
    """The hidden states that predict the completion tokens; no prompt and no padding reaches the head."""
    if isinstance(tokens, Packed):
        return packed_hidden(model, tokens)
    hidden = trunk_hidden(model, tokens.input_ids, tokens.attention_mask)  # (S, T, D)
    return hidden.flatten(0, 1).index_select(0, tokens.predictors)


def packed_hidden(model: PreTrainedModel, packed: Packed) -> Tensor:  # (N, D)
    """The last hidden states that predict the completion tokens, as the head receives them."""
    return pick_predictors(flat_hidden(model, packed), packed.segments)


def pick_predictors(hidden: Tensor, segments: Segments) -> Tensor:  # (T, D) -> (N, D)
    """The states that predict the completion tokens: a prompt's last one for each of its completions."""
    return gather(hidden, segments.once(_predictors, hidden.device))


def _predictors(segments: Segments, device: torch.device) -> Gather:
    return Gather.of(torch.tensor(segments.predictors), device)


def flat_hidden(model: PreTrainedModel, packed: Packed) -> Tensor:  # (T, D)
    """The last hidden state of every token of the flat batch. The first time, `check_packing` runs."""
    if model not in _checked:
        check_packing(model)
    return _flat_hidden(model, packed)


_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models whose flat batches are known to be right


def _flat_hidden(model: PreTrainedModel, packed: Packed) -> Tensor:  # (T, D)
    with within(model, packed.segments):
        # A mask without zeros keeps transformers from making one of the position ids, which restart here.
        return trunk_of(model)(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=torch.ones_like(packed.input_ids, dtype=torch.bool),
            use_cache=False,
            packed_segments=packed.segments,
        )[0][0]


@contextlib.contextmanager
def within(model: PreTrainedModel, segments: Segments) -> Iterator[None]:
    """While this lasts, the model takes the flat batch of `segments`, given as its `packed_segments` too."""
    use_packed_attention(model)
    token = _running.set(segments)
    try:
        yield
    finally:
        _running.reset(token)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While this lasts, no flat batch runs, even inside `within`."""
    token = _running.set(None)
    try:
        yield
    finally:
        _running.reset(token)


def use_packed_attention(model: PreTrainedModel) -> None:
    """Switch the trunk's attention to one that takes flat batches, for good; calls without one are as before.

    `packed_hidden` does it where it was not done. Raises UnsupportedModel, and changes nothing, for a model that is
    known to be out of reach; `check_packing` finds the others.
    """
    config = trunk_of(model).config
    if str(config._attn_implementation).startswith(PREFIX):
        return
    reason = _out_of_reach(model)
    if reason is not None:
        raise UnsupportedModel(f"{type(model).__name__} cannot run flat batches with shared prompts: {reason}")
    _register()
    trunk_of(model).set_attn_implementation(PREFIX + config._attn_implementation)


def _out_of_reach(model: PreTrainedModel) -> str | None:
    trunk = trunk_of(model)
    config = trunk.config
    if not trunk._can_set_attn_implementation():
        return "its attention is not taken from transformers' AttentionInterface"
    if config._attn_implementation not in BEFORE:
        return (
            f'it was loaded with attn_implementation="{config._attn_implementation}": load it with "sdpa" or "eager"; '
            "flat batches run flash-attn's or torch's variable-length kernels all the same"
        )
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        return f"it has layers of the kind {', '.join(sorted(kinds))}, expected full and sliding-window attention only"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):
        if isinstance(parameters, dict) and parameters.get("rope_type") in ("dynamic", "longrope"):
            return f"its {parameters['rope_type']} rotary embedding depends on the longest sequence of the batch"
    return None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    for before in BEFORE:
        # torch.compile would look into the segments, and compile again for every flat batch
        attention = torch.compiler.disable(functools.partial(_attention, before))
        AttentionInterface.register(PREFIX + before, attention)
        AttentionMaskInterface.register(PREFIX + before, functools.partial(_attention_mask, before))


def _attention_mask(before: str, *args, mask_function: Callable, local_size: int | None = None, use_vmap=False, **more):
    """transformers' mask of a layer: in a flat batch, who sees whom by rule, else the former implementation's."""
    segments = _running.get()
    if segments is None:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        more |= {"mask_function": mask_function, "use_vmap": use_vmap}
        if local_size is not None:
            more["local_size"] = local_size
        return ALL_MASK_ATTENTION_FUNCTIONS[before](*args, **more)
    if use_vmap or not _is_causal_window(mask_function, local_size):
        raise UnsupportedModel("the model asks for an attention mask that is neither causal nor a sliding window")
    return PackedMask(segments, local_size)


def _is_causal_window(mask_function: Callable, window: int | None) -> bool:
    """Whether the rule is `0 <= q - k < window`, tried near the diagonal and near the window's edge, early and late."""
    edge = window or 1
    q = torch.tensor([q for far in (0, edge, 3 * edge, 10**5 + 7) for q in range(far, far + 4)])[:, None]
    offsets = torch.tensor([0, 1, 2, edge - 1, edge, edge + 1, 10**5])
    behind = torch.cat([-offsets, offsets])[None]
    k = (q - behind).clamp(min=0)
    zero = torch.zeros_like(k)
    seen = (k <= q) if window is None else (k <= q) & (q - k < window)
    try:
        asked = mask_function(zero, zero, q, k)
    except (RuntimeError, IndexError):  # a rule made of tensors, on another device or of this batch's size
        return False
    return torch.equal(asked.expand_as(seen).bool(), seen)


def _attention(
    before: str,
    module: nn.Module,
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, K, T, d)
    value: Tensor,  # (1, K, T, d)
    attention_mask: PackedMask | Tensor | None,
    packed_segments: Segments | None = None,
    **options,
) -> tuple[Tensor, Tensor | None]:  # (1, T, H, d)
    """transformers' attention function of a layer."""
    if (packed_segments is not None) != isinstance(attention_mask, PackedMask):
        # A layer that got only one of the two would attend to the wrong tokens.
        raise UnsupportedModel(
            f"{type(module).__name__} got {'no' if packed_segments is None else 'the'} segments of its flat batch, and "
            f"{type(attention_mask).__name__} as its mask: expected a model that hands both on to its attention, run "
            "by packed_hidden"
        )
    if packed_segments is None:
        return _former(before, module)(module, query, key, value, attention_mask, **options)
    window = _window(module, attention_mask, options)
    out = shared_prefix_attention(
        query, key, value, packed_segments, scale=options.get("scaling"), window=window, softcap=options.get("softcap")
    )
    return out.transpose(1, 2).contiguous(), None


def _window(module: nn.Module, mask: PackedMask, options: dict) -> int | None:
    """The layer's window, once it is sure that nothing else about its attention is unusual."""
    unusual = {"s_aux": "attention sinks", "position_bias": "a position bias", "dropout": "attention dropout"}
    unusual |= {"cache": "a paged cache"}
    for option, meaning in unusual.items():
        if options.get(option) is not None and not (option == "dropout" and options[option] == 0.0):
            fix = ": set it to 0, or call model.eval()" if option == "dropout" else ""
            raise UnsupportedModel(f"{type(module).__name__} has {meaning}, which flat batches do not{fix}")
    causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise UnsupportedModel(f"{type(module).__name__} is not causal: expected a decoder")
    asked = options.get("sliding_window")
    if asked is not None and asked != mask.window:
        raise UnsupportedModel(
            f"{type(module).__name__} has a sliding window of {asked}, but its mask has {mask.window}: which is meant?"
        )
    return mask.window


def _former(before: str, module: nn.Module) -> Callable:
    if before == "eager":  # every modeling file has its own; FSDP puts a class of its own in front
        files = (sys.modules[cls.__module__] for cls in type(module).__mro__)
        return next(f.eager_attention_forward for f in files if hasattr(f, "eager_attention_forward"))
    from transformers import AttentionInterface

    return AttentionInterface()[before]


# ---------------------------------------------------------------------------------------------------------
# Trust


@torch.no_grad()
def check_packing(model: PreTrainedModel) -> float:
    """Refuse the model if its hidden states in a flat batch are not those of its sequences run one by one.

    Switches the model to packed attention, or leaves it as it was where it is refused. Returns the largest relative
    difference of a token's hidden state.
    """
    trunk = trunk_of(model)
    before = trunk.config._attn_implementation
    try:
        with quietly(model):
            difference = compare_flat(
                model, lambda packed: _flat_hidden(model, packed), lambda ids: trunk_hidden(model, ids)
            )
    except Exception as error:
        if trunk.config._attn_implementation != before:
            trunk.set_attn_implementation(before)
        if isinstance(error, UnsupportedModel):
            raise
        # a trunk that takes no position_ids, or nothing that it does not know, or reads a mask by itself
        raise UnsupportedModel(
            f"{type(model).__name__} cannot run flat batches: {type(error).__name__}: {error}"
        ) from error
    _checked.add(model)
    return difference


def compare_flat(
    model: PreTrainedModel,
    flat: Callable[[Packed], Tensor],  # -> (T, D)
    single: Callable[[Tensor], Tensor],  # (1, T) -> (1, T, D)
) -> float:
    """Hidden states of a flat batch against those of its sequences one by one: UnsupportedModel if they differ."""
    ids = probe_ids(model, 40).tolist()
    groups = [(ids[:9], [ids[9:15], ids[15:17], ids[17:18]]), (ids[20:23], [ids[23:30]]), (ids[30:31], [ids[31:40]])]
    packed = pack(groups).to(model.device)
    got = pick_predictors(flat(packed), packed.segments)
    rows = []
    for prompt, completions in groups:
        for completion in completions:
            hidden = single(torch.tensor([prompt + completion], device=model.device))[0]
            rows.append(hidden[len(prompt) - 1 : -1])
    expected = torch.cat(rows)
    difference, bound = moved(got, expected), bound_of(expected, model)
    if not difference <= bound:  # a nan is a difference
        raise UnsupportedModel(
            f"{type(model).__name__}: hidden states of a flat batch with shared prompts differ from those of its "
            f"sequences alone by {difference:.3g} of their size, more than rounding explains ({bound:.1g}). "
            "It does something across tokens that this library does not know: use padded batches"
        )
    return difference
