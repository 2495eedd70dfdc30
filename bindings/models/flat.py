"""Attention over flat batches whose groups share a prompt, and the way into the models of transformers.

    hidden = packed_hidden(model, pack(groups))     # (N, D): the states that predict the completion tokens

Within a group a completion sees its prompt and itself, causally, and nothing of its siblings. So attention runs per
segment: queries of lengths (p, c, r) over keys of lengths (p, p + c, p + r), aligned at the end. Gradients of a shared
prompt are the sum over its completions, added in a fixed order.

A model keeps its code: transformers lets attention functions be registered by name. `use_packed_attention` switches a
model's trunk to one that takes flat batches, and hands all other calls to the implementation that was there before; so
generation and padded batches stay what they were, bit by bit, and gradient checkpointing, which runs layers again in
the backward, finds the same function there. `check_packing` compares the two on the model itself, since no list of
architectures is complete.

In exact arithmetic a token's hidden state does not depend on the other groups of its batch, nor on its siblings. Its
last bits may: matrix products over another number of rows round otherwise, as in padded batches of another size. The
same flat batch gives the same bits; torch's variable-length kernel does in its backward only under
`torch.use_deterministic_algorithms`.

H query heads, K key and value heads, d per head; T tokens of a flat batch.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from prefuse.models.logps import UnsupportedModel, trunk_hidden, trunk_of
from prefuse.packing import Packed, Segment, Segments, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Backend = Literal["auto", "flash_attn", "varlen", "flex", "sdpa"]

# ---------------------------------------------------------------------------------------------------------
# The function


def shared_prefix_attention(
    query: Tensor,  # (1, H, T, d)
    key: Tensor,  # (1, K, T, d), H a multiple of K
    value: Tensor,  # (1, K, T, d)
    segments: Segments,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> Tensor:  # (1, H, T, d)
    """`F.scaled_dot_product_attention(q, k, v, is_causal=True)` of every prompt + completion alone, prompts run once.

    `scale` is 1 / sqrt(d) unless given. With a `window`, a token sees that many: itself and those just before it, its
    prompt's among them. With a `softcap`, scores s become softcap * tanh(s / softcap). Nothing (T, T) is allocated.

    Backends: flash-attn's varlen kernels; `torch.nn.attention.varlen` (no softcap); Flex attention, compiled; and
    `sdpa`, one call per segment, on any device. "auto" on CUDA takes the first that can, elsewhere sdpa; a backend
    that is asked for and cannot run raises.
    """
    _check_shapes(query, key, value, segments)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    dtype = _compute_dtype(query, value)
    query, key, value = (x.to(dtype) for x in (query, key, value))
    name = _choose(query, value, softcap) if backend == "auto" else backend
    problem = _why_not(name, query, value, softcap)
    if problem is not None:
        raise ValueError(f'backend "{name}" cannot run here: {problem}; use backend="auto"')
    return _BACKENDS[name](query, key, value, segments, scale, window, softcap)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, segments: Segments) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.ndim != 4 or len(query) != 1 or query.shape[2] != segments.num_tokens:
        raise ValueError(f"expected one flat batch of its segments' {segments.num_tokens} tokens, got {shapes}")
    if key.shape[:3] != value.shape[:3] or key.shape[2] != query.shape[2] or query.shape[1] % key.shape[1]:
        raise ValueError(f"expected keys and values for each token, with heads that divide the query's, got {shapes}")


def _compute_dtype(query: Tensor, value: Tensor) -> torch.dtype:
    """Autocast's where it is on, as for torch's own attention; rotary embeddings leave queries in float32 there."""
    if torch.is_autocast_enabled(query.device.type) and value.dtype != torch.float64:
        return torch.get_autocast_dtype(query.device.type)
    return value.dtype


def _choose(query: Tensor, value: Tensor, softcap: float | None) -> str:
    order = ("flash_attn", "varlen", "flex") if query.device.type == "cuda" else ()
    return next((name for name in order if _why_not(name, query, value, softcap) is None), "sdpa")


def _why_not(name: str, query: Tensor, value: Tensor, softcap: float | None) -> str | None:
    """What keeps a backend from this input, None if nothing does."""
    if name not in _BACKENDS:
        return f"expected one of auto, {', '.join(_BACKENDS)}"
    if name == "sdpa":
        return None
    head = query.shape[-1]
    if name == "flex":
        whole = head == value.shape[-1] and head >= 16 and query.dtype != torch.float64
        if query.device.type == "cuda" and not whole:
            return f"it takes one head size of 16 or more, and no float64; got {head}, {value.shape[-1]}, {query.dtype}"
        return None
    if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
        return f"it takes float16 or bfloat16 on CUDA, got {query.dtype} on {query.device.type}"
    if torch.cuda.get_device_capability(query.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or above"
    if head != value.shape[-1] or head > 256 or head % 8:
        return f"it takes one head size, a multiple of 8 up to 256, got {head} and {value.shape[-1]}"
    if name == "varlen":
        if softcap is not None:
            return "it has no softcap"
        return None if _torch_varlen_parameters() else "this torch's varlen_attn has no window_size and enable_gqa"
    return None if importlib.util.find_spec("flash_attn") else "flash_attn is not installed"


# ---------------------------------------------------------------------------------------------------------
# One call per segment


def _per_segment(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    # split once: its backward is one concatenation, where each slice's is a tensor of the whole batch
    lengths = [len(segment.own) for segment in segments.all]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    outputs, prompt = [], 0
    for i, segment in enumerate(segments.all):
        if len(segment.prompt) == 0:
            prompt, k, v = i, keys[i], values[i]
        else:
            seen = _seen_of_prompt(segment, window)
            first = len(segment.prompt) - len(seen)
            k, v = (torch.cat([x[prompt][:, :, first:], x[i]], dim=2) for x in (keys, values))
        outputs.append(_segment_attention(queries[i], k, v, segments, scale, window, softcap))
    return torch.cat(outputs, dim=2)


def _seen_of_prompt(segment: Segment, window: int | None) -> range:
    """The part of its prompt that a completion's first token sees; the others see no more."""
    if window is None:
        return segment.prompt
    return segment.prompt[max(0, len(segment.prompt) - (window - 1)) :]


