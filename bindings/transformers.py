"""Log-probabilities and losses of a transformers causal LM without its logits: the public door of `prefuse.models`."""

from prefuse.models.head import Head, check_head, head_of
from prefuse.models.logps import TokenLogps, sequence_logps, token_logps
from prefuse.models.sft import fuse_loss, sft_loss
from prefuse.models.trunk import UnsupportedModel, UnsupportedVersion, trunk_hidden, trunk_of

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
