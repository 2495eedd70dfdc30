"""The GPU suite's course, dry on a CPU: its sections come in their order and keep their times, and a run that is killed
leaves whole files."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefuse.bench.record import read_result

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
ORDER = ["environment", "real size", "first times", "tiles", "checks", "sanitizer", "tail", "times"]


def start(folder, minutes):
    command = [sys.executable, str(ROOT / "bench" / "checkout.py"), "gpu", "--dry-run", "--minutes", str(minutes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, "--out", str(folder)], env=environment, stdout=subprocess.PIPE, text=True)


def read(folder):
    (path,) = folder.glob("dry-run-*.json")
    record = read_result(path)  # held against the schema
    return {"environment": record.environment, **record.details}


def test_sections_keep_their_order_and_their_time(tmp_path):
    minutes = 0.5
    run = start(tmp_path, minutes)
    said, _ = run.communicate(timeout=240)
    assert run.returncode == 0, said
    result = read(tmp_path)
    assert [row["section"] for row in result["sections"]] == ORDER
    assert all("error" not in row for row in result["sections"])
    ends = [row["until_s"] for row in result["sections"]]
    assert ends == sorted(ends)
    assert ends[-1] == 60 * minutes
    parts = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
    wanted = [30, 120, 180, 120, 42, 12, 12, 24]  # seconds of nine minutes
    assert [round(part * 9 / minutes) for part in parts] == wanted
    for row in result["sections"]:
        # One piece of work may begin just before the end.
        assert row["ended_s"] <= max(row["until_s"], row["began_s"]) + 20
    checks = [row["check"] for row in result["checks"]]
    assert "the head of Llama-3.2-1B, trainable" in checks[0]
    outcomes = {row["outcome"] for row in result["checks"]}
    assert "passed" in outcomes
    assert "FAILED" not in outcomes
    first = result["timings"][0]
    assert (first["model"], first["mode"]) == ("Llama-3-8B", "trainable")
    made = [row for row in result["timings"] if row["variant"].startswith("prefuse")]
    assert made
    assert all("error" not in row for row in made)


def test_a_run_that_is_killed_leaves_whole_files(tmp_path):
    run = start(tmp_path, 5)
    end = time.monotonic() + 120
    try:
        while time.monotonic() < end:
            found = list(tmp_path.glob("dry-run-*.json"))
            if found and len(read(tmp_path)["checks"]) >= 2:
                break
            time.sleep(0.05)
    finally:
        run.send_signal(signal.SIGKILL)
        run.communicate()
    result = read(tmp_path)
    assert len(result["checks"]) >= 2
    assert result["sections"][0]["section"] == "environment"
    (page,) = tmp_path.glob("dry-run-*.md")
    assert page.read_text().endswith("\n")
    assert "section real size" in page.read_text()
