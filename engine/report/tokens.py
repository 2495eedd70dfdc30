"""Tokens in the terminal: runs of one role, one below the other, so that they can be read without colours too."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from rich.table import Table
from rich.text import Text

from prefuse.engine.data.pieces import ROLES, Side
from prefuse.engine.report.screen import console, printable, visible

STYLES = {
    "prompt": "dim",
    "learned": "green",
    "chosen": "green",
    "rejected": "red",
    "ignored": "yellow strike",
    "read": "cyan",
    "scored": "bold cyan reverse",
}
BETWEEN = "\u2502"  # two tokens


def show_sides(row: str, sides: Sequence[Side], with_ids: bool = False) -> None:
    """The sequences of a row. Texts are shown as they are and never as markup; control characters by their codes."""
    console.print(Text(printable(row), style="bold"))
    for side in sides:
        counts = Counter(side.roles)
        said = ", ".join(f"{counts[role]} {role}" for role in ROLES if counts[role])
        console.print(Text(f"  {side.name}: {len(side.ids)} tokens, {said}"))
        console.print(_grid(side, with_ids), soft_wrap=False)
    console.print()


def _grid(side: Side, with_ids: bool) -> Table:
    grid = Table(box=None, show_header=False, padding=(0, 1, 0, 4))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    numbered = zip(side.roles, side.ids, side.pieces, strict=True)
    for role, tokens in groupby(numbered, key=lambda token: token[0]):
        line = Text()
        for number, (_, token, piece) in enumerate(tokens):
            if number:
                line.append(BETWEEN, style="dim")
            line.append(visible(piece), style=STYLES[role])
            if with_ids:
                line.append(f" {token}", style="dim italic")
        grid.add_row(Text(ROLES[role], style=STYLES[role].replace(" strike", "")), line)
    return grid
