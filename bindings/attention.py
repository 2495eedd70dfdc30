"""Flat batches through the attention of transformers' models: a door to the operation and to `prefuse.models.flat`."""

from prefuse.kernels.attention.gather import Gather, gather
from prefuse.kernels.attention.segments import token_places
from prefuse.kernels.attention.shared_prefix import Backend, VarlenIndex, shared_prefix_attention, varlen_index
from prefuse.models.flat import (
    PackedMask,
    check_packing,
    flat_hidden,
    packed_hidden,
    pick_predictors,
    use_packed_attention,
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
