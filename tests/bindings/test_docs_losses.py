"""What docs/losses.md, liger.md and rewards.md show runs as it stands, and their tables say what the code does."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prefuse
from prefuse import liger
from prefuse.losses.names import LOSSES

DOCS = Path(__file__).resolve().parents[2] / "docs"
NAMES = "losses.md", "liger.md", "policy_losses.md", "rewards.md"
PAGES = {name: (DOCS / name).read_text(encoding="utf-8") for name in NAMES}
SNIPPETS = [
    (name, text) for name, page in PAGES.items() for text in re.findall(r"^```python\n(.*?)^```$", page, re.S | re.M)
]


@pytest.mark.parametrize(("page", "text"), SNIPPETS, ids=range(len(SNIPPETS)))
def test_a_snippet_runs(page, text, tmp_path, monkeypatch):
    if "patch()" not in text:
        monkeypatch.chdir(tmp_path)
        exec(compile(text, page, "exec"), {"__name__": "__main__"})
        return
    pytest.importorskip("liger_kernel")  # in a process of its own: what it patches stays patched
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", text], capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert run.returncode == 0, f"{page}\n{text}\n{run.stdout}\n{run.stderr}"


def test_every_loss_and_every_name_of_it_is_in_the_table():
    page = PAGES["losses.md"]
    rows = re.findall(r"^\| `(\w+)\((.*?)\)` \| (.*?) \|", page, re.M)
    assert {cls for cls, _, _ in rows} == {cls.__name__ for cls, _ in LOSSES.values()}
    for name, arguments, names in rows:
        cls = getattr(prefuse, name)
        written = cls(**eval(f"dict({arguments})"))
        defaults = cls() if name != "APO" else dataclasses.replace(cls(), anchor=written.anchor)
        assert written == defaults, f"{name}({arguments}) are not its defaults"
        for loss_type in re.findall(r"`(\w+)`", names):
            assert LOSSES[loss_type][0] is cls
    assert set(re.findall(r"`(\w+)`", " ".join(names for *_, names in rows))) == set(LOSSES)


def test_what_stands_in_liger_is_named():
    for name in liger.__all__:
        short = name.replace("LigerFusedLinear", "...").replace("liger_fused_linear", "...")
        assert name in PAGES["liger.md"] or short in PAGES["liger.md"] or name == "CrossEntropyOutput"


def test_linked_files_exist():
    for page in PAGES.values():
        for link in re.findall(r"\]\(([^)#\s]+)", page):
            assert "://" in link or (DOCS / link).exists(), link
