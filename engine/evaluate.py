"""`prefuse eval`: held-out rows under a model and, where the loss has one, its reference.

    prefuse eval --model_name_or_path run --ref_model_name_or_path base --eval_dataset test.jsonl
    prefuse eval --model_name_or_path run --loss_type sft --eval_dataset demos.jsonl

rows -> examples -> batch -> a run of each trunk -> log-probabilities, loss, rewards and the exact KL. Each model runs
once for each batch (KTO's z0 takes another run over mismatched completions first).

`kl_to_ref` is the exact KL(policy || reference) over the whole vocabulary, in nats per token, a mean over every
position of the completions; while training it is a mean over a sample of them (engine/run/held_out.py).
"""

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

import prefuse
from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import Batch, Examples, collate
from prefuse.engine.data.dataset import read_evaluation_data, with_label_weights
from prefuse.engine.data.of_run import say_unlike_run
from prefuse.engine.model.divergence import kl_of_states, over_common_vocabulary, token_metrics
from prefuse.engine.model.forward import (
    LanguageModel,
    completion_logps,
    completion_states,
    count_items,
    logps_of_states,
    loss_of_states,
)
from prefuse.engine.model.load import (
    check_model,
    device_of,
    load_model,
    load_tokenizer,
    without_padding,
)
from prefuse.engine.report.log import add_metrics, print_table, progress, say
from prefuse.engine.run.files import json_text, write_whole
from prefuse.engine.run.held_out import evaluation_batches, held_out_mismatches, pair_ties
from prefuse.losses.contract import Loss, is_batchwise, needs_of
from prefuse.tokens import IGNORE_INDEX


def evaluate_command(config: Config) -> dict[str, float]:
    """`prefuse eval`: prints the metrics, and writes them to output_file."""
    device = device_of(config)
    tokenizer = load_tokenizer(config.model_name_or_path, config)
    say_unlike_run(config)
    examples, counted = read_evaluation_data(config, config.loss(), tokenizer)
    loss = with_label_weights(config.loss(), config, counted)
    lm, ref = load_model(config.model_name_or_path, config, device), None
    check_model(lm, examples)
    title = f"{config.model_name_or_path}, {len(examples)} examples"
    if config.ref_model_name_or_path is not None:
        ref = load_model(config.ref_model_name_or_path, config, device)
        check_model(ref, examples)
        lm, ref = over_common_vocabulary(lm, ref, config)
        title = f"{config.model_name_or_path} against {config.ref_model_name_or_path}, {len(examples)} examples"
    examples = without_padding(examples, (lm,) if ref is None else (lm, ref), config)
    metrics = compare(lm, ref, examples, config, loss)
    if config.output_file is not None:  # before it is shown: a screen may be gone
        write_whole(Path(config.output_file), json_text(metrics, indent=1) + "\n")
    print_table(title, ["metric", "mean"], [[name, f"{value:.6g}"] for name, value in metrics.items()])
    if "rewards/ties" in metrics and metrics["rewards/ties"] > 0:
        say("rewards/ties: pairs with equal rewards; rewards/accuracies counts them as wrong, as TRL does")
    if "kl_to_ref" in metrics:
        say("kl_to_ref: over every learned position of the completions (while training, over a sample of them)")
    return metrics


@torch.no_grad()
def compare(
    lm: LanguageModel, ref: LanguageModel | None, examples: Examples, config: Config, loss: Loss | None = None
) -> dict[str, float]:
    """Means over `examples`: loss and TRL's metrics of `lm`, and with `ref` kl_to_ref over every position."""
    loss = config.loss() if loss is None else loss
    batches = evaluation_batches(examples, config, is_batchwise(loss))
    z0 = None
    if "z0" in needs_of(loss):
        own = ref if "reference" in needs_of(loss) else None
        z0 = _reference_point(lm, own, held_out_mismatches(examples, config), batches)
    totals: dict[str, Tensor] = {}
    for indices in progress(batches, "evaluating", len(batches)):
        add_metrics(totals, measure_batch(lm, ref, collate(examples, indices).to(lm.device), loss, z0))
    means = prefuse.reduce_metrics(totals)
    return means | ({"perplexity": math.exp(min(means["loss"], 700.0))} if loss.per == "token" else {})


def measure_batch(
    lm: LanguageModel, ref: LanguageModel | None, batch: Batch, loss: Loss, z0: Tensor | None
) -> dict[str, Tensor]:
    """{name: (2,) [sum, count]} of one batch: one run of each trunk."""
    hidden = completion_states(lm, batch)
    ref_hidden = None if ref is None else completion_states(ref, batch)
    learned = batch.targets != IGNORE_INDEX
    if loss.per == "token":
        metrics = token_metrics(lm, hidden, batch, learned)
    else:
        if "reference" in needs_of(loss):
            batch = dataclasses.replace(batch, ref_logps=logps_of_states(ref, ref_hidden, batch))
        out = loss_of_states(lm, hidden, batch, loss, num_items=1, z0=z0)
        metrics = {"loss": torch.stack([out.loss, out.loss.new_tensor(count_items(batch, loss))]), **out.metrics}
        metrics |= pair_ties(loss, out.rewards)
    if ref is not None:
        metrics["kl_to_ref"] = kl_of_states(lm, hidden, ref, ref_hidden, learned)
    return metrics


def _reference_point(
    lm: LanguageModel, ref: LanguageModel, mismatches: Examples, batches: list[list[int]]
) -> Tensor:  # () >= 0
    """KTO's z0 over all mismatched completions; without a reference the mean of their log-probabilities."""
    logps, ref_logps, counts = [], [], []
    for indices in batches:
        batch = collate(mismatches, indices).to(lm.device)
        logps.append(completion_logps(lm, batch))
        ref_logps += [] if ref is None else [completion_logps(ref, batch)]
        counts.append(batch.cu_seqlens.diff())
    cu_seqlens = torch.nn.functional.pad(torch.cat(counts).cumsum(0), (1, 0)).int()
    ref_logps = None if ref is None else torch.cat(ref_logps)
    return prefuse.kto_reference_point(torch.cat(logps), ref_logps, cu_seqlens)