def _segment_attention(
    query: Tensor,  # (1, H, q, d)
    key: Tensor,  # (1, K, k, d) k >= q: the query's own tokens are the last
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:  # (1, H, q, d)
    rows, columns = query.shape[2], key.shape[2]
    if window is not None and window >= columns:
        window = None
    mask = None
    if rows > 1 or window is not None:
        mask = segments.once(_mask, rows, columns, window, query.device)
    if softcap is not None:
        return _softcapped(query, key, value, mask, scale, softcap)
    causal = rows == columns and window is None
    return nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=None if causal else mask, is_causal=causal, scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


def _mask(segments: Segments, rows: int, columns: int, window: int | None, device: torch.device) -> Tensor:
    """(rows, columns) bool, aligned at the end: query i stands at column columns - rows + i."""
    behind = torch.arange(columns - rows, columns, device=device)[:, None] - torch.arange(columns, device=device)
    seen = behind >= 0
    return seen if window is None else seen & (behind < window)


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float
) -> Tensor:  # (1, H, q, d)
    grouped = query.unflatten(1, (key.shape[1], -1))  # (1, K, H / K, q, d)
    # softcap * tanh(scale * q @ k.T / softcap)
    scores = softcap * torch.tanh((grouped @ key[:, :, None].mT) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return (weights.to(value.dtype) @ value[:, :, None]).flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------
# Variable-length kernels: keys and values are gathered, each segment's end to end


@dataclass(frozen=True)
class VarlenIndex:
    """The arguments of a variable-length attention call for one flat batch."""

    keys: Gather  # (sum of key lengths,) in the T
    cu_seqlens_q: Tensor  # (segments + 1,) int32
    cu_seqlens_k: Tensor  # (segments + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int


def varlen_index(segments: Segments, window: int | None, device: torch.device) -> VarlenIndex:
    """A segment's keys are the part of its prompt that it sees, then its own tokens."""
    keys = [[*_seen_of_prompt(segment, window), *segment.own] for segment in segments.all]
    counts_q, counts_k = ([len(segment.own) for segment in segments.all], [len(k) for k in keys])
    cu_q, cu_k = (torch.tensor([0, *counts]).cumsum(0).int().to(device) for counts in (counts_q, counts_k))
    index = torch.tensor([i for k in keys for i in k])
    return VarlenIndex(Gather.of(index, device), cu_q, cu_k, max(counts_q), max(counts_k))


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None,
    softcap: float | None, *, attend: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    index = segments.once(varlen_index, window, query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    # A window of w tokens is, to these kernels, w - 1 to the left: both ends count, and sequences align at their end.
    left = -1 if window is None or window >= index.max_seqlen_k else window - 1
    out = attend(
        q.contiguous(), gather(k, index.keys), gather(v, index.keys), index.cu_seqlens_q, index.cu_seqlens_k,
        index.max_seqlen_q, index.max_seqlen_k, scale, (left, 0), softcap,
    )  # fmt: skip
    return out.transpose(0, 1)[None]


def _flash_attn(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size, softcap) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, softmax_scale=scale, causal=True, window_size=window_size,
        softcap=softcap or 0.0, deterministic=True,
    )  # fmt: skip


def _torch_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size, softcap) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert softcap is None
    return varlen_attn(
        q, k, v, cu_q, cu_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=q.shape[1] != k.shape[1]
    )


