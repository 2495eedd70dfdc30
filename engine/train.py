"""The training run: rows -> examples -> flat batch -> trunk -> fused loss -> step -> metrics -> checkpoint.

    prefuse sft    --model_name_or_path base --dataset_name demos.jsonl --output_dir sft
    prefuse train  --model_name_or_path sft  --dataset_name pairs.jsonl --output_dir dpo --loss_type dpo --beta 0.1
    prefuse reward --model_name_or_path sft  --dataset_name pairs.jsonl --output_dir rm

An optimizer step sees `per_device_train_batch_size * gradient_accumulation_steps` items of every rank, and its loss is
their sum divided by their true number, so how they are cut into microbatches does not matter, nor who works on them
(engine/run/ranks.py). The last step of an epoch may be smaller; no row is dropped. KTO's z0 is one number per optimizer
step, from a pass over all its mismatches before the update, where the paper and TRL take one per microbatch
(`z0_scope`).
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable
from itertools import compress

import torch
from torch import Tensor

import prefuse
from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import padded_tokens
from prefuse.engine.data.dataset import day_of_run
from prefuse.engine.errors import Diverged, OtherRankFailed, UserError
from prefuse.engine.model.flops import training_flops
from prefuse.engine.model.forward import count_items, fused_loss, reference_point
from prefuse.engine.report.clock import clock, timed
from prefuse.engine.report.end import next_commands, say_time
from prefuse.engine.report.log import add_metrics, progress_bar, read_metrics, say, say_metrics
from prefuse.engine.report.messages import Messages
from prefuse.engine.report.plots import plot_curves
from prefuse.engine.run.checkpoint import load_weights, save_checkpoint
from prefuse.engine.run.folder import RunFolder
from prefuse.engine.run.following import move_on
from prefuse.engine.run.health import check_end, check_evaluation, fault_of_weights, say_what_is_left
from prefuse.engine.run.held_out import evaluate, hold
from prefuse.engine.run.optimizer import learning_rate
from prefuse.engine.run.plan import Share
from prefuse.engine.run.proof import fault_of_files
from prefuse.engine.run.publish import kept_elsewhere, publish_model
from prefuse.engine.run.ranks import clip_gradients, join, reduce_in_backward, sum_gradients
from prefuse.engine.run.setup import FileRows, Run, following_of, is_finished, open_run, prepare, state_of
from prefuse.engine.run.signals import Stopped, StopSignals
from prefuse.losses.contract import Loss, needs_of

logger = logging.getLogger(__name__)


def train(config: Config, command: str, rows: FileRows = FileRows()) -> dict[str, float]:  # noqa: B008 (without state)
    """`prefuse sft` and `prefuse train` with validated settings; returns the last metrics, eval_* among them.

    `rows`: what is learned from, where it is not the rows of files.
    """
    clock.restart(torch.device("cpu"))
    with StopSignals() as signals, Messages() as messages:
        home = None
        try:
            try:
                ranks = join(config)
                day = ranks.from_main(lambda: day_of_run(config))  # ranks may start on both sides of midnight
                config = dataclasses.replace(config, template_date=day)
                home = open_run(config, command, ranks)
                if is_finished(home, config):
                    return last_metrics(home)
                run = prepare(config, command, ranks, home, rows)
            except Stopped as stop:
                raise Stopped(stop.signal, f"{stop} before the first step: nothing was trained") from None
            if ranks.main:
                messages.open(run.folder)
            with signals.postponed(), contextlib.closing(run.log):
                return finish(run, signals)
        finally:
            if home is not None:
                home.close()


def finish(run: Run, signals: StopSignals) -> dict[str, float]:
    """Train, publish the model, and say so."""
    try:
        clock.use(run.lm.device)
        metrics, done = train_loop(run, run.data.steps_from(run.start), signals)
        check_end(run, done, evaluated="eval_loss" in metrics)
    except Diverged as error:
        raise say_what_is_left(run, error) from None
    with clock.part("checkpoints"):
        publish_model(run, done, metrics | take_best(run, done))

    def end() -> None:
        try:
            plot_curves(run.folder / "metrics.jsonl", run.folder / "curves.png")
        except OSError as error:  # the model is there
            logger.warning("curves.png was not written: %s", error)
        run.checkpoints.proven(run.folder)
        run.home.write_mark(state="finished", steps=done)

    run.ranks.from_main(end)
    say_time(clock.shares())
    say(f"{done} steps on {len(run.data.examples)} examples; model and curves.png are in {run.folder}")
    say(next_commands(run.config, run.identity.command, holds_out=run.held is not None))
    run.ranks.wait()
    return metrics


def last_metrics(home: RunFolder) -> dict[str, float]:
    """The last metrics of a run that is finished; prints that it is."""
    steps = home.mark.get("steps", home.mark.get("total_steps"))
    say(
        f"the run in {home.path} is finished{f' ({steps} steps)' if steps else ''}: there is nothing to resume. More "
        "num_train_epochs or max_steps would extend it"
    )
    return {name: value for row in read_metrics(home.path / "metrics.jsonl") for name, value in row.items()}


def train_loop(run: Run, steps: Iterable[Share], signals: StopSignals) -> tuple[dict[str, float], int]:
    """Train on `steps`, which begin after step `run.start`: the last metrics, and the steps that are done."""
    config, data, window, ranks, total = run.config, run.data, run.window, run.ranks, run.data.total_steps
    done = run.start
    last, evaluates = {}, run.evaluate_first
    with progress_bar() as bar:
        task = bar.add_task("training", total=total, completed=done)
        try:
            if evaluates:
                last |= evaluate_and_log(run, done, signals)
            evaluates = False
            window.restart_clock()
            for share in timed(() if run.best.stop else steps, "data"):  # resumed where it was to end
                num_items, *done_by_all = agree(run, share, signals)
                rate = learning_rate(share.step, total, config)
                loss = run.loss
                metrics = optimizer_step(run, share, num_items, rate)
                run.loss = move_on(following_of(run.data), run.loss, share.step + 1, run.lm, metrics)
                run.data.after_step()
                window.add({**metrics, **share.metrics})
                window.count(*done_by_all)
                done = share.step + 1
                bar.update(task, completed=done)

                if done == 1 or done % config.logging_steps == 0 or done == total:
                    means = window.means() | {"learning_rate": rate}
                    means |= {"skipped_steps": run.guards.skipped} if run.guards.skipped else {}
                    if done == 1:
                        check_first_loss(run, loss, share, num_items, means)
                    run.log.write(done, done / data.steps_per_epoch, means)
                    run.guards.on_log(done, means)
                    if ranks.main:
                        say_metrics(done, total, means)
                    last |= means
                    window.clear()
                evaluates = is_due(run, config.eval_strategy, config.eval_steps, done) or done == total
                if evaluates:
                    last |= evaluate_and_log(run, done, signals)
                evaluates = False
                stop = stop_of(run, done)
                if stop or is_due(run, config.save_strategy, config.save_steps, done) or is_best(run, done):
                    save(run, done, evaluate=False)
                if stop:
                    say(stop)
                    break
        except Stopped as stop:
            if done > (run.checkpoints.newest or 0):
                save(run, done, evaluates)
            ranks.wait()
            raise Stopped(stop.signal, f"{stop} after step {done}; {what_resume_does(run)}") from None
        except (OSError, UserError) as error:  # a full disk under the log or a checkpoint
            if ranks.sharded or not ranks.main or isinstance(error, Diverged | OtherRankFailed) or done == run.start:
                raise
            raise kept_elsewhere(run, done, error) from None
    return last, done


def is_due(run: Run, strategy: str, every: int, done: int) -> bool:
    """Whether step `done` is one after which to evaluate, or to save."""
    every = {"no": 0, "epoch": run.data.steps_per_epoch}.get(strategy, every)
    return every > 0 and done % every == 0


def is_best(run: Run, done: int) -> bool:
    """Whether the weights after `done` must be kept for load_best_model_at_end."""
    return run.config.load_best_model_at_end and run.best.step == done


def stop_of(run: Run, done: int) -> str:
    """Why the run ends after `done`, in words, or nothing."""
    if run.guards.stop:
        return f"a guard ends the run after step {done} (guard_action stop): {run.guards.stop}"
    return f"the run ends after step {done}: {run.best.stop}" if run.best.stop else ""


def take_best(run: Run, done: int) -> dict[str, float]:
    """With load_best_model_at_end, the weights of the best evaluation into the model; its eval_* metrics."""
    run.best.say()
    if not run.config.load_best_model_at_end or run.best.step in (None, done):
        return {}
    path = run.folder / f"checkpoint-{run.best.step}"
    fault = run.ranks.from_main(lambda: fault_of_files(path))
    if fault is not None:
        logger.warning("%s cannot be read (%s): the model is that of the last step", path, fault)
        return {}
    load_weights(path, run.lm)
    say(f"the model is that of step {run.best.step}")
    return {f"eval_{name}": value for name, value in run.best.metrics.items()}


def what_resume_does(run: Run) -> str:
    newest = run.checkpoints.newest
    if newest is None:
        return "no checkpoint was written, --resume starts from the first step"
    return f"checkpoint-{newest} is whole, --resume goes on from there"


def agree(run: Run, share: Share, signals: StopSignals) -> tuple[int, int, int, float]:
    """Items that the loss is a mean over, tokens, examples and operations of the step over all ranks; Stopped if any
    rank has got a signal.

    The numbers lie in the CPU's memory: nothing here waits for the device.
    """
    own = list(compress(share.batches, share.counts))
    mine = [
        sum(count_items(batch, run.loss) for batch in own),
        sum(batch.num_tokens for batch in own),
        sum(batch.num_items for batch in own),
        0 if run.window.peak_flops is None else sum(training_flops(run.lm, batch) for batch in own),
    ]
    *agreed, stop = run.ranks.sum_(torch.tensor([*mine, bool(signals.received)], dtype=torch.float64)).tolist()
    if stop:
        signals.stop()
    return *(int(count) for count in agreed[:3]), agreed[3]


def optimizer_step(run: Run, share: Share, num_items: int, rate: float) -> dict[str, Tensor]:
    """Makes one update from the microbatches of all ranks; returns {name: (2,) [sum, count]}. Makes no update, and
    returns {}, if the loss or its gradient is not finite."""
    totals, suspects = accumulate(run, share, num_items)
    clock.to("optimizer")
    norm = clip_gradients(run.lm.model, run.config.max_grad_norm).to(run.lm.device)  # from the CPU, if offloaded
    # The one wait for the device in a step: an update that must not be made cannot be taken back.
    loss = totals["loss"][0].item() / num_items
    rows = [row for part in share.rows for microbatch in part for row in microbatch]
    if run.guards.on_step(share.step + 1, loss, norm.item(), suspects or rows):
        if run.guards.sound:  # with the weights of the last checkpoint, or with later ones
            run.checkpoints.proven(run.folder)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        run.optimizer.step()
        totals |= {"grad_norm": torch.stack([norm, torch.ones_like(norm)])}
    else:
        totals = {}
    run.optimizer.zero_grad()
    clock.to("other")
    return totals


def accumulate(run: Run, share: Share, num_items: int) -> tuple[dict[str, Tensor], list[str]]:
    """The step's gradients in the parameters, summed over microbatches and ranks, with its metrics, and the rows of the
    microbatches whose loss is no number. One small reduction carries all that is not a gradient."""
    lm, loss, ranks = run.lm, run.loss, run.ranks
    following = following_of(run.data)
    ask = (lambda batch: batch) if following is None else following.ask
    mismatches = [ask(batch.to(lm.device)) for batch in share.mismatches]
    one_z0 = run.config.z0_scope == "step"
    z0 = None
    if mismatches and one_z0:
        own = list(compress(mismatches, share.counts))
        z0 = reference_point(lm, own, ranks, spare=mismatches[len(own) :])
    totals: dict[str, Tensor] = {}
    finite = torch.ones(ranks.size, len(share.batches), device=lm.device, dtype=torch.float64)
    extremes = torch.zeros(*finite.shape, 2, device=lm.device, dtype=torch.float64)  # of scores, by microbatch
    for number, batch in enumerate(share.batches):
        if mismatches and not one_z0:
            z0 = reference_point(lm, mismatches[number : number + 1])
        reduce_in_backward(lm.model, last=number == len(share.batches) - 1)
        out = fused_loss(lm, ask(batch.to(lm.device)), loss, num_items, z0)
        counts = share.counts[number]
        with clock.part("head"):  # until the gradient of the hidden states is there
            _backward(run, out.loss if counts else 0.0 * out.loss)
        summed = out.loss.detach() * num_items
        count = torch.full_like(summed, count_items(batch, loss))
        metrics = out.metrics | {"loss": torch.stack([summed, count])}
        if lm.scores and "min_reward" in metrics:
            extremes[ranks.rank, number] = torch.stack([metrics.pop(name)[0] for name in EXTREMES])
        add_metrics(totals, metrics if counts else {name: 0.0 * value for name, value in metrics.items()})
        finite[ranks.rank, number] = torch.isfinite(summed)
    with clock.part("optimizer"):
        sum_gradients(lm.model, ranks)
    own = list(compress(share.batches, share.counts))
    padded = padded_tokens(own, run.config.per_device_train_batch_size)
    saved = [padded - sum(batch.tokens.num_tokens for batch in own), padded]
    totals["tokens_saved"] = torch.tensor(saved, device=lm.device, dtype=torch.float64)

    flags = finite.reshape(-1, 1).expand(-1, 2)
    packed = ranks.sum_(torch.cat([torch.stack(list(totals.values())), flags, extremes.reshape(-1, 2)]))
    totals, (flags, extremes) = dict(zip(totals, packed, strict=False)), packed[len(totals) :].chunk(2)
    if lm.scores and "margin" in totals:
        totals |= least_and_largest(share, extremes.reshape(ranks.size, -1, 2))
    suspects = []
    if not torch.isfinite(totals["loss"][0]):
        flags = flags[:, 0].reshape(ranks.size, -1).tolist()  # ranks.size where every loss is a number
        for part, part_flags in zip(share.rows, flags, strict=True):
            suspects += [row for rows, flag in zip(part, part_flags, strict=False) if flag < ranks.size for row in rows]
    return totals, suspects


EXTREMES = ("min_reward", "max_reward")


def least_and_largest(share: Share, extremes: Tensor) -> dict[str, Tensor]:  # (ranks, microbatches, 2)
    """Of the scores of a whole step, however it was cut: TRL's min_reward and max_reward."""
    counted = torch.tensor([[n < len(part) for n in range(extremes.shape[1])] for part in share.rows])
    least, largest = extremes[counted.to(extremes.device)].unbind(-1)
    one = torch.ones((), dtype=torch.float64, device=extremes.device)
    values = zip(EXTREMES, (least.min(), largest.max()), strict=True)
    return {name: torch.stack([value, one]) for name, value in values}


