"""Losses over single sequences: rows that are desirable or not, and plain demonstrations.

    r_s = log pi(y_s | x_s) - log pi_ref(y_s | x_s)      n_s its tokens

Numbers, shapes and the contract are those of `contract`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from prefuse.losses.contract import WITHOUT_REFERENCE, Defaults, Need, Per, Sequences, check_beta


@dataclass(frozen=True)
class KTO(Defaults):
    """Kahneman-Tversky Optimization, Ethayarajh et al. 2024 (arXiv 2402.01306), eq. 7 and 8.

        desirable:    loss = w_d (1 - sigmoid(beta (r - z0)))
        undesirable:  loss = w_u (1 - sigmoid(beta (z0 - r)))

    z0 is the batch's estimate of KL(pi || pi_ref), from mismatched completions: see `kto_reference_point`. The paper
    advises w_d n_desirable / (w_u n_undesirable) in [1, 4/3].
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"reference", "labels", "z0"})
    per: ClassVar[Per] = "sequence"

    def __post_init__(self):
        check_beta(self.beta)
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
class SFT(Defaults):
    """Supervised fine-tuning: the negative log-likelihood of the completion, a mean over tokens.

    loss = -log pi(y | x)
    """

    per: ClassVar[Per] = "token"
    needs: ClassVar[frozenset[Need]] = WITHOUT_REFERENCE

    def losses(self, seq: Sequences) -> Tensor:  # (S,)
        return -seq.ratios

    def rewards(self, seq: Sequences) -> Tensor:  # (S,) there is no preference, so no reward
        return torch.zeros_like(seq.ratios)
