"""One self-contained HTML file of one run or several side by side.

The script draws the curves from the numbers in the page; without it the tables remain.
"""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path

from prefuse.engine.config.setting import TRAINING
from prefuse.engine.config.settings import Config, settings_of
from prefuse.engine.report.page.better import curves_over_kl, evaluations_of, mistakes_of, rounds_of, told_answers
from prefuse.engine.report.page.glance import COMPARED, QUESTIONS, glance_of
from prefuse.engine.report.page.read import RunFiles
from prefuse.engine.report.page.render import write_rendered
from prefuse.engine.report.page.series import charts_of, in_order

OPEN_CHARTS = 8  # the rest stands folded below them


def write_page(path: Path, runs: Sequence[RunFiles]) -> None:
    titles, charts, settings = _titles(runs), _charts(runs), _settings(runs)
    tables = [_progress(run) for run in runs]
    over = curves_over_kl(runs, titles)
    write_rendered(
        path,
        "run.html.j2",
        titles,
        charts + over,
        runs=runs,
        questions=QUESTIONS,
        glance=glance_of(runs, tables, settings),
        charts=charts,
        over_kl=over,
        open_charts=OPEN_CHARTS,
        progress=tables,
        evaluations=evaluations_of(runs),
        answers=told_answers(runs, titles),
        rounds=[rounds_of(run) for run in runs],
        mistakes=[mistakes_of(run) for run in runs],
        next=[line for run in runs for line in _next(run)],
        settings=settings,
        libraries=_libraries(runs),
    )


def _next(run: RunFiles) -> list[str]:
    """Commands that say whether the run is better."""
    start = str(run.settings.get("ref_model_name_or_path") or run.settings.get("model_name_or_path"))
    if run.command == "reward":
        models = {"model_name_or_path": "MODEL", "ref_model_name_or_path": "OTHER", "dataset_name": "PROMPTS"}
        return [_typed("eval", **models, scorer=run.path, output_file="wins.json")]
    own = {"config": run.path / "config.yaml", "model_name_or_path": run.path}
    both = own | {"ref_model_name_or_path": start}
    how = own | {"loss_type": "sft"} if run.command == "sft" else both
    return [
        _typed("eval", **how, output_file=run.path / "eval.json"),
        _typed("eval", **both, scorer="SCORER", output_file=run.path / "wins.json"),
        _typed("generate", **both, output_file=run.path / "answers.jsonl"),
    ]


def _typed(command: str, **settings: object) -> str:
    return shlex.join(["prefuse", command, *(word for name, x in settings.items() for word in (f"--{name}", str(x)))])


def _titles(runs: Sequence[RunFiles]) -> list[str]:
    """The folders' names; their paths where two have one name."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]


def _charts(runs: Sequence[RunFiles]) -> list[dict]:
    """[{title, x, lines: [{run, name, held_out, steps, values, low, high}]}], in the order of the panels."""
    charts: dict[str, list[dict]] = {}
    for number, run in enumerate(runs):
        for title, lines in charts_of(run.metrics).items():
            charts.setdefault(title, []).extend({"run": number} | dataclasses.asdict(line) for line in lines)
    return [{"title": title, "x": "step", "lines": charts[title]} for title in in_order(charts)]


def _progress(run: RunFiles) -> list[dict]:
    """Held-out numbers before the first step and now."""
    rows = [row for row in run.metrics if any(name.startswith("eval_") for name in row)]
    if len(rows) < 2:
        return []
    found = []
    for name, label, hint in COMPARED:
        first, last = (_with_ties(row, name) for row in (rows[0], rows[-1]))
        if first is not None and last is not None:
            found.append({"label": label, "hint": hint, "first": first, "last": last})
    return found


def _with_ties(row: dict, name: str) -> float | None:
    value = row.get(name)
    if not isinstance(value, int | float):
        return None
    ties = row.get("eval_rewards/ties") if name == "eval_rewards/accuracies" else 0.0
    return value + 0.5 * (ties if isinstance(ties, int | float) else 0.0)


def _settings(runs: Sequence[RunFiles]) -> list[dict]:
    """[{topic, rows: [{name, values, differs, changed}]}]: `differs` between runs; `changed`: of each, no default."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    topics = {}
    for command in TRAINING:
        for topic, fields in settings_of(command).items():
            topics.setdefault(topic, {}).update(dict.fromkeys(fields))
    known = {name for names in topics.values() for name in names}
    others = {name: None for run in runs for name in run.settings if name not in known}
    found = []
    for topic, names in [*topics.items(), ("Others", others)]:
        rows = []
        for name in names:
            values = [run.settings.get(name) for run in runs]
            if all(name not in run.settings for run in runs):
                continue
            differs = any(value != values[0] for value in values)
            rows.append({
                "name": name, "values": values, "differs": differs,
                "changed": [name in run.settings and run.settings[name] != defaults.get(name) for run in runs],
            })  # fmt: skip
        if rows:
            found.append({"topic": topic, "rows": rows})
    return found


def _libraries(runs: Sequence[RunFiles]) -> list[dict]:
    parts = [(run.about.get("environment"), run.mark.get("libraries")) for run in runs]
    tables = [{k: v for part in both if isinstance(part, dict) for k, v in part.items()} for both in parts]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [{"name": name, "values": [table.get(name) for table in tables]} for name in names]
    return [row | {"differs": any(value != row["values"][0] for value in row["values"])} for row in rows]
