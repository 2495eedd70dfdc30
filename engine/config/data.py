"""Settings of the rows: where they are read from, and which are held out."""

from dataclasses import dataclass
from typing import ClassVar

from prefuse.engine.config.setting import TRAINING, Rule, Topic, at_least, check_rule, require, setting

FEW_HELD_OUT = 20  # rows: one of them moves the accuracy by 5 points or more


@dataclass(frozen=True)
class DataSettings(Topic):
    title: ClassVar[str] = "Data"

    # A resumed run compares its rows by their tokens, so the names of files and splits may differ.
    dataset_name: str = setting(
        "",
        "Rows to train on, evaluate, or prompt with: a JSON, JSONL or Parquet file, a folder, or a hub name.",
        may_differ=True,
    )
    dataset_train_split: str = setting(
        "train", "Split to read when dataset_name or eval_dataset has splits.", may_differ=True
    )
    eval_dataset: str | None = setting(
        None, "Held-out rows. If not given, eval_fraction of dataset_name is held out.", may_differ=True
    )
    dataset_test_split: str = setting("test", "Split of eval_dataset to read when it has splits.", may_differ=True)
    eval_fraction: float | None = setting(
        None,
        "Share of dataset_name's prompts that is held out (chosen by seed) when eval_dataset is not given. None: 0.05 "
        "for `train`, `reward` and `sft`; `eval` and `generate` then look at all rows.",
    )
    max_length: int = setting(
        1024,
        "Most tokens of a prompt and its completion together. A longer prompt loses its start (or, by truncation_mode, "
        "its end); what happens to a longer completion is long_completions.",
        rule=at_least(1),
    )

    dataset_cache: str = setting(
        "auto",
        "Where the tokens of rows are kept, for later runs on the same rows to start at once: a folder; auto, "
        "prefuse/datasets in the user's cache folder (or datasets in $PREFUSE_CACHE); none.",
        may_differ=True,
    )

    def command_defaults(self, command: str) -> dict[str, object]:
        return {"eval_fraction": 0.05 if command in TRAINING else 1.0}

    def check(self, command: str) -> None:
        answered = command == "eval" and self.model_answers
        if command in TRAINING or (self.eval_dataset is None and not answered):
            require(self, "datasets" if self.datasets else "dataset_name")
        rule = Rule("in (0, 1]", lambda value: 0 < value <= 1)
        if command in TRAINING:
            rule = Rule("in [0, 1): training needs rows too", lambda value: 0 <= value < 1)
        check_rule("eval_fraction", self.eval_fraction, rule)
