"""The rows of a run: read, reported, split into those to train on and those held out."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from prefuse.engine.config.data import FEW_HELD_OUT
from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import Examples, examples_of
from prefuse.engine.data.examples import (
    Kind,
    Prompt,
    describe_learned,
    load_examples,
    load_prompts,
    summarize_skipped,
)
from prefuse.engine.data.feed import one_of_each_prompt, scaled, span_of
from prefuse.engine.data.fit import character_parts
from prefuse.engine.data.forms import Skipped
from prefuse.engine.data.forms.look import SCORER, columns_by_role
from prefuse.engine.data.forms.mixture import mixture_parts, sources_of
from prefuse.engine.data.of_run import control_of_run, first_day, read_system_prompt, today
from prefuse.engine.data.order import hold_out
from prefuse.engine.data.sources import open_source
from prefuse.engine.data.stops import describe_unknown, describe_unstopped
from prefuse.engine.data.templates import TextOptions
from prefuse.engine.errors import UserError
from prefuse.engine.report.log import say
from prefuse.engine.run.files import write_whole
from prefuse.losses.contract import Loss, needs_of
from prefuse.losses.unpaired import kto_weights


def kind_of(loss: Loss) -> Kind:
    """What the rows must be to feed this loss."""
    if loss.per in ("pair", "group"):  # a ranking is read as its pairs (ranked.py)
        return "pair"
    needs = needs_of(loss)
    return "scored" if "scores" in needs else "labelled" if "labels" in needs else "sft"


def text_options(config: Config) -> TextOptions:
    """How the settings want rows to become tokens."""
    model = config.model_name_or_path
    return TextOptions(
        turns=config.sft_turns,
        arguments=config.template_arguments(),
        system_prompt=read_system_prompt(config.system_prompt),
        date=config.template_date or (first_day(Path(model)) if model else None) or today(),
        eos_token=config.eos_token,
        multi_turn=config.multi_turn,
        learn_after_stop=bool(config.learn_after_stop),
        truncation_mode=config.truncation_mode,
        long_completions=config.long_completions,
        controls=(config.control_good, config.control_bad) if config.loss_type == "csft" else None,
        control=config.control or (control_of_run(Path(model)) if model else None),
    )


def day_of_run(config: Config) -> str:
    """The day that the chat template takes for today: the setting, the run's first day where it goes on, else today."""
    return config.template_date or first_day(Path(config.output_dir)) or today()


def reading_of(config: Config, loss: Loss) -> dict[str, Any]:
    """How the settings and the loss want rows to be read and to become tokens: keywords of `load_examples`."""
    text = replace(text_options(config), control=None)
    rest = {"max_skipped": config.max_skipped, "text": text, "cache": config.dataset_cache}
    needs = tuple(sorted(needs_of(loss) & {"margins", "scores"}))
    takes = tuple(sorted(getattr(loss, "takes", frozenset()) & {"margins"}))
    return {**config.reading(), "needs": needs, "takes": takes, **rest}


def read_examples(
    source: str | list, split: str, kind: str, tokenizer, max_length: int, reading: dict[str, Any]
) -> tuple[Examples, list[Skipped]]:
    """The usable rows and the others; says what was skipped, cut or taken apart, and how much is learned."""
    dataset = load_examples(source, kind, tokenizer, max_length, split=split, **reading)
    say(summarize_skipped(dataset))
    say(f"  {describe_learned(dataset)}")
    unstopped = describe_unstopped(dataset.examples, tokenizer, dataset.completions_cut)
    for line in (unstopped, describe_unknown(dataset.examples, tokenizer)):
        if line is not None:
            say(f"  {line}")
    if kind == "labelled" and dataset.is_paired:
        pairs = len(dataset.examples) // 2
        say(f"  each of {pairs} pairs is used as one desirable and one undesirable completion")
    if dataset.examples.weights is not None:
        weights = dataset.examples.weights
        say(f"  rows are weighted: from {weights.min():g} to {weights.max():g}, mean {weights.mean():g}")
    return examples_of(dataset.examples, tokenizer.bos_token_id, character_parts(tokenizer)), dataset.skipped


