"""Scores by rule: answers that can be checked, length, format.

exact=COLUMN      1 where the answer is the text of the column (any of them, for a list), blanks at the ends aside
contains=COLUMN   1 where that text stands in the answer
number=COLUMN     1 where the last number of the answer is the last number of the column ("#### 42")
math=COLUMN       1 where math-verify finds the two equal
regex=PATTERN     1 where the pattern is found in the answer
format=PATTERN    1 where the whole answer is of the pattern
length            the number of words
length=LOW:HIGH   1 where the number of words is within
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefuse.engine.errors import UserError
from prefuse.engine.score.contract import Columns, NoScore, Scores, Text, by_answer

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")
DEFAULT_COLUMN = "solution"  # as TRL's accuracy_reward has it
CHECKED = ("exact", "contains", "number", "math")  # against a column
RULES = (*CHECKED, "regex", "format", "length")


@dataclass(frozen=True)
class TextRule:
    kind: str
    argument: str = ""

    def __post_init__(self) -> None:
        if self.kind in ("regex", "format"):
            try:
                re.compile(self.argument)
            except re.error as error:
                raise UserError(f"scorer {self.name}: {self.argument!r} is no regular expression: {error}") from None
            if not self.argument:
                raise UserError(f"scorer {self.kind} needs a pattern: {self.kind}=PATTERN")
        if self.kind == "length" and self.argument:
            low, colon, high = self.argument.partition(":")
            if not (colon and low.strip().isdigit() and high.strip().isdigit() and int(low) <= int(high)):
                raise UserError(f"scorer length={self.argument}: expected LOW:HIGH in words, as in length=10:200")
        if self.kind == "math":
            _math_verify()

    @property
    def name(self) -> str:
        return f"{self.kind}={self.argument}" if self.argument else self.kind

    @property
    def key(self) -> str:
        return f"rule {self.name}"

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.argument or DEFAULT_COLUMN,) if self.kind in CHECKED else ()

    def score(
        self, prompts: Sequence[Text], answers: Sequence[Sequence[str]], columns: Columns | None = None
    ) -> Scores:
        return by_answer(self._flat, prompts, answers, columns)

    def _flat(self, prompts: list[Text], answers: list[str], columns: dict[str, list]) -> list[float | NoScore]:
        if self.kind not in CHECKED:
            return [self._of_answer(answer) for answer in answers]
        (column,) = self.columns
        truths = columns.get(column, [None] * len(answers))
        return [self._checked(answer, truth, column) for answer, truth in zip(answers, truths, strict=True)]

    def _of_answer(self, answer: str) -> float:
        if self.kind == "regex":
            return float(re.search(self.argument, answer, re.DOTALL) is not None)
        if self.kind == "format":
            return float(re.fullmatch(self.argument, answer, re.DOTALL) is not None)
        words = len(answer.split())
        if not self.argument:
            return float(words)
        low, _, high = self.argument.partition(":")
        return float(int(low) <= words <= int(high))

    def _checked(self, answer: str, truth: Any, column: str) -> float | NoScore:
        if truth is None or truth == []:
            return NoScore("no truth", f"the row has no {column}")
        truths = [str(one) for one in (truth if isinstance(truth, list | tuple) else [truth])]
        if self.kind == "exact":
            return float(answer.strip() in {one.strip() for one in truths})
        if self.kind == "contains":
            return float(any(one.strip() in answer for one in truths))
        if self.kind == "number":
            wanted = [last_number(one) for one in truths]
            if None in wanted:
                return NoScore("no truth", f"no number in {column}: {truths[wanted.index(None)]:.40}")
            return float(last_number(answer) in wanted)
        return _by_math(answer, truths)


def last_number(text: str) -> float | None:
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _math_verify() -> Any:
    try:
        import math_verify
    except ImportError:
        raise UserError("scorer math needs a package: pip install math-verify; or take number=COLUMN") from None
    return math_verify


def _by_math(answer: str, truths: list[str]) -> float | NoScore:
    """math-verify's time limits are signal.alarm's, which the main thread alone may set: elsewhere there are none."""
    math_verify = _math_verify()
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    *wanted, said = (math_verify.parse(text, parsing_timeout=seconds) for text in (*truths, answer))
    if not all(wanted):
        return NoScore("no truth", f"math-verify reads no answer in {truths[0]:.40}")
    return float(any(math_verify.verify(truth, said, timeout_seconds=seconds) for truth in wanted))
