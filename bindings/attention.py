"""Flat batches through the attention of transformers' models: the public door of `prefuse.models.flat`."""

from prefuse.models.flat import (
    Backend,
    Gather,
    PackedMask,
    VarlenIndex,
    check_packing,
    flat_hidden,
    gather,
    packed_hidden,
    pick_predictors,
    shared_prefix_attention,
    token_places,
    use_packed_attention,
    varlen_index,
    within,
)

__all__ = [
    "Backend",
    "Gather",
    "PackedMask",
    "VarlenIndex",
    "check_packing",
    "flat_hidden",
    "gather",
    "packed_hidden",
    "pick_predictors",
    "shared_prefix_attention",
    "token_places",
    "use_packed_attention",
    "varlen_index",
    "within",
]
