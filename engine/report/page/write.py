"""One self-contained HTML file of one run or several side by side.

Jinja escapes every text of a run, so that none of it is ever markup, and the page's policy forbids it to fetch
anything. The script draws the curves from the numbers in the page; without it the tables remain.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

from prefuse.engine.config.settings import Config, settings_of
from prefuse.engine.data.pieces import ROLES
from prefuse.engine.report.page.read import RunFiles
from prefuse.engine.report.page.series import charts_of, over_kl
from prefuse.engine.report.screen import printable, visible
from prefuse.engine.run.files import write_whole

HERE = Path(__file__).parent
OPEN_CHARTS = 8  # the rest stands folded below them
MOST_SIDE_BY_SIDE = 8
COMPARED = (  # of the first and the last evaluation
    ("eval_loss", "loss", "lower is better"),
    ("eval_ece", "calibration error of the scores", "lower is better"),
    ("eval_rewards/accuracies", "reward accuracy (a tie counts half)", "higher is better"),
    ("eval_rewards/margins", "reward margin", ""),
    ("eval_kl_to_ref", "KL to the reference, nats per token", "the price paid"),
    ("eval_accuracy", "accuracy", "higher is better"),
)


def write_page(path: Path, runs: Sequence[RunFiles]) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"shown": _shown, "visible": lambda piece: visible(str(piece)), "role": _role}
    tables = [_progress(run) for run in runs]
    titles, charts = _titles(runs), _charts(runs)
    text = environment.get_template("page.html.j2").render(
        runs=runs,
        titles=titles,
        charts=charts,
        over_kl=_curves_over_kl(runs, titles),
        open_charts=OPEN_CHARTS,
        progress=[table for table in tables if table],
        indices=[index for index, table in enumerate(tables) if table],
        settings=_settings(runs),
        libraries=_libraries(runs),
        roles=ROLES,
        used_roles=_used_roles,
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
    )
    write_whole(path, text)


def _shown(value: Any) -> str:
    """A number short, a text without characters that change what stands around it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(str(value))


def _role(role: Any) -> str:
    """A known role, as a class of the page: nothing else of a file gets into an attribute that means something."""
    return role if role in ROLES else "prompt"


def _used_roles(example: dict) -> set[str]:
    return {_role(role) for side in example.get("sides", ()) for role in side.get("roles", ())}


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
    return [{"title": title, "x": "step", "lines": lines} for title, lines in charts.items()]


def _curves_over_kl(runs: Sequence[RunFiles], titles: Sequence[str]) -> list[dict]:
    """The same, of checkpoints that `prefuse eval --checkpoints` has looked at."""
    return [
        {"title": f"{titles[number]}: scores over sqrt(KL), {file}", "x": "sqrt(KL)", "lines": [
            {"run": number} | dataclasses.asdict(line) for line in over_kl(points)
        ]}
        for number, run in enumerate(runs)
        for file, points in run.checkpoints
        if over_kl(points)
    ]  # fmt: skip


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
    """[{topic, rows: [{name, values, differs, changed}]}]: `differs` between runs, `changed` from the default."""
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    topics = {}
    for command in ("sft", "train"):
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
                "changed": any(value != defaults.get(name) for value in values),
            })  # fmt: skip
        if rows:
            found.append({"topic": topic, "rows": rows})
    return found


def _libraries(runs: Sequence[RunFiles]) -> list[dict]:
    parts = [(run.about.get("environment"), run.mark.get("libraries")) for run in runs]
    tables = [{k: v for part in both if isinstance(part, dict) for k, v in part.items()} for both in parts]
    names = dict.fromkeys(name for table in tables for name in table)
    return [{"name": name, "values": [table.get(name) for table in tables]} for name in names]
