"""`prefuse doctor`: each check says "wrong" where it must, and the command then exits 2."""

import dataclasses
import importlib.metadata

import pytest
import torch

from prefuse.engine import doctor
from prefuse.engine.cli import main
from prefuse.engine.config.flags import given_settings
from prefuse.engine.config.settings import Config, validate
from prefuse.engine.model.size import activations_per_token
from prefuse.engine.run.needs import estimate_needs
from tiny_run import PAIRS, save_model, settings, write_rows


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


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_estimated_within_a_factor_of_two(checkpointing):
    """Against the tensors that autograd keeps for the backward of a Llama's layers, each storage once."""
    from transformers import LlamaConfig, LlamaModel

    about = LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=256, num_hidden_layers=12, num_attention_heads=6,
        num_key_value_heads=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model, tokens = LlamaModel(about).train(), 160
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), x)  # alive, so that no storage takes the place of another
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(inputs_embeds=torch.randn(1, tokens, 96, requires_grad=True)).last_hidden_state.sum()
    measured = sum(size for place, (size, _) in kept.items() if place not in weights)
    config = settings(
        model_name_or_path="m", dataset_name="d", output_dir="o", gradient_checkpointing=checkpointing,
    )  # fmt: skip
    estimate = tokens * activations_per_token(config, about)
    if checkpointing:  # the forward keeps no layer; the backward computes one after the other again
        estimate -= tokens * 4 * (10 * 96 + 4 * 256)
    assert 0.5 < estimate / measured < 2, (estimate, measured)


def test_a_model_that_needs_more_by_its_rows_than_by_its_weights_says_so(config, tmp_path):
    """Long rows in large batches: activations are counted against what is free."""
    folder = config.parent
    rows = write_rows(tmp_path / "long.jsonl", [dict(pair, chosen=pair["chosen"] * 40) for pair in PAIRS])
    lines = {"model_name_or_path": folder / "model", "dataset_name": rows, "output_dir": tmp_path / "run"}
    lines["eval_fraction"] = 0.0
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    whole = validate(Config(**given_settings("train", ["--config", str(tmp_path / "run.yaml")])[0]), "train")
    small = dataclasses.replace(whole, per_device_train_batch_size=1)
    large = dataclasses.replace(whole, per_device_train_batch_size=12)
    one, all_of_them = (estimate_needs(c, "train", []).activations for c in (small, large))
    assert 6 * one < all_of_them <= 12 * one  # one: the longest row
