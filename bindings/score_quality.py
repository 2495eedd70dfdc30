"""How good the scores of a reward model are, beyond how many pairs they order: calibration, length, scale.

P pairs, chosen and rejected adjacent.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 10


def reliability(margins: Tensor, bins: int = BINS) -> list[tuple[float, float, int]]:  # (P,)
    """(mean confidence, share that is right, pairs) of each bin that has any.

    A reward model says that the first of two answers is better with probability sigmoid(s_1 - s_2); its confidence is
    the larger of that and its complement, in [0.5, 1], which is cut into equal bins. Well calibrated, each bin's share
    is its confidence. `margins`: s_chosen - s_rejected.
    """
    confidence = torch.sigmoid(margins.double().abs())
    right = (margins > 0).double() + 0.5 * (margins == 0).double()
    place = ((confidence - 0.5) * 2 * bins).long().clamp(max=bins - 1)
    table = []
    for number in range(bins):
        inside = place == number
        if inside.any():
            table.append((confidence[inside].mean().item(), right[inside].mean().item(), int(inside.sum())))
    return table


def expected_calibration_error(margins: Tensor, bins: int = BINS) -> float:  # (P,)
    """Guo et al. 2017 (arXiv 1706.04599), eq. 3: the mean over pairs of |confidence - share that is right| of its bin;
    nan for no pair."""
    table = reliability(margins, bins)
    total = sum(count for *_, count in table)
    return sum(abs(said - right) * count for said, right, count in table) / total if total else float("nan")


def correlation(x: Tensor, y: Tensor) -> float:  # (P,), (P,)
    """Pearson's; 0 where one of them does not vary."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    size = (x.square().sum() * y.square().sum()).sqrt().item()
    return (x * y).sum().item() / size if size > 0 else 0.0


def score_quality(scores: Tensor, lengths: Tensor) -> dict[str, float]:  # (2 P,), (2 P,)
    """Numbers about the scores of pairs and the lengths of their answers.

    ece                  `expected_calibration_error` of sigmoid(s_chosen - s_rejected)
    std_reward           the standard deviation of all scores: their scale
    length_correlation   of s_chosen - s_rejected with n_chosen - n_rejected
    prefers_longer       the share of pairs of unequal length whose longer answer has the higher score
    longer_is_chosen     the share of them whose longer answer is the chosen one: what the data itself says
    unequal_lengths      how many they are
    """
    margins, longer = scores[0::2] - scores[1::2], lengths[0::2] - lengths[1::2]
    unequal = longer != 0
    numbers = {
        "ece": expected_calibration_error(margins),
        "std_reward": scores.double().std(correction=0).item() if len(scores) else 0.0,
        "length_correlation": correlation(margins, longer),
    }
    if unequal.any():
        same_way = (margins * longer)[unequal]
        numbers["prefers_longer"] = ((same_way > 0).double() + 0.5 * (same_way == 0).double()).mean().item()
        numbers["unequal_lengths"] = float(unequal.sum())
        numbers["longer_is_chosen"] = (longer[unequal] > 0).double().mean().item()
    return numbers
