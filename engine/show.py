"""`prefuse report`: runs as one HTML page. `prefuse show-tokens`: rows as the tokens that training sees."""

import difflib
import json
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from prefuse.engine.config.tools import ToolParser, flags_of
from prefuse.engine.errors import UserError
from prefuse.engine.report.log import say

if TYPE_CHECKING:
    from prefuse.engine.config.settings import Config
    from prefuse.engine.data.records import Skipped

REPORT = """One HTML page about runs: what they were trained on, did they learn, are they better, what went wrong.

    prefuse report runs/dpo
    prefuse report runs/dpo runs/kto --output_file compared.html
"""
TOKENS = """Rows as the tokens that training sees, each with its part: prompt, learned, not learned.

    prefuse show-tokens --model_name_or_path FOLDER --dataset_name pairs.jsonl
    prefuse show-tokens --config runs/dpo/config.yaml --row 17
    prefuse show-tokens --command sft --config run.yaml --rows 5 --ids

Every setting of the command is taken: `prefuse train --help`. What max_length, the chat template and the rules of the
loss do to a row is done here too.
"""
SHOWN_COMMANDS = ("sft", "train", "reward")


def report_parser() -> ToolParser:
    parser = ToolParser(prog="prefuse report", description=REPORT)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs (output_dir)")
    parser.add_argument("--output_file", type=Path, default=None, help="default: report.html in the first folder")
    return parser


def report(argv: Sequence[str]) -> int:
    from prefuse.engine.report.page.read import MOST_SIDE_BY_SIDE, read_run
    from prefuse.engine.report.page.write import write_page

    given = report_parser().parse_args(argv)
    if len(given.runs) > MOST_SIDE_BY_SIDE:
        raise UserError(f"{len(given.runs)} runs do not fit beside each other: expected at most {MOST_SIDE_BY_SIDE}")
    runs = [read_run(folder) for folder in given.runs]
    page = given.output_file or given.runs[0] / "report.html"
    write_page(page, runs)
    say(f"the report of {', '.join(map(str, given.runs))} is in {page}")
    return 0


# ---------------------------------------------------------------------------------------------------------
# Rows as tokens


def tokens_parser() -> ToolParser:
    parser = ToolParser(prog="prefuse show-tokens", usage="%(prog)s [--SETTING VALUE ...]", description=TOKENS)
    parser.add_argument("--command", choices=SHOWN_COMMANDS, help="whose settings follow (the run's own, else train)")
    parser.add_argument("--rows", type=int, default=3, help="how many rows, from the first on (3)")
    parser.add_argument("--row", help="one row: its number in the file, or its name as messages have it")
    parser.add_argument("--ids", action="store_true", help="show each token's id too")
    return parser


def show_tokens(argv: Sequence[str]) -> int:
    from prefuse.engine.data.pieces import sides_of
    from prefuse.engine.report.tokens import show_sides
    from prefuse.engine.run.setup import loss_of, read_rows

    given, words = tokens_parser().parse_known_args(list(argv))
    if given.rows < 1:
        raise UserError(f"rows must be at least 1, got {given.rows}")
    command = given.command or _command_of_run(words) or "train"
    config = _settings(command, words)
    tokenizer, examples, held, skipped = read_rows(config, loss_of(config, command))
    shown = [(examples, index, "") for index in range(min(given.rows, len(examples)))]
    if given.row is not None:
        shown = [
            (rows, index, said)
            for rows, said in ((examples, ""), (held or (), ", held out"))
            for index in range(len(rows))
            if _is_named(rows.rows[index], given.row)
        ]
        if not shown:
            raise UserError(_why_not(given.row, skipped, len(examples)))
    for rows, index, said in shown:
        show_sides(rows.rows[index] + said, sides_of(rows, index, tokenizer, command), with_ids=given.ids)
    return 0


def _command_of_run(words: Sequence[str]) -> str | None:
    """Of a --config file in the folder of a run: what that run was."""
    for word, value in _flags(words):
        if word == "--config":
            try:
                mark = json.loads((Path(value).parent / "run.json").read_text(encoding="utf-8"))
                return mark["command"] if mark["command"] in SHOWN_COMMANDS else None
            except (OSError, ValueError, KeyError, TypeError):
                return None
    return None


def _flags(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        flag, equals, value = word.partition("=")
        yield flag, value if equals else following


def _settings(command: str, words: Sequence[str]) -> "Config":
    from prefuse.engine.config.flags import given_settings
    from prefuse.engine.config.settings import FIELDS, Config, validate

    own = flags_of(tokens_parser())
    known = [*own, *(f"--{name}" for name in FIELDS)]
    for flag, _ in _flags(words):
        near = difflib.get_close_matches(flag.replace("-", "_").replace("__", "--", 1), known, n=1)
        if flag.startswith("--") and near and near[0] in own:
            raise UserError(f"unknown flag {flag}; did you mean {near[0]}? `prefuse show-tokens --help` lists its own")
    values = {"output_dir": "none", "eval_fraction": 0.0} | given_settings(command, list(words))[0]
    return validate(Config(**values), command)


def _is_named(row: str, wanted: str) -> bool:
    """Whether an example is of the row: of "17" are "pairs.jsonl:17" and "pairs.jsonl:17 (0 over 2)"."""
    from prefuse.engine.data.table import source_row

    place = source_row(row)
    return wanted in (row, place, place.rpartition(":")[2])


def _why_not(wanted: str, skipped: Sequence["Skipped"], count: int) -> str:
    for skip in skipped:
        if _is_named(skip.row, wanted):
            return f"{skip.row} is skipped: {skip.reason}"
    return f"no row is named {wanted}: there are {count} examples and {len(skipped)} skipped rows; --rows 3 shows names"
