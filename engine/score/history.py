"""Drift: what a model says to the same probes from one day to another. A JSON line for each look, appended."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path

from prefuse.engine.errors import UserError
from prefuse.engine.run.files import json_text
from prefuse.engine.score.cache import json_digest
from prefuse.engine.score.contract import Text


def record(
    path: Path, model: str, prompts: Sequence[Text], answers: Sequence[Sequence[str]], metrics: dict[str, float]
) -> dict[str, float | str]:
    """Appends this look; what has changed since the last one of this model at these prompts, or {}.

    `changed_answers`: the share of answers that are other texts. NAME_change: of each metric that both have.
    """
    probes = json_digest(list(prompts))
    before = [line for line in _lines(path) if line.get("model") == model and line.get("probes") == probes]
    now = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": model, "probes": probes, "metrics": metrics, "answers": [list(own) for own in answers],
    }  # fmt: skip
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json_text(now) + "\n")
    except OSError as error:
        raise UserError(f"cannot write history {path}: {error}") from None
    return drift(before[-1], now) if before else {}


def drift(before: dict, now: dict) -> dict[str, float | str]:
    pairs = [
        (old, new)
        for olds, news in zip(before["answers"], now["answers"], strict=True)
        for old, new in zip(olds, news, strict=False)
    ]
    changed = sum(old != new for old, new in pairs) / len(pairs) if pairs else 0.0
    both = {
        name: value - before["metrics"][name]
        for name, value in now["metrics"].items()
        if isinstance(before["metrics"].get(name), int | float) and value == value
    }
    changes = {f"{name}_change": difference for name, difference in both.items() if difference}
    return {"since": before["date"], "changed_answers": changed, **changes}


def _lines(path: Path) -> list[dict]:
    """A line that is damaged is none."""
    found = []
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read history {path}: {error}") from None
    for line in text.splitlines():
        try:
            row = json.loads(line)
            if isinstance(row, dict) and {"answers", "metrics", "date"} <= row.keys():
                found.append(row)
        except (ValueError, RecursionError):
            continue
    return found
