"""From a scored round to the batches of its optimizer steps, by algorithm.

Over tokens (grpo, rloo, reinforce, ppo) every answer is learned, weighed by its advantage. Over pairs and labels a
round becomes the examples that `prefuse train` reads from a file, and the same batches are made of them.

P prompts with K answers each; N tokens of all of them, end to end.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import prefuse
from prefuse.engine.config.online import OVER_TOKENS, PAIRED
from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import Batch, Examples, collate, mismatched
from prefuse.engine.data.order import mismatches_of_epoch
from prefuse.engine.data.ragged import Ragged
from prefuse.engine.data.table import Demonstration, Example, Labelled, Pair
from prefuse.engine.model.policy import SampledTokens
from prefuse.engine.rounds.sampler import seed_of
from prefuse.engine.rounds.samples import Round
from prefuse.engine.run.ranks import Ranks


@dataclass(frozen=True)
class Material:
    """What a round is learned from: examples, the prompt that each belongs to, and what its tokens are worth."""

    examples: Examples
    owners: list[int]  # (E,) index of the prompt within the round
    advantages: list[Tensor] | None = None  # (E,) of tensors (n,), for losses over tokens
    answers: list[int] | None = None  # (E,) the answer that each example is, end to end
    returns: list[Tensor] | None = None  # ppo


def adjusted_scores(made: Round, config: Config) -> Tensor:  # (P, K)
    """What a cut-off answer loses is taken off."""
    if config.missing_eos_penalty is None:
        return made.scores
    return made.scores - config.missing_eos_penalty * (~torch.tensor(made.stopped)).double()


def material_of(
    made: Round, prompts: Sequence[Sequence[int]], config: Config, ranks: Ranks, beta: float
) -> Material | None:
    """None where nothing is to be learned: no pair, no label, no answer with a score."""
    if config.algorithm in OVER_TOKENS:
        return _over_tokens(made, prompts, config, ranks, beta)
    scores = adjusted_scores(made, config)
    rows: list[Example] = []
    owners: list[int] = []
    for p, group in enumerate(scores.tolist()):
        found = _examples_of(made, p, group, list(prompts[made.prompts[p]]), config)
        rows += found
        owners += [p] * len(found)
    return Material(Examples.of(rows), owners) if rows else None


def spare_of(made: Round, prompts: Sequence[Sequence[int]], config: Config) -> Material:
    """One example of the algorithm's kind, for a rank that has none: it runs beside the others, and counts nowhere."""
    prompt, ids, row = list(prompts[made.prompts[0]]), made.ids[0][0], made.rows[0]
    if config.algorithm in OVER_TOKENS:
        own = [torch.zeros(len(ids))]
        return Material(Examples.of([Demonstration(prompt, ids, row)]), [0], own, [0], None)
    kinds = {name: Pair(prompt, ids, ids, row) for name in PAIRED}
    kinds |= {"kto": Labelled(prompt, ids, True, row), "best_of_n": Demonstration(prompt, ids, row)}
    return Material(Examples.of([kinds[config.algorithm]]), [0])


def _examples_of(made: Round, p: int, scores: list[float], prompt: list[int], config: Config) -> list[Example]:
    ids, row = made.ids[p], made.rows[p]
    known = [k for k, score in enumerate(scores) if score == score]
    if len({scores[k] for k in known}) < 2:  # no answer is better than another
        return []
    best = max(known, key=lambda k: scores[k])
    if config.algorithm in PAIRED:
        pairs = pairs_of(scores, config.pairs, config.seed, made.number, row)
        return [Pair(prompt, ids[i], ids[j], f"{row}#{i}>{j}") for i, j in pairs]
    if config.algorithm == "kto":
        mean = sum(scores[k] for k in known) / len(known)
        return [Labelled(prompt, ids[k], scores[k] > mean, f"{row}#{k}") for k in known if scores[k] != mean]
    return [Demonstration(prompt, ids[best], f"{row}#{best}")]  # best_of_n


def pairs_of(scores: Sequence[float], which: str, *drawn_from: object) -> list[tuple[int, int]]:
    """(better, worse) of answers with these scores, as `--pairs` says; none of equal scores, none of NaN."""
    known = [k for k, score in enumerate(scores) if score == score]
    best = max(known, key=lambda k: scores[k], default=None)
    worse = [k for k in known if scores[k] < scores[best]]
    if not worse:
        return []
    if which == "all":
        both = [(i, j) if scores[i] > scores[j] else (j, i) for i, j in combinations(known, 2)]
        return [(i, j) for i, j in both if scores[i] != scores[j]]
    if which == "best_vs_random":
        return [(best, worse[seed_of("pair", *drawn_from) % len(worse)])]
    return [(best, min(worse, key=lambda k: scores[k]))]


