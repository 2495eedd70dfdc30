"""A prompt and one answer: whole conversations, questions and answers, instructions and outputs, plain text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from prefuse.engine.data.forms.form import Form, ReadOptions, Row, Tally, make_record
from prefuse.engine.data.forms.implicit import are_spoken, turns_of_transcript
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import ANSWERS, CONVERSATIONS, HISTORIES, PROMPTS, SYSTEMS, TURN_MASKS
from prefuse.engine.data.forms.prompts import PromptColumns, find_prompt, with_turns_before
from prefuse.engine.data.forms.turns import read_text, read_turns, turn_of
from prefuse.engine.data.records import BadRow, DataError, Message, Record, Text, json_kind


@dataclass(frozen=True)
class Conversation:
    """Turns in one column; the last one, the assistant's, is the completion."""

    column: str
    system: str | None
    history: str | None
    repeated: tuple[str, ...] = ()  # columns that say once more what a turn says
    spoken: bool = False  # it is a text, cut into turns at its marks
    notes: Counter[str] = field(default_factory=Counter)
    as_turns = False

    @property
    def columns(self) -> list[str]:
        return [self.column]

    @property
    def optional(self) -> list[str]:
        return [column for column in (self.system, self.history, *self.repeated) if column]

    @property
    def became(self) -> list[tuple[str, str]]:
        before = (self.system, "first turn"), (self.history, "turns before the others")
        repeated = ((column, "not used: it repeats a turn") for column in self.repeated)
        role = "turns, cut at its marks" if self.spoken else self.column
        return [*((column, role) for column, role in (*before, *repeated) if column), (self.column, role)]

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
        value = row[self.column]
        if self.spoken and isinstance(value, str):
            turns = turns_of_transcript(read_text(value, self.column))
        elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
            roles = ("user", "assistant")  # turns without roles take turns
            turns = [turn_of(roles[i % 2], text, self.column) for i, text in enumerate(value)]
        else:
            turns = read_turns(value, self.column)
        for repeated in self.repeated:
            if not _repeats(row, repeated, turns):
                raise BadRow(f'"{repeated}" is none of the turns of "{self.column}", as in other rows')
        return with_turns_before(row, self.system, self.history, turns)


def _repeats(row: Row, column: str, turns: list[Message]) -> bool:
    text = row.get(column)
    return text is None or any((turn.get("content") or "").strip() == str(text).strip() for turn in turns)


SPOKEN = "transcripts, every token of which is learned (--columns messages={} cuts them into turns)"


@dataclass(frozen=True)
class PlainText:
    """A text that is learned from its first token on."""

    column: str
    spoken: bool = False
    notes: Counter[str] = field(default_factory=Counter)
    optional = ()
    as_turns = False

    @property
    def columns(self) -> list[str]:
        return [self.column]

    @property
    def became(self) -> list[tuple[str, str]]:
        return [(self.column, "text")]

    def prompt(self, row: Row) -> str:
        return ""

    def read(self, name: str, row: Row, **more: Any) -> Record:
        if not isinstance(row[self.column], str):
            raise BadRow(f'"{self.column}" is {json_kind(row[self.column])}, expected a string')
        self.notes[SPOKEN.format(self.column)] += self.spoken
        return make_record(name, "", {"completion": read_text(row[self.column], self.column)}, **more)


REPEATED = "rows whose prompt stood at the start of the answer, and is cut off there"
NO_CHANCE = 12  # characters: an answer that begins with a prompt as long as this repeats it


@dataclass(frozen=True)
class AnswerColumns:
    """A prompt's columns and the column of its answer."""

    question: PromptColumns
    answer: str
    repeats: bool = False  # (nearly) all answers begin with their prompt
    copy: str | None = None  # a column that holds prompt and answer once more, as one text
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def columns(self) -> list[str]:
        return [self.question.text, self.answer]

    @property
    def optional(self) -> list[str]:
        return [*self.question.optional, *filter(None, (self.copy,))]

    @property
    def became(self) -> list[tuple[str, str]]:
        copy = [(self.copy, "not used: it repeats prompt and answer")] if self.copy else []
        return [*self.question.became, (self.answer, "completion"), *copy]

    @property
    def as_turns(self) -> bool:
        return self.question.as_turns

    def prompt(self, row: Row) -> Text:
        return self.question.read(row)

    def read(self, name: str, row: Row, **more: Any) -> Record:
        prompt, answer = self.question.read(row), read_text(row[self.answer], self.answer)
        if self.copy and not _is_copy(row, self.copy, self.question.text, self.answer):
            raise BadRow(f'"{self.copy}" does not repeat "{self.question.text}" and "{self.answer}", as in other rows')
        if self.repeats and (asked := repeated_prompt(prompt, answer)):
            self.notes[REPEATED] += 1
            answer = answer[len(asked) :]
        if isinstance(prompt, list) and isinstance(answer, str):
            answer = [turn_of("assistant", answer, self.answer)]
        elif isinstance(prompt, str) and isinstance(answer, list):
            prompt = [turn_of("user", prompt, self.question.text)]
        return make_record(name, prompt, {"completion": answer}, **more)


