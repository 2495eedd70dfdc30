"""Log-probabilities of a transformers causal LM without its logits.

    logps = sequence_logps(model, input_ids, labels, attention_mask=mask)          # (B,) float64

`model` is what training calls: the causal LM itself, or that inside DDP, `fully_shard`, `torch.compile` or PEFT. It
runs by its own forward, from the outside in, so every hook fires and every weight is where it should be; only its head
is another while the call lasts: it takes the hidden states of completion tokens straight to their log-probabilities.

For those who call trunk and head themselves:

    head = head_of(model)
    hidden = trunk_hidden(model, input_ids, attention_mask)              # (B, T, D)
    logps = prefuse.linear_logprobs(hidden[:, :-1].flatten(0, 1), head.weight, targets, **head.options())

A head is understood by its parts (weight, bias, softcap, scale), which every model names in its own way. So nothing
is taken on trust: `sequence_logps` sends numbers through whatever the model's forward does to its logits, and
`check_head` compares log-probabilities with those of `model(...).logits`.

B rows of T tokens, N completion tokens of S sequences, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from prefuse.kernels import linear_logprobs
from prefuse.kernels.attention.segments import Segments
from prefuse.models.flat import compare_flat, pick_predictors, within
from prefuse.models.head import head_layer, product_of, transform_of
from prefuse.models.inside import run_with_head
from prefuse.models.probes import States, check_padding
from prefuse.models.trunk import UnsupportedModel, causal_lm_of, check_versions
from prefuse.packing import Packed
from prefuse.tokens import IGNORE_INDEX, keep_tokens, learned

# ---------------------------------------------------------------------------------------------------------
# Log-probabilities


class TokenLogps(NamedTuple):
    """Packed, as `prefuse.preference_loss` takes them."""

    logps: Tensor  # (N,) float32, with gradient
    cu_seqlens: Tensor  # (S + 1,) int32


def sequence_logps(
    model: nn.Module,
    input_ids: Tensor | Packed,  # (B, T)
    labels: Tensor | None = None,  # (B, T)
    *,
    attention_mask: Tensor | None = None,  # (B, T)
    position_ids: Tensor | None = None,  # (B, T)
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    reduction: Literal["sum", "mean", "none"] = "sum",
    temperature: float = 1.0,
    impl: str = "auto",
    gradient_tolerance: float = 0.0,
) -> Tensor:  # (B,) or (S,) float64; (B, T) float32
    """Equals, without the `(B, T, V)` logits ever existing::

        logits = model(input_ids, attention_mask=attention_mask).logits[:, :-1].float() / temperature
        targets = labels[:, 1:]
        logps = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        (logps * (targets != -100)).sum(-1)

    Only labelled tokens reach the head: those with a label that is not -100 and a token of the same sequence before
    them. A sequence's first token counts nowhere, on whichever side it is padded.

    Args:
        model: a causal LM of transformers, or one in DistributedDataParallel, `fully_shard`, `torch.compile` or PEFT:
            give what you would call, the outermost. Autocast and gradient checkpointing are yours to switch on, and
            `with model.disable_adapter():` makes the reference.
        input_ids: (B, T) padded on either side, with its attention_mask; or (1, T) sequences end to end, with
            cu_seqlens; or a `prefuse.packing.Packed`, whose prompts run once for all of their completions.
        labels: (B, T) as transformers has them, not shifted: `labels[:, t]` is the token at t, or -100. Default: all
            tokens of the sequences.
        attention_mask: (B, T) 1 for real tokens. Where a row begins with 0, position ids are
            counted from its first real token.
        position_ids: (B, T) where they are to be others.
        cu_seqlens: (S + 1,) offsets of the sequences in a flat batch; attention then stays within each.
        reduction: "sum"; "mean", per token that counts (0 for a row without any); or "none": (B, T) float32, at t that
            of `labels[:, t]`, 0 where it does not count.
        temperature: divides the logits.
        impl, gradient_tolerance: as in `prefuse.linear_logprobs`.

    Raises:
        UnsupportedModel: (a ValueError) a wrapper, a head or a transform of the logits that this does not compute.
        UnsupportedVersion: (an ImportError) transformers or PEFT outside the range it was written for.
        TypeError, ValueError: arguments that do not fit.
    """
    if reduction not in ("sum", "mean", "none"):
        raise ValueError(f'reduction must be "sum", "mean" or "none", got {reduction!r}')
    batch = _inputs(input_ids, labels, attention_mask, position_ids, cu_seqlens)
    if reduction == "none" and batch.shape is None:
        raise ValueError('reduction="none" needs a (B, T) batch to lay its numbers out: use token_logps for a Packed')
    logps = _run(model, batch, temperature, impl, gradient_tolerance)
    if reduction == "none":
        return logps.new_zeros(batch.shape).flatten().index_put((batch.rows + 1,), logps).view(batch.shape)
    sums = torch.segment_reduce(logps.double(), "sum", offsets=batch.cu_seqlens.long(), unsafe=True)
    return sums if reduction == "sum" else sums / batch.cu_seqlens.diff().clamp(min=1)


def token_logps(
    model: nn.Module,
    input_ids: Tensor | Packed,  # (B, T)
    labels: Tensor | None = None,  # (B, T)
    *,
    attention_mask: Tensor | None = None,  # (B, T)
    position_ids: Tensor | None = None,  # (B, T)
    cu_seqlens: Tensor | None = None,  # (S + 1,)
    temperature: float = 1.0,
    impl: str = "auto",
    gradient_tolerance: float = 0.0,
) -> TokenLogps:
    """`sequence_logps` before the sum: the log-probability of each token that counts, the sequences end to end.

    For `prefuse.preference_loss(policy.logps, reference.logps, policy.cu_seqlens)`, which subtracts token by token.
    """
    batch = _inputs(input_ids, labels, attention_mask, position_ids, cu_seqlens)
    return TokenLogps(_run(model, batch, temperature, impl, gradient_tolerance), batch.cu_seqlens)


def _run(model: nn.Module, batch: _Inputs, temperature: float, impl: str, gradient_tolerance: float) -> Tensor:  # (N,)
    check_versions(model)
    causal = causal_lm_of(model)
    layer = head_layer(causal)
    transform = transform_of(causal.config.get_text_config())

    def logps(hidden: Tensor) -> Tensor:  # (B, T, D) -> (N,)
        rows, weight, bias = product_of(causal, layer, batch.pick(hidden))
        return linear_logprobs(
            rows, weight, batch.targets, bias=bias, temperature=temperature, impl=impl,
            gradient_tolerance=gradient_tolerance, **transform,
        )  # fmt: skip

    with batch.attention(causal):
        return run_with_head(model, causal, layer, logps, batch.checks(causal), **batch.inputs(causal))


# ---------------------------------------------------------------------------------------------------------
# Batches


@dataclass(frozen=True)
class _Inputs:
    """What runs, and which of its tokens count."""

    run: dict[str, Tensor]  # arguments of the model's forward
    rows: Tensor  # (N,) in the B * T: the position before each token that counts
    targets: Tensor  # (N,)
    cu_seqlens: Tensor  # (S + 1,) int32 in the N
    shape: torch.Size | None = None  # (B, T) of the labels
    segments: Segments | None = None  # of a flat batch

    def pick(self, hidden: Tensor) -> Tensor:  # (B, T, D) -> (N, D)
        if hidden.shape[:-1] != self.run["input_ids"].shape:
            raise UnsupportedModel(
                f"the head was given hidden states of shape {tuple(hidden.shape)} for input_ids of shape "
                f"{tuple(self.run['input_ids'].shape)}: expected one for each token"
            )
        if self.shape is None:  # a prompt's last state counts once for each of its completions
            return pick_predictors(hidden[0], self.segments)
        return hidden.flatten(0, 1).index_select(0, self.rows)

    def inputs(self, causal: nn.Module) -> dict:
        """Arguments of the model's forward."""
        segments = {} if self.segments is None else {"packed_segments": self.segments}
        return _taken(causal, self.run) | segments | {"use_cache": False}

    def checks(self, causal: nn.Module) -> dict[str, Callable[[States], None]]:
        """What must hold of the model for a batch like this one."""
        if self.segments is not None:
            return {"flat": functools.partial(_check_flat, causal)}
        if "attention_mask" not in self.run:
            return {}
        left = "position_ids" in self.run

        def inputs_of(mask: Tensor) -> dict:
            positions = {"position_ids": _positions(mask)} if left else {}
            return _taken(causal, {"attention_mask": mask} | positions)

        name = "padding on the left" if left else "padding"
        return {name: lambda states: check_padding(causal, states, inputs_of, left=left)}

    def attention(self, causal: nn.Module) -> contextlib.AbstractContextManager:
        if self.segments is None:
            return contextlib.nullcontext()
        return within(causal, self.segments)


