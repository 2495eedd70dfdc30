"""The command line: one table of commands, and what each exit code means.

    prefuse train --config run.yaml --beta 0.2        # the file's settings, with this one changed

A setting of `Config` is a flag of the commands for which it has a meaning (engine/config/flags.py reads them). Exit
codes: 0 done; 2 something the user can fix, and one line says what; 128 + n stopped by signal n, with a checkpoint; 75
another rank is gone; anything else is a bug and shows its traceback.
"""

import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from prefuse.engine.config.flags import given_settings
from prefuse.engine.config.help import help_of, needed_of
from prefuse.engine.config.settings import LOSS_TYPES, TRAINING_COMMANDS, Config, validate
from prefuse.engine.config.values import did_you_mean
from prefuse.engine.errors import OtherRankFailed, UserError
from prefuse.engine.run.launch import LOST_A_RANK, launch, what_is_there
from prefuse.engine.run.ranks import launched, leave
from prefuse.engine.run.signals import Stopped

if TYPE_CHECKING:
    import argparse


@dataclass(frozen=True)
class Command:
    about: str
    run: Callable[[Config], object]


# Each imports its story inside: `--help` is quick.
def _sft(config: Config) -> None:
    _train_on_files(config, "sft")


def _train(config: Config) -> None:
    _train_on_files(config, "train")


def _train_on_files(config: Config, command: str) -> None:
    from prefuse.engine.train import train

    if not config.scorer:
        train(config, command)
        return
    from prefuse.engine.rounds.look import ScoredRows

    train(config, command, ScoredRows())


def _reward(config: Config) -> None:
    from prefuse.engine.train import train

    train(config, "reward")


def _online(config: Config) -> None:
    from prefuse.engine.online import PromptRows
    from prefuse.engine.train import train

    train(config, "online", PromptRows())


def _label(config: Config) -> None:
    from prefuse.engine.label import label

    label(config)


def _revise(config: Config) -> None:
    from prefuse.engine.revise import revise

    revise(config)


def _eval(config: Config) -> None:
    if config.checkpoints:
        from prefuse.engine.watch import watch

        watch(config)
    elif config.scorer:
        from prefuse.engine.compare import compare_answers

        compare_answers(config)
    else:
        from prefuse.engine.evaluate import evaluate_command

        evaluate_command(config)


def _generate(config: Config) -> None:
    from prefuse.engine.generate import generate

    generate(config)


def _merge(config: Config) -> None:
    from prefuse.engine.merge import merge

    merge(config)


# A new command: its line here, and its name among the `commands` of its settings (engine/config/). A name of two words
# is a command with a subcommand, such as "data inspect".
COMMANDS = {
    "sft": Command("Fine-tune a causal LM on completions, or on the chosen side of pairs.", _sft),
    "train": Command("Align a causal LM with preferences: pairs, or labelled completions with kto.", _train),
    "reward": Command("Train a reward model from preferences; AutoModelForSequenceClassification loads it.", _reward),
    "online": Command("Sample answers, score them, learn from them, again: GRPO, RLOO, online DPO, ...", _online),
    "label": Command("Prefer answers by a judge, a rule or a reward model: rows to train on.", _label),
    "revise": Command("Critique and revise answers by a constitution: rows for sft.", _revise),
    "eval": Command("Compare a model with its reference: accuracy, margin, KL; with --scorer, win rates.", _eval),
    "generate": Command("Answer the prompts of a data set with one model, or with two side by side.", _generate),
    "merge": Command("Put the adapters of a run with use_peft into their base model, as one whole model.", _merge),
}
ABOUT = "Preference optimization, fused before the logits exist. `prefuse COMMAND --help` lists its settings."


@dataclass(frozen=True)
class Tool:
    """A command with flags of its own, none of them settings of a run."""

    about: str
    story: str  # the module, imported when the command is asked for
    run: str  # its function: words -> exit code
    parser: str  # its function: () -> argparse's parser, by which the shell completes


