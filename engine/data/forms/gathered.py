"""Forms in which a pair needs several rows: answers to one prompt in rows of their own, and trees of messages.

The rows are held in memory until the last one is read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from prefuse.engine.data.forms.demonstrations import Answers, find_answers
from prefuse.engine.data.forms.form import Form, ReadOptions, Row, Tally
from prefuse.engine.data.forms.labels import score_column
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import HELPSTEER
from prefuse.engine.data.forms.rankings import Scored, ranked_pairs
from prefuse.engine.data.forms.ratings import direction_of, number_of, rating_reader
from prefuse.engine.data.forms.turns import read_turns, turn_of
from prefuse.engine.data.records import BadRow, Record, SetAside, Skipped, json_kind

Named = tuple[str, Any]


def find_rows_of_one_prompt(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    """prompt/response/score, as in HelpSteer: rows that share their prompt are the answers to it."""
    if not options.score_column and len(look.find_all(*HELPSTEER)) == len(HELPSTEER):
        options = ReadOptions(**{**vars(options), "score_column": look.find(HELPSTEER[0])})
    column = score_column(look, named, options)
    if column is None:
        return None
    look.used.add(column)
    answers = find_answers(look, named)
    if answers is None or not _share_prompts(look, answers):
        return None
    notes: Counter[str] = Counter()
    number, sign = rating_reader(look.values[column]), direction_of(column, options)

    def answer_of(name: str, row: Row) -> tuple[Any, Any, float]:
        if row.get(column) is None:
            raise SetAside(f'no value in "{column}"')
        value = sign * number(row[column], column)
        record = answers.read(name, row)
        return record.prompt, record.sides["completion"], value

    def gather(rows: Iterator[Named]) -> Iterator[Record | Skipped]:
        groups: dict[str, tuple[list[str], Any, list[Scored]]] = {}
        for name, row in rows:
            outcome = attempt(name, row, tuple(answers.columns), answer_of)
            if isinstance(outcome, Skipped):
                yield outcome
                continue
            prompt, answer, value = outcome
            names, _, scored = groups.setdefault(json.dumps(prompt, sort_keys=True), ([], prompt, []))
            names.append(name)
            scored.append((answer, value))
        for names, prompt, scored in groups.values():
            args = (names[0], prompt, scored)
            for found in _attempt_all(names[0], lambda args=args: ranked_pairs(*args, options, notes)):
                yield from (replace(found, row=name) for name in names) if isinstance(found, Skipped) else (found,)

    def read(name: str, row: Row) -> Iterable[Record]:
        yield from ()

    score = "score" if sign > 0 else "score, the lowest is the best"
    return Form(
        "pair", "/".join([*answers.columns, column]), tuple(answers.columns),
        (*answers.became, (column, f"{score}; rows of one prompt are its answers")), read, answers.prompt,
        as_turns=answers.as_turns, optional=(*answers.optional, column), gather=gather, tally=Tally(notes),
    )  # fmt: skip


def _share_prompts(look: Look, answers: Answers) -> bool:
    """Whether two of the first rows have one prompt."""
    seen = set()
    for row in look.first:
        try:
            prompt = json.dumps(answers.prompt(row), sort_keys=True)
        except (BadRow, KeyError):
            continue  # the row is bad, and is named where it is read
        if prompt in seen:
            return True
        seen.add(prompt)
    return False


def attempt(name: str, row: Any, columns: tuple[str, ...], step: Any) -> Any:
    """`step(name, row)`, or a Skipped."""
    try:
        if isinstance(row, BadRow):
            raise row
        if not isinstance(row, dict):
            raise BadRow(f"the row is {json_kind(row)}, expected an object")
        for column in columns:
            if row.get(column) is None:
                raise BadRow(f'no value in "{column}"')
        return step(name, row)
    except BadRow as problem:
        return Skipped.of(name, problem)
    except RecursionError:
        return Skipped(name, "it is nested too deeply to be read")


def _attempt_all(name: str, records: Any) -> Iterator[Record | Skipped]:
    try:
        yield from records()
    except BadRow as problem:
        yield Skipped.of(name, problem)


# ---------------------------------------------------------------------------------------------------------
# Trees


NODE = ("message_id", "parent_id", "text", "role", "rank")


def find_tree(look: Look, named: dict[str, list[str]], options: ReadOptions) -> Form | None:
    """OpenAssistant's messages, one a row with the id of its parent, or a whole tree a row."""
    flat = [look.find(name) for name in NODE]
    if all(flat):
        message, parent, text, role, rank = flat
        became = (
            (text, "turn"),
            (role, "role"),
            (rank, "rank of the answer"),
            (message, "id"),
            (parent, "id of the turn before"),
        )
        return _tree_form("/".join(flat), became, tuple(flat), _gather_flat, options)  # type: ignore[arg-type]
    root = look.find("prompt")
    if root and any(isinstance(value, dict) and "replies" in value for value in look.values[root]):
        return _tree_form(f"{root} (a tree)", ((root, "tree of turns"),), (root,), _gather_nested, options)
    return None


