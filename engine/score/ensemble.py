"""Several scorers as one: the mean, the minimum, the mean minus a multiple of the spread (arXiv 2310.02743), or a
weighted sum of several objectives.

A reward model with several heads (`prefuse reward --reward_heads`) counts as so many members.

The scores of members that differ in scale should be brought to one before they are combined; members of one kind (the
seeds of a reward model) have one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefuse.engine.score.contract import Columns, NoScore, Scorer, Scores, Text


@dataclass(frozen=True)
class Ensemble:
    members: tuple[Scorer, ...]
    how: str = "mean"  # "mean", "min", "mean_minus_std" or "sum"
    spread_weight: float = 1.0  # c of mean - c * std
    weights: tuple[float, ...] = ()  # of the sum

    @property
    def name(self) -> str:
        weights = [f"{weight:g} " for weight in self.weights] or [""] * len(self.members)
        named = [f"{weight}{member.name}" for weight, member in zip(weights, self.members, strict=True)]
        return f"{self.how} of {', '.join(named)}"

    @property
    def key(self) -> str:
        weight = f" {self.spread_weight}" if self.how == "mean_minus_std" else ""
        weight += f" {self.weights}" if self.weights else ""
        return f"{self.how}{weight} of ({'; '.join(member.key for member in self.members)})"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for member in self.members for name in member.columns))

    def score(
        self, prompts: Sequence[Text], answers: Sequence[Sequence[str]], columns: Columns | None = None
    ) -> Scores:
        """An answer that one member has no score for has none: the others would be another ensemble."""
        found = [
            (member.name, scores)
            for member in self.members
            for scores in (
                member.score_heads(prompts, answers)
                if getattr(member, "heads", 1) > 1
                else [member.score(prompts, answers, columns)]
            )
        ]
        stacked = torch.stack([scores.values for _, scores in found])
        if self.how == "sum":
            values = torch.einsum("m,mpk->pk", stacked.new_tensor(self.weights), stacked)
        else:
            values = combined(stacked, self.how, self.spread_weight)
        reasons = [
            [_first([(name, scores.reasons[p][k]) for name, scores in found]) for k in range(values.shape[1])]
            for p in range(len(prompts))
        ]
        parts = (
            {name: scores.values for name, scores in found} if len(found) == len(self.members) else {}
        )  # not of heads
        return Scores(values, reasons, parts)


def _first(reasons: list[tuple[str, NoScore | None]]) -> NoScore | None:
    for name, reason in reasons:
        if reason is not None:
            return NoScore(reason.kind, f"{name}{f', {reason.detail}' if reason.detail else ''}")
    return None


def combined(values: Tensor, how: str, spread_weight: float) -> Tensor:  # (M, P, K) -> (P, K)
    """std is that of the members as a population: one member has none."""
    if how == "min":
        return values.amin(0)
    mean = values.mean(0)
    return mean if how == "mean" else mean - spread_weight * values.std(0, correction=0)
