"""The command line: `prefuse sft | train | eval | generate`.

    prefuse train --config run.yaml --beta 0.2        # the file's settings, with this one changed

Every setting of `Config` is a flag of the same name. Exit codes: 0 done, 2 something the user can fix (one line says
what), 130 interrupted; anything else is a bug and shows its traceback.
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import tyro

from prefuse.engine.config import Config, read_yaml, validate
from prefuse.engine.errors import UserError

COMMANDS = {
    "sft": "Fine-tune a causal LM on completions, or on the chosen side of pairs.",
    "train": "Align a causal LM with preferences: dpo and ipo on pairs, kto on labelled completions.",
    "eval": "Compare a model with its reference on held-out rows: reward accuracy, margin, KL.",
    "generate": "Answer the prompts of a data set with one model, or with two side by side.",
}
ABOUT = (
    "Preference optimization, fused before the logits exist. --config FILE reads settings from a YAML file; flags win."
)


def main(argv: Sequence[str] | None = None) -> int:
    _set_up_logging()
    try:
        command, config = parse(list(sys.argv[1:] if argv is None else argv))
        run(command, validate(config, command))
    except (UserError, OSError) as error:
        print(f"prefuse: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("prefuse: interrupted; the last checkpoint is whole, --resume goes on from it", file=sys.stderr)
        return 130
    return 0


def parse(argv: list[str]) -> tuple[str, Config]:
    """The command and its settings: defaults, then the --config file, then flags."""
    rest, file = _take_config_file(argv)
    base = Config() if file is None else read_yaml(file)
    commands = {name: _command(name, about, base) for name, about in COMMANDS.items()}
    return tyro.extras.subcommand_cli_from_dict(
        commands, prog="prefuse", description=ABOUT, args=rest, use_underscores=True
    )


def run(command: str, config: Config) -> None:
    """Only here are transformers and its like imported: `--help` is quick."""
    if command in ("sft", "train"):
        from prefuse.engine.train import train

        train(config, command)
    elif command == "eval":
        from prefuse.engine.eval import evaluate_command

        evaluate_command(config)
    else:
        from prefuse.engine.generate import generate

        generate(config)


def _command(name: str, about: str, base: Config) -> Callable[..., tuple[str, Config]]:
    def command(config: Annotated[Config, tyro.conf.arg(name="")] = base) -> tuple[str, Config]:
        return name, config

    command.__doc__ = f"{about}\n\n--config FILE reads settings from a YAML file; flags win."
    return command


def _take_config_file(argv: list[str]) -> tuple[list[str], str | None]:
    """argv without `--config FILE` or `--config=FILE`, and the file."""
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                raise UserError("--config expects a YAML file after it")
            return argv[:i] + argv[i + 2 :], argv[i + 1]
        if word.startswith("--config="):
            return argv[:i] + argv[i + 1 :], word.removeprefix("--config=")
    return argv, None


def _set_up_logging() -> None:
    """Our own messages; of the libraries below only what is wrong."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("prefuse").setLevel(logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
