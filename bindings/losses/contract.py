"""Every preference loss, once: a small function of per-sequence numbers.

    S sequences; with pairs, sequence 2i is chosen and 2i + 1 rejected.
    r_s = log pi(y_s | x_s) - log pi_ref(y_s | x_s)      the log-ratio in nats, prompt excluded
    n_s                                                  its number of completion tokens

A loss is a frozen dataclass: its fields are the paper's hyperparameters, `losses` its equation, `per` what it is a
mean over. To add one, write one more; `preference_loss`, the fused path and the engine take any of them. Others stand
in `pair_losses` (with a reference) and `likelihood_losses` (without one, or with an SFT term); `loss_names` finds them.

DPO, IPO and KTO have a copy on the device, in `kernels/preference/launch.py`: a change here is a change there, and
`tests/kernels/test_tail.py` compares the two. Subclasses and all other losses run what stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Sequences(NamedTuple):
    """What a loss may look at, all float64 but the labels."""

    ratios: Tensor  # (S,) log-ratios; the log-probabilities themselves for a loss without reference
    lengths: Tensor  # (S,) completion tokens, at least 1
    labels: Tensor | None  # (S,) bool: desirable or not, for unpaired losses
    z0: Tensor | None  # () KTO's reference point
    logps: Tensor  # (S,) log pi(y | x), whether or not there is a reference

    @property
    def chosen(self) -> Tensor:  # (P,)
        return self.ratios[0::2]

    @property
    def rejected(self) -> Tensor:  # (P,)
        return self.ratios[1::2]


class Loss(Protocol):
    """What `preference_loss` asks of a loss; a dataclass of your own will do."""

    per: Literal["pair", "sequence", "token"]  # what it is a mean over
    uses_reference: bool
    # And, where it is true, `batchwise: bool`: an item's loss depends on the other items of its call.

    def losses(self, seq: Sequences) -> Tensor: ...  # (P,) for pairs, else (S,), differentiable

    def rewards(self, seq: Sequences) -> Tensor: ...  # (S,) for metrics


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta must be > 0, got {beta}")


def _check_smoothing(label_smoothing: float, above_zero: bool = False) -> None:
    if not (0.0 < label_smoothing if above_zero else 0.0 <= label_smoothing) or not label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in {'(' if above_zero else '['}0, 0.5), got {label_smoothing}")


def smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x)"""
    if label_smoothing == 0.0:
        return -logsigmoid(x)
    return -(1 - label_smoothing) * logsigmoid(x) - label_smoothing * logsigmoid(-x)


@dataclass(frozen=True)
class DPO:
    """Direct Preference Optimization, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; with smoothing, cDPO.

        loss = -(1 - e) log sigmoid(beta (r_chosen - r_rejected)) - e log sigmoid(-beta (r_chosen - r_rejected))

    `label_smoothing` e is the probability that a preference label is flipped (Mitchell 2023, "A note on DPO with noisy
    preferences"); 0 is the paper's loss.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    per: ClassVar[Literal["pair", "sequence", "token"]] = "pair"
    uses_reference: ClassVar[bool] = True

    def __post_init__(self):
        _check_beta(self.beta)
        _check_smoothing(self.label_smoothing)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        return smoothed(self.beta * (seq.chosen - seq.rejected), self.label_smoothing)

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.beta * seq.ratios


@dataclass(frozen=True)
class IPO:
    """Identity Preference Optimization, Azar et al. 2023 (arXiv 2310.12036), eq. 17, with tau = beta.

        loss = (h_chosen - h_rejected - 1 / (2 beta))^2      h = r / n  (average), or h = r

    `average=True`, the per-token mean, is what its authors advise and TRL uses; `average=False` is the paper's sum.
    """

    beta: float = 0.1
    average: bool = True
    per: ClassVar[Literal["pair", "sequence", "token"]] = "pair"
    uses_reference: ClassVar[bool] = True

    def __post_init__(self):
        _check_beta(self.beta)

    def losses(self, seq: Sequences) -> Tensor:  # (P,)
        h = seq.ratios / seq.lengths if self.average else seq.ratios
        return (h[0::2] - h[1::2] - 1 / (2 * self.beta)).square()

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.beta * seq.ratios


@dataclass(frozen=True)
class KTO:
    """Kahneman-Tversky Optimization, Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8.

        desirable:    loss = w_d (1 - sigmoid(beta (r - z0)))
        undesirable:  loss = w_u (1 - sigmoid(beta (z0 - r)))

    z0 is the batch's estimate of KL(pi || pi_ref), from mismatched completions: see `kto_reference_point`. The paper
    advises w_d n_desirable / (w_u n_undesirable) in [1, 4/3].
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    per: ClassVar[Literal["pair", "sequence", "token"]] = "sequence"
    uses_reference: ClassVar[bool] = True

    def __post_init__(self):
        _check_beta(self.beta)
        for name in ("desirable_weight", "undesirable_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")

    def losses(self, seq: Sequences) -> Tensor:  # (S,)
        x = self.beta * (seq.ratios - seq.z0)
        # 1 - sigmoid(x) = sigmoid(-x), which does not cancel
        return torch.where(
            seq.labels, self.desirable_weight * torch.sigmoid(-x), self.undesirable_weight * torch.sigmoid(x)
        )

    def rewards(self, seq: Sequences) -> Tensor:  # (S,)
        return self.beta * seq.ratios


@dataclass(frozen=True)
class SFT:
    """Supervised fine-tuning: the negative log-likelihood of the completion, a mean over tokens.

    loss = -log pi(y | x)
    """

    per: ClassVar[Literal["pair", "sequence", "token"]] = "token"
    uses_reference: ClassVar[bool] = False

    def losses(self, seq: Sequences) -> Tensor:  # (S,)
        return -seq.ratios

    def rewards(self, seq: Sequences) -> Tensor:  # (S,) there is no preference, so no reward
        return torch.zeros_like(seq.ratios)
