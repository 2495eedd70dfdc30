"""The loss of supervised fine-tuning where a transformers model or its Trainer computes it, without the logits.

    Trainer(model=fuse_loss(model), ...)        # or Trainer(model=model, compute_loss_func=sft_loss(model), ...)

B rows of T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import prefuse
from prefuse.kernels.checks import check_tolerance
from prefuse.models.head import head_layer, product_of, transform_of
from prefuse.models.inside import ReplacedHead, is_running, own_router_loss
from prefuse.models.trunk import UnsupportedModel, causal_lm_of, check_versions
from prefuse.tokens import IGNORE_INDEX, keep_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fuse_loss(
    model: nn.Module, *, logits_in_eval: bool = False, workspace: int | None = None, impl: str = "auto",
    gradient_tolerance: float = 0.0,
):  # fmt: skip
    """`model(..., labels=labels).loss` without the logits, from now on; returns `model`.

    For `transformers.Trainer` as it is, and any loop that lets the model compute its loss: the same number, divided by
    `num_items_in_batch` where that is given, from the same labels, with the router's loss where that is asked for. The
    first call tries the model's own loss on a few tokens, and refuses one of another kind. The output's `logits` are
    None. Without labels, as in `generate`, the model does what it did; `del model.forward` takes it back (on the
    transformers model itself).

    Call it before the model is wrapped by DistributedDataParallel, `fully_shard` or the Trainer.

    Args:
        model: a causal LM of transformers, or one in PEFT.
        logits_in_eval: in eval mode compute loss and logits as before, for a Trainer's `compute_metrics`.
        workspace, impl, gradient_tolerance: as in `prefuse.linear_preference_loss`.

    Raises:
        UnsupportedModel, UnsupportedVersion, TypeError: as `sequence_logps`; and for a loss of the model's own.
    """
    check_tolerance(gradient_tolerance, impl)
    causal = _with_causal_loss(model)
    how = {"workspace": workspace, "impl": impl, "gradient_tolerance": gradient_tolerance}

    def begin(self, run, kwargs) -> ReplacedHead | None:
        if kwargs.get("labels") is None or (logits_in_eval and not self.training):
            return None
        given = {name: kwargs.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch")}
        layer = head_layer(self, adds_router_loss=True)

        def loss(hidden: Tensor) -> Tensor:  # (1,)
            inputs = _head_inputs(self, layer, hidden)
            return _sft_loss(inputs, **given, **how)[None]

        call = ReplacedHead(self, layer, loss, own_loss=True)
        call.begin(run, kwargs)
        return call

    def result(call: ReplacedHead, output: object) -> object:
        # (no view, for the hooks of fully_shard)
        return _with_loss(output, call.result()[0, 0, 0].clone() + own_router_loss(call.causal, output))

    _install(causal, begin, result)
    return model


def sft_loss(
    model: nn.Module, *, workspace: int | None = None, impl: str = "auto", gradient_tolerance: float = 0.0
) -> Callable[[object, Tensor, Tensor | int | None], Tensor]:
    """A `compute_loss_func` for `transformers.Trainer`, of the number that the Trainer has without one.

        Trainer(model=model, compute_loss_func=sft_loss(model), ...)

    With a `compute_loss_func` the Trainer gives the forward no labels. So from now on the model, in training mode and
    without labels, returns its hidden states and its head in place of logits, and the loss is computed from both; in
    eval mode nothing changes. The head thus runs after the forward. Under `fully_shard` (FSDP2) its weight is gone by
    then, so such a model is refused: use `fuse_loss(model)`, which needs no `compute_loss_func`, there or anywhere.
    """
    check_tolerance(gradient_tolerance, impl)
    causal = _with_causal_loss(model)
    how = {"workspace": workspace, "impl": impl, "gradient_tolerance": gradient_tolerance}

    def begin(self, run, kwargs) -> ReplacedHead | None:
        asked = self.training and torch.is_grad_enabled() and not is_running(self)
        if not asked or kwargs.get("labels") is not None:
            return None
        if any(hasattr(p, "full_tensor") for p in self.parameters()):
            raise UnsupportedModel(
                "sft_loss runs the head after the forward, where fully_shard has taken its weight away: use "
                "prefuse.transformers.fuse_loss(model), and no compute_loss_func"
            )
        if kwargs.get("output_router_logits"):
            raise UnsupportedModel(
                "sft_loss leaves out the router's loss, which output_router_logits=True asks for: use "
                "prefuse.transformers.fuse_loss(model), and no compute_loss_func"
            )
        layer, kept = head_layer(self), []

        def keep(hidden: Tensor) -> Tensor:  # (0,)
            kept.append(_head_inputs(self, layer, hidden))
            return hidden.new_zeros(0, dtype=torch.float32)

        call = ReplacedHead(self, layer, keep, kept=kept)
        call.begin(run, kwargs)
        return call

    def result(call: ReplacedHead, output: object) -> HeadInputs:
        call.result()
        return call.kept[0]

    def loss(outputs: object, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        if isinstance(outputs, HeadInputs):
            return _sft_loss(outputs, labels, None, num_items_in_batch, **how)
        logits = outputs["logits"]
        return causal.loss_function(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)

    _install(causal, begin, result)
    return loss


def _with_causal_loss(model: nn.Module) -> PreTrainedModel:
    """The transformers model, once it is sure that its head and its loss are computed here."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    check_versions(model)
    causal = causal_lm_of(model)
    head_layer(causal, adds_router_loss=True)
    if causal.loss_function is not ForCausalLMLoss:
        name = getattr(causal.loss_function, "__name__", causal.loss_function)
        raise UnsupportedModel(
            f"the loss of {type(causal).__name__} is {name}, expected transformers' ForCausalLMLoss: compute it from "
            "token_logps"
        )
    return causal


