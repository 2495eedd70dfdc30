"""The prompt of a row: one text column, an input below it, a system text and a history before it, or turns.

A column that is named `prompt` is text as it stands, as in TRL; under any other name (a question, an instruction) and
beside a system text or a history, the text is a user turn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prefuse.engine.data.forms.form import Row
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import (
    ASKED_BY,
    CONTEXT,
    CONTEXTS,
    CONVERSATIONS,
    HISTORIES,
    INPUTS,
    PROMPTS,
    SYSTEMS,
    plain_name,
)
from prefuse.engine.data.forms.turns import read_history, read_text, turn_of
from prefuse.engine.data.records import BadRow, DataError, Message, Text, check_unicode, json_kind
from prefuse.engine.data.turns import content_text


@dataclass(frozen=True)
class PromptColumns:
    text: str  # strings or turns
    input: str | None = None
    system: str | None = None
    history: str | None = None
    as_turns: bool = False

    @property
    def became(self) -> list[tuple[str, str]]:
        behind = (
            (self.input, "below the prompt"),
            (self.system, "first turn"),
            (self.history, "turns before the prompt"),
        )
        return [(self.text, "prompt"), *((column, role) for column, role in behind if column)]

    @property
    def optional(self) -> list[str]:
        return [column for column in (self.input, self.system, self.history) if column]

    def read(self, row: Row) -> Text:
        prompt = read_text(row[self.text], self.text)
        if isinstance(prompt, str) and self.input:
            prompt = "\n\n".join(part for part in (prompt, _string(row, self.input)) if part)
        if isinstance(prompt, str) and self.as_turns:
            prompt = [turn_of("user", prompt, self.text)]
        if isinstance(prompt, str):
            return prompt
        return with_turns_before(row, self.system, self.history, prompt)


def with_turns_before(row: Row, system: str | None, history: str | None, turns: list[Message]) -> list[Message]:
    """A row may give its system text twice, in a column and as the first turn; two different ones are refused."""
    first = before(row, system, history)
    if first and turns and first[0]["role"] == turns[0]["role"] == "system":
        if first[0]["content"] != turns[0].get("content"):
            raise BadRow(f'"{system}" and the first turn are two different system texts')
        first = first[1:]
        return [turns[0], *first, *turns[1:]]
    return first + turns


def before(row: Row, system: str | None, history: str | None) -> list[Message]:
    """The turns that stand before all others; nulls and empty texts give none."""
    text = _system(row[system], system) if system and row.get(system) else ""
    turns = [turn_of("system", text, system or "")] if text.strip() else []
    if history and row.get(history):
        turns += read_history(row[history], history)
    return turns


def _system(value: Any, column: str) -> str:
    """A string; Gemini's {parts: [{text}]}; Bedrock's [{text}]."""
    if isinstance(value, dict):
        value = value.get("parts", value.get("content", [value]))
    return content_text(value, f'"{column}"') or ""


def _string(row: Row, column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f'"{column}" is {json_kind(value)}, expected a string')
    check_unicode(value, column)
    return value


def find_prompt(look: Look, named: dict[str, list[str]], turns: bool = True) -> PromptColumns | None:
    """The prompt's columns, taken out of `look`. Two columns that may each be the prompt stop the run.

    `turns`: columns of turns may be the prompt.
    """
    text = named["prompt"][0] if "prompt" in named else _only_prompt(look, turns)
    if text is None:
        return None
    look.used.add(text)
    behind = named.get("input", [None])[0]
    if behind is None and plain_name(text) not in INPUTS and look.all_are(text, str):
        behind = look.find(*INPUTS)
        if behind is None and plain_name(text) == "instruction" and look.all_are(look.find(CONTEXT), str):
            behind = look.find(CONTEXT)
    system = named.get("system", [None])[0] or look.find(*SYSTEMS)
    history = named.get("history", [None])[0] or look.find(*HISTORIES)
    look.used |= {column for column in (behind, system, history) if column}
    is_raw = plain_name(text.rpartition(".")[2]) == "prompt" and not system and not history
    return PromptColumns(text, behind, system, history, as_turns=not is_raw)


def _only_prompt(look: Look, turns: bool) -> str | None:
    found = [column for column in look.find_all(*PROMPTS) if look.is_text(column)]
    asked_by = [name for answer in look.used for name in ASKED_BY.get(plain_name(answer), ())]
    found += [column for column in look.find_all(*asked_by) if look.all_are(column, str)]
    if turns:
        found += [column for column in look.find_all(*CONVERSATIONS) if look.all_are(column, list, dict)]
        found = found or [column for column in look.find_all(*CONTEXTS) if look.all_are(column, list, dict)]
    found = found or [column for column in look.find_all(*HISTORIES) if look.all_are(column, str)]  # a text, no turns
    if len(found) == 2 and plain_name(found[1]) in INPUTS:
        found = found[:1]  # an instruction and its input
    if len(found) > 1:
        raise DataError(
            f"{look.source}: {' and '.join(found)} may each be the prompt. Fix: --columns prompt={found[0]}, and "
            f"unused={found[1]} (or what else it is: input, system)"
        )
    return found[0] if found else None
