"""What a page says to "Is it better?": evaluations and answers of several runs side by side, scores over the KL."""

import dataclasses
from collections.abc import Sequence

from prefuse.engine.report.page.read import RunFiles
from prefuse.engine.report.page.series import over_kl

MOST_ANSWERS = 20  # on the page
MOST_MISTAKES = 10
MOST_SAMPLED = 5  # prompts of a round; of each its first and its best answer
EXPLAINED = {
    "loss": "lower is better",
    "win_rate": "share won against the reference; a tie counts half; interval of 95%",
    "gold_win_rate": "the same by the gold scorer",
    "length_controlled_win_rate": "as if the answers were equally long (AlpacaEval 2)",
    "comparisons": "answers compared",
    "without_verdict": "answers that no verdict came for",
    "first_shown_wins": "bias to the answer shown first; 0.5 is none",
    "cohen_kappa": "agreement with the gold scorer beyond chance; 1 is full",
    "score": "mean by the scorer",
    "ref_score": "the reference's",
    "gold_score": "mean by the gold scorer",
    "length": "characters of the answers",
    "ref_length": "the reference's",
    "kl_to_ref": "nats per token: the price paid",
    "rewards/accuracies": "share of pairs whose chosen side has the higher reward",
    "rewards/ties": "share of pairs with equal rewards",
    "rewards/margins": "reward of chosen less that of rejected",
}


def evaluations_of(runs: Sequence[RunFiles]) -> list[dict]:
    """[{file, rows: [{name, about, cells}], wins: [{run, name, value, low, high}]}], one for each name of a file."""
    files: dict[str, dict[int, dict[str, float]]] = {}
    for number, run in enumerate(runs):
        for file, metrics in run.evaluations:
            files.setdefault(file, {})[number] = metrics
    found = []
    for file, by_run in files.items():
        names = dict.fromkeys(name for metrics in by_run.values() for name in metrics)
        bounds = {f"{name}{end}" for name in names for end in ("_low", "_high") if f"{name}{end}" in names}
        rows = [
            {
                "name": name,
                "about": EXPLAINED.get(name, ""),
                "cells": [_with_interval(by_run.get(number, {}), name) for number in range(len(runs))],
            }
            for name in names
            if name not in bounds
        ]
        found.append({"file": file, "rows": rows, "wins": list(_wins(by_run))})
    return found


def _with_interval(metrics: dict[str, float], name: str) -> str | float | None:
    value, low, high = (metrics.get(f"{name}{end}") for end in ("", "_low", "_high"))
    if value is None or low is None or high is None:
        return value
    return f"{value:.4g} ({low:.4g} to {high:.4g})"


def _wins(by_run: dict[int, dict[str, float]]):
    for number, metrics in by_run.items():
        for name in ("win_rate", "gold_win_rate"):
            value, low, high = (metrics.get(f"{name}{end}") for end in ("", "_low", "_high"))
            if None not in (value, low, high) and 0 <= low <= value <= high <= 1:
                yield {"run": number, "name": name, "value": value, "low": low, "high": high}


def told_answers(runs: Sequence[RunFiles], titles: Sequence[str]) -> list[dict]:
    """[{file, columns, rows: [[prompt, answer, ...]], count}]: what each run says to the same prompts."""
    files: dict[str, list[tuple[int, list[dict]]]] = {}
    for number, run in enumerate(runs):
        for file, rows in run.answers:
            files.setdefault(file, []).append((number, rows))
    found = []
    for file, of_runs in files.items():
        table: dict[str, dict[str, str]] = {}
        columns: dict[str, None] = {}
        for number, rows in of_runs:
            alone = len(of_runs) == 1
            before, after = ("before", "after") if alone else (f"before {titles[number]}", titles[number])
            given = any("reference" in row for row in rows)
            columns |= dict.fromkeys([*([before] if given else []), after if given or not alone else "answer"])
            for row in rows:
                told = table.setdefault(str(row["prompt"]), {})
                told[after if given or not alone else "answer"] = str(row["model"])
                if "reference" in row:
                    told[before] = str(row["reference"])
        rows = [[prompt, *(told.get(name) for name in columns)] for prompt, told in table.items()]
        found.append({"file": file, "columns": list(columns), "rows": rows[:MOST_ANSWERS], "count": len(rows)})
    return found


def curves_over_kl(runs: Sequence[RunFiles], titles: Sequence[str]) -> list[dict]:
    """Charts of checkpoints that `prefuse eval --checkpoints` has looked at, each with what is said below it."""
    return [
        {
            "title": f"{titles[number]}: scores over sqrt(KL), {file}",
            "x": "sqrt(KL)",
            "lines": [{"run": number} | dataclasses.asdict(line) for line in over_kl(points)],
            "mark": turn.get("turns_at"),
            "said": _said_of_turn(turn),
        }
        for number, run in enumerate(runs)
        for file, points, turn in run.checkpoints
        if over_kl(points)
    ]


def _said_of_turn(turn: dict) -> str:
    best = f"The best checkpoint by what was measured is step {turn['best_step']:g}. " if "best_step" in turn else ""
    if "turns_at" in turn:
        return f"{best}The curve turns at sqrt(KL) {turn['turns_at']:.3g}: what lies behind it is over-optimized."
    return best + ("The curve has not turned within what was seen." if turn else "Too few points to look for a turn.")


def rounds_of(run: RunFiles) -> list[dict]:
    """[{name, mean, rows: [{row, first, first_score, best, best_score}]}] of an online run, the first and the last."""
    found = []
    for name, rows in run.rounds:
        scores = [score for row in rows for score in row["scores"] if score is not None]
        shown = []
        for row in rows[:MOST_SAMPLED]:
            scored = [
                (score, answer)
                for score, answer in zip(row["scores"], row["answers"], strict=True)
                if score is not None
            ]
            for score, answer in (
                (max(scored, key=lambda pair: pair[0]), min(scored, key=lambda pair: pair[0])) if scored else ()
            ):
                shown.append({"row": row.get("row"), "answer": answer, "score": float(score)})
        mean = sum(scores) / len(scores) if scores else None
        found.append({"name": name, "mean": mean, "count": len(scores), "rows": shown})
    return found


def mistakes_of(run: RunFiles) -> dict | None:
    """Of a reward model: how many held-out rows it has the wrong way round, and the worst of them."""
    if not run.held_out_scores:
        return None
    gaps = [(max(row["scores"][1:]) - row["scores"][0], row) for row in run.held_out_scores]
    wrong = sorted((pair for pair in gaps if pair[0] > 0), key=lambda pair: -pair[0])
    rows = [
        {
            "row": row.get("row"),
            "best": float(row["scores"][0]),
            "other": float(max(row["scores"][1:])),
            "gap": float(gap),
        }
        for gap, row in wrong[:MOST_MISTAKES]
    ]
    return {"count": len(gaps), "wrong": len(wrong), "rows": rows}
