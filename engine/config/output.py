"""Settings of what a command leaves behind: the folder of a run, and the file of results."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from prefuse.engine.config.setting import TRAINING, Topic, at_least, require, setting
from prefuse.engine.errors import UserError


@dataclass(frozen=True)
class OutputSettings(Topic):
    title: ClassVar[str] = "Output"
    commands: ClassVar[tuple[str, ...]] = TRAINING

    output_dir: str = setting(
        "",
        "Folder of the run: model, checkpoints, config.yaml, metrics.jsonl, curves.png; `merge`: of the whole model. "
        "Must be new or empty.",
        commands=(*TRAINING, "merge"),
        may_differ=True,
    )
    resume: bool = setting(False, "Go on from the newest whole checkpoint in output_dir.", may_differ=True)
    save_steps: int = setting(
        500, "Optimizer steps between checkpoints; 0 writes none.", rule=at_least(0), may_differ=True
    )
    save_total_limit: int = setting(2, "Checkpoints kept; 0 keeps all.", rule=at_least(0), may_differ=True)
    logging_steps: int = setting(10, "Optimizer steps between lines of metrics.", rule=at_least(1), may_differ=True)
    eval_steps: int = setting(
        100,
        "Optimizer steps between evaluations, beside those before the first and after the last step.",
        rule=at_least(1),
        may_differ=True,
    )
    eval_strategy: Literal["no", "steps", "epoch"] = setting(
        "steps",
        "When held-out rows are looked at: every eval_steps, or after each epoch; before the first and after the last "
        "step too. no: never.",
        may_differ=True,
    )
    save_strategy: Literal["no", "steps", "epoch"] = setting(
        "steps", "When checkpoints are written: every save_steps, or after each epoch. no: never.", may_differ=True
    )
    metric_for_best_model: str | None = setting(
        None,
        "The metric of held-out rows by which evaluations are compared: loss, rewards/accuracies, kl_to_ref, ...; with "
        "a scorer also score, gold_score, kl, length, distinct_2, perplexity, ... "
        "load_best_model_at_end and early_stopping_patience take loss where it is not given.",
    )
    greater_is_better: bool | None = setting(None, "Whether more of it is better. None: no for loss and KL, else yes.")
    load_best_model_at_end: bool = setting(
        False,
        "The model of the run is that of the best evaluation, not of the last step. Each best one is kept as a "
        "checkpoint, beside save_total_limit.",
    )
    early_stopping_patience: int | None = setting(
        None, "The run ends after so many evaluations in a row that were no better.", rule=at_least(1)
    )
    early_stopping_threshold: float = setting(0.0, "How much better counts as better there.", rule=at_least(0))
    report_to: list[str] | None = setting(
        None,
        "Where metrics are written beside metrics.jsonl: tensorboard, wandb, trackio (their own packages), all that "
        "are installed, or none.",
        may_differ=True,
    )
    run_name: str | None = setting(None, "The run's name there. None: the name of output_dir.", may_differ=True)
    output_file: str | None = setting(
        None,
        "`eval`: JSON file, `generate`, `label`, `revise`: JSONL file for the results. Must not exist.",
        commands=("eval", "generate", "label", "revise"),
    )

    def command_defaults(self, command: str) -> dict[str, object]:
        wanted = self.load_best_model_at_end or self.early_stopping_patience is not None
        return {"metric_for_best_model": "loss"} if wanted else {}

    def check(self, command: str) -> None:
        for name in ("metric_for_best_model", "load_best_model_at_end", "early_stopping_patience"):
            if getattr(self, name) and self.eval_strategy == "no":
                raise UserError(f"{name} goes by evaluations: set eval_strategy to steps or epoch")
            if getattr(self, name) and command in TRAINING and self.eval_dataset is None and not self.eval_fraction:
                raise UserError(f"{name} goes by held-out rows: give eval_dataset, or eval_fraction above 0")
        if command in (*TRAINING, "merge"):
            require(self, "output_dir")
        elif self.output_file is not None and Path(self.output_file).exists():
            raise UserError(f"output_file {self.output_file} exists: give another name, or remove it")
        if self.output_file is not None and not Path(self.output_file).absolute().parent.is_dir():
            raise UserError(f"output_file {self.output_file} is in a folder that does not exist: make it first")
