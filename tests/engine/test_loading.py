"""Models from folders and names that others made: nothing of theirs runs unasked, and a fault is one line."""

import json
from pathlib import Path

import huggingface_hub
import pytest
import transformers

from prefuse.engine import cli
from prefuse.engine.model import limits
from tiny_run import PAIRS, save_model, write_rows

CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({marker!r}).touch()
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"model": save_model(folder / "model"), "pairs": write_rows(folder / "pairs.jsonl", PAIRS)}


def generate(model, files, *options):
    words = ["generate", "--model_name_or_path", str(model), "--dataset_name", files["pairs"], "--max_new_tokens", "2"]
    return cli.main([*words, *options])


def changed_config(folder, **changes):
    save_model(folder)
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_code_of_a_model_folder_runs_only_with_the_flag(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "ran"
    folder = changed_config(
        tmp_path / "own",
        model_type="own",
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    assert generate(folder, files) == 2
    assert "then give --trust_remote_code true to run it" in capsys.readouterr().err
    assert not marker.exists()
    assert generate(folder, files, "--trust_remote_code", "true") == 0
    assert marker.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/modle", "does not exist; did you mean {folder}/model?"),
        ("runs/dpo/last", "model folder runs/dpo/last does not exist"),
        ("./none", "model folder ./none does not exist"),
    ],
)
def test_a_mistyped_folder_is_one_line_and_no_question_to_the_hub(name, message, files, capsys, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_: pytest.fail("the hub was asked"))
    folder = Path(files["model"]).parent
    assert generate(name.format(folder=folder), files) == 2
    error = capsys.readouterr().err
    assert message.format(folder=folder) in error
    assert error.count("\n") == 1


def test_the_hub_is_asked_once_for_a_name_that_it_does_not_have(files, capsys, monkeypatch):
    asked = []

    def get_hf_file_metadata(url):
        asked.append(url)
        raise OSError("Name or service not known\nand more lines")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", get_hf_file_metadata)
    assert generate("someone/no-such-model", files) == 2
    error = capsys.readouterr().err
    assert "someone/no-such-model is no folder here, and no model of the hub that can be read" in error
    assert error.count("\n") == 1
    assert [url.partition("/someone/")[2] for url in asked] == ["no-such-model/resolve/main/config.json"]


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "32"},
        {"num_attention_heads": None},
        {"model_type": 7},
        {"vocab_size": -1},
        {"hidden_act": "no such"},
        {"rope_parameters": [1]},
    ],
)
def test_a_config_json_with_wrong_values_is_one_line(changes, files, tmp_path, capsys):
    folder = changed_config(tmp_path / "model", **changes)
    assert generate(folder, files) == 2
    error = capsys.readouterr().err
    assert "cannot load a causal LM from" in error or "no tokenizer in" in error
    assert "Traceback" not in error


def test_weights_that_are_a_pickle_with_code_are_one_line(files, tmp_path, capsys):
    import pickle

    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    folder = tmp_path / "model"
    save_model(folder)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))
    assert generate(folder, files) == 2
    assert "cannot load a causal LM from" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_learned_positions(files):
    config = transformers.OPTConfig(
        vocab_size=300, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=20,
    )  # fmt: skip
    assert limits.position_limit(transformers.OPTForCausalLM(config)) == 20
    assert limits.position_limit(transformers.AutoModelForCausalLM.from_pretrained(files["model"])) is None


@pytest.mark.parametrize("use_peft", [False, True])
def test_a_model_comes_with_a_card_of_its_own_run(use_peft, files, tmp_path):
    run = tmp_path / "my run"
    words = ["--model_name_or_path", files["model"], "--dataset_name", files["pairs"], "--output_dir", str(run)]
    words += ["--max_steps", "1", "--save_steps", "1", "--beta", "0.25", "--eval_fraction", "0.2", "--max_length", "64"]
    assert cli.main(["train", *words, *(["--use_peft", "--lora_r", "4"] if use_peft else [])]) == 0
    card = (run / "README.md").read_text()
    assert f"base_model: {files['model']}" in card
    assert f"library_name: {'peft' if use_peft else 'transformers'}" in card
    assert "# my run" in card
    assert "| `beta` | 0.25 |" in card
    assert ("| `lora_r` | 4 |" in card) == use_peft
    assert "`loss_type`" not in card  # it is the default
    assert "`eval_loss`" in card
    assert "[More Information Needed]" not in card
    assert not list(run.glob("checkpoint-*/README.md"))
