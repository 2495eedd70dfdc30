"""Settings of what a command leaves behind: the folder of a run, and the file of results."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

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
    output_file: str | None = setting(
        None,
        "`eval`: JSON file, `generate`: JSONL file for the results. Must not exist.",
        commands=("eval", "generate"),
    )

    def check(self, command: str) -> None:
        if command in (*TRAINING, "merge"):
            require(self, "output_dir")
        elif self.output_file is not None and Path(self.output_file).exists():
            raise UserError(f"output_file {self.output_file} exists: give another name, or remove it")
        if self.output_file is not None and not Path(self.output_file).absolute().parent.is_dir():
            raise UserError(f"output_file {self.output_file} is in a folder that does not exist: make it first")
