"""The parser of commands with flags of their own, such as `prefuse data`: its errors are one line with the fix."""

import argparse
import re
from collections.abc import Iterator
from typing import NoReturn

from prefuse.engine.config.values import did_you_mean
from prefuse.engine.errors import UserError


class ToolParser(argparse.ArgumentParser):
    """argparse's own, whose help keeps the lines of `description` and whose mistakes are UserErrors."""

    def __init__(self, **options) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        hint = _hint(self, message)
        raise UserError(f"{self.prog.removeprefix('prefuse ')}: {message}{hint}; `{self.prog} --help` shows how")


def _hint(parser: argparse.ArgumentParser, message: str) -> str:
    unknown = re.search(r"unrecognized arguments: (--[\w-]+)", message)
    if unknown:
        return did_you_mean(unknown[1], flags_of(parser)) or f"; its flags are {', '.join(flags_of(parser))}"
    wrong = re.search(r"invalid choice: '(.*?)' \(choose from", message)
    if wrong:
        choices = [str(choice) for action in parser._actions for choice in action.choices or ()]
        return did_you_mean(wrong[1], choices)
    return ""


def flags_of(parser: argparse.ArgumentParser) -> list[str]:
    """Its long flags, and those of its verbs."""
    return list(dict.fromkeys(_flags(parser)))


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from (flag for flag in action.option_strings if flag.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for verb in action.choices.values():
                yield from _flags(verb)