Answers = Conversation | AnswerColumns | PlainText


def repeated_prompt(prompt: Text, answer: Text) -> str:
    """The text of the prompt, or of its last turn, that the answer begins with as a whole; else ""."""
    asked = prompt if isinstance(prompt, str) else (prompt[-1].get("content") or "") if prompt else ""
    if len(asked.strip()) < NO_CHANCE or not isinstance(answer, str) or not answer.startswith(asked):
        return ""
    rest = answer[len(asked) :]
    return asked if rest.strip() and not (asked[-1].isalnum() and rest[0].isalnum()) else ""


def _repeating(look: Look, answer: AnswerColumns) -> AnswerColumns:
    """With `repeats`, as (nearly) all of the first rows say."""
    found = 0
    for row in look.first:
        try:
            found += bool(repeated_prompt(answer.question.read(row), read_text(row[answer.answer], answer.answer)))
        except (BadRow, KeyError):
            continue  # the row is bad, and is named where it is read
    return replace(answer, repeats=found >= 0.9 * len(look.first) > 0)


def find_answers(look: Look, named: dict[str, list[str]]) -> Answers | None:
    """A conversation, a prompt and an answer, or plain text; their columns are taken out of `look`."""
    if "completion" not in named:
        column = named["messages"][0] if "messages" in named else _conversation(look)
        if column:
            look.used.add(column)
            system = named.get("system", [None])[0] or look.find(*SYSTEMS)
            history = named.get("history", [None])[0] or look.find(*HISTORIES)
            look.used |= {name for name in (system, history) if name}
            _refuse_turn_masks(look, column)
            spoken = look.all_are(column, str) and are_spoken(look.values[column])
            repeated = () if spoken else _repeated_columns(look, column)
            return Conversation(column, system, history, repeated, spoken)
    answer = named["completion"][0] if "completion" in named else look.find(*ANSWERS)
    if answer is None:
        text = named["text"][0] if "text" in named else look.find("text")
        if text is None or not look.all_are(text, str):
            return None
        look.used.add(text)
        return PlainText(text, are_spoken(look.values[text]))
    look.used.add(answer)
    prompt = find_prompt(look, named)
    if prompt is None:
        return None
    copy = _copy(look, prompt.text, answer)
    look.used |= {copy} if copy else set()
    return _repeating(look, AnswerColumns(prompt, answer, copy=copy))


def _refuse_turn_masks(look: Look, column: str) -> None:
    """A number for each turn, beside the conversation, may say which turns are learned."""
    mask = next((name for name in look.find_all(*TURN_MASKS) if look.all_are(name, list)), None)
    if mask:
        raise DataError(
            f'{look.source}: "{mask}" is a list beside "{column}", and may say which turns are learned. Fix: write it '
            f'into the turns, as "weight": 0 or 1; or --columns unused={mask}'
        )


def _copy(look: Look, question: str, answer: str) -> str | None:
    """A column `text` that holds prompt and answer of every one of the first rows, as Alpaca's does."""
    text = look.find("text")
    return text if text and all(_is_copy(row, text, question, answer) for row in look.first) else None


def _is_copy(row: Row, text: str, question: str, answer: str) -> bool:
    asked, said, whole = (row.get(column) for column in (question, answer, text))
    if not all(isinstance(part, str) for part in (asked, said, whole)):
        return whole is None
    return asked.strip() in whole and said.strip() in whole


def _conversation(look: Look) -> str | None:
    """Turns, or texts in which a user and an assistant speak."""
    found = look.find_all(*CONVERSATIONS)
    return next((name for name in found if not look.all_are(name, str) or are_spoken(look.values[name])), None)


def _repeated_columns(look: Look, conversation: str) -> tuple[str, ...]:
    """The prompt and the answer beside a conversation that has them as turns in every one of the first rows."""
    prompt, answer = look.find(*PROMPTS), look.find(*ANSWERS)
    found = []
    for column in filter(None, (prompt, answer)):
        said = [_says_again(row, column, conversation) for row in look.first] if look.all_are(column, str) else [False]
        if False not in said and True in said:
            look.used.add(column)
            found.append(column)
    return tuple(found)


def _says_again(row: Row, column: str, conversation: str) -> bool | None:
    """None of a row without the one or the other, which is named where it is read."""
    try:
        turns = read_turns(row.get(conversation), conversation)
    except BadRow:
        return None
    return None if row.get(column) is None else _repeats(row, column, turns)


def find_demonstration(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    answers = find_answers(look, named)
    if answers is None:
        return None

    def read(name: str, row: Row) -> Iterable[Record]:
        yield answers.read(name, row)

    return Form(
        "sft", "/".join(answers.columns), tuple(answers.columns), tuple(answers.became), read, answers.prompt,
        as_turns=answers.as_turns, optional=tuple(answers.optional), tally=Tally(answers.notes),
    )  # fmt: skip


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