# ---- over tokens ---------------------------------------------------------------------------------


def _over_tokens(
    made: Round, prompts: Sequence[Sequence[int]], config: Config, ranks: Ranks, beta: float
) -> Material | None:
    cu_seqlens = torch.tensor([0, *made.lengths]).cumsum(0).int()
    returns = None
    scores = adjusted_scores(made, config)
    if config.algorithm == "ppo":
        tokens, returns = _by_values(made, scores, cu_seqlens, config, ranks, beta)
    else:
        if config.algorithm == "rloo" and beta:
            scores = scores - beta * _kl_of_answers(made, cu_seqlens).reshape(scores.shape)
        advantages = _by_groups(scores, config, ranks).flatten()
        tokens = advantages.repeat_interleave(cu_seqlens.diff().long())
    bare = answers_of(made, prompts)
    kept = [stop or not config.mask_truncated_completions for own in made.stopped for stop in own]
    if not any(kept):
        return None
    examples = bare.examples
    if not all(kept):
        examples = replace(examples, learned=np.repeat(kept, examples.completions.lengths))
    split = made.tokens_of(tokens.float())
    split_returns = None if returns is None else made.tokens_of(returns.float())
    return Material(examples, bare.owners, split, bare.answers, split_returns)


def answers_of(made: Round, prompts: Sequence[Sequence[int]]) -> Material:
    """All answers of a round, end to end."""
    rows = [
        Demonstration(list(prompts[made.prompts[p]]), made.ids[p][k], f"{made.rows[p]}#{k}") for p, k in made.answers
    ]
    return Material(Examples.of(rows), [p for p, _ in made.answers], None, list(range(len(rows))))


def _by_groups(scores: Tensor, config: Config, ranks: Ranks) -> Tensor:  # (P, K) of this rank
    """Over the groups of all ranks, for what is divided by the spread of the batch."""
    gathered = ranks.gather(scores)  # (ranks, P, K)
    everyone = gathered.reshape(-1, scores.shape[1])
    if config.algorithm == "grpo":
        found = prefuse.group_advantages(everyone, scale=config.scale_rewards)
    elif config.algorithm == "rloo":
        found = prefuse.group_advantages(everyone, baseline="leave_one_out", scale="none")
    else:
        found = prefuse.batch_advantages(everyone.flatten()).reshape(everyone.shape)
    return found.reshape(gathered.shape)[ranks.rank]


def _kl_of_answers(made: Round, cu_seqlens: Tensor) -> Tensor:  # (P * K,)
    """log pi_old(y) - log pi_ref(y): k1, as RLOO's paper has it."""
    ratios = made.old_logps.double() - made.ref_logps.double()
    return torch.segment_reduce(ratios, "sum", offsets=cu_seqlens.long(), unsafe=True)


def _by_values(
    made: Round, scores: Tensor, cu_seqlens: Tensor, config: Config, ranks: Ranks, beta: float
) -> tuple[Tensor, Tensor]:  # (N,), (N,)
    """PPO: KL in the reward of each token, generalized advantages, whitened over the tokens of all ranks."""
    flat = scores.flatten()
    known = ~flat.isnan()
    ref = made.ref_logps if made.ref_logps is not None else made.old_logps
    rewards = prefuse.token_rewards(flat.nan_to_num(0.0), made.old_logps, ref, cu_seqlens, beta)
    advantages, returns = prefuse.gae(rewards, made.old_values, cu_seqlens, config.gamma, config.lam)
    counted = known.repeat_interleave(cu_seqlens.diff().long())
    total = ranks.sum_(
        torch.stack([counted.sum().double(), advantages[counted].sum(), advantages[counted].square().sum()])
    )
    mean = total[1] / total[0].clamp_min(1)
    spread = (total[2] / total[0].clamp_min(1) - mean.square()).clamp_min(0)
    white = (advantages - mean) * torch.rsqrt(spread + 1e-8)
    return torch.where(counted, white, 0.0), returns


# ---- batches -------------------------------------------------------------------------------------


def parts_of(material: Material, prompts: int, config: Config) -> list[list[list[int]]]:
    """Of each of the round's steps, its microbatches: indices of examples. A step takes the next of the prompts."""
    examples, steps = material.examples, config.steps_per_generation
    size = config.per_device_train_batch_size
    cut = None
    if examples.padding_free:
        cut = examples.bins(config.token_budget(size, examples.sides))
    parts = []
    for step in range(steps):
        first, last = step * prompts // steps, (step + 1) * prompts // steps
        chosen = [i for i, owner in enumerate(material.owners) if first <= owner < last]
        if cut is not None:
            parts.append(cut(chosen) if chosen else [])
        else:
            parts.append([chosen[start : start + size] for start in range(0, len(chosen), size)])
    return parts


