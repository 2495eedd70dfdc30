"""The balance loss of a mixture of experts, of the same run of the trunk that the fused head gets its states from.

    hidden, balance = hidden_and_balance(model, packed, router_of(model))     # (N, D), ()

It is the `load_balancing_loss_func` of the model's own file in transformers (Fedus et al. 2021, arXiv 2101.03961,
equations 4 to 6), on the router logits of every layer. With f_e the share of routed tokens that went to expert e, P_e
the mean probability that the router gave it, E experts:

    balance = E * sum over e of f_e * P_e

A token counts as often as it stands in the padded batch: one of a shared prompt once for each of its completions,
padding not at all.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from prefuse.models.flat import completion_hidden
from prefuse.models.probes import probe_ids, quietly
from prefuse.models.trunk import UnsupportedModel, class_of, trunk_hidden, trunk_of
from prefuse.packing import Packed, Padded, pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel


WANTED = "load_balancing_loss_func, of num_experts and num_experts_per_tok"


@dataclass(frozen=True)
class Router:
    """What the balance loss of a model is made with."""

    function: Callable[..., Tensor]
    experts: int
    top_k: int

    def balance(self, logits: tuple[Tensor, ...], counts: Tensor) -> Tensor:  # (layers,) of (T, E), (..., T) -> ()
        return self.function(logits, self.experts, self.top_k, counts)


def own_coefficient(model: PreTrainedModel) -> float | None:
    """What the model's own forward multiplies its balance loss with; None for a model that has none."""
    return getattr(model.config.get_text_config(), "router_aux_loss_coef", None)


def router_of(model: PreTrainedModel) -> Router:
    """Tried on a padded batch of a few tokens against the model's own `aux_loss`.

    Raises UnsupportedModel for a model that is no mixture of experts, and for one whose balance loss is another.
    """
    name, config = class_of(model).__name__, model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        raise UnsupportedModel(f"{name} is no mixture of experts that returns its router logits, so it has no loss")
    function = getattr(sys.modules[class_of(model).__module__], "load_balancing_loss_func", None)
    experts, top_k = (_number(model, config, key) for key in ("num_experts", "num_experts_per_tok"))
    if function is None or experts is None or top_k is None:
        raise UnsupportedModel(f"{name} has no balance loss in transformers ({WANTED}), so none is computed here")
    router = Router(function, experts, top_k)
    ids, mask = pad([probe_ids(model).tolist(), probe_ids(model)[:5].tolist()])
    ids, mask = ids.to(model.device), mask.to(model.device)
    try:
        with quietly(model):
            own = model(input_ids=ids, attention_mask=mask, output_router_logits=True, use_cache=False).aux_loss
            with router_logits(model) as kept:
                trunk_hidden(model, ids, mask)
            got = router.balance(kept[0], mask)
        difference = (got.double() - own.double()).abs().item()
    except Exception as error:
        raise UnsupportedModel(
            f"the router loss of {name} cannot be computed: {type(error).__name__}: {error}"
        ) from error
    if not difference <= 1e-4 * max(1.0, abs(own.item())):
        raise UnsupportedModel(f"{name} has a router loss of its own: {own.item():.6g}, by its router {got.item():.6g}")
    return router


def hidden_and_balance(
    model: PreTrainedModel, tokens: Packed | Padded, router: Router
) -> tuple[Tensor, Tensor]:  # (N, D), ()
    """`completion_hidden`, and the balance loss of all the batch's tokens."""
    with router_logits(model) as kept:
        hidden = completion_hidden(model, tokens)
    return hidden, router.balance(kept[-1], token_counts(tokens))


def token_counts(tokens: Packed | Padded) -> Tensor:  # (T,) or (S, T)
    """How often each token stands in the padded batch of the same sequences."""
    if isinstance(tokens, Padded):
        return tokens.attention_mask
    counts = [
        count
        for prompt, *completions in tokens.segments.lengths
        for count in [len(completions)] * prompt + [1] * sum(completions)
    ]
    return torch.tensor(counts, device=tokens.input_ids.device)


@contextlib.contextmanager
def router_logits(model: PreTrainedModel) -> Iterator[list[tuple[Tensor, ...]]]:
    """While this lasts, each run of the trunk adds its router logits to the list, (T, E) of every layer."""
    trunk, kept = trunk_of(model), []
    before = trunk.config.output_router_logits

    def keep(module: nn.Module, args: tuple, output) -> None:
        kept.append(output.router_logits)

    hook = trunk.register_forward_hook(keep)
    trunk.config.output_router_logits = True
    try:
        yield kept
    finally:
        trunk.config.output_router_logits = before
        hook.remove()


def _number(model: nn.Module, config: object, key: str) -> int | None:
    """As the forwards of transformers read it: of the model, else of its text config."""
    found = getattr(model, key, getattr(config, key, None))
    return found if isinstance(found, int) else None
