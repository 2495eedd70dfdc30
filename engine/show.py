"""`prefuse report`: runs as one HTML page. `prefuse show-tokens`: rows as the tokens that training sees.

prefuse report runs/dpo
prefuse report runs/dpo runs/kto --output_file compared.html
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from prefuse.engine.errors import UserError
from prefuse.engine.report.log import say


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `prefuse report --help` shows two examples")


def report(argv: Sequence[str]) -> int:
    from prefuse.engine.report.page.read import read_run
    from prefuse.engine.report.page.write import MOST_SIDE_BY_SIDE, write_page

    parser = _Parser(prog="prefuse report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs (output_dir)")
    parser.add_argument("--output_file", type=Path, default=None, help="default: report.html in the first folder")
    given = parser.parse_args(argv)
    if len(given.runs) > MOST_SIDE_BY_SIDE:
        raise UserError(f"{len(given.runs)} runs do not fit beside each other: expected at most {MOST_SIDE_BY_SIDE}")
    runs = [read_run(folder) for folder in given.runs]
    page = given.output_file or given.runs[0] / "report.html"
    write_page(page, runs)
    say(f"the report of {', '.join(map(str, given.runs))} is in {page}")
    return 0
