"""Log-probabilities and losses of a transformers causal LM without its logits: the public door of `prefuse.models`."""

from prefuse.models.head import Head, UnsupportedModel, head_of
from prefuse.models.inside import UnsupportedVersion
from prefuse.models.logps import TokenLogps, check_head, sequence_logps, token_logps, trunk_hidden, trunk_of
from prefuse.models.sft import fuse_loss, sft_loss

__all__ = [
    "Head",
    "TokenLogps",
    "UnsupportedModel",
    "UnsupportedVersion",
    "check_head",
    "fuse_loss",
    "head_of",
    "sequence_logps",
    "sft_loss",
    "token_logps",
    "trunk_hidden",
    "trunk_of",
]
