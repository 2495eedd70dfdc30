"""Held-out rows while training: loss, rewards, and how far the policy has moved from its reference.

`kl_to_ref` is the exact KL(policy || reference) over the whole vocabulary, in nats per token, a mean over completion
positions. Not an estimate from the text's own tokens: those were not sampled from the policy, and once it has learnt to
avoid a rejected completion such an estimate says more about that text than about the policy. Here the reference's
distributions at a fixed sample of positions are kept (KL_POSITIONS at most, and KL_BYTES), so no second model stays in
memory; `prefuse eval` takes every position.

N completion tokens of a batch, K of them in its sample, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import prefuse
from prefuse import PreferenceOutput
from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import Batch, Examples, collate, mismatched
from prefuse.engine.data.order import mismatches_of_epoch, plan_evaluation
from prefuse.engine.model.forward import (
    LanguageModel,
    completion_states,
    count_items,
    logps_of_states,
    loss_of_states,
    reference_point,
    states_and_balance,
    with_balance,
)
from prefuse.engine.model.sharding import where_weights_are
from prefuse.engine.report.log import add_metrics, progress, say
from prefuse.engine.run.held_out_scores import evaluate_scores
from prefuse.engine.run.ranks import ALONE, Ranks
from prefuse.engine.run.reference_logps import reference_logps
from prefuse.losses.contract import Loss, is_batchwise, needs_of
from prefuse.losses.rewards import reads_scores

KL_BYTES = 1 << 26  # of float32 log-probabilities held at once
KL_POSITIONS = 1024  # at most
SCORES = "held_out_scores.jsonl"


@dataclass(frozen=True)
class KLSample:
    """What the reference says at a few completion positions of one batch."""

    positions: Tensor  # (K,) among the batch's N completion tokens
    ref_logprobs: Tensor  # (K, V) float32, on the CPU


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows with the reference's numbers for them. Each rank has the numbers of its own batches."""

    examples: Examples
    batches: list[list[int]]
    ref_logps: list[Tensor | None] | None = None  # by example; None for a loss without reference
    mismatches: Examples | None = None  # KTO
    mismatch_ref_logps: list[Tensor] | None = None
    kl_samples: dict[int, KLSample] | None = None  # by batch
    scores_file: Path | None = None  # of a reward model: where the scores of the last evaluation are written

    @property
    def meets_reference(self) -> bool:
        """Whether there is a reference, whose numbers are known."""
        return self.ref_logps is not None


def evaluation_batches(examples: Examples, config: Config, batchwise: bool = False) -> list[list[int]]:
    """All examples once, as indices; for a loss that is `batchwise`, so many in each."""
    size = config.per_device_eval_batch_size
    flat = examples.padding_free and not batchwise
    bins = examples.bins(config.token_budget(size, examples.sides)) if flat else None
    return plan_evaluation(examples.lengths, size, bins)


def held_out_mismatches(examples: Examples, config: Config) -> Examples:
    """KTO: each held-out prompt with a completion of another."""
    return mismatched(examples, mismatches_of_epoch(examples.prompts, config.seed, -1), config.max_length)


def hold(examples: Examples, ref: LanguageModel | None, loss: Loss, config: Config, ranks: Ranks = ALONE) -> HeldOut:
    """Computes all that the held-out rows need of the reference, while the reference is in memory."""
    batches = evaluation_batches(examples, config, is_batchwise(loss))
    mismatches = held_out_mismatches(examples, config) if "z0" in needs_of(loss) else None
    if ref is None:
        scores = Path(config.output_dir) / SCORES if reads_scores(loss) else None
        return HeldOut(examples, batches, mismatches=mismatches, scores_file=scores)
    own = batches[ranks.rank :: ranks.size]
    mismatch_logps = None
    if mismatches is not None:
        mismatch_logps = reference_logps(ref, mismatches, own, config.reference_cache, ranks)
    ref_logps: list[Tensor | None] = [None] * len(examples)
    if config.reference_cache is not None:
        ref_logps = reference_logps(ref, examples, own, config.reference_cache, ranks)
    chosen, kl_samples = _sampled_positions(examples, batches, ref.head.weight.shape[0]), {}
    say(f"  kl_to_ref is taken at {sum(map(len, chosen))} of {int(examples.counts.sum())} held-out positions")
    for number, _ in progress(_own_batches(batches, ranks), "reference, held-out rows", len(own)):
        batch = collate(examples, batches[number]).to(ref.device)
        logps, logprobs = _ask(ref, batch, chosen[number], needs_logps=config.reference_cache is None)
        kl_samples[number] = KLSample(chosen[number], logprobs.cpu())
        if logps is not None:
            sizes = examples.counts[batches[number]].tolist()
            for index, own_logps in zip(batches[number], logps.float().cpu().split(sizes), strict=True):
                ref_logps[index] = own_logps.clone()  # not a view that keeps the whole batch alive
    return HeldOut(examples, batches, ref_logps, mismatches, mismatch_logps, kl_samples)