def read_training_data(config: Config, loss: Loss, tokenizer) -> tuple[Examples, Examples | None, list[Skipped]]:
    """Rows to train on, held-out rows or None, and all that were skipped."""
    rest = (kind_of(loss), tokenizer, config.max_length, reading_of(config, loss))
    examples, skipped = read_examples(config.datasets or config.dataset_name, config.dataset_train_split, *rest)
    held = None
    if config.eval_dataset is not None:
        held, more = read_examples(config.eval_dataset, config.dataset_test_split, *rest)
        skipped = skipped + more
    examples, held = _of_one_scale(examples, held, config)
    if held is None:
        examples, held = _split(examples, config)
    if config.kto_one_per_prompt:
        kept = one_of_each_prompt(examples, config.seed)
        say(f"  {len(kept)} of {len(examples)} rows are used, one of each prompt (kto_one_per_prompt)")
        examples = examples.select(kept)
    examples, held = (
        rows and replace(rows, policy_weights=config.use_weighting and loss.per == "pair") for rows in (examples, held)
    )
    return examples, held, skipped


def _of_one_scale(
    examples: Examples, held: Examples | None, config: Config
) -> tuple[Examples, Examples | None]:  # fmt: skip
    """Scores, where a loss needs them, brought to [0, 1] alike."""
    if examples.scores is None:
        return examples, held
    span = span_of(examples.scores, config.score_low, config.score_high)
    both = [rows and scaled(rows, span) for rows in (examples, held)]
    beyond = sum(pair[1] for pair in both if pair)
    more = f"; {beyond} beyond count as the nearer end" if beyond else ""
    say(f"  scores from {span[0]:g} to {span[1]:g} become 0 to 1 (score_low, score_high){more}")
    return both[0][0], both[1] and both[1][0]


def _split(examples: Examples, config: Config) -> tuple[Examples, Examples | None]:
    """The rows to train on and the held-out ones."""
    kept, held = _held_out(examples, config)
    if not held:
        return examples, None
    say(f"  {len(held)} of {len(examples)} held out for evaluation (eval_fraction {config.eval_fraction})")
    if len(held) < FEW_HELD_OUT:
        say("  too few for a reliable number: raise eval_fraction, or give an eval_dataset")
    return examples.select(kept), examples.select(held)


def read_evaluation_data(config: Config, loss: Loss, tokenizer) -> tuple[Examples, Examples]:
    """What `prefuse eval` looks at: eval_dataset, or the rows of dataset_name that training holds out; and the rows by
    whose numbers settings are found that were left open (`kto_weights`): those to train on, or the same."""
    rest = (kind_of(loss), tokenizer, config.max_length, reading_of(config, loss))
    if config.eval_dataset is not None:
        examples, _ = read_examples(config.eval_dataset, config.dataset_test_split, *rest)
        examples, _ = _of_one_scale(examples, None, config)
        chosen = counted = examples
    else:
        examples, _ = read_examples(config.datasets or config.dataset_name, config.dataset_train_split, *rest)
        examples, _ = _of_one_scale(examples, None, config)
        kept, held = _held_out(examples, config)
        say(f"  evaluating {len(held)} of {len(examples)}")
        chosen = examples.select(held)
        counted = examples.select(kept) if kept else chosen
    return replace(chosen, policy_weights=config.use_weighting and loss.per == "pair"), counted


def with_label_weights(loss: Loss, config: Config, examples: Examples) -> Loss:
    """The loss with what its rows decide: KTO's weights by the numbers of labels, where `kto_weights` is auto."""
    if config.kto_weights != "auto" or examples.labels is None:
        return loss
    good = int(examples.labels.sum())
    bad = len(examples) - good
    try:
        weights = kto_weights(good, bad)
    except ValueError as error:
        raise UserError(f"kto_weights auto: {error}") from None
    ratio = weights[0] * good / (weights[1] * bad)
    say(
        f"  KTO weights of {good} desirable and {bad} undesirable rows: desirable_weight {weights[0]:.6g}, "
        f"undesirable_weight {weights[1]:.6g}, for w_d n_d / (w_u n_u) = {ratio:.3g} (the paper's [1, 4/3])"
    )
    return replace(loss, desirable_weight=weights[0], undesirable_weight=weights[1])