TOOLS = {
    "data": Tool(
        "Look at rows, convert, filter and split them: `prefuse data inspect ROWS`.",
        "prefuse.engine.curate", "main", "parser",
    ),
    "show-tokens": Tool(
        "Print rows as the tokens that training sees, each with its part: `prefuse show-tokens --row 17 ...`.",
        "prefuse.engine.show", "show_tokens", "tokens_parser",
    ),
    "plot": Tool(
        "Draw losses over the log-ratio, or the curves of a run: `prefuse plot --help`.",
        "prefuse.engine.plot", "main", "parser",
    ),
    "report": Tool(
        "Write one HTML page about one run or several: `prefuse report RUN [RUN ...]`.",
        "prefuse.engine.show", "report", "report_parser",
    ),
    "doctor": Tool(
        "Check versions, devices and kernels, and what a run needs: `prefuse doctor --config FILE`.",
        "prefuse.engine.doctor", "doctor", "parser",
    ),
    "bench": Tool(
        "Measure the head, the losses and whole runs beside peers: `prefuse bench --help` lists the verbs.",
        "prefuse.bench.cli", "main", "parser",
    ),
    "completion": Tool(
        "Print what makes a shell complete commands and flags: `prefuse completion bash`.",
        "prefuse.engine.completion", "main", "parser",
    ),
}  # fmt: skip
GROUPS = {  # in the overview
    "Before a run": ("doctor", "data", "show-tokens"),
    "Training": ("sft", "train", "reward", "online"),
    "Afterwards": ("report", "eval", "generate", "plot", "merge"),
    "Rows by judges": ("label", "revise"),
    "Other": ("bench", "completion"),
}
OTHER_NAMES = {
    "benchmark": "bench",
    "evaluate": "eval",
    "finetune": "sft",
    "fine-tune": "sft",
    "align": "train",
    "rm": "reward",
    "sample": "generate",
    "inspect": "data inspect",
    "convert": "data convert",
    "tokens": "show-tokens",
    "completions": "completion",
    "check": "doctor",
}


def main(argv: Sequence[str] | None = None) -> int:
    _set_up_logging()
    argv = list(sys.argv[1:] if argv is None else argv)
    rank = 0
    command = None
    try:
        if argv[:1] == ["help"]:  # `prefuse help train loss` is `prefuse train --help loss`
            argv = [*argv[1:2], "--help", *argv[2:]]
        if argv and argv[0] in ("-h", "--help", "--version", "-V", "version"):
            _show(overview() if argv[0] in ("-h", "--help") else _version())
            return 0
        if argv and argv[0] in TOOLS:
            return _tool(argv[0], argv[1:])
        command, words = command_of(argv)
        if {"-h", "--help"} & set(words):
            _show(help_of(command, COMMANDS[command].about, *_after_help(words)))
            return 0
        if not words:
            raise UserError(f"{needed_of(command)}; `prefuse {command} --help` lists them, `--help TOPIC` explains")
        config = validate(settings(command, words), command)
        if command in TRAINING_COMMANDS:
            rank, _ = launched(config.nproc)
            if "RANK" not in os.environ and (config.nproc > 1 or config.max_restarts):
                return launch(argv, config.nproc, config.max_restarts, config.output_dir)
        run(command, config)
    except (UserError, OSError) as error:
        if not isinstance(error, OtherRankFailed):
            _complain(f"error: {f'rank {rank}: ' if rank else ''}{error}")
        return 2
    except Stopped as stop:
        if rank == 0:
            _complain(str(stop))
        return 128 + stop.signal
    except KeyboardInterrupt:  # within training it is Stopped
        after = "; if output_dir holds a checkpoint, --resume goes on from it" if command in TRAINING_COMMANDS else ""
        _complain(f"interrupted{after}")
        return 130
    except RuntimeError as error:
        if not _lost_peer(error):
            raise
        _complain(
            f"rank {rank} lost another rank, which has died or is stuck ({str(error).splitlines()[0]}); "
            f"{what_is_there(config.output_dir)}"
        )
        return LOST_A_RANK
    return 0


