"""The rows of a run: read, reported, split into those to train on and those held out."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from prefuse.engine.config.settings import Config
from prefuse.engine.data.batches import Examples, examples_of
from prefuse.engine.data.examples import Kind, load_examples, summarize_skipped
from prefuse.engine.data.forms import Skipped
from prefuse.engine.data.order import hold_out
from prefuse.engine.report.log import say
from prefuse.losses.contract import Loss, needs_of


def kind_of(loss: Loss) -> Kind:
    """What the rows must be to feed this loss."""
    if loss.per == "pair":
        return "pair"
    return "labelled" if "labels" in needs_of(loss) else "sft"


def read_examples(source: str, split: str, kind: str, tokenizer, max_length: int) -> tuple[Examples, list[Skipped]]:
    """The usable rows and the others; says what was skipped, cut or taken apart."""
    dataset = load_examples(source, kind, tokenizer, max_length, split=split)
    say(summarize_skipped(dataset))
    if kind == "labelled" and "chosen" in dataset.form:
        pairs = len(dataset.examples) // 2
        say(f"  each of {pairs} pairs is used as one desirable and one undesirable completion")
    return examples_of(dataset.examples, tokenizer.bos_token_id), dataset.skipped


def read_training_data(config: Config, kind: str, tokenizer) -> tuple[Examples, Examples | None, list[Skipped]]:
    """Rows to train on, held-out rows or None, and all that were skipped."""
    rest = (kind, tokenizer, config.max_length)
    examples, skipped = read_examples(config.dataset_name, config.dataset_train_split, *rest)
    if config.eval_dataset is not None:
        held, more = read_examples(config.eval_dataset, config.dataset_test_split, *rest)
        return examples, held, skipped + more
    kept, held = hold_out_rows(examples.prompts, config)
    if not held:
        return examples, None, skipped
    say(f"  {len(held)} of {len(examples)} held out for evaluation (eval_fraction {config.eval_fraction})")
    return examples.select(kept), examples.select(held), skipped


def read_evaluation_data(config: Config, kind: str, tokenizer) -> Examples:
    """What `prefuse eval` looks at: eval_dataset, or the rows of dataset_name that training holds out."""
    rest = (kind, tokenizer, config.max_length)
    if config.eval_dataset is not None:
        return read_examples(config.eval_dataset, config.dataset_test_split, *rest)[0]
    examples, _ = read_examples(config.dataset_name, config.dataset_train_split, *rest)
    _, held = hold_out_rows(examples.prompts, config)
    say(f"  evaluating {len(held)} of {len(examples)}")
    return examples.select(held)


def hold_out_rows(prompts: Sequence[list[int]], config: Config) -> tuple[list[int], list[int]]:
    """Indices to train on and indices held out. Mismatched completions, for z0, need two prompts there."""
    at_least = 2 if "z0" in needs_of(config.loss()) else 1
    return hold_out(prompts, config.eval_fraction, config.seed, at_least)


def write_skipped(skipped: list[Skipped], path: Path) -> None:
    """Every skipped row by name, where the screen shows the first ones."""
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in skipped), encoding="utf-8")
    if skipped:
        say(f"  all {len(skipped)} skipped rows are named in {path}")
