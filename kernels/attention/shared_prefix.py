"""Causal attention over a flat batch whose groups share a prompt: one function, and its four backends.

Within a group a completion sees its prompt and itself, causally, and nothing of its siblings. So attention runs per
segment: queries of lengths (p, c, r) over keys of lengths (p, p + c, p + r), aligned at the end. Gradients of a shared
prompt are the sum over its completions, added in a fixed order.

The same flat batch gives the same bits. One exception: the backward of torch's variable-length kernel does so only
under `torch.use_deterministic_algorithms`.

H query heads, K key and value heads, d per head; T tokens of a flat batch.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from prefuse.kernels.attention.gather import Gather, gather
from prefuse.kernels.attention.segments import Segment, Segments, token_places
from prefuse.kernels.slices import row_blocks

Backend = Literal["auto", "flash_attn", "varlen", "flex", "sdpa"]
# Queries of one call on a CPU, which multiplies all its queries with all its keys, masked ones too.
QUERIES = 128


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
    dtype = attention_dtype(query, value)
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


def attention_dtype(query: Tensor, value: Tensor) -> torch.dtype:
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
    if softcap is not None:
        return _softcapped(query, key, value, _mask_of(segments, rows, columns, window, query), scale, softcap)
    attend = functools.partial(
        nn.functional.scaled_dot_product_attention, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    if rows == columns and window is None:
        return attend(query, key, value, is_causal=True)
    outputs = []
    size = QUERIES if query.device.type == "cpu" else max(rows, 1)
    for part in row_blocks(rows, size) if rows else [slice(0, 0)]:  # an empty completion has no query
        # What none of these queries sees, behind the last one or before the first one's window, is not multiplied.
        last = columns - rows + part.stop
        first = 0 if window is None else max(0, columns - rows + part.start + 1 - window)
        mask = _mask_of(segments, part.stop - part.start, last - first, window, query)
        outputs.append(attend(query[:, :, part], key[:, :, first:last], value[:, :, first:last], attn_mask=mask))
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0]


def _mask_of(segments: Segments, rows: int, columns: int, window: int | None, query: Tensor) -> Tensor | None:
    """`_mask`, made once for a batch; None where a single query sees everything."""
    return segments.once(_mask, rows, columns, window, query.device) if rows > 1 or window is not None else None


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


_BACKENDS: dict[str, Callable[..., Tensor]] = {
    "flash_attn": functools.partial(_varlen, attend=_flash_attn),
    "varlen": functools.partial(_varlen, attend=_torch_varlen),
    "flex": _flex,
    "sdpa": _per_segment,
}
