"""The rows of a run: read, reported, split into those to train on and those held out."""

from prefuse.engine.batches import Examples, examples_of
from prefuse.engine.config import Config
from prefuse.engine.data import load_examples, summarize_skipped
from prefuse.engine.order import hold_out
from prefuse.engine.report import say

KIND_OF = {"sft": "sft", "dpo": "pair", "ipo": "pair", "kto": "labelled"}


def read_examples(source: str, split: str, kind: str, tokenizer, max_length: int) -> Examples:
    """All usable rows; says what was skipped, cut or taken apart."""
    dataset = load_examples(source, kind, tokenizer, max_length, split=split)
    say(summarize_skipped(dataset))
    if kind == "labelled" and "chosen" in dataset.form:
        pairs = len(dataset.examples) // 2
        say(f"  each of {pairs} pairs is used as one desirable and one undesirable completion")
    return examples_of(dataset.examples)


def read_training_data(config: Config, kind: str, tokenizer) -> tuple[Examples, Examples | None]:
    """Rows to train on, and held-out rows or None."""
    examples = read_examples(config.dataset_name, config.dataset_train_split, kind, tokenizer, config.max_length)
    if config.eval_dataset is not None:
        held = read_examples(config.eval_dataset, config.dataset_test_split, kind, tokenizer, config.max_length)
        return examples, held
    kept, held = hold_out(examples.prompts, config.eval_fraction, config.seed)
    if not held:
        return examples, None
    say(f"  {len(held)} of {len(examples)} held out for evaluation (eval_fraction {config.eval_fraction})")
    return examples.select(kept), examples.select(held)


def read_evaluation_data(config: Config, kind: str, tokenizer) -> Examples:
    """What `prefuse eval` looks at: eval_dataset, or the rows of dataset_name that training holds out."""
    if config.eval_dataset is not None:
        return read_examples(config.eval_dataset, config.dataset_test_split, kind, tokenizer, config.max_length)
    examples = read_examples(config.dataset_name, config.dataset_train_split, kind, tokenizer, config.max_length)
    _, held = hold_out(examples.prompts, config.eval_fraction, config.seed)
    say(f"  evaluating {len(held)} of {len(examples)}")
    return examples.select(held)
