"""From per-token log-probabilities of sampled answers to a policy loss and its metrics.

    N completion tokens, end to end; S answers, cut by cu_seqlens (S + 1,).

Ratios are exp of differences taken in float64, so a policy equal to the one that sampled has ratio exactly 1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
import torch.distributed as dist
from torch import Tensor

from prefuse.grouped import WithGradients, gradients_in_forward, split_in_groups
from prefuse.kernels import HeadOptions
from prefuse.kernels.gradients import Gradients
from prefuse.kernels.logprobs.call import HeadCall, prepare_call
from prefuse.kernels.logprobs.linear_logprobs import logprobs_of
from prefuse.loss_inputs import check_devices, check_packed
from prefuse.losses.policy import GRPO
from prefuse.losses.sampled import POLICY_NEEDS, PolicyObjective, Sampled, mean_of
from prefuse.preference import WORKSPACE


@dataclass(frozen=True)
class PolicyOutput:
    """What a policy loss gives back; everything but `loss` is detached."""

    loss: Tensor  # () float32, the one differentiable field: sum of `losses` / num_items
    losses: Tensor  # (S,) float32
    logps: Tensor  # (N,) of the policy: the `old_logps` of later steps on the same samples
    metrics: dict[str, Tensor]  # {TRL's name: (2,) [sum, count]}, to be added up and given to `reduce_metrics`


@dataclass(frozen=True)
class PolicyInputs:
    """What is given for the tokens of a call, or of a group of its answers: numbers of tokens, or of answers."""

    old_logps: Tensor | None = None
    advantages: Tensor | None = None
    ref_logps: Tensor | None = None
    kl: Tensor | None = None
    importance: Tensor | None = None

    def of(self, tokens: slice) -> PolicyInputs:
        given = {f.name: x[tokens] for f in fields(self) if (x := getattr(self, f.name)) is not None}
        return replace(self, **given)


def policy_loss(
    logps: Tensor,  # (N,)
    old_logps: Tensor | None,  # (N,)
    advantages: Tensor,  # (S,) or (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    loss: PolicyObjective = GRPO(),  # noqa: B008 (frozen)
    num_items: int | Tensor | None = None,
    *,
    ref_logps: Tensor | None = None,  # (N,)
    kl: Tensor | None = None,  # (N,)
    entropy: Tensor | None = None,  # (N,)
    importance_sampling_ratio: Tensor | None = None,  # (S,) or (N,)
) -> PolicyOutput:
    """Equals, for `GRPO()` with one advantage for each token::

        w = torch.exp(logps - old_logps)
        loss = -torch.minimum(w * advantages, w.clamp(0.8, 1.2) * advantages).mean()

    Args:
        logps: (N,) per-token log-probabilities of the policy, nats, packed without padding; carries the gradient.
        old_logps: (N,) those of the policy that sampled. None: `logps` itself, as in the first step on new samples.
        advantages: (S,) one for each answer, or (N,) one for each token (where N = S, float64 says per answer).
        cu_seqlens: (S + 1,) int32 offsets: answer s is `logps[cu_seqlens[s] : cu_seqlens[s + 1]]`.
        loss: `GRPO`, `RLOO`, `Reinforce`, `PPOClip`; equation and paper stand in its docstring.
        num_items: what the sum is divided by: tokens where `loss.per` is "token", else answers. Default: those of this
            call; give the global count when microbatches or ranks share one optimizer step.
        ref_logps: (N,) the reference's, for a loss with `beta` and an estimator of the KL.
        kl: (N,) the exact divergence with its gradient (`linear_kl`), for `kl_estimator="exact"`.
        entropy: (N,) of each token's distribution; it is reported, and carries the gradient of `entropy_coef`.
        importance_sampling_ratio: pi_old over the probability with which the sampler really drew (another engine's, or
            another precision's), which multiplies the policy's term; TRL's name for the same.

    Raises:
        TypeError, ValueError: shapes that do not fit, or an input that the loss needs or does not take.
    """
    check_packed(logps, cu_seqlens)
    needs = needs_of_policy(loss)
    given = PolicyInputs(old_logps, advantages, ref_logps, kl, importance_sampling_ratio)
    given = per_token(given, logps, cu_seqlens, needs)
    if "entropy" in needs and entropy is None:
        raise ValueError(f"{type(loss).__name__} with entropy_coef needs {POLICY_NEEDS['entropy']}")
    kept = torch.ones_like(logps, dtype=torch.bool)
    return _policy_loss(logps, cu_seqlens, kept, loss, given, entropy, num_items)


def linear_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    cu_seqlens: Tensor,  # (S + 1,)
    old_logps: Tensor | None,  # (N,)
    advantages: Tensor,  # (S,) or (N,)
    *,
    ref_logps: Tensor | None = None,  # (N,)
    loss: PolicyObjective = GRPO(),  # noqa: B008 (frozen)
    num_items: int | Tensor | None = None,
    kl: Tensor | None = None,  # (N,)
    importance_sampling_ratio: Tensor | None = None,  # (S,) or (N,)
    report_entropy: bool = True,
    workspace: int | None = None,
    bias: Tensor | None = None,  # (V,)
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
    vocab_group: dist.ProcessGroup | None = None,
    gradient_tolerance: float = 0.0,
) -> PolicyOutput:
    """Equals `policy_loss(logps, old_logps, advantages, cu_seqlens, loss, entropy=entropy, ...)` with::

        logps, outputs = linear_logprobs(hidden, weight, targets, outputs=("entropy",), temperature=temperature, ...)
        entropy = outputs["entropy"]

    `hidden[i]` is the state that predicts `targets[i]`: sampled tokens only, no prompt and no padding; answers to one
    prompt can share its run (`prefuse.packing`). No `(N, V)` logits exist. `temperature` is the one that the answers
    were sampled with. Tokens with `targets == ignore_index` count nowhere, and nothing that is given for them is read.
    The head's options and `workspace` are those of `linear_preference_loss`.

    The first step on new samples takes `old_logps=None`, or the `logps` of a pass without gradients over the same
    hidden states: every mode of the portable head gives a token the same bits, so each ratio is exactly 1.

    `report_entropy=False` leaves `metrics["entropy"]` out where `entropy_coef` is 0, and saves its share of the pass.
    """
    options = HeadOptions(softcap, float(logit_scale), float(temperature), int(ignore_index))
    needs = needs_of_policy(loss)
    outputs = ("entropy",) if report_entropy or "entropy" in needs else ()
    call = prepare_call(hidden, weight, targets, bias, options, outputs, impl, vocab_group, gradient_tolerance)
    check_packed(call.targets, cu_seqlens)
    given = PolicyInputs(old_logps, advantages, ref_logps, kl, importance_sampling_ratio)
    given = per_token(given, call.targets, cu_seqlens, needs)
    kept = call.targets != ignore_index
    num_items = _items(loss, kept, cu_seqlens) if num_items is None else num_items

    workspace = WORKSPACE if workspace is None else workspace
    # The exact KL and the entropy carry gradients of their own, which groups would have to make again.
    whole = vocab_group is not None or gradient_tolerance > 0.0 or "entropy" in needs or kl is not None
    groups = [] if whole else split_in_groups(call, workspace, cu_seqlens, per_item=1)
    if groups:
        out, gradients = _in_groups(groups, call, cu_seqlens, kept, loss, given, outputs, num_items)
        return replace(out, loss=WithGradients.apply(out.loss, gradients, hidden, weight, bias))
    logps = logprobs_of(call, workspace, outputs)
    logps, entropy = (logps[0], logps[1]["entropy"]) if outputs else (logps, None)
    return _policy_loss(logps, cu_seqlens, kept, loss, given, entropy, num_items)


def needs_of_policy(loss: PolicyObjective) -> frozenset[str]:
    """The names out of POLICY_NEEDS that a call with this loss must bring; TypeError for what is no policy loss."""
    if isinstance(loss, type) or not hasattr(loss, "policy_losses"):
        raise TypeError(f"loss must be an instance such as prefuse.GRPO(epsilon=0.2), got {loss!r}")
    needs = frozenset(loss.policy_needs)
    unknown = sorted(needs - set(POLICY_NEEDS))
    if unknown:
        raise ValueError(f"{type(loss).__name__}.policy_needs names {', '.join(unknown)}; known: {[*POLICY_NEEDS]}")
    return needs


def per_token(given: PolicyInputs, like: Tensor, cu_seqlens: Tensor, needs: frozenset[str]) -> PolicyInputs:
    """Every input checked, and as (N,) float64; `like` has the tokens' shape and place."""
    tensors = {f.name: getattr(given, f.name) for f in fields(given)}
    for name in ("ref_logps", "kl"):
        if name in needs and tensors[name] is None:
            raise ValueError(f"this loss needs {POLICY_NEEDS[name]}")
        if name not in needs and tensors[name] is not None:
            raise ValueError(
                f"this loss uses no {name}, so it must be None: leave it out, or set beta and kl_estimator"
            )
    if tensors["advantages"] is None:
        raise ValueError("advantages are missing: (S,) one for each answer, or (N,) one for each token")
    for name, x in tensors.items():
        if x is not None and not (isinstance(x, Tensor) and x.is_floating_point()):
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    check_devices(like, {"cu_seqlens": cu_seqlens, **tensors})
    counts = cu_seqlens.diff().long()
    spread = {}
    for name, x in tensors.items():
        if x is None:
            continue
        by_answer = name in ("advantages", "importance") and x.shape == counts.shape
        if by_answer and (x.shape != like.shape or x.dtype == torch.float64):
            x = x.repeat_interleave(counts, output_size=len(like))
        if x.shape != like.shape:
            wanted = f"({len(like)},)" + (f" or ({len(counts)},)" if name in ("advantages", "importance") else "")
            raise ValueError(f"expected {name} {wanted}, got {tuple(x.shape)}")
        spread[name] = x.double() if name == "kl" else x.detach().double()
    return PolicyInputs(**spread)


def _in_groups(
    groups: list, call: HeadCall, cu_seqlens: Tensor, kept: Tensor, loss: PolicyObjective, given: PolicyInputs,
    outputs: tuple[str, ...], num_items: int | Tensor,
) -> tuple[PolicyOutput, Gradients]:  # fmt: skip
    """A few whole answers at a time, their gradients made in the forward."""

    def loss_of(logps: Tensor, answers: slice, tokens: slice) -> Tensor:
        cu = cu_seqlens[answers.start : answers.stop + 1] - tokens.start
        return _policy_loss(logps, cu, kept[tokens], loss, given.of(tokens), None, num_items).loss

    logps, gradients, extra = gradients_in_forward(groups, call, loss_of, outputs)
    return _policy_loss(logps, cu_seqlens, kept, loss, given, extra.get("entropy"), num_items), gradients


def _policy_loss(
    logps: Tensor,  # (N,)
    cu_seqlens: Tensor,
    kept: Tensor,  # (N,) bool
    loss: PolicyObjective,
    given: PolicyInputs,
    entropy: Tensor | None,
    num_items: int | Tensor | None,
) -> PolicyOutput:
    if isinstance(num_items, int) and num_items < 1:
        raise ValueError(f"num_items must be at least 1, got {num_items}")
    num_items = _items(loss, kept, cu_seqlens) if num_items is None else num_items

    def clean(x: Tensor | None) -> Tensor | None:  # whatever stands at an ignored token is not read
        return None if x is None else torch.where(kept, x.double(), 0.0)

    new = clean(logps)
    seq = Sampled(
        new, new.detach() if given.old_logps is None else clean(given.old_logps), clean(given.advantages), cu_seqlens,
        kept.double(), clean(given.ref_logps), clean(given.kl), clean(entropy), clean(given.importance),
    )  # fmt: skip
    losses = loss.policy_losses(seq)
    total = (losses.sum() / num_items).float()
    with torch.no_grad():
        metrics = dict(loss.policy_metrics(seq))
        if entropy is not None:
            metrics["entropy"] = mean_of(seq.entropy, seq.kept)
    return PolicyOutput(total, losses.detach().float(), logps.detach(), metrics)


def _items(loss: PolicyObjective, kept: Tensor, cu_seqlens: Tensor) -> int | Tensor:
    """What the loss is a mean over, in this call: tokens or answers."""
    return kept.sum().clamp_min(1) if loss.per == "token" else max(len(cu_seqlens) - 1, 1)
