"""The command line: `prefuse sft | train | eval | generate`.

    prefuse train --config run.yaml --beta 0.2        # the file's settings, with this one changed

Every setting of `Config` is a flag of the same name. Exit codes: 0 done; 2 something the user can fix, and one line
says what; 128 + n stopped by signal n, with a checkpoint; 75 another rank is gone; anything else is a bug and shows
its traceback.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import tyro

from prefuse.engine.config.settings import TRAINING_COMMANDS, Config, validate
from prefuse.engine.config.yaml_file import read_yaml
from prefuse.engine.errors import OtherRankFailed, UserError
from prefuse.engine.run.launch import launch, what_is_there
from prefuse.engine.run.ranks import launched
from prefuse.engine.run.signals import Stopped

COMMANDS = {
    "sft": "Fine-tune a causal LM on completions, or on the chosen side of pairs.",
    "train": "Align a causal LM with preferences: dpo and ipo on pairs, kto on labelled completions.",
    "eval": "Compare a model with its reference on held-out rows: reward accuracy, margin, KL.",
    "generate": "Answer the prompts of a data set with one model, or with two side by side.",
}
ABOUT = "Preference optimization, fused before the logits exist. `prefuse COMMAND --help` lists the settings."


def main(argv: Sequence[str] | None = None) -> int:
    _set_up_logging()
    argv = list(sys.argv[1:] if argv is None else argv)
    rank = 0
    try:
        command, config = parse(argv)
        config = validate(config, command)
        if command in TRAINING_COMMANDS:
            rank, _ = launched(config.nproc)
            if "RANK" not in os.environ and (config.nproc > 1 or config.max_restarts):
                return launch(argv, config.nproc, config.max_restarts, config.output_dir)
        run(command, config)
    except (UserError, OSError) as error:
        if not isinstance(error, OtherRankFailed):
            print(f"prefuse: error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        if rank == 0:
            print(f"prefuse: {stop}", file=sys.stderr)
        return 128 + stop.signal
    except KeyboardInterrupt:
        print("prefuse: interrupted before the end", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not _lost_peer(error):
            raise
        print(
            f"prefuse: rank {rank} lost another rank, which has died or is stuck ({str(error).splitlines()[0]}); "
            f"{what_is_there(config.output_dir)}", file=sys.stderr,
        )  # fmt: skip
        return 75
    return 0


def _lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed. Gloo raises a plain RuntimeError, known by where it comes from."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(
        words in str(error) for words in ("gloo/transport", "Connection closed by peer", "Connection reset by peer")
    )


def parse(argv: list[str]) -> tuple[str, Config]:
    """The command and its settings: defaults, then the --config file, then flags."""
    file = _config_file(argv)
    base = Config() if file is None else read_yaml(file)
    commands = {name: _command(name, about, base) for name, about in COMMANDS.items()}
    return tyro.extras.subcommand_cli_from_dict(
        commands, prog="prefuse", description=ABOUT, args=argv, use_underscores=True
    )


def run(command: str, config: Config) -> None:
    """Only here are transformers and its like imported: `--help` is quick."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if command in ("sft", "train"):
        from prefuse.engine.train import train

        train(config, command)
    elif command == "eval":
        from prefuse.engine.evaluate import evaluate_command

        evaluate_command(config)
    else:
        from prefuse.engine.generate import generate

        generate(config)


def _command(name: str, about: str, base: Config) -> Callable[..., tuple[str, Config]]:
    def command(
        settings: Annotated[Config, tyro.conf.arg(name="")] = base,
        config: Annotated[str | None, tyro.conf.arg(help="YAML file with settings; flags win.")] = None,
    ) -> tuple[str, Config]:
        return name, settings

    command.__doc__ = about
    return command


def _config_file(argv: list[str]) -> str | None:
    """The file of `--config FILE` or `--config=FILE`: its settings are the defaults that tyro then starts from."""
    for i, word in enumerate(argv):
        if word == "--config" and i + 1 < len(argv):
            return argv[i + 1]
        if word.startswith("--config="):
            return word.removeprefix("--config=")
    return None


def _set_up_logging() -> None:
    """Our own messages; of the libraries below only what is wrong."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("prefuse").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
