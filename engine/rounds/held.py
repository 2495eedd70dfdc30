"""Held-out prompts of online training: one answer is sampled to each, always from the same seed, and scored.

`eval_reward` is the scorer's mean, `eval_gold` that of gold_scorer, which does not train the policy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prefuse.engine.data.examples import Prompt
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.rounds.sampler import Sampler, seed_of, texts_of
from prefuse.engine.run.ranks import Ranks
from prefuse.engine.score.contract import Scorer


@dataclass(frozen=True)
class HeldPrompts:
    prompts: Sequence[Prompt]
    sampler: Sampler
    gold: Scorer | None
    seed: int

    @property
    def meets_reference(self) -> bool:
        return False

    def evaluate(self, lm: LanguageModel, ranks: Ranks, between: Callable[[], None]) -> dict[str, float]:
        """Means over all prompts; each rank answers some of them."""
        between()
        width = -(-len(self.prompts) // ranks.size)
        places = list(range(ranks.rank, len(self.prompts), ranks.size))
        asked = places + [0] * (width - len(places))  # all ranks generate as often
        own = [self.prompts[i] for i in asked]
        samples = self.sampler.sample(own, 1, seed_of(self.seed, "held out", ranks.rank), "held-out prompts")
        texts = texts_of(samples)
        scorers = {"reward": self.sampler} | (
            {} if self.gold is None else {"gold": replace(self.sampler, scorer=self.gold)}
        )
        sums: dict[str, Tensor] = {}
        count = len(places)
        for name, sampler in scorers.items():
            x = sampler.score(asked, own, texts)[:count, 0]
            known = x[~x.isnan()]
            sums[name] = torch.stack([known.sum(), known.square().sum(), torch.tensor(float(len(known)))]).double()
        lengths = torch.tensor([len(one[0].ids) for one in samples[:count]], dtype=torch.float64)
        cut = torch.tensor([not one[0].stopped for one in samples[:count]], dtype=torch.float64)
        sums["completions/mean_length"] = torch.stack(
            [lengths.sum(), lengths.square().sum(), torch.tensor(float(count))]
        )
        sums["completions/clipped_ratio"] = torch.stack([cut.sum(), cut.sum(), torch.tensor(float(count))])
        packed = ranks.sum_(torch.stack([x.double() for x in sums.values()]))
        means = {}
        for name, (total, squares, n) in zip(sums, packed.tolist(), strict=True):
            means[name] = total / n if n else float("nan")
            if name in scorers:
                means[f"{name}_std"] = max(squares / n - means[name] ** 2, 0.0) ** 0.5 if n else float("nan")
        return means