@functools.cache
def _torch_varlen_parameters() -> bool:
    """Whether this torch's varlen_attn takes what is used here."""
    from torch.nn.attention import varlen

    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen.varlen_attn).parameters.keys()


# ---------------------------------------------------------------------------------------------------------
# Flex attention: the mask as a function of three numbers per token


def _flex(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    def capped(score, batch, head, q, k):
        return softcap * torch.tanh(score / softcap)

    return _flex_attention(query.device.type)(
        query, key, value, score_mod=None if softcap is None else capped, scale=scale,
        block_mask=segments.once(_block_mask, window, query.device), enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip


@functools.cache
def _flex_attention(device: str) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def _block_mask(segments: Segments, window: int | None, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    group, side, position = token_places(segments, device)

    def visible(batch, head, q, k):
        behind = position[q] - position[k]
        seen = (group[q] == group[k]) & ((side[k] == 0) | (side[k] == side[q])) & (behind >= 0)
        return seen if window is None else seen & (behind < window)

    size = segments.num_tokens
    return create_block_mask(visible, None, None, size, size, device=device, _compile=device.type == "cuda")


def token_places(segments: Segments, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:  # 3 x (T,)
    """Of each token its group, its side (0: the prompt, then 1, 2, ... for the completions) and its position."""
    places = [
        (group, side, position + (lengths[0] if side else 0))
        for group, lengths in enumerate(segments.lengths)
        for side, length in enumerate(lengths)
        for position in range(length)
    ]
    return torch.tensor(places, device=device).unbind(1)


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "flash_attn": functools.partial(_varlen, attend=_flash_attn),
    "varlen": functools.partial(_varlen, attend=_torch_varlen),
    "flex": _flex,
    "sdpa": _per_segment,
}

# ---------------------------------------------------------------------------------------------------------
# Rows taken more than once


@dataclass(frozen=True)
class Gather:
    """Rows to take, some of them several times, and how to add up their gradients in a fixed order."""

    index: Tensor  # (M,)
    rounds: list[tuple[Tensor, Tensor]]  # (rows, places in the M): the first copy of each row, the second, ...

    @classmethod
    def of(cls, index: Tensor, device: torch.device) -> Gather:  # (M,)
        order = torch.argsort(index, stable=True)
        rows, copies = torch.unique_consecutive(index[order], return_counts=True)
        starts = copies.cumsum(0) - copies
        rounds = []
        for copy in range(int(copies.max())):
            more = copies > copy
            rounds.append((rows[more].to(device), order[starts[more] + copy].to(device)))
        return cls(index.to(device), rounds)


def gather(x: Tensor, rows: Gather) -> Tensor:  # (T, ...) -> (M, ...)
    """`x[rows.index]`; its gradient is the same bits every time, which that of torch is not on a GPU."""
    return _Gather.apply(x, rows)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Gather) -> Tensor:
        ctx.rows, ctx.shape = rows, x.shape
        return x.index_select(0, rows.index)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        total = grad.new_zeros(ctx.shape)
        for rows, places in ctx.rows.rounds:  # within a round each row comes once
            total[rows] = total[rows] + grad[places]
        return total, None


# ---------------------------------------------------------------------------------------------------------
# The way into transformers

PREFIX = "prefuse_packed_"  # and the implementation for all other calls: prefuse_packed_sdpa
BEFORE = ("sdpa", "eager")  # what a model may have had

_running: ContextVar[Segments | None] = ContextVar("segments of the flat batch that a trunk is running", default=None)


@dataclass(frozen=True)
class PackedMask:
    """What layers get as their attention mask in a flat batch."""

    segments: Segments
    window: int | None


def packed_hidden(model: PreTrainedModel, packed: Packed) -> Tensor:  # (N, D)
    """The last hidden states that predict the completion tokens, as the head receives them."""
    return pick_predictors(flat_hidden(model, packed), packed.segments)


def pick_predictors(hidden: Tensor, segments: Segments) -> Tensor:  # (T, D) -> (N, D)
    """The states that predict the completion tokens: a prompt's last one for each of its completions."""
    return gather(hidden, segments.once(_predictors, hidden.device))


def _predictors(segments: Segments, device: torch.device) -> Gather:
    return Gather.of(torch.tensor(segments.predictors), device)


def flat_hidden(model: PreTrainedModel, packed: Packed) -> Tensor:  # (T, D)
    """The last hidden state of every token of the flat batch."""
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
        difference, bound = _difference(model)
        if not difference <= bound:  # a nan is a difference
            raise UnsupportedModel(
                f"{type(model).__name__}: hidden states of a flat batch with shared prompts differ from those of its "
                f"sequences alone by {difference:.3g} of their size, more than rounding explains ({bound:.1g}). "
                "It does something across tokens that this library does not know: use padded batches"
            )
    except (UnsupportedModel, TypeError) as error:
        if trunk.config._attn_implementation != before:
            trunk.set_attn_implementation(before)
        if isinstance(error, TypeError):  # a trunk that takes no position_ids, or nothing that it does not know
            raise UnsupportedModel(f"{type(model).__name__} cannot run flat batches: {error}") from error
        raise
    return difference


def _difference(model: PreTrainedModel) -> tuple[float, float]:
    """The largest difference of hidden states, and how large rounding alone can make it."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = [(ids[:9], [ids[9:15], ids[15:17], ids[17:18]]), (ids[20:23], [ids[23:30]]), (ids[30:31], [ids[31:40]])]
    packed = pack(groups).to(model.device)
    got = packed_hidden(model, packed).float()
    alone = []
    for prompt, completions in groups:
        for completion in completions:
            hidden = trunk_hidden(model, torch.tensor([prompt + completion], device=model.device))[0]
            alone.append(hidden[len(prompt) - 1 : -1].float())
    expected = torch.cat(alone)
    # A wrong mask moves a state by some tenth of its size; rounding by some eps, which add up over the layers.
    dtype = _compute_dtype(packed.input_ids, next(model.parameters()))
    bound = max(1e-4, 16 * torch.finfo(dtype).eps)
    return ((got - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item(), bound