def batch_of(
    material: Material, indices: list[int], made: Round, config: Config, *, needs_ref: bool, values: Any = None
) -> Batch:
    """One microbatch. `values`: PPO's value head."""
    batch = collate(material.examples, indices)
    if material.advantages is None:
        return batch
    chosen = [material.answers[i] for i in indices]

    def picked(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        by_answer = made.tokens_of(x)
        return torch.cat([by_answer[i] for i in chosen])

    returns = None if material.returns is None else torch.cat([material.returns[i] for i in indices])
    sampled = SampledTokens(
        torch.cat([material.advantages[i] for i in indices]), picked(made.old_logps), config.temperature,
        picked(made.old_values), returns, values, config.cliprange_value,
    )  # fmt: skip
    return replace(batch, sampled=sampled, ref_logps=picked(made.ref_logps) if needs_ref else None)


def with_mismatches(
    material: Material | None, made: Round, config: Config, ranks: Ranks
) -> tuple[Material | None, Examples | None]:
    """KTO: the examples, and each prompt with a completion of another prompt of the round, of whichever rank: as one
    process with all prompts draws them. (None, None) where the prompts of all ranks with examples are one."""
    own = []
    if material is not None:
        examples = material.examples
        own = list(zip(material.owners, examples.prompts, examples.completions, strict=True))
    # Prompts are dealt to the ranks in turn.
    placed = [[p * ranks.size + ranks.rank, list(prompt), list(ids)] for p, prompt, ids in own]
    everyone = sorted((x for said in ranks.texts(json.dumps(placed)) for x in json.loads(said)), key=itemgetter(0))
    places, prompts, completions = ([x[i] for x in everyone] for i in range(3))
    if len(set(map(tuple, prompts))) < 2 or material is None:
        return None, None
    draw = mismatches_of_epoch(prompts, config.seed, made.number)
    others = [j for place, j in zip(places, draw, strict=True) if place % ranks.size == ranks.rank]
    return material, mismatched(material.examples, others, config.max_length, Ragged.of(completions))


def summary_of(made: Round, ranks: Ranks, name: str) -> dict[str, Tensor]:
    """{TRL's name: (2,) [sum, count]} of the round over all ranks."""
    lengths = torch.tensor(made.lengths, dtype=torch.float64)
    stopped = torch.tensor([stop for own in made.stopped for stop in own])
    scores = ranks.gather(made.scores).reshape(-1, made.scores.shape[1])
    known = ~scores.isnan()
    flat = scores[known]
    spread = torch.stack(
        [row[k].std() if k.sum() > 1 else row.new_zeros(()) for row, k in zip(scores, known, strict=True)]
    )
    repeated = sum(len(own) - len(set(map(tuple, own))) for own in made.ids)
    sums = {
        "completions/mean_length": (lengths.sum(), len(lengths)),
        "completions/clipped_ratio": ((~stopped).sum(), len(lengths)),
        "completions/mean_terminated_length": (lengths[stopped].sum(), stopped.sum()),
        "completions/duplicates": (repeated, len(lengths)),
        "reward_truncated": _score_of(made, ~stopped),
    }
    packed = ranks.sum_(torch.tensor([[float(a), float(b)] for a, b in sums.values()], dtype=torch.float64))
    found = dict(zip(sums, packed, strict=True))
    extremes = ranks.gather(torch.stack([lengths.min(), lengths.max()]))
    one = {
        "completions/min_length": extremes[:, 0].min(), "completions/max_length": extremes[:, 1].max(),
        "reward": flat.mean() if len(flat) else flat.new_tensor(np.nan),
        "reward_std": flat.std() if len(flat) > 1 else flat.new_zeros(()),
        "frac_reward_zero_std": (spread <= 1e-8).double().mean(),
        "unscored": (~known).double().mean(),
    }  # fmt: skip
    for part, own in (made.parts or {name: made.scores}).items():
        x = ranks.gather(own)
        x = x[~x.isnan()]
        one[f"rewards/{part}/mean"] = x.mean() if len(x) else x.new_tensor(np.nan)
        one[f"rewards/{part}/std"] = x.std() if len(x) > 1 else x.new_zeros(())
    return found | {
        key: torch.stack([value.double(), value.new_ones((), dtype=torch.float64)]) for key, value in one.items()
    }


def _score_of(made: Round, chosen: Tensor) -> tuple[Tensor, Tensor]:
    scores = made.scores.flatten()
    counted = chosen & ~scores.isnan()
    return scores[counted].sum(), counted.sum()