@torch.no_grad()
def evaluate(
    lm: LanguageModel,
    held: HeldOut,
    loss: Loss,
    ranks: Ranks = ALONE,
    between: Callable[[], None] = lambda: None,
    *,
    unmoved: bool = False,
) -> dict[str, float]:
    """Means over all held-out rows: loss, TRL's metrics and, where there is a reference, kl_to_ref.

    `unmoved`: the policy still is its reference, so its log-ratios are 0 and the model does not run. Each rank takes
    some of the batches; `between` is called before each.
    """
    if not isinstance(held, HeldOut):  # held-out prompts, whose answers are sampled and scored
        return held.evaluate(lm, ranks, between)
    if reads_scores(loss):
        return evaluate_scores(lm, held, loss, ranks, between)
    own = _own_batches(held.batches, ranks)
    z0 = None
    if held.mismatches is not None:
        z0 = torch.zeros((), dtype=torch.float64, device=lm.device)
        if not unmoved:
            batches = {n: collate(held.mismatches, held.batches[n], held.mismatch_ref_logps) for n, _ in own}
            batches = {n: batch.to(lm.device) for n, batch in batches.items()}
            spare = [batches[n] for n, counts in own if not counts]
            z0 = reference_point(lm, [batches[n] for n, counts in own if counts], ranks, spare)
    totals: dict[str, Tensor] = {}
    for number, counts in own:
        between()
        batch = collate(held.examples, held.batches[number], held.ref_logps).to(lm.device)
        sample = None if held.kl_samples is None else held.kl_samples[number]
        metrics = _measure_unmoved(batch, loss, z0, sample) if unmoved else _measure(lm, batch, loss, z0, sample)
        add_metrics(totals, {name: value if counts else 0 * value for name, value in metrics.items()})
    return prefuse.reduce_metrics(totals, ranks.group)


def pair_ties(loss: Loss, rewards: Tensor) -> dict[str, Tensor]:
    """`rewards/ties`: pairs whose rewards are equal. TRL's `rewards/accuracies` counts them as wrong."""
    if loss.per != "pair":
        return {}
    ties = (rewards[0::2] == rewards[1::2]).double()
    return {"rewards/ties": torch.stack([ties.sum(), ties.new_tensor(len(ties))])}


@where_weights_are
def _measure(
    lm: LanguageModel, batch: Batch, loss: Loss, z0: Tensor | None, sample: KLSample | None
) -> dict[str, Tensor]:
    """{name: (2,) [sum, count]} of one batch, from one run of the trunk."""
    hidden, balance = states_and_balance(lm, batch)
    out = with_balance(lm, loss_of_states(lm, hidden, batch, loss, 1, z0), balance, batch, loss, 1)
    metrics = _with_loss(out, batch, loss)
    if sample is not None:  # an empty sample too: all ranks make the same names
        logits = lm.head.logits(hidden[sample.positions.to(lm.device)])
        metrics["kl_to_ref"] = _kl_sum(logits, sample.ref_logprobs.to(lm.device))
    return metrics


def _measure_unmoved(batch: Batch, loss: Loss, z0: Tensor | None, sample: KLSample | None) -> dict[str, Tensor]:
    """What `_measure` gives for a policy that is its own reference."""
    logps = batch.ref_logps
    out = prefuse.preference_loss(logps, logps, batch.cu_seqlens, loss, z0=z0, num_items=1, **batch.numbers)
    metrics = _with_loss(out, batch, loss)
    if sample is not None:
        metrics["kl_to_ref"] = torch.tensor([0.0, len(sample.positions)], dtype=torch.float64, device=out.loss.device)
    return metrics


def _with_loss(out: PreferenceOutput, batch: Batch, loss: Loss) -> dict[str, Tensor]:
    summed = torch.stack([out.loss, out.loss.new_tensor(count_items(batch, loss))])
    return {"loss": summed, **out.metrics, **pair_ties(loss, out.rewards)}


@torch.no_grad()
@where_weights_are
def _ask(ref: LanguageModel, batch: Batch, positions: Tensor, needs_logps: bool) -> tuple[Tensor | None, Tensor]:
    """What the reference says: log-probabilities (N,) of the completion, and (K, V) of all tokens at `positions`."""
    hidden = completion_states(ref, batch)
    logps = logps_of_states(ref, hidden, batch) if needs_logps else None
    return logps, torch.log_softmax(ref.head.logits(hidden[positions.to(ref.device)]), -1)


def _own_batches(batches: list[list[int]], ranks: Ranks) -> list[tuple[int, bool]]:
    """This rank's batches by number, each with True; see `Ranks.in_step` for those with False."""
    return list(ranks.in_step(range(len(batches))[ranks.rank :: ranks.size], 0, always=True))


def _sampled_positions(examples: Examples, batches: list[list[int]], vocabulary: int) -> list[Tensor]:
    """(K,) of each batch: evenly spaced over the completion positions of all batches, as many as fit."""
    counts = [int(examples.counts[indices].sum()) for indices in batches]
    size = max(1, min(sum(counts), KL_POSITIONS, KL_BYTES // (4 * vocabulary)))
    chosen = torch.linspace(0, sum(counts) - 1, size, dtype=torch.float64).long()
    positions, start = [], 0
    for count in counts:
        positions.append(chosen[(chosen >= start) & (chosen < start + count)] - start)
        start += count
    return positions


def _kl_sum(logits: Tensor, ref_logprobs: Tensor) -> Tensor:  # (K, V), (K, V) -> (2,) [sum of KL, K]
    """Over the tokens that both models have. In float64: near the reference the terms nearly cancel."""
    common = min(logits.shape[-1], ref_logprobs.shape[-1])
    logprobs = torch.log_softmax(logits[:, :common].double(), -1)
    kl = (logprobs.exp() * (logprobs - torch.log_softmax(ref_logprobs[:, :common].double(), -1))).sum(-1)
    return torch.stack([kl.sum(), kl.new_tensor(len(kl))])
