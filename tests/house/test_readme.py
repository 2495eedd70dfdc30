"""What README.md shows works as it stands: Python runs, commands exist with the flags that are shown."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prefuse.engine.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# ```python ... ``` -> [("python", text)]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, text in BLOCKS
    if language in ("bash", "sh", "shell", "console")
    for line in re.sub(r"\\\n\s*", "", text).splitlines()
]


def commands_of(program):
    """The shown command lines of one program, split into words, prompt and comment dropped."""
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in COMMANDS]
    return [line for line in words if line[:1] == [program]]


def linked_files():
    links = re.findall(r"\]\(([^)#\s]+)", README) + re.findall(r'(?:src|href)="([^"#]+)"', README)
    return sorted({link for link in links if "://" not in link})


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_snippet_runs(number, tmp_path):
    """Each alone, in a process and folder of its own, as a reader would paste it."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PYTHON[number]],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert run.returncode == 0, f"{PYTHON[number]}\n{run.stdout}\n{run.stderr}"


def test_shown_prefuse_commands_exist_with_their_flags(capsys):
    shown = commands_of("prefuse")
    assert shown
    for _, *words in shown:
        subcommand = [word for word in words[:1] if not word.startswith("-")]
        try:
            code = main([*subcommand, "--help"])
        except SystemExit as end:  # of argparse, which the tools with verbs of their own use
            code = end.code
        output = capsys.readouterr()
        assert code == 0, f"{words}\n{output.out}\n{output.err}"
        known = {flag.replace("-", "_") for flag in re.findall(r"--[\w-]+", output.out)}
        flags = {word.split("=")[0].replace("-", "_") for word in words if word.startswith("--")}
        assert flags <= known, f"prefuse {' '.join(words)}: unknown {flags - known}"


def test_shown_make_targets_exist():
    targets = {target for _, *words in commands_of("make") for target in words if "=" not in target}
    assert {"demo", "test"} <= targets
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


def test_linked_files_exist():
    missing = [link for link in linked_files() if not (ROOT / link).exists()]
    assert not missing