def _install(causal: PreTrainedModel, begin: Callable, result: Callable) -> None:
    """Puts a `ReplacedHead` around the model's forward, from now on.

    `begin(self, run, kwargs)` takes its own arguments out of `kwargs` and begins a ReplacedHead, or returns None for a
    call that stays as it is; `run` is the forward that the model had before. The model returns `result(call, output)`.

    `run` is taken from the class and bound at the call, so that a copy of the model runs itself. A forward that a
    library put into the instance is bound already.
    """
    before = causal.__dict__.get("forward", type(causal).forward)
    bound = "forward" in causal.__dict__
    begin, end, result = (torch.compiler.disable(x) for x in (begin, ReplacedHead.end, result))

    @functools.wraps(before)  # with its signature, by which the Trainer chooses columns
    def installed(self, *args, **kwargs):
        run = before if bound else functools.partial(before, self)
        call = begin(self, run, kwargs)
        if call is None:
            return run(*args, **kwargs)
        try:
            output = run(*args, **kwargs)
        finally:
            end(call)
        return result(call, output)

    causal.forward = types.MethodType(torch.compiler.disable(installed, recursive=False), causal)


@dataclass(frozen=True)
class HeadInputs:
    """What `sft_loss` has a model return: the head as one matrix product, not done yet."""

    # (A dataclass: DistributedDataParallel searches dataclasses for tensors that the loss depends on; accelerate, which
    # casts outputs to float32, does not look into them.)
    hidden: Tensor  # (B, T, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    transform: dict  # softcap and logit_scale
    autocast: torch.dtype | None  # the model's


def _head_inputs(causal: nn.Module, layer: nn.Module, hidden: Tensor) -> HeadInputs:
    rows, weight, bias = product_of(causal, layer, hidden.flatten(0, -2))
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # Views of the parameters: a leaf among the outputs does not count as used.
    weight, bias = (None if x is None else x.view_as(x) for x in (weight, bias))
    transform = transform_of(causal.config.get_text_config())
    return HeadInputs(rows.view(*hidden.shape[:-1], -1), weight, bias, transform, dtype)


def _sft_loss(
    head: HeadInputs,
    labels: Tensor,  # (B, T)
    shift_labels: Tensor | None,  # (B, T) shifted already
    num_items_in_batch: Tensor | int | None,
    workspace: int | None,
    impl: str,
    gradient_tolerance: float,
) -> Tensor:  # ()
    """transformers' ForCausalLMLoss: a mean over the labels that are not -100, or their sum / num_items_in_batch."""
    targets = nn.functional.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:] if shift_labels is None else shift_labels
    if targets.shape != head.hidden.shape[:-1]:
        raise ValueError(
            f"expected hidden states for each of the labels {tuple(targets.shape)}, got {tuple(head.hidden.shape)}: "
            "give labels of input_ids' shape, and no logits_to_keep"
        )
    tokens = keep_tokens(targets)
    device = head.hidden.device
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(device)
    with torch.autocast(device.type, dtype=head.autocast, enabled=head.autocast is not None):
        return prefuse.linear_preference_loss(
            head.hidden.flatten(0, -2).index_select(0, tokens.places),
            head.weight,
            tokens.targets,
            tokens.cu_seqlens,
            None,
            loss=prefuse.SFT(),
            num_items=num_items_in_batch,
            workspace=workspace,
            bias=head.bias,
            impl=impl,
            gradient_tolerance=gradient_tolerance,
            **head.transform,
        ).loss


def _with_loss(output: object, loss: Tensor) -> object:
    if isinstance(output, tuple):
        return (loss,)
    rest = {name: x for name, x in output.items() if name not in ("loss", "logits")}
    return type(output)(loss=loss, **rest)
