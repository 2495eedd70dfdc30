"""From per-token log-probabilities to a preference loss, its rewards and its metrics.

    N completion tokens, end to end; S sequences, cut by cu_seqlens (S + 1,); P = S / 2 pairs.

Token log-ratios are subtracted first and summed per sequence in float64 in a fixed order, so a policy equal to its
reference has log-ratio exactly 0, and a 1000-token log-ratio keeps its last digits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from prefuse.grouped import WithGradients, gradients_in_forward, split_in_groups
from prefuse.kernels import HeadOptions, checks
from prefuse.kernels.gradients import Gradients
from prefuse.kernels.logprobs.call import HeadCall, prepare_call
from prefuse.kernels.logprobs.linear_logprobs import logprobs_of
from prefuse.kernels.preference.tail import METRICS, preference_tail
from prefuse.loss_inputs import (
    LossInputs,
    Mismatched,
    check_devices,
    check_loss_inputs,
    check_packed,
    sequences_per_item,
)
from prefuse.losses.contract import Loss, Sequences, Tokens, is_batchwise
from prefuse.losses.pairs import DPO, IPO
from prefuse.losses.unpaired import KTO

# What `linear_preference_loss` may keep from the forward to the backward, unless told otherwise.
WORKSPACE = 1 << 30
# Losses that the tail kernel knows: its name for each, and the fields that it takes. Exactly these classes, for a
# subclass may have another equation.
TAILS: dict[type, tuple[str, tuple[str, ...]]] = {
    DPO: ("dpo", ("beta", "label_smoothing")),
    IPO: ("ipo", ("beta", "average")),
    KTO: ("kto", ("beta", "desirable_weight", "undesirable_weight")),
}


@dataclass(frozen=True)
class PreferenceOutput:
    """What a preference loss gives back; everything but `loss` is detached."""

    loss: Tensor  # () float32, the one differentiable field: sum of `losses` / num_items
    losses: Tensor  # (P,) for pairs, else (S,), float32
    logps: Tensor  # (S,) float64, log pi(y | x): exact enough to serve as another run's `ref_logps`
    rewards: Tensor  # (S,) float32, what `loss.rewards` gives: beta * log-ratio for DPO, IPO and KTO
    metrics: dict[str, Tensor]  # {TRL's name: (2,) [sum, count]}, to be added up and given to `reduce_metrics`


def preference_loss(
    logps: Tensor,  # (N,)
    ref_logps: Tensor | None,  # (N,) or (S,)
    cu_seqlens: Tensor,  # (S + 1,)
    loss: Loss = DPO(),  # noqa: B008 (frozen)
    labels: Tensor | None = None,  # (S,)
    z0: Tensor | float | Mismatched | None = None,  # ()
    num_items: int | Tensor | None = None,
    *,
    weights: Tensor | None = None,  # (P,) for pairs, else (S,)
    margins: Tensor | None = None,  # (P,) for pairs, else (S,)
    scores: Tensor | None = None,  # (S,)
    impl: str = "auto",
) -> PreferenceOutput:
    """Equals, for `DPO` with pairs (0, 1), (2, 3), ...::

        ratios = torch.stack([x.sum() for x in (logps - ref_logps).split(lengths)])
        loss = -torch.nn.functional.logsigmoid(beta * (ratios[0::2] - ratios[1::2])).mean()

    Args:
        logps: (N,) per-token log-probabilities of the policy, nats, packed without padding; carries the gradient.
        ref_logps: the reference's: (N,) float32 per token, or (S,) float64 per sequence, or None for a loss that
            uses no reference.
        cu_seqlens: (S + 1,) int32 offsets: sequence s is `logps[cu_seqlens[s] : cu_seqlens[s + 1]]`.
        loss: `DPO`, `IPO`, `KTO`, `SimPO`, ...; equation and paper stand in its docstring.
        labels: (S,) bool, desirable or not, for `KTO` and other losses whose `needs` name them.
        z0: KTO's reference point in nats: from `kto_reference_point`, a number, or a `Mismatched` to compute it from.
        num_items: what the sum is divided by: pairs, sequences or tokens, by the loss. Default: those of this call;
            give the global count when microbatches or ranks share one optimizer step.
        weights: what the loss of each item is multiplied by, for any loss (`wpo_weights` makes some). The divisor stays
            the number of items.
        margins, scores: a number for each item, or for each sequence, for losses whose `needs` name them.
        impl: "triton" (DPO, IPO and KTO without `weights`, in one launch each way; KTO's ablations, subclasses and all
            other losses run in torch), "torch", "reference" (here the same) or "auto": "triton" where it can run, else
            "torch".

    Raises:
        TypeError, ValueError: shapes that do not fit, an odd number of sequences for a loss over pairs, a missing or
            superfluous reference, or other inputs that the loss needs or does not take.
        RuntimeError: an `impl` that cannot run here.
    """
    check_packed(logps, cu_seqlens)
    counts = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    given = LossInputs(labels, z0, weights, margins, scores)
    return _preference_loss(logps, ref_logps, cu_seqlens, counts, loss, given, num_items, impl)


def linear_preference_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    ref_logps: Tensor | None,  # (N,) or (S,)
    loss: Loss = DPO(),  # noqa: B008 (frozen)
    labels: Tensor | None = None,  # (S,)
    z0: Tensor | float | Mismatched | None = None,  # ()
    num_items: int | Tensor | None = None,
    *,
    weights: Tensor | None = None,  # (P,) for pairs, else (S,)
    margins: Tensor | None = None,  # (P,) for pairs, else (S,)
    scores: Tensor | None = None,  # (S,)
    workspace: int | None = None,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
    vocab_group: dist.ProcessGroup | None = None,
    gradient_tolerance: float = 0.0,
) -> PreferenceOutput:
    """Equals `preference_loss(linear_logprobs(hidden, weight, targets, ...), ref_logps, cu_seqlens, loss, ...)`.

    `hidden[i]` is the state that predicts `targets[i]`: packed completion tokens only, no prompt and no padding. The
    head's options are `linear_logprobs`'s, the rest `preference_loss`'s. Tokens with `targets == ignore_index` count
    nowhere: not in a sum, not in a length, and `ref_logps` is not read there.

    `workspace`: bytes that may be kept for the backward (default `WORKSPACE`, 1 GiB). With a trainable head the
    backward needs N * V numbers, one for each token and column (2 bytes each in bf16). If all of them fit, they are
    kept: forward and backward take 3 units of matrix products instead of 4. If only those of some whole pairs fit
    (beside a float32 gradient of a half-precision weight), the pairs are processed in groups and the gradients are
    computed in the forward: 3 units too, and the same bits of the log-probabilities. 0 always recomputes: 4 units.

    `gradient_tolerance` is `linear_logprobs`'s. Above 0.0 the workspace is not used, and the backward writes the
    gradient's [skipped, whole] mass into `metrics["head/skipped_mass"]`, which is [0, 0] until then.
    """
    options = HeadOptions(softcap, float(logit_scale), float(temperature), int(ignore_index))
    given = LossInputs(labels, z0, weights, margins, scores)
    call = prepare_call(hidden, weight, targets, bias, options, (), impl, vocab_group, gradient_tolerance)
    workspace = WORKSPACE if workspace is None else workspace
    out, gradients = _linear_preference_loss(call, cu_seqlens, ref_logps, loss, given, num_items, workspace, impl)
    if gradients is None:
        return out
    return replace(out, loss=WithGradients.apply(out.loss, gradients, hidden, weight, bias))


def _linear_preference_loss(
    call: HeadCall, cu_seqlens: Tensor, ref_logps: Tensor | None, loss: Loss, given: LossInputs,
    num_items: int | Tensor | None, workspace: int, impl: str,
) -> tuple[PreferenceOutput, Gradients | None]:  # fmt: skip
    """The loss, and its gradients where they are made in the forward."""
    targets = call.targets
    check_packed(targets, cu_seqlens)
    kept = targets != call.options.ignore_index
    counts = _sequence_sums(kept.double(), cu_seqlens).long()
    check_loss_inputs(loss, len(counts), ref_logps, given)
    per_token = ref_logps is not None and _is_per_token(ref_logps, targets, counts)
    if per_token:
        ref_logps = torch.where(kept, ref_logps, 0.0)
    num_items = _items(loss, counts) if num_items is None else num_items

    def loss_of(logps: Tensor, sequences: slice = slice(None), tokens: slice = slice(None)) -> PreferenceOutput:
        ref = None if ref_logps is None else ref_logps[tokens if per_token else sequences]
        cu = cu_seqlens if sequences == slice(None) else cu_seqlens[sequences.start : sequences.stop + 1] - tokens.start
        part = given.of(sequences, sequences_per_item(loss))
        return _preference_loss(logps, ref, cu, counts[sequences], loss, part, num_items, impl, kept[tokens])

    if call.gradient_tolerance > 0.0:
        meter = torch.zeros(2, dtype=torch.float64, device=call.hidden.device)
        out = loss_of(logprobs_of(call, guess=ref_logps if per_token else None, meter=meter))
        return replace(out, metrics={**out.metrics, "head/skipped_mass": meter}), None
    # Ranks that share a head must agree on the groups, but each knows the size of its own part only.
    whole = call.vocab_group or is_batchwise(loss)
    groups = [] if whole else split_in_groups(call, workspace, cu_seqlens, sequences_per_item(loss))
    if not groups:
        return loss_of(logprobs_of(call, workspace)), None
    if isinstance(given.z0, Mismatched):  # it is the mean over all groups
        given = replace(given, z0=kto_reference_point(*given.z0))
    logps, gradients, _ = gradients_in_forward(groups, call, lambda *group: loss_of(*group).loss)
    return loss_of(logps), gradients


def kto_reference_point(
    kl_logps: Tensor,  # (N,)
    kl_ref_logps: Tensor | None,  # (N,) or (S,)
    cu_seqlens: Tensor,  # (S + 1,)
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """KTO's reference point z0 (arXiv 2402.01306, section 4.1), from completions paired with another row's prompt.

        z0 = max(0, mean over s of (log pi(y'_s | x_s) - log pi_ref(y'_s | x_s)))      y'_s: another row's completion

    Args:
        kl_logps, kl_ref_logps: log-probabilities of the mismatched completions, as in `preference_loss`. Give those
            of a whole optimizer step at once, so that accumulation does not change the update. Without a reference
            (None, for `KTO(reference_free=True)`) z0 is the mean of log pi(y'_s | x_s): below 0, and not clamped.
        cu_seqlens: (S + 1,) int32 offsets of the mismatched completions.
        group: ranks that share the optimizer step; sum and count are reduced over them.

    Returns:
        () float64, >= 0 where there is a reference, detached: the paper lets no gradient through z0. With no sequence
        at all, 0.
    """
    check_packed(kl_logps, cu_seqlens)
    kl_ref_logps = None if kl_ref_logps is None else kl_ref_logps.detach()
    ratios = _log_ratios(kl_logps.detach(), kl_ref_logps, cu_seqlens)
    total = torch.stack([ratios.sum(), torch.full_like(ratios.sum(), len(ratios))])
    if group is not None:
        dist.all_reduce(total, group=group)
    mean = total[0] / total[1].clamp_min(1.0)
    return mean if kl_ref_logps is None else mean.clamp_min(0.0)


def reduce_metrics(metrics: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """{name: (2,) [sum, count]} -> {name: mean}: one packed reduction over `group`, one wait for the device.

    A name that nobody counted is left out. Unpaired losses have no margin per row; theirs is the difference of the
    two means, as TRL has it.
    """
    if not metrics:
        return {}
    packed = torch.stack([value.double() for value in metrics.values()])  # (names, 2)
    if group is not None:
        dist.all_reduce(packed, group=group)
    return means_of(dict(zip(metrics, packed.tolist(), strict=True)))


def means_of(metrics: dict[str, Sequence[float]]) -> dict[str, float]:
    """{name: [sum, count]} -> {name: mean}, without those that nobody counted, and with a margin where both sides have
    a reward."""
    means = {name: total / count for name, (total, count) in metrics.items() if count}
    if "rewards/margins" not in means and {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def _preference_loss(
    logps: Tensor,  # (N,)
    ref_logps: Tensor | None,
    cu_seqlens: Tensor,
    counts: Tensor,  # (S,) tokens that are not ignored
    loss: Loss,
    given: LossInputs,
    num_items: int | Tensor | None,
    impl: str = "auto",
    kept: Tensor | None = None,  # (N,) bool
) -> PreferenceOutput:
    checks.check_impl(impl)
    check_loss_inputs(loss, len(counts), ref_logps, given)
    check_devices(logps, {"ref_logps": ref_logps, "cu_seqlens": cu_seqlens, **given.tensors()})
    if isinstance(num_items, int) and num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}")
    num_items = _items(loss, counts) if num_items is None else num_items
    ref_logps = None if ref_logps is None else ref_logps.detach()
    if checks.resolve(impl, logps) == "triton" and _on_device(loss, given):
        return _tail(logps, ref_logps, cu_seqlens, counts, loss, given, num_items)

    ratios = _log_ratios(logps, ref_logps, cu_seqlens)
    sums = ratios if ref_logps is None else _sequence_sums(logps, cu_seqlens)
    by_token = ref_logps is not None and _is_per_token(ref_logps, logps, counts)
    seq = Sequences(
        ratios, counts.clamp_min(1).double(), given.labels, _z0(given.z0, logps.device), sums,
        given.double("margins"), given.double("scores"),
        Tokens(logps, ref_logps if by_token else None, cu_seqlens, kept),
    )  # fmt: skip
    losses = loss.losses(seq)
    losses = losses if given.weights is None else losses * given.double("weights")
    total = (losses.sum() / num_items).float()

    with torch.no_grad():
        rewards = loss.rewards(seq)
        metrics = _metrics(loss, seq, sums, rewards)
    return PreferenceOutput(total, losses.detach().float(), sums.detach(), rewards.detach().float(), metrics)


def _z0(z0: Tensor | float | Mismatched | None, device: torch.device) -> Tensor | None:  # ()
    if isinstance(z0, Mismatched):
        return kto_reference_point(*z0)
    return None if z0 is None else torch.as_tensor(z0, dtype=torch.float64, device=device).detach()


def _items(loss: Loss, counts: Tensor) -> int | Tensor:
    """What the loss is a mean over, in this call: tokens, pairs or sequences."""
    if loss.per == "token":
        return counts.sum().clamp_min(1)
    return max(len(counts) // sequences_per_item(loss), 1)


def _on_device(loss: Loss, given: LossInputs) -> bool:
    """Whether the tail kernel has this loss: it knows its class, and every field that it lacks has its default."""
    if type(loss) not in TAILS or given.weights is not None:
        return False
    _, known = TAILS[type(loss)]
    return all(f.name in known or getattr(loss, f.name) == f.default for f in fields(loss))


def _tail(
    logps: Tensor,
    ref_logps: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,
    loss: DPO | IPO | KTO,
    given: LossInputs,
    num_items: int | Tensor,
) -> PreferenceOutput:
    """`_preference_loss` in one launch each way."""
    (name, known), z0, kl_per_token = TAILS[type(loss)], given.z0, False
    if isinstance(z0, Mismatched):
        z0 = Mismatched(z0.logps.detach(), z0.ref_logps.detach(), z0.cu_seqlens)
        kl_per_token = _is_per_token(z0.ref_logps, z0.logps, z0.cu_seqlens[1:])
    elif isinstance(z0, Tensor):
        z0 = z0.detach()
    per_token = _is_per_token(ref_logps, logps, counts)
    numbers = {field: getattr(loss, field) for field in known}
    out = preference_tail(
        name, logps, ref_logps, cu_seqlens, counts, given.labels, z0, num_items, per_token, kl_per_token, **numbers
    )
    metrics = dict(zip(METRICS[name], out.metrics.unbind(), strict=True))
    return PreferenceOutput(out.loss, out.losses, out.logps, out.rewards, metrics)


def _log_ratios(logps: Tensor, ref_logps: Tensor | None, cu_seqlens: Tensor) -> Tensor:
    """(S,) float64: token differences first, then their sum."""
    if ref_logps is None:
        return _sequence_sums(logps, cu_seqlens)
    if _is_per_token(ref_logps, logps, cu_seqlens[1:]):
        return _sequence_sums(logps.double() - ref_logps.double(), cu_seqlens)
    return _sequence_sums(logps, cu_seqlens) - ref_logps.double()


def _is_per_token(ref_logps: Tensor, logps: Tensor, counts: Tensor) -> bool:
    """(N,) or (S,)? Where N = S, float64 says per sequence."""
    per_token, per_sequence = ref_logps.shape == logps.shape, ref_logps.shape == counts.shape
    if not (per_token or per_sequence):
        raise ValueError(
            f"expected ref_logps ({len(logps)},) per token or ({len(counts)},) per sequence, "
            f"got {tuple(ref_logps.shape)}"
        )
    return per_token and not (per_sequence and ref_logps.dtype == torch.float64)


def _sequence_sums(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(N,) -> (S,) float64. Each sequence is summed by itself in token order: no neighbour changes its bits."""
    return torch.segment_reduce(x.double(), "sum", offsets=cu_seqlens.long(), unsafe=True)


def _metrics(loss: Loss, seq: Sequences, sums: Tensor, rewards: Tensor) -> dict[str, Tensor]:
    """TRL's names -> [sum, count]."""
    if loss.per != "pair" and seq.labels is None:  # no side to tell apart
        return {}
    chosen, rejected = _sides(loss, seq)

    def pick(x: Tensor, side: Tensor) -> Tensor:
        return torch.stack([torch.where(side, x, 0.0).sum(), side.sum().double()])

    metrics = {
        "rewards/chosen": pick(rewards, chosen),
        "rewards/rejected": pick(rewards, rejected),
        "logps/chosen": pick(sums, chosen),
        "logps/rejected": pick(sums, rejected),
    }
    if loss.per == "pair":
        margins = rewards[0::2] - rewards[1::2]
        everyone = torch.ones_like(margins, dtype=torch.bool)
        metrics["rewards/accuracies"] = pick((margins > 0).double(), everyone)
        metrics["rewards/margins"] = pick(margins, everyone)
    if seq.z0 is not None:
        metrics["kl"] = torch.stack([seq.z0, torch.ones_like(seq.z0)])
    return metrics


def _sides(loss: Loss, seq: Sequences) -> tuple[Tensor, Tensor]:
    """(S,) bool twice: which sequences are chosen (desirable), which rejected."""
    if loss.per == "pair":
        chosen = torch.arange(len(seq.ratios), device=seq.ratios.device) % 2 == 0
    else:
        chosen = seq.labels
    return chosen, ~chosen
