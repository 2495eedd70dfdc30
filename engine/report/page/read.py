"""The folder of a run as one value. Every file may be absent, cut short or strange: what can be read is shown."""

import json
import shlex
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from prefuse.engine.errors import UserError
from prefuse.engine.report.log import read_metrics
from prefuse.engine.report.messages import MESSAGES
from prefuse.engine.run.files import is_number

QUANTILES = 5  # numbers that about.json has of each length
MOST_BYTES = 1 << 26  # of a file of answers or messages that is read
MEASURED = {"loss", "win_rate", "score", "prompts"}  # one of them is in what `prefuse eval` writes
MOST_ANSWERS = 200
MOST_MESSAGES = 200
MOST_SIDE_BY_SIDE = 8  # runs


@dataclass(frozen=True)
class RunFiles:
    """What a run left: `metrics` are the lines of metrics.jsonl, `skipped` counts rows by reason."""

    name: str
    path: Path
    mark: dict[str, Any] = field(default_factory=dict)  # run.json
    settings: dict[str, Any] = field(default_factory=dict)  # config.yaml
    about: dict[str, Any] = field(default_factory=dict)  # about.json
    metrics: list[dict] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)  # the first row of each reason
    messages: list[dict] = field(default_factory=list)
    answers: list[tuple[str, list[dict]]] = field(default_factory=list)  # (file, rows) of `prefuse generate`
    evaluations: list[tuple[str, dict]] = field(default_factory=list)  # (file, metrics) of `prefuse eval`
    checkpoints: list[tuple[str, list[dict], dict]] = field(default_factory=list)  # of `eval --checkpoints`: and turn
    rounds: list[tuple[str, list[dict]]] = field(default_factory=list)  # of `prefuse online`: the first and the last
    held_out_scores: list[dict] = field(default_factory=list)  # of `prefuse reward`

    def skipped_rows(self, most: int) -> list[tuple[str, int, str]]:
        """(reason, rows, the first of them)"""
        return [(reason, count, self.first_skipped.get(reason, "")) for reason, count in self.skipped.most_common(most)]

    @property
    def command(self) -> str:
        return str(self.mark.get("command", "?"))

    @property
    def steps(self) -> int:
        return max((row["step"] for row in self.metrics if isinstance(row.get("step"), int)), default=0)

    @property
    def state(self) -> str:
        total = self.mark.get("total_steps")
        state = self.mark.get("state", "unknown")
        if state == "finished":
            return f"finished, {self.steps} step{'s' * (self.steps != 1)}"
        return f"not finished: step {self.steps}" + (f" of {total}" if isinstance(total, int) else "")


def read_run(folder: Path) -> RunFiles:
    """UserError where the folder holds no run."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        inside = [shlex.quote(str(path.parent)) for path in sorted(folder.glob("*/metrics.jsonl"))]
        hint = f"; there are runs in it: prefuse report {' '.join(inside[:MOST_SIDE_BY_SIDE])}" if inside else ""
        raise UserError(f"{folder} has no metrics.jsonl: expected the output_dir of a run{hint}")
    skipped = list(_lines(folder / "skipped.jsonl"))
    return RunFiles(
        name=folder.resolve().name,
        path=folder,
        mark=_mapping(_read_json(folder / "run.json")),
        settings=_settings(folder / "config.yaml"),
        about=_about(_read_json(folder / "about.json")),
        metrics=read_metrics(metrics),
        skipped=Counter(str(row.get("reason", "")) for row in skipped),
        first_skipped={str(row.get("reason", "")): str(row.get("row", "")) for row in reversed(skipped)},
        messages=list(islice(_lines(folder / MESSAGES), MOST_MESSAGES)),
        answers=list(_answers(folder)),
        evaluations=list(_evaluations(folder)),
        checkpoints=list(_checkpoints(folder)),
        rounds=list(_rounds(folder / "samples")),
        held_out_scores=[row for row in _lines(folder / "held_out_scores.jsonl") if _is_scored(row)],
    )


def _read_json(path: Path) -> object:
    """None where there is none, or where it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _about(value: object) -> dict[str, Any]:
    """The parts of about.json that have the form in which a run writes them."""
    about = _mapping(value)
    rows, lengths, example = (_mapping(about.get(name)) for name in ("rows", "lengths", "example"))
    found: dict[str, Any] = {"environment": _mapping(about.get("environment"))}
    if {"train", "held_out"} <= rows.keys():
        found["rows"] = rows
    found["lengths"] = {part: numbers for part, numbers in lengths.items() if _are_numbers(numbers, QUANTILES)}
    sides = example.get("sides")
    if isinstance(sides, list) and all(map(_is_side, sides)):
        found["example"] = {"row": str(example.get("row")), "sides": sides}
    if isinstance(about.get("chat_template"), str):
        found["chat_template"] = about["chat_template"]
    return found


def _are_numbers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(is_number(x) for x in value)


def _is_side(side: object) -> bool:
    lists = [_mapping(side).get(name) for name in ("ids", "pieces", "roles")]
    return all(isinstance(values, list) for values in lists) and len(set(map(len, lists))) == 1 and "name" in side


def _settings(path: Path) -> dict[str, Any]:
    try:
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return {}


def _lines(path: Path):
    """The objects of a JSONL file; what is none is left out."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _answers(folder: Path):
    """Files that `prefuse generate` has written there: rows with a prompt and what `model` answered."""
    for path in sorted(folder.glob("*.jsonl")):
        if path.name in ("metrics.jsonl", "skipped.jsonl", "held_out_scores.jsonl", MESSAGES):
            continue
        rows = [row for row in islice(_lines(path), MOST_ANSWERS) if {"prompt", "model"} <= row.keys()]
        if rows:
            yield path.name, rows


def _evaluations(folder: Path):
    """Files that `prefuse eval` has written there: metrics, most of them numbers."""
    for path in sorted(folder.glob("*.json")):
        found = _mapping(_read_json(path))
        if MEASURED & found.keys():
            yield path.name, {name: value for name, value in found.items() if is_number(value)}


def _checkpoints(folder: Path):
    """Files that `prefuse eval --checkpoints` has written there: numbers of each checkpoint, and where gold turns."""
    for path in sorted(folder.glob("*.json")):
        found = _mapping(_read_json(path))
        points = found.get("checkpoints")
        if isinstance(points, list) and all(is_number(_mapping(point).get("sqrt_kl")) for point in points):
            turn = {name: value for name, value in _mapping(found.get("turn")).items() if is_number(value)}
            yield path.name, points, turn


def _rounds(folder: Path):
    """The first and the last round of samples: (name, rows with answers and their scores)."""
    files = sorted(folder.glob("round-*.jsonl"))
    for path in files[:1] + files[1:][-1:]:
        rows = [row for row in _lines(path) if _is_sampled(row)]
        if rows:
            yield path.stem, rows


def _is_sampled(row: dict) -> bool:
    answers, scores = row.get("answers"), row.get("scores")
    if not isinstance(answers, list) or not isinstance(scores, list) or len(answers) != len(scores):
        return False
    return all(score is None or is_number(score) for score in scores)


def _is_scored(row: dict) -> bool:
    scores = row.get("scores")
    return isinstance(scores, list) and len(scores) > 1 and all(map(is_number, scores))
