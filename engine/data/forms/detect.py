"""Which form a source has: the first of `FINDERS` that fits and can be read as what is wanted.

Then every other column that holds text must be known as metadata, or the run stops. If such a column were ignored
silently, a run could train on something else than its user thinks.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from prefuse.engine.data.forms.demonstrations import find_bare_prompt, find_demonstration
from prefuse.engine.data.forms.form import Form, ReadOptions
from prefuse.engine.data.forms.gathered import find_rows_of_one_prompt, find_tree
from prefuse.engine.data.forms.labels import find_labelled, find_scored
from prefuse.engine.data.forms.look import Look, holds_text, parse_columns
from prefuse.engine.data.forms.names import MEDIA, TEMPLATE_SETTINGS, TOOLS, is_metadata, plain_name
from prefuse.engine.data.forms.nested import paths_into
from prefuse.engine.data.forms.numbers import find_numbers
from prefuse.engine.data.forms.pairs import find_pair
from prefuse.engine.data.forms.rankings import find_ranking
from prefuse.engine.data.forms.verdicts import find_verdict
from prefuse.engine.data.records import DataError

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


EXAMPLES = {  # of --columns
    "pair": "prompt=question,chosen=good_answer,rejected=bad_answer",
    "labelled": "prompt=question,completion=answer,label=is_good",
    "scored": "prompt=question,completion=answer,score=stars",
    "sft": "prompt=question,completion=answer",
    "prompt": "prompt=question",
}


def detect_form(look: Look, kind: str, options: ReadOptions) -> Form:
    named = parse_columns(options.columns, look)
    look = replace(look, used=set(named.get("unused", ())))
    _refuse_media(look)
    extras = _extras(look, named)
    look.used |= {column for column in extras if column}
    fitting = None
    for form in _forms(look, named, options, kind):
        if form.kind in OF_KIND[kind]:
            form = _with_extras(look, form, extras)
            if kind != "prompt" and (form.kind, kind) != ("pair", "sft"):  # a pair's numbers are about the comparison
                form = _with_numbers(look, form, named, options)
            _refuse_unused_text(look, form, kind)
            return form
        fitting = fitting or form
    raise DataError(_nothing_fits(look, kind, fitting))


def _forms(look: Look, named: dict[str, list[str]], options: ReadOptions, kind: str):
    finders = list(FINDERS.values())
    if kind == "pair":  # a score says which of several rows is better, rather than which is good
        finders.insert(finders.index(find_labelled), find_rows_of_one_prompt)
    for finder in finders:
        form = finder(replace(look, used=set(look.used)), named, options)
        if form is not None:
            yield form


def _extras(look: Look, named: dict[str, list[str]]) -> tuple[str | None, str | None]:
    tools = named.get("tools", [None])[0] or look.find(*TOOLS)
    settings = named.get("chat_template_kwargs", [None])[0] or look.find(*TEMPLATE_SETTINGS)
    return tools, settings


def _with_extras(look: Look, form: Form, extras: tuple[str | None, str | None]) -> Form:
    roles = ("tools", "chat_template_kwargs")
    became = [(column, role) for column, role in zip(extras, roles, strict=True) if column]
    optional = (*form.optional, *(column for column in extras if column))
    nested = None if extras[0] else next((column for column in form.columns if _holds_tools(look, column)), None)
    became += [(f"{nested}.tools", "tools")] if nested else []
    return replace(form, became=(*form.became, *became), optional=optional, extras=extras, nested_tools=nested)


def _with_numbers(look: Look, form: Form, named: dict[str, list[str]], options: ReadOptions) -> Form:
    found = find_numbers(replace(look, used=set(look.used)), form, named, options)
    if not found.became:
        return form
    optional = (*form.optional, *(column for column, _ in found.became))
    return replace(form, became=(*form.became, *found.became), optional=optional, numbers=found.read)


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
    free = [column for column in look.values if not (column in form.used or column in look.used or is_metadata(column))]
    unused = [column for column in free if any(map(holds_text, look.values[column]))]
    if unused:
        raise DataError(unused_text(look.source, unused, form, kind))


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
