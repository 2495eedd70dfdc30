"""A page of a template: one self-contained HTML file, written whole.

Jinja escapes every text, so that nothing of a run or a row is ever markup, and the page's policy forbids it to fetch
anything.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import markupsafe

from prefuse.engine.data.pieces import ROLES
from prefuse.engine.report.screen import printable, visible
from prefuse.engine.run.files import write_whole

HERE = Path(__file__).parent


def write_rendered(path: Path, template: str, titles: list[str], drawn: Sequence[dict] = (), **context: Any) -> None:
    """`titles`: what the page is about. `drawn`: [{title, x, lines}], which figures name by their place."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "shown": in_short, "path": in_lines, "visible": lambda piece: visible(str(piece)), "role": role,
    }  # fmt: skip
    environment.globals |= {
        "roles": ROLES,
        "used_roles": _used_roles,
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        "titles": titles,
        "chart_data": {"titles": titles, "charts": list(drawn)},
    }
    write_whole(path, environment.get_template(template).render(**context))


def in_short(value: Any) -> str:
    """A number short, a text without characters that change what stands around it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(in_short, value))
    return printable(str(value))


def in_lines(value: Any) -> markupsafe.Markup:
    """The same of a path, which a narrow column may break behind each slash."""
    return markupsafe.Markup("/<wbr>").join(in_short(value).split("/"))


def role(name: Any) -> str:
    """A known role, as a class of the page: nothing else of a file gets into an attribute that means something."""
    return name if name in ROLES else "prompt"


def _used_roles(sides: list[dict]) -> set[str]:
    return {role(name) for side in sides for name in side.get("roles", ())}
