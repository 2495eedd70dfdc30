"""Batch -> trunk -> hidden states of the completion tokens -> fused head."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import prefuse
from prefuse import PreferenceOutput, RewardOutput
from prefuse.engine.data.batches import Batch
from prefuse.engine.model.sharding import where_weights_are
from prefuse.engine.report.clock import clock
from prefuse.engine.run.ranks import ALONE, Ranks
from prefuse.losses.contract import Loss
from prefuse.models.flat import completion_hidden
from prefuse.models.head import Head, check_head, head_of

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM with all it takes to compute with it."""

    model: torch.nn.Module  # a transformers PreTrainedModel
    head: Head
    device: torch.device
    compute_dtype: torch.dtype
    impl: str
    adapters: "PeftModel | None" = None  # the same model, as peft sees it
    gradient_tolerance: float = 0.0  # of the head's backward

    @property
    def scores(self) -> bool:
        """Whether its head makes scores (`RewardModel`), not logits of tokens."""
        return False

    @property
    def vocabulary(self) -> int:
        return self.head.weight.shape[0]

    @staticmethod
    def head_layer(model: torch.nn.Module) -> torch.nn.Module:
        return model.get_output_embeddings()

    @staticmethod
    def head_of(model: torch.nn.Module) -> Head:
        return head_of(model)

    def states(self, batch: Batch) -> Tensor:  # (N, D)
        """What its head reads: the hidden states that predict the completion tokens."""
        return completion_hidden(self.model, batch.tokens)

    def check(self, input_ids: Tensor) -> None:  # (1, T)
        """UnsupportedModel if what is computed here of a row is not what the model's own forward makes of it."""
        check_head(self.model, input_ids, impl=self.impl)

    def autocast(self) -> AbstractContextManager:
        weights = self.head.weight.dtype if self.adapters is None else torch.float32  # adapters always are float32
        mixed = self.compute_dtype != weights
        return torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=mixed)


def count_items(batch: Batch, loss: Loss) -> int:
    """What `loss` is a mean over, in this batch."""
    return batch.num_learned if loss.per == "token" else batch.num_items


# If the model is sharded, call these three only inside a function decorated with `where_weights_are`.


def completion_states(lm: LanguageModel, batch: Batch) -> Tensor:  # (N, D)
    """What the head reads of the completions: one run of the trunk."""
    with clock.part("trunk"), lm.autocast():
        return lm.states(batch)


def loss_of_states(
    lm: LanguageModel,
    hidden: Tensor,  # (N, D)
    batch: Batch,
    loss: Loss,
    num_items: int | None = None,
    z0: Tensor | None = None,  # ()
) -> PreferenceOutput | RewardOutput:
    """The loss of one batch, summed and divided by `num_items`, with its metrics."""
    if lm.scores:
        return lm.loss_of_states(hidden, batch, loss, num_items)
    with lm.autocast():
        return prefuse.linear_preference_loss(
            hidden,
            lm.head.weight,
            batch.targets,
            batch.cu_seqlens,
            batch.ref_logps,
            loss=loss,
            labels=batch.labels,
            z0=z0,
            num_items=num_items,
            impl=lm.impl,
            gradient_tolerance=lm.gradient_tolerance,
            **lm.head.options(),
        )


def logps_of_states(lm: LanguageModel, hidden: Tensor, batch: Batch) -> Tensor:  # (N, D) -> (N,) float32
    with lm.autocast():
        return prefuse.linear_logprobs(hidden, lm.head.weight, batch.targets, **lm.head.options(), impl=lm.impl)


@where_weights_are
def fused_loss(
    lm: LanguageModel, batch: Batch, loss: Loss, num_items: int | None = None, z0: Tensor | None = None
) -> PreferenceOutput | RewardOutput:
    """The loss of one batch; its backward begins in the head and goes on in the trunk."""
    hidden = completion_states(lm, batch)
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: clock.to("trunk"))
    with clock.part("head"):
        return loss_of_states(lm, hidden, batch, loss, num_items, z0)


@torch.no_grad()
@where_weights_are
def token_logps(lm: LanguageModel, batch: Batch) -> Tensor:  # (N,) float32
    return logps_of_states(lm, completion_states(lm, batch), batch)


@torch.no_grad()
def reference_point(
    lm: LanguageModel, batches: Sequence[Batch], ranks: Ranks = ALONE, spare: Sequence[Batch] = ()
) -> Tensor:  # () >= 0
    """KTO's z0 over the mismatched completions of all `batches`, of all ranks; `spare` see `Ranks.in_step`."""
    none = torch.empty(0, device=lm.device)
    logps = torch.cat([none, *(token_logps(lm, batch) for batch in batches)])
    for batch in spare:
        token_logps(lm, batch)
    ref_logps = torch.cat([none, *(batch.ref_logps for batch in batches)])
    counts = torch.cat([none.int(), *(batch.cu_seqlens.diff() for batch in batches)])
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return prefuse.kto_reference_point(logps, ref_logps, cu_seqlens, group=ranks.group)
