"""Whether the balance loss of a mixture of experts is part of a training, and what is said about it."""

import logging
from typing import TYPE_CHECKING

from prefuse.engine.config.settings import Config
from prefuse.engine.errors import UserError
from prefuse.models.router import Router, own_coefficient, router_of
from prefuse.models.trunk import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def router_and_weight(model: "PreTrainedModel", config: Config, trains: bool) -> tuple[Router | None, float]:
    """The router whose balance loss is to be added, and its weight. It is said where a mixture trains without.

    The model's own forward never adds it: the loss here is not that forward's.
    """
    own, text = own_coefficient(model), model.config.get_text_config()
    asked = getattr(text, "output_router_logits", False)
    if asked and trains and not config.output_router_logits:
        raise UserError(
            f"the config.json of {type(model).__name__} asks for its router's balance loss (output_router_logits is "
            "true): give --output_router_logits true to add it, or set it to false there"
        )
    if asked:
        text.output_router_logits = False
    if not trains:
        return None, 0.0
    if not config.output_router_logits:
        if own is not None:
            logger.info(
                "%s is a mixture of experts: its router's balance loss is no part of this training. TRL adds it with a "
                "weight of %s; --output_router_logits true does so here", type(model).__name__, own,
            )  # fmt: skip
        return None, 0.0
    try:
        router = router_of(model)
    except UnsupportedModel as error:
        raise UserError(f"output_router_logits: {error}; drop output_router_logits") from None
    coefficient = own if config.router_aux_loss_coef is None else config.router_aux_loss_coef
    if not coefficient:
        raise UserError(
            f"output_router_logits: the config.json of {type(model).__name__} has {own} as its router_aux_loss_coef: "
            "give --router_aux_loss_coef, or drop output_router_logits"
        )
    return router, coefficient
