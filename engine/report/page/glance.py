"""The first screen of a report: to each question the first answer, in one line, a cell for each run."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from prefuse.engine.config.data import FEW_HELD_OUT
from prefuse.engine.report.page.read import RunFiles
from prefuse.engine.report.page.render import in_short

QUESTIONS = {
    "data": "What was it trained on?",
    "learned": "Did it learn?",
    "better": "Is it better?",
    "wrong": "What went wrong?",
    "settings": "With which settings?",
}
COMPARED = (  # of the first and the last evaluation
    ("eval_loss", "loss", "lower is better"),
    ("eval_reward", "reward of sampled answers", "higher is better"),
    ("eval_gold", "gold score of sampled answers", "higher is better"),
    ("eval_ece", "calibration error of the scores", "lower is better"),
    ("eval_rewards/accuracies", "reward accuracy (a tie counts half)", "higher is better"),
    ("eval_rewards/margins", "reward margin", ""),
    ("eval_kl_to_ref", "KL to the reference, nats per token", "the price paid"),
    ("eval_accuracy", "accuracy", "higher is better"),
)
LAST_WORDS = 90  # characters of the last message


def glance_of(runs: Sequence[RunFiles], tables: Sequence[list[dict]], settings: Sequence[dict]) -> list[dict]:
    """[{id, question, rows: [{name, hint, cells}]}]; a row that no run has anything for is left out."""

    def of_runs(name: str, said: Callable[[RunFiles], str], hint: str = "") -> dict:
        return {"name": name, "hint": hint, "cells": [said(run) for run in runs]}

    changes = [
        {**_named(label, hint), "cells": [_change(table, label) for table in tables]}
        for _, label, hint in COMPARED
        if label != "reward margin"
    ]
    rows = {
        "data": [of_runs("rows", _rows), of_runs("held out", _held_out), of_runs("model", _model)],
        "learned": [*changes, of_runs("training loss", _training_loss, "lower is better")],
        "better": [of_runs("win rate", _wins, "against the reference; a tie counts half")],
        "wrong": [of_runs("the run", _unfinished), of_runs("warnings", _warnings)],
        "settings": [{"name": "not the default", "hint": "", "cells": _changed(settings, len(runs))}],
    }
    if not any(rows["better"][0]["cells"]):
        rows["better"] = [of_runs("win rate", lambda run: "not measured yet", "the commands below measure it")]
    return [
        {"id": name, "question": question, "rows": [row for row in rows[name] if any(row["cells"])]}
        for name, question in QUESTIONS.items()
    ]


def _named(label: str, hint: str) -> dict:
    """A name short enough for a phone; what explains it is the hint's."""
    short, explained, rest = re.match(r"([^,(]+)([,(]?)(.*)", label).groups()
    said = [rest.strip(" )"), hint] if explained else [hint]
    return {"name": f"held-out {short.strip()}", "hint": ", ".join(filter(None, said))}


def _rows(run: RunFiles) -> str:
    rows, what = run.about.get("rows"), "prompts" if run.command == "online" else "rows"
    if not rows:
        return ""
    files = run.settings.get("datasets") or run.settings.get("dataset_name")
    source = f" of {Path(files).name}" if isinstance(files, str) else ""
    skipped = f", {run.skipped.total()} skipped" if run.skipped else ""
    return f"{in_short(rows['train'])} {what}{source}{skipped}"


def _held_out(run: RunFiles) -> str:
    rows = run.about.get("rows")
    if not rows:
        return ""
    held = rows["held_out"]
    few = ": too few for a reliable number" if isinstance(held, int) and 0 < held < FEW_HELD_OUT else ""
    return f"{in_short(held)} rows{few}"


def _model(run: RunFiles) -> str:
    return Path(str(run.settings.get("model_name_or_path") or "")).name


def _change(table: list[dict], label: str) -> str:
    return next((f"{in_short(row['first'])} → {in_short(row['last'])}" for row in table if row["label"] == label), "")


def _training_loss(run: RunFiles) -> str:
    """Where no rows are held out there is nothing better."""
    losses = [row["loss"] for row in run.metrics if isinstance(row.get("loss"), int | float)]
    held = any(name.startswith("eval_") for row in run.metrics for name in row)
    return f"{in_short(losses[0])} → {in_short(losses[-1])}" if losses and not held else ""


def _wins(run: RunFiles) -> str:
    for _, metrics in run.evaluations:
        if "win_rate" in metrics:
            low, high = metrics.get("win_rate_low"), metrics.get("win_rate_high")
            if low is None or high is None:
                return f"{metrics['win_rate']:.1%}"
            decided = "better" if low > 0.5 else "worse" if high < 0.5 else "not decided"
            return f"{metrics['win_rate']:.1%} ({low:.1%} to {high:.1%}): {decided}"
    return ""


def _unfinished(run: RunFiles) -> str:
    return "" if run.mark.get("state") == "finished" else run.state


def _warnings(run: RunFiles) -> str:
    if not run.messages:
        return "none"
    last = " ".join(str(run.messages[-1].get("text", "")).split())
    shown = last if len(last) <= LAST_WORDS else last[:LAST_WORDS].rsplit(" ", 1)[0] + " …"
    return f"{len(run.messages)}, the last: {shown}"


def _changed(settings: Sequence[dict], count: int) -> list[str]:
    """How many settings of each run are not the default."""
    return [
        f"{sum(row['changed'][number] for topic in settings for row in topic['rows'])} settings"
        for number in range(count)
    ]
