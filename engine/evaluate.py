"""Held-out rows: loss, rewards, and how far the policy has moved from its reference.

`kl_to_ref` is the exact KL(policy || reference) over the whole vocabulary, in nats per token, a mean over positions of
the held-out completions. Not an estimate from the text's own tokens: those were not sampled from the policy, and once
it has learnt to avoid a rejected completion such an estimate says more about that text than about the policy.
`prefuse eval` takes every position. While training, the reference's distributions at a fixed sample of positions are
kept (at most 64 MiB), so no second model stays in memory.

    prefuse eval --model_name_or_path run --ref_model_name_or_path base --eval_dataset test.jsonl
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import prefuse
from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import Batch, Examples, collate, mismatched
from prefuse.engine.data.dataset import kind_of, read_evaluation_data
from prefuse.engine.data.order import draw_mismatches, plan_evaluation
from prefuse.engine.model.forward import LanguageModel, count_items, fused_loss, reference_point
from prefuse.engine.model.load import (
    check_model,
    check_same_vocabulary,
    device_of,
    load_model,
    load_tokenizer,
    without_padding,
)
from prefuse.engine.model.sharding import where_weights_are
from prefuse.engine.report.log import add_metrics, table
from prefuse.engine.run.ranks import ALONE, Ranks
from prefuse.engine.run.reference_logps import reference_logps
from prefuse.losses.contract import needs_of
from prefuse.models.flat import completion_hidden

KL_BYTES = 1 << 26  # of float32 log-probabilities held at once
KL_POSITIONS = 1024  # at most, while training


@dataclass(frozen=True)
class KLSample:
    """What the reference says at a few completion positions of one batch."""

    positions: Tensor  # (K,) among the batch's N completion tokens
    ref_logprobs: Tensor  # (K, V) float32, on the CPU


@dataclass(frozen=True)
class HeldOut:
    examples: Examples
    batches: list[list[int]]
    ref_logps: list[Tensor] | None = None  # (E,), None for a loss without reference
    mismatches: Examples | None = None  # for a loss that needs z0
    mismatch_ref_logps: list[Tensor] | None = None
    kl_samples: list[KLSample] | None = None  # one per batch


def hold(examples: Examples, ref: LanguageModel | None, loss, config: Config, ranks: Ranks = ALONE) -> HeldOut:
    """Everything about the held-out rows that needs the reference, computed while it is here."""
    size = config.per_device_eval_batch_size
    bins = examples.bins(config.token_budget(size, len(examples.sequences[0]))) if examples.padding_free else None
    batches = plan_evaluation(examples.lengths, size, bins)
    if ref is None:
        return HeldOut(examples, batches)
    own = batches[ranks.rank :: ranks.size]
    mismatches = mismatch_logps = None
    if "z0" in needs_of(loss):
        mismatches = mismatched(examples, draw_mismatches(examples.prompts, config.seed, -1), config.max_length)
        mismatch_logps = reference_logps(ref, mismatches, own, config.reference_cache, ranks)
    return HeldOut(
        examples,
        batches,
        reference_logps(ref, examples, own, config.reference_cache, ranks) if "reference" in needs_of(loss) else None,
        mismatches,
        mismatch_logps,
        _sample_reference(ref, examples, batches),
    )


@torch.no_grad()
def evaluate(
    lm: LanguageModel, held: HeldOut, loss, ranks: Ranks = ALONE, between: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Means over all held-out rows: loss, TRL's metrics and, where there is a reference, kl_to_ref.

    Each rank takes some of the batches; `between` is called before each.
    """
    own = list(ranks.in_step(range(len(held.batches))[ranks.rank :: ranks.size], 0, always=True))
    z0 = None
    if held.mismatches is not None:
        batches = {n: collate(held.mismatches, held.batches[n], held.mismatch_ref_logps).to(lm.device) for n, _ in own}
        spare = [batches[n] for n, counts in own if not counts]
        z0 = reference_point(lm, [batches[n] for n, counts in own if counts], ranks, spare)
    totals: dict[str, Tensor] = {}
    for number, counts in own:
        between()
        batch = collate(held.examples, held.batches[number], held.ref_logps).to(lm.device)
        out = fused_loss(lm, batch, loss, num_items=1, z0=z0)
        metrics = {"loss": torch.stack([out.loss, out.loss.new_tensor(count_items(batch, loss))]), **out.metrics}
        if held.kl_samples is not None:  # an empty sample too: all ranks make the same calls and the same names
            metrics["kl_to_ref"] = _kl_at(lm, batch, held.kl_samples[number])
        add_metrics(totals, {name: value if counts else 0 * value for name, value in metrics.items()})
    return prefuse.reduce_metrics(totals, ranks.group)


