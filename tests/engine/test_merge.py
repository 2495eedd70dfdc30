"""`prefuse merge`: base and adapters as one model, which computes what the two did and trains on."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from prefuse.engine import cli
from prefuse.engine.model.load import load_model
from tiny_run import PAIRS, save_model, settings, write_rows


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    model, pairs = save_model(folder / "model"), write_rows(folder / "pairs.jsonl", PAIRS)
    words = ["--model_name_or_path", model, "--dataset_name", pairs, "--output_dir", str(folder / "lora")]
    words += ["--use_peft", "--learning_rate", "1e-2", "--max_steps", "3", "--max_length", "64", "--eval_fraction", "0"]
    assert cli.main(["train", *words]) == 0
    return {"model": model, "pairs": pairs, "lora": str(folder / "lora")}


def test_the_merged_model_computes_what_base_and_adapters_did(lora, tmp_path, capsys):
    whole = str(tmp_path / "whole")
    assert cli.main(["merge", "--model_name_or_path", lora["lora"], "--output_dir", whole]) == 0
    assert "with the adapters of" in capsys.readouterr().out
    ids = torch.arange(2, 40)[None]
    config = settings("generate", model_name_or_path="-", dataset_name="-", eval_fraction=1.0)
    with torch.no_grad():
        wanted = load_model(lora["lora"], config, torch.device("cpu")).model(input_ids=ids).logits
        got = AutoModelForCausalLM.from_pretrained(whole)(input_ids=ids).logits
        base = AutoModelForCausalLM.from_pretrained(lora["model"])(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (got - base).abs().max() > 1e-2
    words = ["--model_name_or_path", whole, "--dataset_name", lora["pairs"], "--output_dir", str(tmp_path / "run")]
    assert cli.main(["train", *words, "--max_steps", "1", "--max_length", "64"]) == 0
    half = str(tmp_path / "half")
    assert cli.main(["merge", "--model_name_or_path", lora["lora"], "--output_dir", half, "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(half, dtype="auto").dtype == torch.bfloat16


def test_a_strange_generation_config_beside_adapters_is_one_line(lora, tmp_path, capsys):
    adapters = shutil.copytree(lora["lora"], tmp_path / "lora")
    for strange in ("null", "[1]", "{"):
        (adapters / "generation_config.json").write_text(strange)
        assert cli.main(["merge", "--model_name_or_path", str(adapters), "--output_dir", str(tmp_path / "w")]) == 2
        assert "cannot read generation_config.json of" in capsys.readouterr().err


def test_what_cannot_be_merged_is_one_line(lora, tmp_path, capsys):
    words = ["--model_name_or_path", lora["model"], "--output_dir", str(tmp_path / "whole")]
    assert cli.main(["merge", *words]) == 2
    assert "holds no adapters: expected a folder with adapter_config.json" in capsys.readouterr().err
    assert cli.main(["merge", "--model_name_or_path", lora["lora"], "--output_dir", lora["model"]]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert cli.main(["merge", "--model_name_or_path", lora["lora"]]) == 2
    assert "output_dir is required" in capsys.readouterr().err
    train = ["--model_name_or_path", lora["lora"], "--dataset_name", lora["pairs"], "--output_dir", str(tmp_path / "r")]
    assert cli.main(["train", *train]) == 2
    assert f"prefuse merge --model_name_or_path {lora['lora']}" in capsys.readouterr().err