def read_prompts(config: Config, tokenizer, columns: Sequence[str] = ()) -> list[Prompt]:
    """The first num_prompts distinct prompts of eval_dataset, or of what dataset_name holds out.

    `columns`: those that a scorer reads (`columns_of_rows`), and that are no part of the prompt.
    """
    source, split = _prompts_from(config)
    prompts = load_prompts(source, tokenizer, config.max_length, split=split, **_prompt_reading(config, columns))
    if config.eval_dataset is None:
        _, held = hold_out_rows([prompt.ids for prompt in prompts], config)
        prompts = [prompts[i] for i in held]
    prompts = list({tuple(prompt.ids): prompt for prompt in reversed(prompts)}.values())[::-1]  # the first of each
    return prompts[: config.num_prompts or None]


def _prompt_reading(config: Config, columns: Sequence[str]) -> dict[str, Any]:
    reading = {**config.reading(), "text": text_options(config)}
    if columns:
        roles = columns_by_role(config.columns)
        named = {column for given in roles.values() for column in given}
        reading["columns"] = {**roles, SCORER: [name for name in columns if name not in named]}
    return reading


def read_training_prompts(config: Config, tokenizer, columns: Sequence[str] = ()) -> tuple[list[Prompt], list[Prompt]]:
    """Distinct prompts to sample answers to, and held-out ones: of eval_dataset, or eval_fraction of dataset_name."""
    reading = _prompt_reading(config, columns)

    def distinct(source: Any, split: str) -> list[Prompt]:
        prompts = load_prompts(source, tokenizer, config.max_length, split=split, **reading)
        return list({tuple(prompt.ids): prompt for prompt in reversed(prompts)}.values())[::-1]  # the first of each

    prompts = distinct(config.datasets or config.dataset_name, config.dataset_train_split)
    if config.eval_dataset is not None:
        return prompts, distinct(config.eval_dataset, config.dataset_test_split)
    kept, held = hold_out([prompt.ids for prompt in prompts], config.eval_fraction, config.seed)
    return [prompts[i] for i in kept], [prompts[i] for i in held]


def columns_of_rows(
    config: Config, prompts: Sequence[Prompt], columns: Sequence[str], *, trained: bool = False
) -> dict[str, list[Any]]:
    """{column: its value in the row of each prompt}; None where a row lacks it. `trained`: of dataset_name's rows."""
    if not columns:
        return {}
    source, split = _prompts_from(config)
    if trained:
        source, split = config.datasets or config.dataset_name, config.dataset_train_split
    one = isinstance(source, str)
    sources = [open_source(source, split, config.dataset_config)] if one else sources_of(mixture_parts(source), split)
    wanted, found = {prompt.row for prompt in prompts}, {}
    for name, row in (both for part in sources for both in part.rows()):
        if name in wanted and isinstance(row, dict):
            if name in found:
                raise UserError(f"two sources of the mixture have a row {name}: their columns cannot be told apart")
            found[name] = row
    return {column: [found.get(prompt.row, {}).get(column) for prompt in prompts] for column in columns}


def _prompts_from(config: Config) -> tuple[Any, str]:
    if config.eval_dataset is not None:
        return config.eval_dataset, config.dataset_test_split
    return config.datasets or config.dataset_name, config.dataset_train_split


def hold_out_rows(
    prompts: Sequence[list[int]], config: Config, threads: np.ndarray | None = None
) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out. Mismatched completions, for z0, need two prompts there."""
    at_least = 2 if "z0" in needs_of(config.loss()) else 1
    return hold_out(prompts, config.eval_fraction, config.seed, at_least, threads)


def _held_out(examples: Examples, config: Config) -> tuple[list[int], list[int]]:
    """The same of examples; texts without a prompt are told apart by what they say."""
    texts = examples.prompts
    if examples.sides == 1 and examples.labels is None and len(examples) > 1 and not texts.same.any():
        texts = examples.completions
    return hold_out_rows(texts, config, examples.threads)


def write_skipped(skipped: list[Skipped], path: Path) -> None:
    """Every skipped row by name, where the screen shows the first ones."""
    write_whole(path, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in skipped))
    if skipped:
        say(f"  all {len(skipped)} skipped rows are named in {path}")
