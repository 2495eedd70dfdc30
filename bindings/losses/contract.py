"""What a loss is: a small function of per-sequence numbers, and what it needs to be given.

    S sequences; with pairs, sequence 2i is chosen and 2i + 1 rejected.
    r_s = log pi(y_s | x_s) - log pi_ref(y_s | x_s)      the log-ratio in nats, prompt excluded
    n_s                                                  its number of completion tokens

A loss is a frozen dataclass: its fields are the paper's hyperparameters, `losses` is its equation, `per` says what it
is a mean over, and `needs` says what a call must bring. Everything that takes a loss (`preference_loss`, the fused
path, the engine, the trainers for TRL) asks these, so a loss of your own works wherever one of these does.

Losses over pairs stand in `pairs` (with a reference) and `likelihood` (without one, or with an SFT term), losses over
single sequences in `unpaired`; `names` finds them by name. DPO, IPO and KTO are written a second time in Triton, in
`kernels/preference/device.py`: change both together; `tests/kernels/test_tail.py` compares the two.
Subclasses and all other losses run the code of this folder.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

Per = Literal["pair", "sequence", "token"]
Need = Literal["reference", "labels", "z0", "margins", "scores"]
# What `needs` may name, and what a call then brings.
NEEDS: dict[Need, str] = {
    "reference": "ref_logps",
    "labels": "labels (S,) bool",
    "z0": "z0, from kto_reference_point (or a number, or Mismatched)",
    "margins": "margins, one number for each item (a pair, or a sequence)",
    "scores": "scores (S,), one number for each sequence",
}


class Tokens(NamedTuple):
    """The tokens behind the sums, for losses that weigh or clip each: packed, end to end."""

    logps: Tensor  # (N,) float32, with gradient
    ref_logps: Tensor | None  # (N,) float32; None without a reference, or with one per sequence
    cu_seqlens: Tensor  # (S + 1,)
    kept: Tensor | None = None  # (N,) bool: tokens that are not ignored; None for all

    @property
    def ratios(self) -> Tensor:  # (N,) float64
        if self.ref_logps is None:
            raise ValueError("this loss reads log-ratios token by token: expected ref_logps (N,), one for each token")
        return self.logps.double() - self.ref_logps.double()

    @property
    def counted(self) -> Tensor:  # (N,) float64: 1 for a kept token, else 0
        return torch.ones_like(self.logps, dtype=torch.float64) if self.kept is None else self.kept.double()

    @property
    def owners(self) -> Tensor:  # (N,) the sequence of each token
        places = torch.arange(len(self.logps), device=self.logps.device)
        return torch.searchsorted(self.cu_seqlens[1:].long(), places, right=True)

    @property
    def positions(self) -> Tensor:  # (N,) how many kept tokens of its sequence come before each
        counted = self.counted
        before = counted.cumsum(0) - counted
        return before - before[self.cu_seqlens[:-1].long().clamp(max=max(len(before) - 1, 0))][self.owners]

    def sums(self, x: Tensor) -> Tensor:  # (N,) -> (S,)
        return torch.segment_reduce(x.double(), "sum", offsets=self.cu_seqlens.long(), unsafe=True)


class Sequences(NamedTuple):
    """What a loss may look at, all float64 but the labels; what its `needs` do not name is None."""

    ratios: Tensor  # (S,) log-ratios; the log-probabilities themselves for a loss without reference
    lengths: Tensor  # (S,) completion tokens, at least 1
    labels: Tensor | None  # (S,) bool: desirable or not
    z0: Tensor | None  # () KTO's reference point
    logps: Tensor  # (S,) log pi(y | x), whether or not there is a reference
    margins: Tensor | None = None  # (P,) for pairs, else (S,)
    scores: Tensor | None = None  # (S,)
    tokens: Tokens | None = None

    @property
    def chosen(self) -> Tensor:  # (P,)
        return self.ratios[0::2]

    @property
    def rejected(self) -> Tensor:  # (P,)
        return self.ratios[1::2]


class Loss(Protocol):
    """What `preference_loss` asks of a loss; a dataclass of your own will do.

    Also optional: `batchwise: bool`, true if an item's loss depends on the other items of its call.
    """

    per: Per  # what it is a mean over
    needs: frozenset[Need]

    def losses(self, seq: Sequences) -> Tensor: ...  # (P,) for pairs, else (S,), differentiable

    def rewards(self, seq: Sequences) -> Tensor: ...  # (S,) for metrics


class Defaults:
    """The base class of this library's losses, with the most common answers: over pairs, with a reference."""

    per: ClassVar[Per] = "pair"
    needs: ClassVar[frozenset[Need]] = frozenset({"reference"})
    batchwise: ClassVar[bool] = False

    @property
    def uses_reference(self) -> bool:
        return "reference" in self.needs


WITHOUT_REFERENCE: frozenset[Need] = frozenset()


def needs_of(loss: Loss) -> frozenset[Need]:
    """The names out of NEEDS that a call with this loss must bring, no more and no fewer.

    An attribute `uses_reference`, true or false, decides about "reference" in place of `needs`, also in a subclass.
    Raises TypeError if `loss` is no loss, ValueError if `needs` has a name that is not in NEEDS.
    """
    if not isinstance(loss, type) and hasattr(loss, "policy_losses") and not hasattr(loss, "losses"):
        raise TypeError(f"{type(loss).__name__} is a loss over sampled tokens: give it to prefuse.linear_policy_loss")
    if isinstance(loss, type) or not hasattr(loss, "losses"):
        raise TypeError(f"loss must be an instance such as prefuse.DPO(beta=0.1), got {loss!r}")
    needs = frozenset(getattr(loss, "needs", ()))
    unknown = sorted(needs - set(NEEDS))
    if unknown:
        raise ValueError(f"{type(loss).__name__}.needs names {', '.join(unknown)}; expected some of {', '.join(NEEDS)}")
    uses_reference = getattr(loss, "uses_reference", "reference" in needs)
    return needs | {"reference"} if uses_reference else needs - {"reference"}


def is_batchwise(loss: Loss) -> bool:
    """Whether an item's loss depends on the other items of its call, so that the call must not be split."""
    return bool(getattr(loss, "batchwise", False))


# ---- what several losses check and compute -------------------------------------------------------


def check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")


def check_smoothing(label_smoothing: float, above_zero: bool = False) -> None:
    if not (0.0 < label_smoothing if above_zero else 0.0 <= label_smoothing) or not label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in {'(' if above_zero else '['}0, 0.5), got {label_smoothing}")


def check_weight(name: str, weight: Any) -> None:
    if not (weight >= 0 and math.isfinite(weight)):
        raise ValueError(f"{name} must be finite and >= 0, got {weight}")


def check_share(name: str, share: float) -> None:
    if not 0 < share <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {share}")


EXPONENT = 80.0  # e^80 still is a float32


def capped_exp(x: Tensor) -> Tensor:
    """e^x, constant above e^80, so that a difference of two is never inf - inf."""
    return torch.exp(x.clamp(max=EXPONENT))


def smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x)"""
    if label_smoothing == 0.0:
        return -logsigmoid(x)
    return -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)