def _show(text: str) -> None:
    """Printed, as far as the reader wants it: `prefuse train --help | head` closes the pipe early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is said as Python ends


def program() -> NoReturn:
    """`prefuse` as a process: `main` and its exit code, with an end that no thread of a process group can spoil."""
    code = main()
    leave(code)
    sys.exit(code)


def _lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed. Gloo raises a plain RuntimeError, known by where it comes from."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(
        words in str(error) for words in ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    )


def parse(argv: list[str]) -> tuple[str, Config]:
    """The command and its settings: defaults, then the --config file, then flags."""
    command, words = command_of(argv)
    return command, settings(command, words)


def settings(command: str, words: list[str]) -> Config:
    given, unused = given_settings(command, words)
    if unused and int(os.environ.get("RANK", 0)) == 0:
        print(f"prefuse: without a meaning for `prefuse {command}`, not used: {', '.join(unused)}", file=sys.stderr)
    return Config(**given)


def command_of(argv: list[str]) -> tuple[str, list[str]]:
    """The command's name and the words after it."""
    for size in 2, 1:
        name = " ".join(argv[:size])
        if name in COMMANDS:
            return name, argv[size:]
    first = argv[0] if argv else ""
    if not argv or first.startswith("-"):
        all_of_them = f": prefuse {' | '.join([*COMMANDS, *TOOLS])}"
        hint = (first and did_you_mean(first, ["--help", "--version"])) or all_of_them
        raise UserError(f"expected a command first{hint}; `prefuse --help` says what")
    if first in LOSS_TYPES:
        raise UserError(f"unknown command {first!r}: the loss is a setting, prefuse train --loss_type {first}")
    if (meant := _of_path(first)) is not None:
        raise UserError(f"{first!r} is no command; {meant}")
    hint = did_you_mean(first, [*COMMANDS, *TOOLS], OTHER_NAMES) or f": expected {', '.join([*COMMANDS, *TOOLS])}"
    raise UserError(f"unknown command {first!r}{hint}")


def _of_path(word: str) -> str | None:
    """What may have been meant by a file or folder in the place of a command."""
    path = Path(word)
    if (path / "metrics.jsonl").is_file():
        return f"to look at this run: prefuse report {word}"
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        return f"to train with these settings: prefuse train --config {word}"
    if path.is_file() and path.suffix in (".json", ".jsonl", ".parquet", ".csv"):
        return f"to look at these rows: prefuse data inspect {word}"
    return None


def _after_help(words: Sequence[str]) -> list[str]:
    """The topic or setting that is asked about: the word behind --help."""
    place = next(place for place, word in enumerate(words) if word in ("-h", "--help"))
    return list(words[place + 1 : place + 2])


def _tool(name: str, words: Sequence[str]) -> int:
    tool = TOOLS[name]
    run = getattr(importlib.import_module(tool.story), tool.run)
    try:
        return run(words, *_tables()) if name == "completion" else run(words)
    except SystemExit as end:  # of argparse, which has shown its help
        return int(end.code or 0)


def _tables() -> tuple[dict[str, str], dict[str, tuple[str, "argparse.ArgumentParser"]]]:
    """Every command, and every tool with its parser."""
    parsers = {
        name: (tool.about, getattr(importlib.import_module(tool.story), tool.parser)()) for name, tool in TOOLS.items()
    }
    return {name: command.about for name, command in COMMANDS.items()}, parsers


def run(command: str, config: Config) -> None:
    """The command with validated settings."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    COMMANDS[command].run(config)


def overview() -> str:
    abouts = {name: command.about for name, command in [*COMMANDS.items(), *TOOLS.items()]}
    width = max(map(len, abouts))
    lines = [
        line
        for group, names in GROUPS.items()
        for line in [group, *(f"  {name:{width}}  {abouts[name]}" for name in names)]
    ]
    return "\n".join(["usage: prefuse COMMAND [--SETTING VALUE ...]", "", ABOUT, "", *lines])


def _version() -> str:
    import importlib.metadata

    return f"prefuse {importlib.metadata.version('prefuse')}"


def _complain(message: str) -> None:
    """One line on stderr."""
    from prefuse.engine.report.screen import complain

    complain(" ".join(line.strip() for line in message.splitlines() if line.strip()))


class _Printable(logging.Formatter):
    """A message may name what stands in the data: no control character of it reaches the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        from prefuse.engine.report.screen import printable

        return printable(super().format(record))


def _set_up_logging() -> None:
    """Our own messages; of the libraries below only what is wrong."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        if type(handler) is logging.StreamHandler and handler.formatter and handler.formatter._fmt == "%(message)s":
            handler.setFormatter(_Printable("%(message)s"))
    logging.getLogger("prefuse").setLevel(logging.INFO)


if __name__ == "__main__":
    program()
