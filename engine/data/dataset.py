"""The rows of a run: read, reported, split into those to train on and those held out."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

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
from prefuse.engine.data.fit import character_parts
from prefuse.engine.data.forms import Skipped
from prefuse.engine.data.forms.mixture import parts_of, sources_of
from prefuse.engine.data.order import hold_out
from prefuse.engine.data.sources import open_source
from prefuse.engine.data.stops import describe_unstopped
from prefuse.engine.data.templates import TextOptions
from prefuse.engine.errors import UserError
from prefuse.engine.report.log import say
from prefuse.engine.run.files import write_whole
from prefuse.losses.contract import Loss, needs_of

FEW_HELD_OUT = 20  # rows: one of them moves the accuracy by 5 points or more


def kind_of(loss: Loss) -> Kind:
    """What the rows must be to feed this loss."""
    if loss.per == "pair":
        return "pair"
    return "labelled" if "labels" in needs_of(loss) else "sft"


def text_options(config: Config) -> TextOptions:
    """How the settings want rows to become tokens."""
    system = config.system_prompt
    if system is not None and system.endswith(".txt"):
        try:
            system = Path(system).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read system_prompt {system}: {error}") from None
    return TextOptions(
        turns=config.sft_turns,
        arguments=config.template_arguments(),
        system_prompt=system,
        date=config.template_date or first_day(Path(config.model_name_or_path)),
        eos_token=config.eos_token,
        multi_turn=config.multi_turn,
        learn_after_stop=bool(config.learn_after_stop),
        truncation_mode=config.truncation_mode,
        long_completions=config.long_completions,
    )


def first_day(folder: Path) -> str | None:
    """The day that the run in `folder` began, which its chat template was told; None for any other folder."""
    try:
        settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        date = settings["template_date"]
        return date if isinstance(date, str) else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):
        return None


def day_of_run(config: Config) -> str:
    """The day that the chat template takes for today: the setting, the run's first day where it goes on, else today."""
    return config.template_date or first_day(Path(config.output_dir)) or datetime.date.today().isoformat()


def reading_of(config: Config) -> dict[str, Any]:
    """How the settings want rows to be read and to become tokens: keywords of `load_examples`."""
    rest = {"max_skipped": config.max_skipped, "text": text_options(config), "cache": config.dataset_cache}
    return {**config.reading(), **rest}


def read_examples(
    source: str | list, split: str, kind: str, tokenizer, max_length: int, reading: dict[str, Any]
) -> tuple[Examples, list[Skipped]]:
    """The usable rows and the others; says what was skipped, cut or taken apart, and how much is learned."""
    dataset = load_examples(source, kind, tokenizer, max_length, split=split, **reading)
    say(summarize_skipped(dataset))
    say(f"  {describe_learned(dataset)}")
    unstopped = describe_unstopped(dataset.examples, tokenizer, dataset.completions_cut)
    if unstopped is not None:
        say(f"  {unstopped}")
    if kind == "labelled" and dataset.is_paired:
        pairs = len(dataset.examples) // 2
        say(f"  each of {pairs} pairs is used as one desirable and one undesirable completion")
    return examples_of(dataset.examples, tokenizer.bos_token_id, character_parts(tokenizer)), dataset.skipped


def read_training_data(config: Config, kind: str, tokenizer) -> tuple[Examples, Examples | None, list[Skipped]]:
    """Rows to train on, held-out rows or None, and all that were skipped."""
    rest = (kind, tokenizer, config.max_length, reading_of(config))
    examples, skipped = read_examples(config.datasets or config.dataset_name, config.dataset_train_split, *rest)
    if config.eval_dataset is not None:
        held, more = read_examples(config.eval_dataset, config.dataset_test_split, *rest)
        return examples, held, skipped + more
    kept, held = hold_out_rows(examples.prompts, config)
    if not held:
        return examples, None, skipped
    say(f"  {len(held)} of {len(examples)} held out for evaluation (eval_fraction {config.eval_fraction})")
    if len(held) < FEW_HELD_OUT:
        say("  too few for a reliable number: raise eval_fraction, or give an eval_dataset")
    return examples.select(kept), examples.select(held), skipped


def read_evaluation_data(config: Config, kind: str, tokenizer) -> Examples:
    """What `prefuse eval` looks at: eval_dataset, or the rows of dataset_name that training holds out."""
    rest = (kind, tokenizer, config.max_length, reading_of(config))
    if config.eval_dataset is not None:
        return read_examples(config.eval_dataset, config.dataset_test_split, *rest)[0]
    examples, _ = read_examples(config.datasets or config.dataset_name, config.dataset_train_split, *rest)
    _, held = hold_out_rows(examples.prompts, config)
    say(f"  evaluating {len(held)} of {len(examples)}")
    return examples.select(held)


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
        given = [config.columns] if config.columns else []
        named = {part.partition("=")[2].strip() for part in (config.columns or "").split(",")}
        reading["columns"] = ",".join([*given, *(f"unused={name}" for name in columns if name not in named)])
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
    sources = [open_source(source, split, config.dataset_config)] if one else sources_of(parts_of(source), split)
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


def hold_out_rows(prompts: Sequence[list[int]], config: Config) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out. Mismatched completions, for z0, need two prompts there."""
    at_least = 2 if "z0" in needs_of(config.loss()) else 1
    return hold_out(prompts, config.eval_fraction, config.seed, at_least)


def write_skipped(skipped: list[Skipped], path: Path) -> None:
    """Every skipped row by name, where the screen shows the first ones."""
    write_whole(path, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in skipped))
    if skipped:
        say(f"  all {len(skipped)} skipped rows are named in {path}")
