"""`prefuse doctor`: each check says "wrong" where it must, and the command then exits 2."""

import importlib.metadata

import pytest
import torch

from prefuse.engine import doctor
from prefuse.engine.cli import main
from tiny_run import PAIRS, save_model, write_rows


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctor")
    model, rows = save_model(folder / "model"), write_rows(folder / "pairs.jsonl", PAIRS)
    lines = {"model_name_or_path": model, "dataset_name": rows, "output_dir": folder / "run", "use_peft": "true"}
    (folder / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return folder / "run.yaml"


def states(checks):
    return {check.name: check.state for check in checks}


def test_a_machine_that_runs_the_tests_is_well_and_a_run_is_estimated(config, capsys):
    assert main(["doctor", "--config", str(config)]) == 0
    shown = capsys.readouterr().out
    for said in ("torch", "self-test, float32", 'impl="auto"', "weights", "memory", "disk", "tokens an epoch"):
        assert said in shown


def test_a_library_that_is_absent_or_too_old_is_wrong(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.0" if name == "transformers" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = states(doctor.versions())
    assert found["peft"] == found["transformers"] == "wrong"
    assert found["torch"] == "ok"


def test_a_head_with_wrong_numbers_is_wrong_and_the_command_exits_2(monkeypatch, capsys):
    real = doctor._head_numbers

    def numbers(impl, dtype, device):
        logps, gradient = real(impl, dtype, device)
        return logps, gradient * (1.01 if impl == "auto" else 1.0)

    monkeypatch.setattr(doctor, "_head_numbers", numbers)
    assert doctor.self_test(torch.float32).state == "wrong"
    assert main(["doctor"]) == 2


def test_a_table_of_tiles_that_is_not_there_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setenv("PREFUSE_TILES", str(tmp_path / "none.toml"))
    assert states(doctor.kernels())["tiles"] == "wrong"


def test_too_little_memory_or_disk_is_wrong(config, monkeypatch):
    monkeypatch.setattr(doctor, "free_memory", lambda: 1000)
    usage = doctor.shutil.disk_usage("/")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    found = states(doctor.needs_of_run(config, "train"))
    assert found["memory"] == found["disk"] == "wrong"


def test_a_config_that_is_wrong_is_one_line(config, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text("betta: 1\n")
    assert main(["doctor", "--config", str(tmp_path / "bad.yaml")]) == 2
    assert "betta" in capsys.readouterr().err
