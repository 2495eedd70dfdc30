"""The parser of commands with flags of their own, such as `prefuse data`: its errors are one line with the fix."""

import argparse
import math
import re
from collections.abc import Callable, Iterator
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


def number_from(least: float, most: float = math.inf) -> Callable[[str], float]:
    """A flag's type: numbers like `least`, from there on."""

    def read(word: str) -> float:
        number = type(least)(word)
        if not least <= number <= most or math.isinf(number):
            end = "on" if math.isinf(most) else f"to {most:g}"
            raise argparse.ArgumentTypeError(f"{word} is no number from {least:g} {end}")
        return number

    read.__name__ = type(least).__name__  # for argparse's own words
    return read
