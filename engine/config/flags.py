"""The flags of a command, read into settings. Its help is in help.py."""

import argparse
import re
from collections.abc import Iterator
from typing import NoReturn

from prefuse.engine.config.settings import FIELDS, Config, commands_of, settings_of
from prefuse.engine.config.values import from_words, options_of, unknown_setting
from prefuse.engine.config.yaml_file import is_of_a_run, read_settings
from prefuse.engine.errors import UserError


def given_settings(command: str, words: list[str]) -> tuple[dict[str, object], list[str]]:
    """{name: value} of a command's --config file and of its flags, and what the file holds for other commands alone.

    Of a flag that is given twice the last one counts, as everywhere; --config is given once.
    """
    words = list(_with_underscores(words))
    for word in words:
        if word.startswith("--"):
            _check_flag(command, word)
    flags = vars(_parser(command).parse_args(words))
    files = flags.pop("config", [])
    if len(files) > 1:
        raise UserError(f"--config is given twice ({', '.join(files)}): put all settings into one file")
    file = read_settings(files[0]) if files else {}
    unused = [name for name in file if command not in commands_of(name)]
    given = {name: value for name, value in file.items() if name not in unused}
    for name, flag_words in flags.items():
        given[name] = from_words(name, flag_words)
    # The file of a run is given to other commands on purpose: they take its rows and its loss.
    said = [] if not files or is_of_a_run(files[0]) else unused
    return given, [name for name in said if file[name] != getattr(Config, name)]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = f"; `{self.prog} --help` lists the settings"
        stray = re.search(r"unrecognized arguments: ([\w-]+)", message)
        if stray and (name := stray[1].replace("-", "_")) in FIELDS:
            hint = f": a setting begins with two dashes, --{name}"
        flag = re.search(r"argument --(\w+): expected", message)
        if flag:
            hint = f"; `{self.prog} --help {flag[1]}` says what it takes"
        raise UserError(f"{message}{hint}")


def _parser(command: str) -> argparse.ArgumentParser:
    """Collects the words after each flag; what is not given is not in the result."""
    parser = _Parser(prog=f"prefuse {command}", add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--config", action="append")
    for fields in settings_of(command).values():
        for name in fields:
            many = "+" if _is_list(name) else "?" if bool in options_of(name) else 1
            parser.add_argument(f"--{name}", nargs=many, const=[], action=_Words)
    return parser


class _Words(argparse.Action):
    """Stores a list whatever nargs is."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, values if isinstance(values, list) else [values])


def _with_underscores(words: list[str]) -> Iterator[str]:
    """`--learning-rate` as `--learning_rate`, and `--no_use_peft` as `--use_peft=false`."""
    for word in words:
        if not word.startswith("--"):
            yield word
            continue
        flag, equals, value = word.partition("=")
        flag = "--" + flag[2:].replace("-", "_")
        name = flag.removeprefix("--no_")
        if not equals and name in FIELDS and bool in options_of(name):
            flag, equals, value = f"--{name}", "=", "false"
        yield flag + equals + value


def _check_flag(command: str, word: str) -> None:
    name = word[2:].partition("=")[0]
    if name == "config":
        return
    if name not in FIELDS:
        raise unknown_setting(name, "")
    if command not in commands_of(name):
        raise UserError(
            f"{name} has no meaning for `prefuse {command}`, only for {', '.join(commands_of(name))}: drop --{name}"
        )


def _is_list(name: str) -> bool:
    return bool({list[str], list[float]} & set(options_of(name)))
