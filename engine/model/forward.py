"""Batch -> trunk -> hidden states of the completion tokens -> fused head."""

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import prefuse
from prefuse import PolicyOutput, PreferenceOutput, RewardOutput
from prefuse.engine.data.batches import Batch
from prefuse.engine.model.policy import policy_loss_of_states
from prefuse.engine.model.sharding import where_weights_are
from prefuse.engine.report.clock import clock
from prefuse.engine.run.ranks import ALONE, Ranks
from prefuse.losses.contract import Loss
from prefuse.models.flat import completion_hidden
from prefuse.models.head import Head, check_head, head_of
from prefuse.models.router import Router, hidden_and_balance

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
    router: Router | None = None  # whose balance loss is part of the training
    router_aux_loss_coef: float = 0.0

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
) -> PreferenceOutput | PolicyOutput | RewardOutput:
    """The loss of one batch, summed and divided by `num_items`, with its metrics."""
    if batch.sampled is not None:
        return policy_loss_of_states(lm, hidden, batch, loss, num_items)
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
            z0=z0,
            num_items=num_items,
            impl=lm.impl,
            gradient_tolerance=lm.gradient_tolerance,
            **loss_numbers(lm, hidden, batch),
            **lm.head.options(),
        )


@torch.no_grad()
def loss_numbers(lm: LanguageModel, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
    """What the loss takes of the rows; with `policy_weights` the weights of WPO too (Zhou et al. 2024)."""
    if not batch.policy_weights:
        return batch.numbers
    logps, outputs = prefuse.linear_logprobs(
        hidden, lm.head.weight, batch.targets, outputs=("log_sum_sq_probs",), impl=lm.impl, **lm.head.options()
    )
    weights = prefuse.wpo_weights(logps, outputs["log_sum_sq_probs"], batch.cu_seqlens)
    return batch.numbers | {"weights": weights * batch.numbers.get("weights", 1.0)}


def logps_of_states(
    lm: LanguageModel, hidden: Tensor, batch: Batch, temperature: float = 1.0
) -> Tensor:  # (N, D) -> (N,) float32
    options = {**lm.head.options(), "temperature": temperature, "impl": lm.impl}
    with lm.autocast():
        return prefuse.linear_logprobs(hidden, lm.head.weight, batch.targets, **options)


@where_weights_are
def fused_loss(
    lm: LanguageModel, batch: Batch, loss: Loss, num_items: int | None = None, z0: Tensor | None = None
) -> PreferenceOutput | PolicyOutput | RewardOutput:
    """The loss of one batch, its router's included; its backward begins in the head and goes on in the trunk."""
    hidden, balance = states_and_balance(lm, batch)
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: clock.to("trunk"))
    with clock.part("head"):
        return with_balance(lm, loss_of_states(lm, hidden, batch, loss, num_items, z0), balance, batch, loss, num_items)


def states_and_balance(lm: LanguageModel, batch: Batch) -> tuple[Tensor, Tensor | None]:  # (N, D), ()
    """`completion_states`, and the balance loss of the same run where it is asked for."""
    if lm.router is None:
        return completion_states(lm, batch), None
    with clock.part("trunk"), lm.autocast():
        return hidden_and_balance(lm.model, batch.tokens, lm.router)


def with_balance(
    lm: LanguageModel, out: PreferenceOutput, balance: Tensor | None, batch: Batch, loss: Loss, num_items: int | None
) -> PreferenceOutput:
    """The loss and the balance loss of one batch, whose share is that of its items: over the batches of a step

    loss = mean over items of the preference loss + router_aux_loss_coef * mean over items of their batch's balance
    """
    if balance is None:
        return out
    items = count_items(batch, loss)
    share = items / (num_items or items)
    added = lm.router_aux_loss_coef * share * balance.to(out.loss.dtype)
    summed = torch.stack([balance.detach().double() * items, balance.new_tensor(items, dtype=torch.float64)])
    return dataclasses.replace(out, loss=out.loss + added, metrics={**out.metrics, "aux_loss": summed})


@torch.no_grad()
@where_weights_are
def completion_logps(lm: LanguageModel, batch: Batch, temperature: float = 1.0) -> Tensor:  # (N,) float32
    return logps_of_states(lm, completion_states(lm, batch), batch, temperature)


@torch.no_grad()
@where_weights_are
def token_values(lm: LanguageModel, batch: Batch, head: torch.nn.Module) -> Tensor:  # (N,) float32
    """What PPO's value head says of each completion token."""
    return head(completion_states(lm, batch))


@torch.no_grad()
def reference_point(
    lm: LanguageModel, batches: Sequence[Batch], ranks: Ranks = ALONE, spare: Sequence[Batch] = ()
) -> Tensor:  # () >= 0
    """KTO's z0 over the mismatched completions of all `batches`, of all ranks; `spare` see `Ranks.in_step`."""
    none = torch.empty(0, device=lm.device)
    logps = torch.cat([none, *(completion_logps(lm, batch) for batch in batches)])
    for batch in spare:
        completion_logps(lm, batch)
    known = all(batch.ref_logps is not None for batch in (*batches, *spare))
    ref_logps = torch.cat([none, *(batch.ref_logps for batch in batches)]) if known else None
    counts = torch.cat([none.int(), *(batch.cu_seqlens.diff() for batch in batches)])
    cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    return prefuse.kto_reference_point(logps, ref_logps, cu_seqlens, group=ranks.group)
