"""From per-token log-probabilities to a preference loss, its rewards and its metrics.

    N completion tokens, end to end; S sequences, cut by cu_seqlens (S + 1,); P = S / 2 pairs.

Token log-ratios are subtracted first and summed per sequence in float64 in a fixed order, so a policy equal to its
reference has log-ratio exactly 0, and a 1000-token log-ratio keeps its last digits.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from prefuse.grouped import WithGradients, gradients_in_forward, split_in_groups
from prefuse.kernels import HeadOptions, checks
from prefuse.kernels.logprobs.call import prepare
from prefuse.kernels.logprobs.linear_logprobs import logprobs_of
from prefuse.kernels.preference.tail import METRICS, preference_tail
from prefuse.losses.contract import NEEDS, Loss, Sequences, is_batchwise, needs_of
from prefuse.losses.pairs import DPO, IPO
from prefuse.losses.unpaired import KTO

# What `linear_preference_loss` may keep from the forward to the backward, unless told otherwise.
WORKSPACE = 1 << 30
# Losses that the tail kernel knows, by its names: exactly these, for a subclass may have another equation.
TAILS = {DPO: "dpo", IPO: "ipo", KTO: "kto"}


class Mismatched(NamedTuple):
    """Completions paired with another row's prompt: as a `z0`, what it is to be computed from (`kto_reference_point`).

    For a batch that is an optimizer step by itself. When microbatches or ranks share one, call `kto_reference_point`.
    """

    logps: Tensor  # (N',) of the policy
    ref_logps: Tensor  # (N',) or (K,)
    cu_seqlens: Tensor  # (K + 1,)


@dataclass(frozen=True)
class PreferenceOutput:
    """What a preference loss gives back; everything but `loss` is detached."""

    loss: Tensor  # () float32, the one differentiable field: sum of `losses` / num_items
    losses: Tensor  # (P,) for pairs, else (S,), float32
    logps: Tensor  # (S,) float64, log pi(y | x): exact enough to serve as another run's `ref_logps`
    rewards: Tensor  # (S,) float32, beta * log-ratio
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
        impl: "triton" (DPO, IPO and KTO in one launch each way; their subclasses and other losses run in torch),
            "torch", "reference" (here the same) or "auto": "triton" where it can run, else "torch".

    Raises:
        TypeError, ValueError: shapes that do not fit, an odd number of sequences for a loss over pairs, a missing or
            superfluous reference, labels or z0.
        RuntimeError: an `impl` that cannot run here.
    """
    _check_packed(logps, cu_seqlens)
    counts = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    return _preference_loss(logps, ref_logps, cu_seqlens, counts, loss, labels, z0, num_items, impl)


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

    `workspace`: bytes that may be kept for the backward (default `WORKSPACE`, 1 GiB). When the `N * V` weights of a
    trainable head fit in it (2 bytes each in bf16), they are kept, and forward and backward take 3 units of matrix
    products instead of 4. When those of some whole pairs fit, beside a float32 gradient of a half-precision weight,
    pairs go group by group and the gradients are made in the forward: 3 units too, the same log-probabilities bit by
    bit. 0 always recomputes.

    `gradient_tolerance` is `linear_logprobs`'s: above 0.0 the backward takes the place of the workspace, and writes the
    skipped share into `metrics["head/skipped_mass"]`, which is [0, 0] before.
    """
    options = HeadOptions(softcap, float(logit_scale), float(temperature), int(ignore_index))
    workspace = WORKSPACE if workspace is None else workspace
    call = prepare(hidden, weight, targets, bias, options, (), impl, vocab_group, gradient_tolerance)
    targets = call.targets
    _check_packed(targets, cu_seqlens)
    kept = targets != ignore_index
    counts = _sequence_sums(kept.double(), cu_seqlens).long()
    _check_loss(loss, len(counts), ref_logps, labels, z0)
    per_token = ref_logps is not None and _is_per_token(ref_logps, targets, counts)
    if per_token:
        ref_logps = torch.where(kept, ref_logps, 0.0)
    num_items = _items(loss, counts) if num_items is None else num_items

    def loss_of(logps: Tensor, sequences: slice = slice(None), tokens: slice = slice(None)) -> PreferenceOutput:
        ref = None if ref_logps is None else ref_logps[tokens if per_token else sequences]
        cu = cu_seqlens if sequences == slice(None) else cu_seqlens[sequences.start : sequences.stop + 1] - tokens.start
        desirable = None if labels is None else labels[sequences]
        return _preference_loss(logps, ref, cu, counts[sequences], loss, desirable, z0, num_items, impl)

    if gradient_tolerance > 0.0:
        meter = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        out = loss_of(logprobs_of(call, guess=ref_logps if per_token else None, meter=meter))
        return replace(out, metrics={**out.metrics, "head/skipped_mass": meter})
    # (Ranks that share a head must agree on the groups, but each knows the size of its own part only.)
    whole = vocab_group or is_batchwise(loss)
    groups = [] if whole else split_in_groups(call, workspace, cu_seqlens, 2 if loss.per == "pair" else 1)
    if not groups:
        return loss_of(logprobs_of(call, workspace))
    if isinstance(z0, Mismatched):  # of all groups
        z0 = kto_reference_point(*z0)
    logps, gradients = gradients_in_forward(groups, call, lambda *group: loss_of(*group).loss)
    out = loss_of(logps)
    return replace(out, loss=WithGradients.apply(out.loss, gradients, hidden, weight, bias))


def kto_reference_point(
    kl_logps: Tensor,  # (N,)
    kl_ref_logps: Tensor,  # (N,) or (S,)
    cu_seqlens: Tensor,  # (S + 1,)
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """KTO's reference point z0 (arXiv 2402.01306, section 4.1), from completions paired with another row's prompt.

        z0 = max(0, mean over s of (log pi(y'_s | x_s) - log pi_ref(y'_s | x_s)))      y'_s: another row's completion

    Args:
        kl_logps, kl_ref_logps: log-probabilities of the mismatched completions, as in `preference_loss`. Give those
            of a whole optimizer step at once, so that accumulation does not change the update.
        cu_seqlens: (S + 1,) int32 offsets of the mismatched completions.
        group: ranks that share the optimizer step; sum and count are reduced over them.

    Returns:
        () float64 >= 0, detached: the paper lets no gradient through z0. With no sequence at all, 0.
    """
    _check_packed(kl_logps, cu_seqlens)
    ratios = _log_ratios(kl_logps.detach(), kl_ref_logps.detach(), cu_seqlens)
    total = torch.stack([ratios.sum(), torch.full_like(ratios.sum(), len(ratios))])
    if group is not None:
        dist.all_reduce(total, group=group)
    return (total[0] / total[1].clamp_min(1.0)).clamp_min(0.0)


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
    means = {name: total / count for name, (total, count) in zip(metrics, packed.tolist(), strict=True) if count}
    if "rewards/margins" not in means and {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def _preference_loss(
    logps: Tensor,  # (N,)
    ref_logps: Tensor | None,
    cu_seqlens: Tensor,
    counts: Tensor,  # (S,) tokens that count
    loss: Loss,
    labels: Tensor | None,
    z0: Tensor | float | Mismatched | None,
    num_items: int | Tensor | None,
    impl: str = "auto",
) -> PreferenceOutput:
    checks.check_impl(impl)
    _check_loss(loss, len(counts), ref_logps, labels, z0)
    _check_devices(logps, {"ref_logps": ref_logps, "cu_seqlens": cu_seqlens, "labels": labels})
    if isinstance(z0, Mismatched):
        _check_devices(logps, {f"z0.{name}": x for name, x in z0._asdict().items()})
    if isinstance(num_items, int) and num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}")
    num_items = _items(loss, counts) if num_items is None else num_items
    ref_logps = None if ref_logps is None else ref_logps.detach()
    if checks.resolve(impl, logps) == "triton" and type(loss) in TAILS:
        return _tail(logps, ref_logps, cu_seqlens, counts, loss, labels, z0, num_items)

    ratios = _log_ratios(logps, ref_logps, cu_seqlens)
    if isinstance(z0, Mismatched):
        z0 = kto_reference_point(*z0)
    elif z0 is not None:
        z0 = torch.as_tensor(z0, dtype=torch.float64, device=logps.device).detach()
    sums = ratios if ref_logps is None else _sequence_sums(logps, cu_seqlens)
    seq = Sequences(ratios, counts.clamp_min(1).double(), labels, z0, sums)
    losses = loss.losses(seq)
    total = (losses.sum() / num_items).float()

    with torch.no_grad():
        rewards = loss.rewards(seq)
        metrics = _metrics(loss, seq, sums, rewards)
    return PreferenceOutput(total, losses.detach().float(), sums.detach(), rewards.detach().float(), metrics)


def _items(loss: Loss, counts: Tensor) -> int | Tensor:
    """What the loss is a mean over, in this call: tokens, pairs or sequences."""
    if loss.per == "token":
        return counts.sum().clamp_min(1)
    return max(len(counts) // (2 if loss.per == "pair" else 1), 1)


def _tail(
    logps: Tensor,
    ref_logps: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,
    loss: DPO | IPO | KTO,
    labels: Tensor | None,
    z0: Tensor | float | Mismatched | None,
    num_items: int | Tensor,
) -> PreferenceOutput:
    """`_preference_loss` in one launch each way."""
    name, kl_per_token = TAILS[type(loss)], False
    if isinstance(z0, Mismatched):
        z0 = Mismatched(z0.logps.detach(), z0.ref_logps.detach(), z0.cu_seqlens)
        kl_per_token = _is_per_token(z0.ref_logps, z0.logps, z0.cu_seqlens[1:])
    elif isinstance(z0, Tensor):
        z0 = z0.detach()
    per_token = _is_per_token(ref_logps, logps, counts)
    out = preference_tail(
        name, logps, ref_logps, cu_seqlens, counts, labels, z0, num_items, per_token, kl_per_token, **asdict(loss)
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


def _check_packed(logps: Tensor, cu_seqlens: Tensor) -> None:
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
        raise ValueError("cu_seqlens must be a tensor (S + 1,) of offsets, beginning with 0")
    if cu_seqlens.is_floating_point() or cu_seqlens.dtype == torch.bool:
        raise TypeError(f"cu_seqlens must hold integers (int32), got {cu_seqlens.dtype}")
    if logps.dim() != 1:
        raise ValueError(
            f"expected logps (N,), the completion tokens of all sequences end to end, got {tuple(logps.shape)}"
        )
    if (
        torch.compiler.is_compiling() or cu_seqlens.is_cuda
    ):  # a look at the values would break the graph, or wait for them
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != len(logps) or bool((cu_seqlens.diff() < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to N = {len(logps)}, got {cu_seqlens.tolist()[:8]} ... {last}")


def _check_devices(logps: Tensor, others: dict[str, Tensor | None]) -> None:
    for name, x in others.items():
        if x is not None and x.device != logps.device:
            raise TypeError(f"{name} is on {x.device} but logps is on {logps.device}; move one of them")


def _check_loss(loss: Loss, sequences: int, ref_logps, labels, z0) -> None:
    name, needs = type(loss).__name__, needs_of(loss)
    if loss.per == "pair" and sequences % 2:
        raise ValueError(f"{name} takes pairs (chosen, rejected adjacent), got an odd number of sequences: {sequences}")
    if "reference" in needs and ref_logps is None:
        raise ValueError(f"{name} needs ref_logps; for a uniform reference pass zeros ({sequences},) in float64")
    if "reference" not in needs and ref_logps is not None:
        raise ValueError(f"{name} uses no reference, so ref_logps must be None")
    others = {"labels": labels, "z0": z0}
    for need, given in others.items():
        if need in needs and given is None:
            raise ValueError(f"{name} needs {' and '.join(NEEDS[other] for other in others if other in needs)}")
        if need not in needs and given is not None:
            raise ValueError(f"{name} takes no {need}: leave it out, or give a loss whose needs name it (KTO)")
    if isinstance(z0, Mismatched):
        _check_packed(z0.logps, z0.cu_seqlens)
    if isinstance(z0, Tensor) and z0.dim():
        raise ValueError(f"z0 must be one number for all sequences, shape (), got {tuple(z0.shape)}")
    if labels is None:
        return
    if labels.dtype != torch.bool:
        raise TypeError(f"labels must be bool, got {labels.dtype}")
    if labels.shape != (sequences,):
        raise ValueError(f"expected labels ({sequences},), one per sequence, got {tuple(labels.shape)}")