@torch.no_grad()
def compare(lm: LanguageModel, ref: LanguageModel, examples: Examples, config: Config) -> dict[str, float]:
    """`prefuse eval`: the metrics of `lm` against `ref`, with kl_to_ref over every completion position."""
    loss = config.loss()
    held = hold(examples, ref, loss, config)
    metrics = evaluate(lm, held, loss)
    total = torch.zeros(2, dtype=torch.float64, device=lm.device)
    for indices in held.batches:
        batch = collate(examples, indices).to(lm.device)
        hidden, ref_hidden = _hidden(lm, batch), _hidden(ref, batch)
        rows = max(1, KL_BYTES // (4 * lm.head.weight.shape[0]))
        for own, theirs in zip(hidden.split(rows), ref_hidden.split(rows), strict=True):
            total += _kl_sum(lm.head.logits(own), torch.log_softmax(ref.head.logits(theirs), -1))
    return metrics | prefuse.reduce_metrics({"kl_to_ref": total})


def evaluate_command(config: Config) -> dict[str, float]:
    """`prefuse eval`: prints the metrics, and writes them to output_file."""
    device = device_of(config)
    tokenizer = load_tokenizer(config.model_name_or_path)
    examples = read_evaluation_data(config, kind_of(config.loss()), tokenizer)
    lm, ref = (load_model(path, config, device) for path in (config.model_name_or_path, config.ref_model_name_or_path))
    for model in lm, ref:
        check_model(model, examples)
    check_same_vocabulary(lm, ref)
    examples = without_padding(examples, (lm, ref), config)
    metrics = compare(lm, ref, examples, config)
    title = f"{config.model_name_or_path} against {config.ref_model_name_or_path}, {len(examples)} examples"
    table(title, ["metric", "mean"], [[name, f"{value:.6g}"] for name, value in metrics.items()])
    if config.output_file is not None:
        Path(config.output_file).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    return metrics


def _sample_reference(ref: LanguageModel, examples: Examples, batches: Sequence[list[int]]) -> list[KLSample]:
    """Evenly spaced over all completion positions, as many as fit."""
    vocabulary = ref.head.weight.shape[0]
    counts = [sum(len(y) for i in indices for _, y in examples.sequences[i]) for indices in batches]
    size = max(1, min(sum(counts), KL_POSITIONS, KL_BYTES // (4 * vocabulary)))
    chosen = torch.linspace(0, sum(counts) - 1, size, dtype=torch.float64).long()
    return list(_samples(ref, examples, batches, counts, chosen))


@torch.no_grad()
def _samples(ref, examples, batches, counts, chosen: Tensor) -> Iterator[KLSample]:
    start = 0
    for indices, count in zip(batches, counts, strict=True):
        positions = chosen[(chosen >= start) & (chosen < start + count)] - start
        start += count
        batch = collate(examples, indices).to(ref.device)
        yield KLSample(positions, _logprobs_at(ref, batch, positions).cpu())


@where_weights_are
def _logprobs_at(lm: LanguageModel, batch: Batch, positions: Tensor) -> Tensor:  # (K, V)
    return torch.log_softmax(lm.head.logits(_hidden(lm, batch)[positions.to(lm.device)]), -1)


@where_weights_are
def _kl_at(lm: LanguageModel, batch: Batch, sample: KLSample) -> Tensor:  # (2,)
    hidden = _hidden(lm, batch)[sample.positions.to(lm.device)]
    return _kl_sum(lm.head.logits(hidden), sample.ref_logprobs.to(lm.device))


def _kl_sum(logits: Tensor, ref_logprobs: Tensor) -> Tensor:  # (K, V), (K, V) -> (2,) [sum of KL, K]
    # In float64: for a policy near its reference the terms nearly cancel.
    logprobs = torch.log_softmax(logits.double(), -1)
    kl = (logprobs.exp() * (logprobs - torch.log_softmax(ref_logprobs.double(), -1))).sum(-1)
    return torch.stack([kl.sum(), kl.new_tensor(len(kl))])


def _hidden(lm: LanguageModel, batch: Batch) -> Tensor:  # (N, D)
    with lm.autocast():
        return completion_hidden(lm.model, batch.tokens)
