"""What a run shows never ends it, and shows nothing but text; what it writes is there before it is shown."""

import json
import os
import subprocess
import sys

import pytest

from prefuse.engine import evaluate, generate
from prefuse.engine.report.log import MetricsLog
from prefuse.engine.report.screen import printable
from prefuse.engine.run.files import json_text
from tiny_run import PAIRS, read_log, save_model, settings, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"model_name_or_path": save_model(folder / "m"), "dataset_name": write_rows(folder / "p.jsonl", PAIRS)}


def command(files, out, **changes):
    flags = {**files, "output_dir": out, "max_length": 64, "device": "cpu", "impl": "torch", "max_steps": 4}
    flags |= {"logging_steps": 1, "eval_fraction": 0.0} | changes
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    return [sys.executable, "-m", "prefuse.engine", "train", *words]


def test_a_closed_stdout_does_not_end_a_run(files, tmp_path):
    out = tmp_path / "run"
    reader, writer = os.pipe()
    run = subprocess.Popen(command(files, out), stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)  # as `head` does
    error = run.communicate(timeout=200)[1]
    assert run.returncode == 0, error
    assert error.count("prefuse: nothing more can be shown on stdout (Broken pipe): work goes on") == 1
    assert "Traceback" not in error
    assert "Exception ignored" not in error
    assert (out / "model.safetensors").exists()
    assert [row["step"] for row in read_log(out)] == [1, 2, 3, 4]


def test_a_refusal_into_a_closed_stderr_still_exits_2(files, tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    run = subprocess.run(
        command(files, tmp_path / "run", model_name_or_path="/none/here"), stdout=writer, stderr=writer, timeout=200,
        check=False,
    )  # fmt: skip
    os.close(writer)
    assert run.returncode == 2


@pytest.mark.slow
def test_what_the_terminal_cannot_show_is_replaced_and_control_characters_never_reach_it(files, tmp_path):
    hostile = [pair | {"prompt": "\x1b]0;title\x07\x1b[2J sky é 漢 " + pair["prompt"]} for pair in PAIRS]
    rows = write_rows(tmp_path / "rows.jsonl", hostile)
    words = ["generate", "--model_name_or_path", files["model_name_or_path"], "--dataset_name", rows]
    words += ["--max_new_tokens", "2", "--num_prompts", "2", "--device", "cpu"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "200", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "prefuse.engine", *words], capture_output=True, env=environment, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"\\x1b]0;title" in done.stdout
    assert b"\x1b" not in done.stdout
    assert b"\x07" not in done.stdout


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", "a\nb\tc"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202egnp", "\\u202egnp"),
        ("\ud800", "\\ud800"),
        ("déjà 漢 🙂", "déjà 漢 🙂"),
    ],
)
def test_printable(text, shown):
    assert printable(text) == shown


def test_results_are_written_before_they_are_shown(files, tmp_path, monkeypatch):
    def gone(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(evaluate, "print_table", gone)
    monkeypatch.setattr(generate, "print_table", gone)
    common = files | {"ref_model_name_or_path": files["model_name_or_path"], "eval_fraction": 1.0}
    with pytest.raises(OSError, match="Input/output error"):
        evaluate.evaluate_command(settings("eval", **common, output_file=str(tmp_path / "e.json")))
    assert "loss" in json.loads((tmp_path / "e.json").read_text())
    with pytest.raises(OSError, match="Input/output error"):
        generate.generate(settings("generate", **common, output_file=str(tmp_path / "g.jsonl"), max_new_tokens=2))
    assert len((tmp_path / "g.jsonl").read_text().splitlines()) == 8


def test_json_has_null_for_what_is_no_number(tmp_path):
    nan, inf = float("nan"), float("inf")
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, 0.5, {"loss": nan, "grad_norm": inf, "fine": 1.5})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    strict = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert strict == {"step": 1, "epoch": 0.5, "loss": None, "grad_norm": None, "fine": 1.5}
    assert json.loads(json_text({"a": [nan, (1, -inf)], "b": {"c": inf}})) == {"a": [None, [1, None]], "b": {"c": None}}
    assert json_text({"x": 0.1 + 0.2}) == '{"x": 0.30000000000000004}'


@pytest.mark.parametrize("content", [b"", b"\xfb{}", b"[1]\n", b"3\n", b"[" * 100_000])
def test_a_metrics_file_that_is_none_costs_no_run(content, tmp_path):
    from prefuse.engine.report.log import read_metrics
    from prefuse.engine.report.plots import plot_curves

    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    assert read_metrics(path) == []
    plot_curves(path, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").exists()
