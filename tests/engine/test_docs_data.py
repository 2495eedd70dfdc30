"""docs/data.md: every row of its table is read, and said, as it stands there; its commands have the flags shown."""

import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

from prefuse.engine import curate
from prefuse.engine.cli import parse
from prefuse.engine.config.rows import RowSettings
from rows import read

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
TABLE = re.findall(r"^\| (pair|labelled|sft) \| `(.*)` \| (.*) \|$", PAGE, re.MULTILINE)
SHELL = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [shlex.split(line) for block in SHELL for line in block.strip().splitlines()]


@pytest.mark.parametrize(("kind", "row", "line"), TABLE)
def test_rows_are_read_as_the_page_says(tmp_path, kind, row, line):
    records, reading, skipped = read(tmp_path, [json.loads(row)], kind)
    assert reading.form.roles == line
    assert records
    assert not skipped
    texts = "|".join(map(str, records[0]))
    assert "Q" in texts or line == "text"
    assert texts.index("A") < texts.index("B") if kind == "pair" else "A" in texts


def test_the_table_is_there():
    assert len(TABLE) > 20


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_commands_have_the_flags_shown(words):
    if words[1] == "data":
        curate.parser().parse_args(words[2:])
    else:
        parse(words[1:])


def test_every_setting_of_rows_is_named():
    for field in dataclasses.fields(RowSettings):
        assert field.name in PAGE, field.name
