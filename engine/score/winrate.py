"""How often a model's answers win, how sure that is, and what it depends on.

P prompts, N answers of each.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DRAWS = 2000  # of the bootstrap


def win_rate(values: Tensor, seed: int = 0, level: float = 0.95) -> dict[str, float]:  # (P,) or (P, N)
    """The mean of wins (1), ties (0.5) and losses (0), with its interval; NaN is no verdict, and counted apart.

    The answers to one prompt are drawn together: they are not independent.
    """
    values = values if values.ndim == 2 else values[:, None]
    decided = ~values.isnan()
    counts = {name: int((values == value).sum()) for name, value in (("wins", 1), ("ties", 0.5), ("losses", 0))}
    counts |= {"comparisons": int(decided.sum()), "without_verdict": int((~decided).sum())}
    if not decided.any():
        return {"win_rate": math.nan, **counts}
    sums, sizes = values.nan_to_num(0).sum(1), decided.sum(1)
    low, high = bootstrap(sums[sizes > 0], sizes[sizes > 0], seed, level)
    return {"win_rate": float(sums.sum() / sizes.sum()), "win_rate_low": low, "win_rate_high": high, **counts}


def bootstrap(sums: Tensor, sizes: Tensor, seed: int, level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of sum / size over prompts drawn with replacement."""
    draws = np.random.default_rng(seed).integers(len(sums), size=(DRAWS, len(sums)))
    means = sums.numpy()[draws].sum(1) / sizes.numpy()[draws].sum(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def cohen_kappa(first: Tensor, second: Tensor) -> float:  # (P,), (P,) of 1, 0.5, 0
    """(observed - expected agreement) / (1 - expected agreement), over wins, ties and losses of both.

    Cohen (1960). NaN where both give one and the same verdict to all, so that no agreement is beyond chance.
    """
    both = ~(first.isnan() | second.isnan())
    first, second = first[both], second[both]
    if not len(first):
        return math.nan
    observed = float((first == second).double().mean())
    expected = sum(float((first == v).double().mean() * (second == v).double().mean()) for v in (0.0, 0.5, 1.0))
    return math.nan if expected == 1 else (observed - expected) / (1 - expected)


def best_of_n(proxy: Tensor, gold: Tensor) -> list[dict[str, float]]:  # (P, N), (P, N)
    """What the best of n answers by `proxy` is worth by both, for n = 1 to N, over the prompts with all N scores.

    The mean over all subsets of n: the i-th of N by proxy is the best of n with probability C(i-1, n-1) / C(N, n).
    Answers of equal proxy share their gold. KL(best of n || the model) <= log n - (n-1)/n (arXiv 2401.01879).
    """
    whole = ~(proxy.isnan() | gold.isnan()).any(1)
    proxy, gold = proxy[whole], gold[whole]
    size = proxy.shape[1]
    if not len(proxy):
        return []
    gold = torch.stack([_shared(*row) for row in zip(proxy, gold, strict=True)])
    order = proxy.argsort(dim=1, stable=True)
    proxy, gold = proxy.gather(1, order), gold.gather(1, order)
    curve = []
    for n in range(1, size + 1):
        chance = torch.tensor([math.comb(i, n - 1) / math.comb(size, n) for i in range(size)], dtype=torch.float64)
        means = [float((values * chance).sum(1).mean()) for values in (proxy, gold)]
        curve.append({"n": n, "kl": math.log(n) - (n - 1) / n, "proxy": means[0], "gold": means[1]})
    return curve


def _shared(proxy: Tensor, gold: Tensor) -> Tensor:  # (N,)
    return torch.stack([gold[proxy == value].mean() for value in proxy])


def lengths(answers: Sequence[Sequence[str]]) -> float:
    """The mean number of characters, as AlpacaEval has it."""
    flat = [len(answer) for own in answers for answer in own]
    return sum(flat) / len(flat) if flat else math.nan
