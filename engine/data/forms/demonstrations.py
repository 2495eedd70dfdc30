"""A prompt and one answer: whole conversations, questions and answers, instructions and outputs, plain text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from prefuse.engine.data.forms.form import Form, ReadOptions, Row, make_record
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import ANSWERS, CONVERSATIONS, HISTORIES, SYSTEMS
from prefuse.engine.data.forms.prompts import PromptColumns, find_prompt, with_turns_before
from prefuse.engine.data.forms.turns import read_text, read_turns, turn_of
from prefuse.engine.data.records import BadRow, Message, Record, Text


@dataclass(frozen=True)
class Conversation:
    """Turns in one column; the last one, the assistant's, is the completion."""

    column: str
    system: str | None
    history: str | None
    as_turns = False

    @property
    def columns(self) -> list[str]:
        return [self.column]

    @property
    def optional(self) -> list[str]:
        return [column for column in (self.system, self.history) if column]

    @property
    def became(self) -> list[tuple[str, str]]:
        roles = (self.system, "first turn"), (self.history, "turns before the others")
        return [*((column, role) for column, role in roles if column), (self.column, self.column)]

    def prompt(self, row: Row) -> list[Message]:
        """All turns up to the assistant's last one."""
        turns = self._turns(row)
        return turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns

    def read(self, name: str, row: Row, **more: Any) -> Record:
        turns = self._turns(row)
        if not turns or turns[-1]["role"] != "assistant":
            last = f'is from "{turns[-1]["role"]}"' if turns else "is missing"
            raise BadRow(f'the last turn of "{self.column}" {last}, expected "assistant"')
        return make_record(name, turns[:-1], {"completion": turns[-1:]}, conversation=True, **more)

    def _turns(self, row: Row) -> list[Message]:
        return with_turns_before(row, self.system, self.history, read_turns(row[self.column], self.column))


@dataclass(frozen=True)
class Answer:
    """A prompt's columns and the column of its answer."""

    question: PromptColumns
    answer: str

    @property
    def columns(self) -> list[str]:
        return [self.question.text, self.answer]

    @property
    def optional(self) -> list[str]:
        return self.question.optional

    @property
    def became(self) -> list[tuple[str, str]]:
        return [*self.question.became, (self.answer, "completion")]

    @property
    def as_turns(self) -> bool:
        return self.question.as_turns

    def prompt(self, row: Row) -> Text:
        return self.question.read(row)

    def read(self, name: str, row: Row, **more: Any) -> Record:
        prompt, answer = self.question.read(row), read_text(row[self.answer], self.answer)
        if isinstance(prompt, list) and isinstance(answer, str):
            answer = [turn_of("assistant", answer, self.answer)]
        elif isinstance(prompt, str) and isinstance(answer, list):
            prompt = [turn_of("user", prompt, self.question.text)]
        return make_record(name, prompt, {"completion": answer}, **more)


def find_answers(look: Look, named: dict[str, list[str]]) -> Conversation | Answer | None:
    """A conversation, or a prompt and an answer; their columns are taken out of `look`."""
    if "completion" not in named:
        column = named["messages"][0] if "messages" in named else look.find(*CONVERSATIONS)
        if column:
            look.used.add(column)
            system = named.get("system", [None])[0] or look.find(*SYSTEMS)
            history = named.get("history", [None])[0] or look.find(*HISTORIES)
            look.used |= {name for name in (system, history) if name}
            return Conversation(column, system, history)
    answer = named["completion"][0] if "completion" in named else look.find(*ANSWERS)
    if answer is None:
        return None
    look.used.add(answer)
    prompt = find_prompt(look, named)
    return Answer(prompt, answer) if prompt else None


def find_demonstration(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    answers = find_answers(look, named)
    if answers is None:
        return None

    def read(name: str, row: Row) -> Iterable[Record]:
        yield answers.read(name, row)

    return Form(
        "sft", "/".join(answers.columns), tuple(answers.columns), tuple(answers.became), read, answers.prompt,
        as_turns=answers.as_turns, optional=tuple(answers.optional),
    )  # fmt: skip


def find_text(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    """Plain text, learned from its first token on."""
    column = named["text"][0] if "text" in named else look.find("text")
    if column is None:
        return None

    def read(name: str, row: Row) -> Iterable[Record]:
        text = row[column]
        if not isinstance(text, str):
            raise BadRow(f'"{column}" must be a string')
        yield make_record(name, "", {"completion": read_text(text, column)})

    return Form("sft", column, (column,), ((column, "text"),), read)


def find_bare_prompt(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    """Prompts without answers, for `generate`; a conversation that ends with the user's turn is one."""
    prompt = find_prompt(look, named)
    if prompt is None:
        return None

    def read(name: str, row: Row) -> Iterable[Record]:
        yield make_record(name, prompt.read(row), {})

    return Form(
        "prompt", prompt.text, (prompt.text,), tuple(prompt.became), read, as_turns=prompt.as_turns,
        optional=tuple(prompt.optional),
    )  # fmt: skip
