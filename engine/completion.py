"""`prefuse completion`: commands, flags and values that a shell completes, as a script for it.

The script holds all words, so that TAB starts no Python. It is written by shtab from argparse's parsers.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefuse.engine.config.help import ALL, CONFIG_HELP, topic_name
from prefuse.engine.config.setting import known
from prefuse.engine.config.settings import settings_of
from prefuse.engine.config.tools import ToolParser
from prefuse.engine.config.values import literals, options_of
from prefuse.engine.errors import UserError

TAKE_SETTINGS = {"show-tokens": "train"}  # {tool: the command whose settings it takes}
SHELLS = ("bash", "zsh", "fish", "tcsh")
ABOUT = """What makes a shell complete the commands of prefuse, their flags, values and files.

    prefuse completion bash > ~/.local/share/bash-completion/completions/prefuse
    prefuse completion zsh > ~/.zfunc/_prefuse         # a folder of $fpath
    prefuse completion fish > ~/.config/fish/completions/prefuse.fish

or, for this shell alone: eval "$(prefuse completion bash)"
"""


def parser() -> ToolParser:
    parser = ToolParser(prog="prefuse completion", description=ABOUT)
    parser.add_argument("shell", choices=SHELLS)
    return parser


def main(
    argv: Sequence[str], commands: Mapping[str, str], tools: Mapping[str, tuple[str, argparse.ArgumentParser]]
) -> int:
    """`commands`: {name: about} of those with settings; `tools`: {name: (about, parser)} of the others."""
    given = parser().parse_args(list(argv))
    try:
        import shtab
    except ImportError:
        raise UserError("completion needs the package shtab: pip install shtab") from None
    print(shtab.complete(whole_parser(commands, tools, shtab.FILE), shell=given.shell))
    return 0


def whole_parser(commands, tools, files: object) -> argparse.ArgumentParser:
    """One parser of the whole command line. `files`: what completes an argument that may be a path."""
    whole = argparse.ArgumentParser(prog="prefuse", allow_abbrev=False)
    whole.add_argument("--version", action="store_true", help="print the version")
    words = whole.add_subparsers(dest="command")
    for name, about in commands.items():
        command = words.add_parser(name, help=_first(about), add_help=False)
        command.add_argument("--help", choices=_topics(name), help="the settings by topic; --help TOPIC says more")
        _add_settings(command, name, files)
    for name, (about, own) in tools.items():
        _complete_files(own, files)
        tool = words.add_parser(name, help=_first(about), parents=[own], add_help=False)
        if name in TAKE_SETTINGS:
            _add_settings(tool, TAKE_SETTINGS[name], files)
    return whole


def _add_settings(command: argparse.ArgumentParser, name: str, files: object) -> None:
    command.add_argument("--config", help=_first(CONFIG_HELP)).complete = files
    for fields in settings_of(name).values():
        for setting, field in fields.items():
            options = options_of(setting)
            choices = literals(setting) or (("true", "false") if bool in options else None)
            flag = command.add_argument(f"--{setting}", choices=choices, help=_first(known(field).about))
            if choices is None and not {int, float} & set(options):
                flag.complete = files


def _topics(command: str) -> list[str]:
    return [*map(topic_name, settings_of(command)), ALL]


def _complete_files(parser: argparse.ArgumentParser, files: object) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                _complete_files(verb, files)
        elif action.choices is None and action.nargs != 0 and action.type in (None, Path):
            action.complete = files


def _first(about: str) -> str:
    """The first sentence, without what argparse would take for a format."""
    return re.split(r"(?<=[.:;]) ", about, maxsplit=1)[0].rstrip(".:;").replace("%", "%%")
