"""Numbers beside the text of a row: its weight, its margin, and what is known of its sides.

weight          what the loss of the row is multiplied by; 0 sets it aside
margin          by how much the better side should win, or (of one answer) what the other objectives say
score_chosen    and score_rejected, or chosen_score, rating_chosen, ...: what each side got
safety_chosen   and safety_rejected (of one answer: safety), for each name in --objective_weights
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from prefuse.engine.data.forms.form import Form, ReadOptions, Row
from prefuse.engine.data.forms.look import Look
from prefuse.engine.data.forms.names import plain_name
from prefuse.engine.data.forms.ratings import are_ratings, number_of, rating_reader
from prefuse.engine.data.records import BadRow, DataError, Record, SetAside, json_kind

WEIGHTS = ("weight", "row_weight", "sample_weight", "example_weight", "loss_weight")
MARGINS = ("margin",)
SCORE_WORDS = ("score", "rating", "reward")
Columns = tuple[str, ...]  # one for each side


@dataclass(frozen=True)
class Numbers:
    """The columns that hold them; None and () where there are none."""

    weight: str | None = None
    margin: str | None = None
    scores: Columns = ()
    objectives: tuple[tuple[float, Columns], ...] = ()  # the weight of each, and its columns
    compared: Columns = ()  # the scores of a pair's sides, read or not
    rate: Callable[[Any, str], float] = field(default_factory=lambda: rating_reader(()))  # (score, column) -> number
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def became(self) -> list[tuple[str, str]]:
        said = [(self.weight, "weight of the row"), (self.margin, "margin")]
        said += [(column, "score") for column in self.scores]
        said += [(column, f"objective of weight {weight:g}") for weight, names in self.objectives for column in names]
        return [(column, role) for column, role in said if column]

    def read(self, row: Row, record: Record) -> Record:
        found: dict[str, object] = {}
        if self.compared:
            better, worse = (number_of(row.get(column)) for column in self.compared)
            if better is not None and worse is not None and better < worse:
                self.notes[f"rows with a lower {' than '.join(self.compared)}, kept as they stand"] += 1
        if self.weight and row.get(self.weight) is not None:
            weight = number(row[self.weight], self.weight)
            if weight < 0:
                raise BadRow(f'"{self.weight}" is {weight:g}, expected a weight of 0 or more')
            if weight == 0:
                raise SetAside(f'its "{self.weight}" is 0')
            found["weight"] = weight * (1.0 if record.weight is None else record.weight)
        if self.margin and row.get(self.margin) is not None:
            found["margin"] = number(row[self.margin], self.margin)
        if self.scores and all(row.get(column) is not None for column in self.scores):
            numbers = [self.rate(row[column], column) for column in self.scores]
            found["scores"] = dict(zip(record.sides, numbers, strict=True))
        if self.objectives:
            found["objectives"] = {
                side: math.fsum(weight * _given(row, columns[place]) for weight, columns in self.objectives)
                for place, side in enumerate(record.sides)
            }
        return replace(record, **found) if found else record  # type: ignore[arg-type]


def number(value: object, column: str) -> float:
    """A finite number, whether or not it stands in quotes."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = math.nan
        if math.isfinite(found):
            return found
    raise BadRow(f'"{column}" is {value!r:.40}, {json_kind(value)}; expected a finite number')


def _given(row: Row, column: str) -> float:
    if row.get(column) is None:
        raise BadRow(f'no value in "{column}"')
    return number(row[column], column)


def find_numbers(look: Look, form: Form, named: dict[str, list[str]], options: ReadOptions) -> Numbers:
    """Among the columns that the form leaves over; a form that makes a record of several rows has none.

    A weight counts for any loss, margins and scores are looked for where `options.needs` has them.
    """
    if form.gather is not None or form.kind == "prompt":
        return Numbers()
    look.used |= form.used
    weight = named.get("weight", [None])[0] or (_numeric(look, *WEIGHTS) if options.row_weights else None)
    wants_margin, is_pair = "margins" in (*options.needs, *options.takes), form.kind == "pair"
    margin = (named.get("margin", [None])[0] or _numeric(look, *MARGINS)) if wants_margin else None
    sides = [column for column, role in form.became if role in ("chosen", "rejected")]
    scores = next((pair for pair in _score_names(sides) if all(_numeric(look, name) for name in pair)), ())
    found = tuple(look.find(name) or "" for name in scores)
    objectives = tuple(_objectives(look, is_pair, options)) if wants_margin else ()
    rate = rating_reader(value for column in found for value in look.values[column])
    return Numbers(weight, margin, found if options.needs else (), objectives, found, rate, form.tally.notes)


def _numeric(look: Look, *names: str) -> str | None:
    column = look.find(*names)
    return column if column and (look.is_numbers(column) or are_ratings(look.values[column])) else None


def _score_names(sides: list[str]) -> Iterator[tuple[str, str]]:
    if len(sides) == 2:
        for first, second in ((plain_name(sides[0]), plain_name(sides[1])), ("chosen", "rejected")):
            for word in SCORE_WORDS:
                yield f"{word}_{first}", f"{word}_{second}"
                yield f"{first}_{word}", f"{second}_{word}"


def _objectives(look: Look, is_pair: bool, options: ReadOptions) -> Iterator[tuple[float, Columns]]:
    for name, weight in objective_weights(options.objective_weights).items():
        wanted = ((f"{name}_chosen", f"{name}_rejected"), (f"chosen_{name}", f"rejected_{name}"))
        for names in wanted if is_pair else ((name,),):
            found = tuple(filter(None, (_numeric(look, plain_name(part)) for part in names)))
            if len(found) == len(names):
                yield weight, found
                break
        else:
            columns = " and ".join(wanted[0]) if is_pair else name
            raise DataError(
                f'{look.source}: objective_weights names "{name}", and there are no numbers in {columns}; its columns '
                f"are {', '.join(look.values)}"
            )


def objective_weights(text: str | None) -> dict[str, float]:
    """{name: weight} of "safety=0.3,brevity=0.2"."""
    weights: dict[str, float] = {}
    for part in (text or "").split(","):
        name, equals, value = (word.strip() for word in part.partition("="))
        if not part.strip():
            continue
        try:
            weights[name] = float(value)
        except ValueError:
            equals = ""
        if not name or not equals or not math.isfinite(weights[name]):
            raise DataError(f'objective_weights has "{part.strip()}"; expected NAME=NUMBER, as in safety=0.3')
    return weights
