"""Padded batches in the style of the original DPO repository, for plain PyTorch loops.

    chosen, rejected = concatenated_forward(policy, batch)                    # instead of logits and _get_batch_logps
    losses, chosen_rewards, rejected_rewards = preference_loss(chosen, rejected, ref_chosen, ref_rejected)

Names, argument order and the keys of `batch` are those of github.com/eric-mitchell/direct-preference-optimization.
Completion tokens of the padded rows are packed, end to end, before they meet the head: padding and prompts never do.

B rows of T tokens, N labelled tokens, D hidden size, V vocabulary, P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prefuse.kernels import linear_logprobs
from prefuse.losses.contract import Loss, Sequences, needs_of
from prefuse.losses.pairs import DPO
from prefuse.tokens import IGNORE_INDEX, keep_tokens, learned


class PackedRows(NamedTuple):
    """What `linear_logprobs` and `linear_preference_loss` take of a padded batch."""

    hidden: Tensor  # (N, D) the states that predict the targets
    targets: Tensor  # (N,)
    cu_seqlens: Tensor  # (B + 1,) int32


def pack_rows(hidden: Tensor, labels: Tensor) -> PackedRows:  # (B, T, D), (B, T)
    """Equals `(hidden[:, :-1][keep], labels[:, 1:][keep], ...)` with `keep = labels[:, 1:] != -100`.

    `labels[:, t]` is the token at t, not shifted; the state before it predicts it. Raises ValueError for shapes that
    do not fit.
    """
    if hidden.dim() != 3 or labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"expected hidden (B, T, D) and labels (B, T), got {tuple(hidden.shape)} and {tuple(labels.shape)}; labels "
            "are shifted inside, so give them as long as hidden"
        )
    tokens = keep_tokens(labels, learned(labels))
    return PackedRows(hidden.flatten(0, 1).index_select(0, tokens.predictors), tokens.targets, tokens.cu_seqlens)


def batch_logps(
    hidden: Tensor,  # (B, T, D)
    weight: Tensor,  # (V, D)
    labels: Tensor,  # (B, T)
    average_log_prob: bool = False,
    **head,
) -> Tensor:  # (B,) float64
    """Equals `_get_batch_logps(logits, labels, average_log_prob)` with `logits = hidden @ weight.T`, never made::

        logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, labels[:, 1:, None])[..., 0]
        (logps * (labels[:, 1:] != -100)).sum(-1)                # or its mean over the labelled tokens

    For any model that gives hidden states and has a linear head; `prefuse.transformers.sequence_logps` takes a model.

    Args:
        hidden: (B, T, D) last hidden states of padded rows, as the head receives them.
        weight: (V, D) the head.
        labels: (B, T) the tokens, not shifted, -100 where they do not count: prompt and padding.
        average_log_prob: the mean over a row's tokens instead of their sum; 0 for a row without any.
        **head: `bias`, `softcap`, `logit_scale`, `temperature`, `impl` of `prefuse.linear_logprobs`.
    """
    rows = pack_rows(hidden, labels)
    logps = linear_logprobs(rows.hidden, weight, rows.targets, **head)
    sums = torch.segment_reduce(logps.double(), "sum", offsets=rows.cu_seqlens.long(), unsafe=True)
    return sums / rows.cu_seqlens.diff().clamp(min=1) if average_log_prob else sums


def concatenated_inputs(batch: Mapping[str, object]) -> dict[str, Tensor]:
    """`chosen_*` above `rejected_*`, padded on the right to one length: `concatenated_*`, each (2P, T).

    Padding is -100 in labels and 0 elsewhere. Entries that are no tensors are left out.
    """
    names = [key.removeprefix("chosen_") for key, x in batch.items() if key.startswith("chosen_") and _is_rows(x)]
    missing = [f"{side}_{name}" for side in ("chosen", "rejected") for name in ("input_ids", "attention_mask", "labels")
               if not _is_rows(batch.get(f"{side}_{name}"))]  # fmt: skip
    if missing:
        raise ValueError(f"expected tensors (P, T) under {', '.join(missing)}, got a batch of {sorted(batch)}")
    width = max(batch["chosen_input_ids"].shape[1], batch["rejected_input_ids"].shape[1])
    result = {}
    for name in names:
        sides = [batch[f"{side}_{name}"] for side in ("chosen", "rejected")]
        fill = IGNORE_INDEX if "labels" in name else 0
        padded = [nn.functional.pad(x, (0, width - x.shape[1]), value=fill) for x in sides]
        result[f"concatenated_{name}"] = torch.cat(padded)
    return result


def _is_rows(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 2


def concatenated_forward(
    model: nn.Module, batch: Mapping[str, object], average_log_prob: bool = False, impl: str = "auto"
) -> tuple[Tensor, Tensor]:  # (P,), (P,) float64
    """Log-probabilities of the chosen and of the rejected completions, in one forward of a transformers causal LM.

    `batch` has `chosen_input_ids`, `chosen_attention_mask`, `chosen_labels` and the same of `rejected`. What `model`
    may be, and what is refused, is `prefuse.transformers.sequence_logps`'s.
    """
    from prefuse.models.logps import sequence_logps

    rows = concatenated_inputs(batch)
    logps = sequence_logps(
        model,
        rows["concatenated_input_ids"],
        rows["concatenated_labels"],
        attention_mask=rows["concatenated_attention_mask"],
        reduction="mean" if average_log_prob else "sum",
        impl=impl,
    )
    chosen, rejected = logps.chunk(2)
    return chosen, rejected


def preference_loss(
    policy_chosen_logps: Tensor,  # (P,)
    policy_rejected_logps: Tensor,  # (P,)
    reference_chosen_logps: Tensor,  # (P,)
    reference_rejected_logps: Tensor,  # (P,)
    loss: Loss = DPO(),  # noqa: B008 (frozen)
) -> tuple[Tensor, Tensor, Tensor]:  # 3 x (P,)
    """`losses, chosen_rewards, rejected_rewards` of a loss over pairs; `losses.mean().backward()` trains.

    `DPO(beta, label_smoothing)` is the repository's loss. Its `ipo=True` is `IPO(beta)` of sums of log-probabilities;
    the mean per token that IPO's authors advise takes logps made with `average_log_prob=True`. For a loss without
    reference, which is not over pairs, or for metrics, see `prefuse.preference_loss`.
    """
    sides = (policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps)
    if len({x.shape for x in sides}) > 1 or policy_chosen_logps.dim() != 1:
        raise ValueError(f"expected four tensors (P,), one number for each pair, got {[tuple(x.shape) for x in sides]}")
    if loss.per != "pair" or needs_of(loss) != {"reference"}:
        raise ValueError(f"expected a loss over pairs with a reference (DPO, IPO), got {loss}")
    chosen = policy_chosen_logps.double() - reference_chosen_logps.detach().double()
    rejected = policy_rejected_logps.double() - reference_rejected_logps.detach().double()
    ratios = torch.stack([chosen, rejected], dim=1).flatten()  # pairs are neighbours
    logps = torch.stack([policy_chosen_logps, policy_rejected_logps], dim=1).flatten().double()
    sequences = Sequences(ratios=ratios, lengths=torch.ones_like(ratios), labels=None, z0=None, logps=logps)
    rewards = loss.rewards(sequences).detach()
    return loss.losses(sequences), rewards[0::2], rewards[1::2]
