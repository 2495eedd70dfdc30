"""`prefuse plot`: pictures of losses, and of a run from its metrics.

prefuse plot losses dpo ipo kto --beta 0.05 0.1 --image losses.png
prefuse plot run runs/dpo --image curves.png
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from prefuse.engine.config.tools import ToolParser
from prefuse.engine.errors import UserError
from prefuse.engine.report.log import say


def parser() -> ToolParser:
    parser = ToolParser(prog="prefuse plot", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    losses = verbs.add_parser("losses", help="value and slope of losses over the log-ratio")
    losses.add_argument("losses", nargs="+", help="names as in loss_type")
    losses.add_argument("--beta", nargs="+", type=float, default=[0.05, 0.1, 0.5])
    losses.add_argument("--image", type=Path, default=Path("losses.png"))
    run = verbs.add_parser("run", help="the curves of a run, from its metrics.jsonl")
    run.add_argument("folder", type=Path)
    run.add_argument("--image", type=Path, default=None, help="default: curves.png in the folder")
    return parser


def main(argv: Sequence[str]) -> int:
    given = parser().parse_args(argv)
    (plot_losses if given.verb == "losses" else plot_run)(given)
    return 0


def plot_losses(given: argparse.Namespace) -> None:
    from prefuse.engine.report.loss_curves import draw_losses

    try:
        draw_losses(given.image, given.losses, given.beta)
    except (ValueError, TypeError) as error:  # a name that is no loss, a beta that it cannot have
        raise UserError(str(error)) from None
    say(f"{', '.join(given.losses)} are in {given.image}")


def plot_run(given: argparse.Namespace) -> None:
    from prefuse.engine.report.plots import plot_curves

    metrics = given.folder / "metrics.jsonl"
    if not metrics.is_file() or not metrics.stat().st_size:
        raise UserError(f"{given.folder} has no metrics: expected metrics.jsonl, as a run writes it")
    image = given.image or given.folder / "curves.png"
    plot_curves(metrics, image)
    say(f"the curves of {given.folder} are in {image}")