def _backward(run: Run, loss: Tensor) -> None:
    if not loss.requires_grad:
        raise UserError(f"no gradient of the loss reaches the trained weights of {type(run.lm.model).__name__}")
    try:
        loss.backward()
    except AssertionError as error:  # of layers that ask for train mode
        fault = next(iter(str(error).splitlines()), "an assertion fails")
        raise UserError(
            f"{type(run.lm.model).__name__} gives no gradients in eval mode, in which models are trained here: {fault}"
        ) from None


def evaluate_and_log(run: Run, step: int, signals: StopSignals) -> dict[str, float]:
    if run.held is None or run.config.eval_strategy == "no":
        return {}

    def between() -> None:
        if run.ranks.any(bool(signals.received)):
            signals.stop()

    # A policy that is its own reference, before the first step: known without running it.
    unmoved = step == 0 and run.config.ref_model_name_or_path is None and run.held.meets_reference
    unmoved = unmoved and run.lm.router is None  # whose loss takes a run of the model
    unmoved = unmoved and not getattr(run.held.examples, "policy_weights", False)
    following = following_of(run.data)
    if following is not None and following.moved:
        held = hold(run.held.examples, following.lm, run.loss, run.config, run.ranks)
        run.held = dataclasses.replace(held, look=run.held.look)
        following.moved = False
    with run.window.clock_stopped(), clock.part("evaluation"):
        means = evaluate(run.lm, run.held, run.loss, run.ranks, between, unmoved=unmoved)
    check_evaluation(step, means)
    run.guards.on_evaluation(step, means)
    run.best.on_evaluation(step, means)
    metrics = {f"eval_{name}": value for name, value in means.items()}
    run.log.write(step, step / run.data.steps_per_epoch, metrics)
    say_metrics(step, run.data.total_steps, metrics, prefix="eval_")
    return metrics


