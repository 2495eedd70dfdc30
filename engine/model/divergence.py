"""How far two models are apart on a text, and how well one predicts it: sums over the completion tokens of a batch."""

import dataclasses

import torch
from torch import Tensor

import prefuse
from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import Batch
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.load import check_same_vocabulary, first_rows


def kl_of_states(
    lm: LanguageModel,
    hidden: Tensor,  # (N, D)
    ref: LanguageModel,
    ref_hidden: Tensor,  # (N, ref D)
    mask: Tensor,  # (N,)
) -> Tensor:  # (2,) [sum of nats, positions]
    """The exact KL(policy || reference) at the completion positions in `mask`."""
    ref_options = ref.head.options()
    ref_bias = ref_options.pop("bias")
    with lm.autocast():
        kl = prefuse.linear_kl(
            hidden, lm.head.weight, ref_hidden.to(hidden.dtype), ref.head.weight,
            ref_bias=ref_bias, mask=mask, ref_options=ref_options, impl=lm.impl, **lm.head.options(),
        )  # fmt: skip
    return torch.stack([kl.double().sum(), mask.sum().double()])


def token_metrics(lm: LanguageModel, hidden: Tensor, batch: Batch, learned: Tensor) -> dict[str, Tensor]:
    """TRL's names for demonstrations, with sums over the `learned` tokens (N,), from one pass of the head."""
    with lm.autocast():
        logps, outputs = prefuse.linear_logprobs(
            hidden, lm.head.weight, batch.targets, outputs=("entropy", "is_top1"), impl=lm.impl, **lm.head.options()
        )
    sums = {"loss": -logps, "mean_token_accuracy": outputs["is_top1"], "entropy": outputs["entropy"]}
    return {
        name: torch.stack([torch.where(learned, x.double(), 0.0).sum(), learned.sum().double()])
        for name, x in sums.items()
    }


def over_common_vocabulary(
    lm: LanguageModel, ref: LanguageModel, config: Config
) -> tuple[LanguageModel, LanguageModel]:
    """Both models with heads over the tokens that both have, if they differ in rows of padding alone."""
    common = check_same_vocabulary(lm, ref, config)
    return tuple(
        one if one.head.weight.shape[0] == common else dataclasses.replace(one, head=first_rows(one.head, common))
        for one in (lm, ref)
    )
