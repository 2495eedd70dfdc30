"""`prefuse completion`: bash completes commands, flags, values and files, and bash and zsh do at TAB in a terminal."""

import contextlib
import os
import pty
import select
import shutil
import subprocess
import sys

import pytest

from prefuse.engine import cli
from prefuse.engine.config.settings import FIELDS, commands_of

pytest.importorskip("shtab")

# Bash fills COMP_WORDS as TAB would; compopt works within a real TAB alone.
TRY = """
compopt() { :; }
source "$1"
shift
COMP_WORDS=(prefuse "$@")
COMP_CWORD=$#
_shtab_prefuse
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """{shell: file}"""
    from contextlib import redirect_stdout
    from io import StringIO

    folder, files = tmp_path_factory.mktemp("completion"), {}
    for shell in ("bash", "zsh", "fish", "tcsh"):
        with redirect_stdout(StringIO()) as out:
            assert cli.main(["completion", shell]) == 0
        files[shell] = folder / shell
        files[shell].write_text(out.getvalue())
    return files


@pytest.fixture
def complete(scripts):
    def complete(*words):
        command = ["bash", "--norc", "-c", TRY, "bash", str(scripts["bash"]), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    return complete


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["tr"], ["train"]),
        (["show"], ["show-tokens"]),
        (["train", "--learning"], ["--learning_rate"]),
        (["train", "--loss_type", "sigm"], ["sigmoid", "sigmoid_norm"]),
        (["train", "--use_peft", ""], ["true", "false"]),
        (["train", "--beta", "0.1", "--simpo"], ["--simpo_gamma"]),
        (["train", "--help", "opt"], ["optimization"]),
        (["data", "insp"], ["inspect"]),
        (["data", "inspect", "--kind", "pa"], ["pair"]),
        (["show-tokens", "--comm"], ["--command"]),
        (["show-tokens", "--dataset_n"], ["--dataset_name"]),
        (["bench", "hea"], ["head"]),
        (["plot", "los"], ["losses"]),
        (["doctor", "--command", "s"], ["sft"]),
        (["completion", "z"], ["zsh"]),
    ],
)
def test_bash_completes_words(words, found, complete):
    assert complete(*words) == found


@pytest.mark.parametrize(
    "before", [["train", "--dataset_name"], ["data", "inspect"], ["report"], ["train", "--config"]]
)
def test_bash_completes_files(before, complete, tmp_path):
    (tmp_path / "pairs.jsonl").touch()
    assert complete(*before, str(tmp_path / "pa")) == [str(tmp_path / "pairs.jsonl")]


def test_every_command_offers_exactly_its_own_settings(complete):
    for command in cli.COMMANDS:
        own = {name for name in FIELDS if command in commands_of(name)}
        assert set(complete(command, "--")) == {f"--{name}" for name in own} | {"--help", "--config"}, command


def test_every_command_is_offered_and_every_script_names_all(complete, scripts):
    assert set(complete("")) >= {*cli.COMMANDS, *cli.TOOLS}
    for shell, file in scripts.items():
        text = file.read_text()
        assert all(name in text for name in (*cli.COMMANDS, *cli.TOOLS)), shell
    assert "--learning_rate" in scripts["zsh"].read_text()
    subprocess.run(["bash", "-n", str(scripts["bash"])], check=True)


def test_without_its_library_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install shtab" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
@pytest.mark.parametrize(("line", "found"), [("prefuse tra", "train"), ("prefuse train --learning", "--learning_rate")])
def test_fish_completes_words(line, found, scripts):
    command = ["fish", "--no-config", "-c", f'source {scripts["fish"]}; complete -C "{line}"']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split("\t")[0] == found


@contextlib.contextmanager
def terminal_of(shell):
    """A real shell in a terminal: `write` types, `appears` says whether a text comes behind what has appeared."""
    command = {"bash": ["bash", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    terminal, own = pty.openpty()
    environment = os.environ | {"TERM": "dumb", "PS1": "", "HISTFILE": ""}
    process = subprocess.Popen(["setsid", "--ctty", *command], stdin=own, stdout=own, stderr=own, env=environment)
    os.close(own)
    said = ""

    def appears(wanted):
        nonlocal said
        while wanted not in said and select.select([terminal], [], [], 20)[0]:
            said += os.read(terminal, 4096).decode(errors="replace")
        there = wanted in said
        said = said.partition(wanted)[2]
        return there

    try:
        yield lambda text: os.write(terminal, text.encode()), appears
    finally:
        process.kill()
        process.wait()
        os.close(terminal)


@pytest.mark.parametrize(
    ("line", "completed"),
    [("prefuse tra", "prefuse train "), ("prefuse train --loss_type sigmoid_n", "--loss_type sigmoid_norm ")],
)
@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_tab_in_a_terminal(shell, line, completed, scripts, tmp_path):
    if shutil.which(shell) is None or shutil.which("setsid") is None:
        pytest.skip(f"needs {shell} and setsid")
    shutil.copy(scripts["zsh"], tmp_path / "_prefuse")
    setup = {
        "bash": f"source {scripts['bash']}",
        "zsh": f"fpath=({tmp_path} $fpath); autoload -Uz compinit; compinit -u -D",
    }
    with terminal_of(shell) as (write, appears):
        write(f"{setup[shell]}; echo rea''dy\n")
        assert appears("ready\r\n")
        write(f"{line}\t")
        assert appears(completed)


def test_an_unknown_shell_is_one_line(capsys):
    assert cli.main(["completion", "basch"]) == 2
    assert "did you mean bash" in capsys.readouterr().err
    assert cli.main(["completion"]) == 2
    assert "prefuse completion --help" in capsys.readouterr().err
