"""Adapters over several runs: gone on with as their own reference, their base moved, written in another precision."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefuse.engine.cli import main
from prefuse.engine.errors import UserError
from prefuse.engine.model.load import load_model
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, weights, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def run(command, model, pairs, out, **changes):
    base = {"model_name_or_path": str(model), "dataset_name": pairs, "output_dir": str(out), "use_peft": True}
    config = settings(command, **base | {"max_steps": 2} | changes)
    train(config, command)
    return config


@pytest.fixture(scope="module")
def sft(pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    run("sft", save_model(folder / "base"), pairs, folder / "sft", lora_r=4, lora_alpha=8)
    return folder / "sft"


def test_dpo_goes_on_with_the_adapters_of_sft_and_they_are_its_reference(sft, pairs, tmp_path):
    """The first loss is ln 2 only if the reference is the model with the adapters that the run began with."""
    config = run("train", sft, pairs, tmp_path / "dpo")
    steps = [row for row in read_log(tmp_path / "dpo") if "loss" in row]
    assert abs(steps[0]["loss"] - math.log(2)) <= 1e-6
    assert steps[-1]["loss"] < steps[0]["loss"]
    about, before = (json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "dpo", sft))
    for name in "r", "lora_alpha", "base_model_name_or_path", "target_modules":
        assert sorted(about[name]) == sorted(before[name]) if name == "target_modules" else about[name] == before[name]
    moved = [name for name, value in weights(tmp_path / "dpo").items() if not torch.equal(value, weights(sft)[name])]
    assert len(moved) == len(weights(sft))
    assert config.lora_r == 16  # the adapters' own rank counts


@pytest.mark.slow
def test_a_run_that_goes_on_resumes_bit_by_bit(sft, pairs, tmp_path):
    out = tmp_path / "run"
    config = run("train", sft, pairs, out, max_steps=4, save_steps=2)
    expected = weights(out)
    (out / "checkpoint-4").rename(tmp_path / "gone")
    (out / "run.json").write_text(json.dumps(json.loads((out / "run.json").read_text()) | {"state": "training"}))
    train(type(config)(**{**vars(config), "resume": True}), "train")
    assert all(torch.equal(value, expected[name]) for name, value in weights(out).items())


def test_a_shape_that_is_not_the_adapters_is_refused(sft, pairs, tmp_path):
    with pytest.raises(UserError, match=r"lora_r is 2, but the adapters in .* have 4: drop lora_r"):
        run("train", sft, pairs, tmp_path / "x", lora_r=2)
    with pytest.raises(UserError, match="holds adapters for CAUSAL_LM, and this command takes SEQ_CLS"):
        run("reward", sft, pairs, tmp_path / "y")


def test_a_base_that_has_moved_is_named(sft, pairs, tmp_path):
    adapters, base = tmp_path / "adapters", tmp_path / "elsewhere"
    shutil.copytree(sft, adapters)
    about = json.loads((adapters / "adapter_config.json").read_text())
    shutil.copytree(about["base_model_name_or_path"], base)
    (adapters / "adapter_config.json").write_text(
        json.dumps(about | {"base_model_name_or_path": str(tmp_path / "gone")})
    )
    words = ["merge", "--model_name_or_path", str(adapters), "--output_dir", str(tmp_path / "whole")]
    assert main(words) == 2
    assert main([*words, "--base_model_name_or_path", str(base)]) == 0
    assert (tmp_path / "whole" / "model.safetensors").is_file()


def test_bfloat16_files_are_the_float32_ones_rounded_once(sft, tmp_path):
    for dtype in "float32", "bfloat16":
        words = ["merge", "--model_name_or_path", str(sft), "--output_dir", str(tmp_path / dtype), "--dtype", dtype]
        assert main(words) == 0
    words = ["merge", "--model_name_or_path", str(tmp_path / "float32"), "--dtype", "bfloat16"]
    assert main([*words, "--output_dir", str(tmp_path / "again")]) == 0
    whole = weights(tmp_path / "float32")
    for name in "bfloat16", "again":
        for key, value in weights(tmp_path / name).items():
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, whole[key].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bfloat16").dtype == torch.bfloat16
    assert load_model(str(tmp_path / "again"), settings(model_name_or_path="m", dataset_name="d", output_dir="o"), CPU)