def _tree_form(name: str, became: Any, columns: tuple[str, ...], gather: Any, options: ReadOptions) -> Form:
    notes: Counter[str] = Counter()

    def read(name: str, row: Row) -> Iterable[Record]:
        yield from ()

    required = tuple(column for column, key in zip(columns, NODE, strict=False) if key not in ("parent_id", "rank"))
    return Form(
        "pair",
        name,
        required,
        became,
        read,
        gather=lambda rows: gather(rows, columns, options, notes),
        tally=Tally(notes),
    )


def _gather_flat(rows: Iterator[Named], columns: tuple[str, ...], options: ReadOptions, notes: Counter[str]) -> Any:
    nodes: dict[Any, tuple[str, Row]] = {}
    children: dict[Any, list[Any]] = {}
    required = [column for column, key in zip(columns, NODE, strict=True) if key in ("message_id", "text", "role")]
    for name, row in rows:
        node = attempt(name, row, tuple(required), lambda name, row: _node(row, columns))
        if isinstance(node, Skipped):
            yield node
            continue
        nodes[node["message_id"]] = (name, node)
        children.setdefault(node["parent_id"], []).append(node["message_id"])

    def path(node: Any) -> list[str]:
        """The ids from the root to a node."""
        ids: list[Any] = []
        while node is not None:
            if node not in nodes or len(ids) > 1000:
                raise BadRow(f"the turn before it, {node!r:.60}, is in no row")
            ids.append(node)
            node = nodes[node][1]["parent_id"]
        return ids[::-1]

    def pairs(name: str, parent: Any, answers: list[Row]) -> Iterable[Record]:
        ids = path(parent)
        turns = [{"role": nodes[node][1]["role"], "content": nodes[node][1]["text"]} for node in ids]
        for record in _ranked(name, read_turns(turns, "text"), answers, options, notes):
            yield replace(record, thread=nodes[ids[0]][0])

    for parent, replies in children.items():
        answers = [nodes[node][1] for node in replies if str(nodes[node][1]["role"]).lower() != "prompter"]
        if parent is None or not answers:
            continue
        name = nodes[parent][0] if parent in nodes else nodes[replies[0]][0]
        yield from _attempt_all(name, lambda args=(name, parent, answers): pairs(*args))


def _node(row: Row, columns: tuple[str, ...]) -> Row:
    """A message, its keys spelled as OpenAssistant does."""
    node = {key: row.get(column) for key, column in zip(NODE, columns, strict=True)}
    if any(isinstance(node[key], dict | list) for key in ("message_id", "parent_id")):
        raise BadRow("its message_id and parent_id must be texts or numbers")
    return node


def _gather_nested(rows: Iterator[Named], columns: tuple[str, ...], options: ReadOptions, notes: Counter[str]) -> Any:
    for name, row in rows:
        outcome = attempt(name, row, columns, lambda name, row: row[columns[0]])
        if isinstance(outcome, Skipped):
            yield outcome
        elif not isinstance(outcome, dict):
            yield Skipped(name, f'"{columns[0]}" is {json_kind(outcome)}, expected a tree of turns')
        else:
            yield from _walk(name, outcome, [], options, notes)


def _walk(
    name: str, node: Any, turns: list[Any], options: ReadOptions, notes: Counter[str]
) -> Iterator[Record | Skipped]:
    try:
        here = [*turns, *read_turns([{"role": node.get("role"), "content": node.get("text")}], "text")]
    except BadRow as problem:
        yield Skipped.of(name, problem)
        return
    replies = [reply for reply in node.get("replies") or [] if isinstance(reply, dict)]
    answers = [reply for reply in replies if str(reply.get("role")).lower() != "prompter"]
    if answers:
        yield from _attempt_all(name, lambda: _ranked(name, here, answers, options, notes))
    for reply in replies:
        yield from _walk(name, reply, here, options, notes)


def _ranked(name: str, turns: Any, answers: list[Row], options: ReadOptions, notes: Counter[str]) -> Iterable[Record]:
    """Rank 0 is the best; answers that nobody ranked are left out and counted."""
    ranked = [answer for answer in answers if number_of(answer.get("rank")) is not None]
    notes["answers without a rank, in no pair"] += len(answers) - len(ranked)
    if len(ranked) < 2:
        raise SetAside("fewer than two ranked answers")
    scored = [
        ([turn_of("assistant", answer["text"], "text")], -(number_of(answer["rank"]) or 0.0)) for answer in ranked
    ]
    yield from ranked_pairs(name, turns, scored, options, notes)
