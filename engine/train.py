"""The training run: rows -> examples -> flat batch -> trunk -> fused loss -> step -> metrics -> checkpoint.

    prefuse sft   --model_name_or_path base --dataset_name demos.jsonl --output_dir sft
    prefuse train --model_name_or_path sft  --dataset_name pairs.jsonl --output_dir dpo --loss_type dpo --beta 0.1

An optimizer step sees `per_device_train_batch_size * gradient_accumulation_steps` items, and its loss is their sum
divided by their true number, so how they are cut into microbatches does not matter. The last step of an epoch is
smaller; no row is dropped. KTO's z0 is one number per optimizer step, from a pass over all its mismatches before the
update, where the paper and TRL take one per microbatch (`z0_scope`).
"""

import logging
import tempfile
from pathlib import Path

import torch
from torch import Tensor

import prefuse
from prefuse.engine.batches import Batch, padded_tokens
from prefuse.engine.checkpoint import save_checkpoint
from prefuse.engine.config import Config
from prefuse.engine.eval import evaluate
from prefuse.engine.flops import training_flops
from prefuse.engine.forward import count_items, fused_loss, reference_point
from prefuse.engine.model import save_model
from prefuse.engine.optimizer import learning_rate
from prefuse.engine.plots import plot_curves
from prefuse.engine.report import add_metrics, progress_bar, say, say_metrics
from prefuse.engine.run import Run, prepare

logger = logging.getLogger(__name__)


def train(config: Config, command: str) -> dict[str, float]:
    """`prefuse sft` and `prefuse train` with validated settings; returns the last metrics, eval_* among them."""
    run = prepare(config, command)
    metrics = train_loop(run)
    publish_model(run)
    plot_curves(run.log.path, run.folder / "curves.png")
    say(f"{run.data.total_steps} steps on {len(run.data.examples)} examples; model and curves.png are in {run.folder}")
    return metrics


def train_loop(run: Run) -> dict[str, float]:
    config, data, window, total = run.config, run.data, run.window, run.data.total_steps
    last = evaluate_and_log(run, 0) if run.start == 0 else {}
    with progress_bar() as bar:
        task = bar.add_task("training", total=total, completed=run.start)
        window.restart_clock()
        for step, batches, mismatches in data.steps_from(run.start):
            rate = learning_rate(step, total, config)
            window.add(optimizer_step(run, batches, mismatches, rate))
            done = step + 1
            bar.update(task, completed=done)

            if done == 1 or done % config.logging_steps == 0 or done == total:
                means = window.means() | {"learning_rate": rate}
                if done == 1:
                    check_first_loss(run, batches, means["loss"])
                run.log.write(done, done / data.steps_per_epoch, means)
                say_metrics(done, total, means)
                last |= means
                window.clear()
            evaluates = done % config.eval_steps == 0 or done == total
            saves = config.save_steps and done % config.save_steps == 0
            if evaluates or saves:
                window.check_finite()
            if evaluates:
                last |= evaluate_and_log(run, done)
            if saves:
                state = {"step": done, "identity": run.identity, "window": window.state()}
                save_checkpoint(run.folder, run.lm, run.tokenizer, run.optimizer, state, config.save_total_limit)
    return last


def optimizer_step(
    run: Run, batches: list[Batch], mismatches: list[Batch], rate: float
) -> dict[str, Tensor]:  # {name: (2,) [sum, count]}
    """One update from all `batches`. Nothing in here waits for the device."""
    lm, loss = run.lm, run.loss
    num_items = sum(count_items(batch, loss) for batch in batches)
    mismatches = [batch.to(lm.device) for batch in mismatches]
    one_z0 = run.config.z0_scope == "step"
    z0 = reference_point(lm, mismatches) if mismatches and one_z0 else None
    totals: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        if mismatches and not one_z0:
            z0 = reference_point(lm, mismatches[number : number + 1])
        out = fused_loss(lm, batch.to(lm.device), loss, num_items, z0)
        out.loss.backward()
        summed = out.loss.detach() * num_items
        count = torch.full_like(summed, count_items(batch, loss))
        add_metrics(totals, out.metrics | {"loss": torch.stack([summed, count])})
        run.window.watch(batch.rows, summed)

    norm = torch.nn.utils.clip_grad_norm_(run.lm.model.parameters(), run.config.max_grad_norm)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.window.watch([row for batch in batches for row in batch.rows], norm)
    for batch in batches:
        flops = 0 if run.window.peak_flops is None else training_flops(lm, batch)
        run.window.count(batch.num_tokens, batch.num_items, flops)
    padded = padded_tokens(batches, run.config.per_device_train_batch_size)
    saved = [padded - sum(batch.tokens.num_tokens for batch in batches), padded]
    saved = torch.stack([torch.full_like(norm, tokens, dtype=torch.float64) for tokens in saved])
    return totals | {"grad_norm": torch.stack([norm, torch.ones_like(norm)]), "tokens_saved": saved}


def evaluate_and_log(run: Run, step: int) -> dict[str, float]:
    if run.held is None:
        return {}
    with run.window.clock_stopped():
        metrics = {f"eval_{name}": value for name, value in evaluate(run.lm, run.held, run.loss).items()}
    run.log.write(step, step / run.data.steps_per_epoch, metrics)
    say_metrics(step, run.data.total_steps, metrics, prefix="eval_")
    return metrics


def check_first_loss(run: Run, batches: list[Batch], loss: float) -> None:
    """A policy that is its own reference starts at the loss of log-ratio 0: for DPO, ln 2.

    Anything else means that the two were not computed alike, and that rewards carry that error from here on.
    """
    if not run.loss.uses_reference or run.config.ref_model_name_or_path is not None:
        return
    z0 = 0.0 if isinstance(run.loss, prefuse.KTO) else None
    num_items = sum(count_items(batch, run.loss) for batch in batches)
    expected = sum(
        prefuse.preference_loss(b.ref_logps, b.ref_logps, b.cu_seqlens, run.loss, b.labels, z0, num_items).loss.item()
        for b in batches
    )
    bound = max(1e-5, torch.finfo(run.lm.compute_dtype).eps) * max(1.0, expected)
    if abs(loss - expected) > bound:
        logger.warning(
            "the first loss is %.7f, but the policy still is its reference, so %.7f within %.1g was expected: "
            "rewards will be off by as much", loss, expected, bound,
        )  # fmt: skip


def publish_model(run: Run) -> None:
    """The final model straight in the run folder, each file whole or absent."""
    with tempfile.TemporaryDirectory(dir=run.folder, prefix="model.") as aside:
        save_model(run.lm.model, run.tokenizer, Path(aside))
        for path in Path(aside).iterdir():
            path.replace(run.folder / path.name)