def check_first_loss(run: Run, loss: Loss, share: Share, num_items: int, means: dict[str, float]) -> None:
    """A policy that is its own reference starts at the loss of log-ratio 0: for DPO, ln 2.

    Anything else means that the two were not computed alike, and that rewards carry that error from here on.
    """
    if any(batch.sampled is not None for batch in share.batches):  # its first ratio is 1
        return
    if "reference" not in needs_of(loss) or run.config.ref_model_name_or_path is not None or "loss" not in means:
        return
    if (
        following_of(run.data) is not None or run.data.examples.policy_weights
    ):  # what is expected is not known beforehand
        return
    z0 = 0.0 if "z0" in needs_of(loss) else None
    expected = sum(
        prefuse.preference_loss(
            b.ref_logps, b.ref_logps, b.cu_seqlens, loss, z0=z0, num_items=num_items, **b.numbers
        ).loss.item()
        for b in compress(share.batches, share.counts)
    )
    expected = run.ranks.sum_(torch.tensor(expected, dtype=torch.float64)).item()
    expected += run.lm.router_aux_loss_coef * means.get("aux_loss", 0.0)
    bound = max(1e-5, torch.finfo(run.lm.compute_dtype).eps) * max(1.0, expected)
    if abs(means["loss"] - expected) > bound:
        logger.warning(
            "the first loss is %.7f, but the policy still is its reference, so %.7f within %.1g was expected: "
            "rewards will be off by as much", means["loss"], expected, bound,
        )  # fmt: skip


def save(run: Run, step: int, evaluate: bool) -> None:
    """Writes a checkpoint, unless the last step made no update. Raises Diverged if the weights are broken."""
    fault = fault_of_weights(run)
    if fault is not None:
        raise Diverged(f"{fault} after step {step}")
    if run.guards.skipped_in_row:
        say(f"no checkpoint after step {step}, which made no update; {what_resume_does(run)}")
        return
    state = state_of(run, step, evaluate)
    with clock.part("checkpoints"):
        rest = (run.identity.rows, run.ranks, following_of(run.data))
        save_checkpoint(run.folder, run.lm, run.tokenizer, run.optimizer, state, *rest)
    run.checkpoints.saved(step)