def _taken(causal: nn.Module, inputs: dict) -> dict:
    """`inputs`, without position_ids if the model's forward takes none."""
    positions = "position_ids" in inspect.signature(type(causal).forward).parameters
    return {name: x for name, x in inputs.items() if name != "position_ids" or positions}


def _positions(attention_mask: Tensor) -> Tensor:  # (B, T) -> (B, T) from 0 at the first token
    return (attention_mask.long().cumsum(1) - 1).clamp(min=0)


def _check_flat(causal: nn.Module, states: States) -> None:
    def flat(packed: Packed) -> Tensor:  # (T, D)
        inputs = {"position_ids": packed.position_ids}
        inputs |= {"attention_mask": torch.ones_like(packed.input_ids, dtype=torch.bool)}
        with within(causal, packed.segments):
            return states(packed.input_ids, packed_segments=packed.segments, **_taken(causal, inputs))[0]

    compare_flat(causal, flat, states)


def _inputs(
    input_ids: Tensor | Packed, labels: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> _Inputs:  # fmt: skip
    if not isinstance(input_ids, Tensor):
        return _of_packed(input_ids, labels, attention_mask, position_ids, cu_seqlens)
    _check_batch(input_ids, labels, attention_mask, position_ids, cu_seqlens)
    if cu_seqlens is not None:
        return _flat(input_ids, input_ids if labels is None else labels, position_ids, cu_seqlens)
    run = {"input_ids": input_ids}
    labels = input_ids if labels is None else labels
    kept = learned(labels)
    if attention_mask is not None:
        real = attention_mask.bool()
        kept = kept & real & real.roll(1, dims=1)
        run |= {"attention_mask": attention_mask}
        if position_ids is None and not bool(real[:, 0].all()):  # right padding: the model's positions are right
            position_ids = _positions(attention_mask)
        run |= {} if position_ids is None else {"position_ids": position_ids}
    elif position_ids is not None:
        run |= {"position_ids": position_ids}
    tokens = keep_tokens(labels, kept)
    return _Inputs(run, tokens.predictors, tokens.targets, tokens.cu_seqlens, labels.shape)


def _flat(input_ids: Tensor, labels: Tensor, position_ids: Tensor | None, cu_seqlens: Tensor) -> _Inputs:
    lengths = cu_seqlens.diff().tolist()
    starts = cu_seqlens[:-1].long()
    kept = labels != IGNORE_INDEX
    kept[0, starts] = False  # nothing predicts a sequence's first token
    if position_ids is None:
        position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        position_ids = position_ids - starts.repeat_interleave(cu_seqlens.diff())[None]
    run = {"input_ids": input_ids, "position_ids": position_ids}
    # A mask without zeros keeps transformers from making one of the position ids, which restart here.
    run["attention_mask"] = torch.ones_like(input_ids, dtype=torch.bool)
    by_sequence = torch.segment_reduce(kept[0].double(), "sum", offsets=cu_seqlens.long(), unsafe=True).long()
    tokens, segments = keep_tokens(labels, kept, by_sequence), Segments([[length] for length in lengths])
    return _Inputs(run, tokens.predictors, tokens.targets, tokens.cu_seqlens, labels.shape, segments)


def _of_packed(packed: Packed, *others: Tensor | None) -> _Inputs:
    if not isinstance(packed, Packed):
        raise TypeError(f"input_ids must be a torch.Tensor or a prefuse.packing.Packed, got {type(packed).__name__}")
    if any(other is not None for other in others):
        raise ValueError("a Packed knows its labels, positions and lengths: expected input_ids alone")
    run = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
    run["attention_mask"] = torch.ones_like(packed.input_ids, dtype=torch.bool)
    return _Inputs(run, packed.predictors, packed.targets, packed.cu_seqlens, None, packed.segments)


def _check_batch(
    input_ids: Tensor, labels: Tensor | None, attention_mask: Tensor | None, position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:  # fmt: skip
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(f"expected input_ids (B, T) of integers, got {tuple(input_ids.shape)} of {input_ids.dtype}")
    for name, x in (("labels", labels), ("attention_mask", attention_mask)):
        if x is not None and x.shape != input_ids.shape:
            hint = "; labels are shifted inside, so give them as long as input_ids" if name == "labels" else ""
            raise ValueError(
                f"expected {name} of input_ids' shape {tuple(input_ids.shape)}, got {tuple(x.shape)}{hint}"
            )
    if position_ids is not None and position_ids.shape[-1] != input_ids.shape[1]:
        raise ValueError(f"expected position_ids for {input_ids.shape[1]} tokens, got {tuple(position_ids.shape)}")
    if cu_seqlens is None:
        return
    if attention_mask is not None:
        raise ValueError("a flat batch has no padding: give cu_seqlens or attention_mask, not both")
    if len(input_ids) != 1:
        raise ValueError(f"expected a flat batch (1, T) with cu_seqlens, got {tuple(input_ids.shape)}")
    ends = cu_seqlens.tolist()
    if ends[:1] != [0] or ends[-1] != input_ids.shape[1] or any(a >= b for a, b in itertools.pairwise(ends)):
        raise ValueError(
            f"expected cu_seqlens to rise from 0 to the {input_ids.shape[1]} tokens, each sequence with one at least, "
            f"got {ends[:8]}{'...' if len(ends) > 8 else ''}"
        )
