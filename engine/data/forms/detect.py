"""Which form a source has: the first of `FINDERS` that fits and can be read as what is wanted.

Then every other column that holds text must be known as metadata, or the run stops. If such a column were ignored
silently, a run could train on something else than its user thinks.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from prefuse.engine.data.forms.demonstrations import find_bare_prompt, find_demonstration
from prefuse.engine.data.forms.form import Form, ReadOptions
from prefuse.engine.data.forms.gathered import find_rows_of_one_prompt, find_tree
from prefuse.engine.data.forms.labels import find_labelled, find_scored
from prefuse.engine.data.forms.look import SCORER, Look, holds_text, parse_columns, passed_over
from prefuse.engine.data.forms.marks import find_marks, label_key
from prefuse.engine.data.forms.names import (
    MEDIA,
    REMARKS,
    SWAPPED,
    TEMPLATE_SETTINGS,
    TOOLS,
    VERDICTS,
    is_metadata,
    plain_name,
)
from prefuse.engine.data.forms.nested import paths_into
from prefuse.engine.data.forms.numbers import find_numbers
from prefuse.engine.data.forms.pairs import find_pair
from prefuse.engine.data.forms.rankings import find_ranking
from prefuse.engine.data.forms.verdicts import find_verdict
from prefuse.engine.data.records import ColumnMissing, DataError

Finder = Callable[[Look, dict[str, list[str]], ReadOptions], Form | None]

FINDERS: dict[str, Finder] = {  # what the columns must hold, in words for the message: how it is found
    "prompt/chosen/rejected": find_pair,
    "prompt with two answers and a verdict": find_verdict,
    "prompt with a list of answers and their scores or ranks": find_ranking,
    "a tree of ranked messages": find_tree,
    "prompt/completion/label or messages/label": find_labelled,
    "prompt/response/score": find_scored,
    "messages, conversations, prompt/completion, instruction/output or text": find_demonstration,
    "prompt": find_bare_prompt,
}
OF_KIND = {  # which of them each kind is read from: a pair holds two labelled completions, and a demonstration
    "pair": ("pair",),
    "labelled": ("pair", "labelled", "scored"),
    "scored": ("pair", "scored"),  # pairs that have scores
    "sft": ("pair", "labelled", "scored", "sft"),
    "prompt": ("pair", "labelled", "scored", "sft", "prompt"),
}


NUMBER_ROLES = ("weight", "margin")  # read where the loss needs them


EXAMPLES = {  # of --columns
    "pair": "prompt=question,chosen=good_answer,rejected=bad_answer",
    "labelled": "prompt=question,completion=answer,label=is_good",
    "scored": "prompt=question,completion=answer,score=stars",
    "sft": "prompt=question,completion=answer",
    "prompt": "prompt=question",
}


def detect_form(look: Look, kind: str, options: ReadOptions) -> Form:
    named = parse_columns(options.columns, look)
    look = replace(look, used=passed_over(named))
    _refuse_media(look)
    extras = _extras(look, named)
    look.used |= {column for column in extras if column}
    fitting = None
    for form in _forms(look, named, options, kind):
        if form.kind in OF_KIND[kind]:
            form = _with_extras(look, form, extras)
            if kind != "prompt" and (form.kind, kind) != ("pair", "sft"):  # a pair's numbers are about the comparison
                form = _with_numbers(look, form, named, options)
            form = form if kind == "prompt" else _with_marks(look, form, kind)
            _refuse_unused_text(look, form, kind)
            _refuse_swapped(look, form)
            _refuse_unused_roles(look, form, named, kind)
            return form
        fitting = fitting or form
    raise ColumnMissing(_nothing_fits(look, kind, fitting))


def _forms(look: Look, named: dict[str, list[str]], options: ReadOptions, kind: str):
    finders = list(FINDERS.values())
    if kind == "pair":  # a score says which of several rows is better, rather than which is good
        finders.insert(finders.index(find_labelled), find_rows_of_one_prompt)
    told = {column for role, columns in named.items() if role not in NUMBER_ROLES for column in columns}
    for finder in finders:  # what has a role is not found in another one
        form = finder(replace(look, used=look.used | told), named, options)
        if form is not None:
            yield form


def _extras(look: Look, named: dict[str, list[str]]) -> tuple[str | None, str | None]:
    tools = named.get("tools", [None])[0] or next(filter(partial(_may_be_tools, look), look.find_all(*TOOLS)), None)
    settings = named.get("chat_template_kwargs", [None])[0] or look.find(*TEMPLATE_SETTINGS)
    return tools, settings


def _may_be_tools(look: Look, column: str) -> bool:
    """Of `functions` (OpenAI's name until 2023) only objects, or their JSON text: they may be something else."""
    values = look.values[column]
    is_json = all(isinstance(value, str) and re.match(r"\s*\[?\s*\{", value) for value in values)
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return plain_name(column) == "tools" or is_json or all(isinstance(part, dict) for part in parts)


def _with_extras(look: Look, form: Form, extras: tuple[str | None, str | None]) -> Form:
    roles = ("tools", "chat_template_kwargs")
    became = [(column, role) for column, role in zip(extras, roles, strict=True) if column]
    optional = (*form.optional, *(column for column in extras if column))
    nested = None if extras[0] else next((column for column in form.columns if _holds_tools(look, column)), None)
    became += [(f"{nested}.tools", "tools")] if nested else []
    return replace(form, became=(*form.became, *became), optional=optional, extras=extras, nested_tools=nested)


def _with_numbers(look: Look, form: Form, named: dict[str, list[str]], options: ReadOptions) -> Form:
    found = find_numbers(replace(look, used=set(look.used)), form, named, options)
    if not found.became and not found.compared:
        return form
    optional = (*form.optional, *(column for column, _ in found.became))
    return replace(form, became=(*form.became, *found.became), optional=optional, numbers=found.read)


def _with_marks(look: Look, form: Form, kind: str) -> Form:
    marking, marks = find_marks(look, form, kind)
    became = [(column, "rows that it marks as bad are set aside") for column in marking]
    return replace(form, became=(*form.became, *became), optional=(*form.optional, *marking), marks=marks)


def _holds_tools(look: Look, column: str) -> bool:
    return any(isinstance(value, dict) and value.get("tools") for value in look.values[column])


def _refuse_media(look: Look) -> None:
    for column in look.values:
        if plain_name(column) in MEDIA and column not in look.used and any(map(holds_text, look.values[column])):
            raise DataError(
                f'{look.source}: "{column}" holds {plain_name(column).rstrip("s")} data, and prefuse reads text alone. '
                f"Fix: leave these rows out; or --columns unused={column} if the text says all"
            )


def _refuse_unused_text(look: Look, form: Form, kind: str) -> None:
    free = [column for column in look.values if not (column in form.used or column in look.used)]
    unused = [
        column
        for column in free
        if (_is_long(column, look.values[column]) if is_metadata(column) else any(map(holds_text, look.values[column])))
    ]
    if unused:
        raise DataError(unused_text(look.source, unused, form, kind))


def _is_long(column: str, values: list[Any]) -> bool:
    """Whether a column that is named like a source, a title or the like holds whole texts."""
    texts = [value for value in values if isinstance(value, str)]
    most = 2 if plain_name(column) == "task" else 20  # words: "summarization", and no instruction
    long = sum(len(text.split()) > most or (len(text) > 100 and not text.isascii()) for text in texts)
    return plain_name(column) not in REMARKS and long > 0.5 * len(values)


def _refuse_swapped(look: Look, form: Form) -> None:
    """A flag, or a verdict beside chosen and rejected, that may say that some rows stand the other way round."""
    free = [column for column in look.values if column not in form.used | look.used and form.kind == "pair"]
    for column in free:
        name, values = plain_name(column), set(map(label_key, look.values[column]))
        says_all = name in VERDICTS and "rejected" in dict(form.became).values() and "strength" not in name
        if (name in SWAPPED and values - {"false", 0.0}) or (says_all and len(values) > 1):
            raise DataError(
                f'{look.source}: "{column}" may say that the two sides of a row are to be swapped. Fix: --columns '
                f"unused={column} if they stand as they should; else write them the right way round"
            )


def _refuse_unused_roles(look: Look, form: Form, named: dict[str, list[str]], kind: str) -> None:
    """A column that was given a role and has none in the form that was found."""
    for role, columns in named.items():
        is_read = role not in ("unused", SCORER)
        is_number = role in NUMBER_ROLES and form.gather is None
        if kind != "prompt" and is_read and not is_number and not form.used.issuperset(columns):
            raise DataError(
                f'{look.source}: --columns has {role}={columns[0]}, and {form.name} for "{kind}" data has no such role '
                f"({form.roles}). Fix: name all columns of the form that is meant, or leave {role} out"
            )


def unused_text(source: str, columns: list[str], form: Form, kind: str, row: str = "") -> str:
    place = f" (first in row {row})" if row else ""
    named = " and ".join(f'"{column}"' for column in columns)
    holds, them = ("holds", "it") if len(columns) == 1 else ("hold", "them")
    return (
        f'{source}: {named} {holds} text{place}, and {form.name} for "{kind}" data does not use {them} ({form.roles}). '
        f"Fix: --columns ROLE={columns[0]} with its role (prompt, input, system, history, completion, chosen, ...), or "
        f"--columns {','.join(f'unused={column}' for column in columns)}"
    )


def _nothing_fits(look: Look, kind: str, fitting: Form | None) -> str:
    wanted = [words for words, finder in FINDERS.items() if _kind_of(finder) in OF_KIND[kind]]
    fix = f"name the columns, as in --columns {EXAMPLES[kind]}"
    if inside := [part for column, values in look.values.items() for part in paths_into(column, values)]:
        fix += f"; what stands inside an object is named by its path ({', '.join(inside[:12])})"
    if fitting:
        readable = [other for other, kinds in OF_KIND.items() if fitting.kind in kinds and other != kind]
        fix += f'; or use it as "{readable[0]}" data, whose {fitting} it has'
    near = _nearest(look)
    return (
        f'{look.source}: a column is missing for "{kind}" data. Found: {", ".join(look.values)}. '
        f"Accepted: {'; '.join(wanted)}. {near}Fix: {fix}."
    )


def _kind_of(finder: Finder) -> str:
    kinds = {find_labelled: "labelled", find_scored: "scored", find_demonstration: "sft"}
    return (kinds | {find_bare_prompt: "prompt"}).get(finder, "pair")


def _nearest(look: Look) -> str:
    """Columns whose names are nearly those of a role."""
    known = ("prompt", "chosen", "rejected", "completion", "messages", "label", "instruction", "question", "response")
    near = {column: difflib.get_close_matches(plain_name(column), known, 1, 0.8) for column in look.values}
    said = [
        f'"{column}" may be {match[0]}' for column, match in near.items() if match and match[0] != plain_name(column)
    ]
    return f"{', '.join(said)}. " if said else ""
