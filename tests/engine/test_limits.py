"""What a model cannot take, and model folders whose content is wrong: one line that names it, with the fix."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers

from prefuse.engine import cli
from prefuse.engine.model.limits import position_limit
from tiny_run import LABELLED, PAIRS, save_model, write_rows
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    shape = {"vocab_size": len(tiny_tokenizer()), "n_positions": 48, "n_embd": 32, "n_layer": 1, "n_head": 2}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=1))
    long = [*PAIRS, PAIRS[0] | {"prompt": "the sky is blue " * 12}]
    return {
        "model": save_model(folder / "model"),
        "gpt2": save_model(folder / "gpt2", model=gpt2),
        "pairs": write_rows(folder / "pairs.jsonl", PAIRS),
        "labelled": write_rows(folder / "labelled.jsonl", LABELLED),
        "long": write_rows(folder / "long.jsonl", long),
    }


def refused(capsys, command, **flags) -> str:
    assert cli.main([command, *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("prefuse: ")]
    assert len(lines) == 1
    assert "Traceback" not in error
    return lines[0]


@pytest.mark.parametrize("command", ["train", "sft"])
def test_rows_beyond_a_table_of_positions_name_the_limit_and_max_length(command, files, tmp_path, capsys):
    flags = {"model_name_or_path": files["gpt2"], "dataset_name": files["long"], "output_dir": tmp_path / "run"}
    said = refused(capsys, command, **flags, device="cpu", eval_fraction=0)
    assert "GPT2LMHeadModel takes at most 48 tokens, and long.jsonl:13 has " in said
    assert "set max_length to 48" in said
    assert not (tmp_path / "run").exists()
    assert cli.main([command, *words(flags), "--device", "cpu", "--max_length", "48", "--max_steps", "1"]) == 0


def words(flags):
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def test_held_out_rows_are_looked_at_too(files, tmp_path, capsys):
    flags = {"model_name_or_path": files["gpt2"], "dataset_name": files["pairs"], "eval_dataset": files["long"]}
    said = refused(capsys, "train", **flags, output_dir=tmp_path / "run", device="cpu", max_length=128)
    assert "takes at most 48 tokens, and long.jsonl:13 has " in said


def test_kto_mismatches_must_fit_as_well(files, tmp_path, capsys):
    rows = [row | {"prompt": "the " * 38} if i == 0 else row for i, row in enumerate(LABELLED)]
    rows[1] = rows[1] | {"completion": "the " * 20}
    flags = {"model_name_or_path": files["gpt2"], "dataset_name": write_rows(tmp_path / "rows.jsonl", rows)}
    said = refused(capsys, "train", **flags, output_dir=tmp_path / "run", device="cpu", loss_type="kto")
    assert "takes at most 48 tokens, and kto puts completions after other rows' prompts" in said


def test_generation_beyond_a_table_of_positions(files, capsys):
    flags = {"model_name_or_path": files["gpt2"], "dataset_name": files["pairs"], "device": "cpu"}
    said = refused(capsys, "generate", **flags, max_new_tokens=47)
    assert "with max_new_tokens 47 behind it: lower max_new_tokens" in said


@pytest.mark.parametrize("command", ["train", "generate"])
def test_a_token_the_model_lacks_is_named_by_its_row(command, files, tmp_path, capsys):
    """In held-out rows and in prompts, where training rows have none."""
    tokenizer, small = tiny_tokenizer(), tmp_path / "small"
    plain = [{"prompt": a, "chosen": b, "rejected": a} for a, b in ("xy", "yz", "zx", "yx")]
    used = {token for row in plain for text in row.values() for token in tokenizer(text)["input_ids"]}
    vocabulary = max(used | {tokenizer.eos_token_id}) + 1
    save_model(small, vocab_size=vocabulary)
    data = write_rows(tmp_path / "plain.jsonl", plain)
    odd = write_rows(tmp_path / "odd.jsonl", [*plain[:2], PAIRS[2]])
    flags = {"model_name_or_path": small, "dataset_name": data, "eval_dataset": odd, "device": "cpu"}
    flags |= {"output_dir": tmp_path / "run"} if command == "train" else {"max_new_tokens": 2}
    said = refused(capsys, command, **flags)
    assert f"in odd.jsonl:3 is outside the model's vocabulary of {vocabulary}" in said


def test_only_tables_limit_positions(files):
    gpt2 = transformers.AutoModelForCausalLM.from_pretrained(files["gpt2"])
    llama = transformers.AutoModelForCausalLM.from_pretrained(files["model"])
    shape = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "ffn_dim": 16, "num_attention_heads": 2}
    opt = transformers.OPTForCausalLM(
        transformers.OPTConfig(**shape, max_position_embeddings=20, word_embed_proj_dim=16)
    )
    assert (position_limit(gpt2), position_limit(llama), position_limit(opt)) == (48, None, 20)


def change(name, text):
    return lambda folder: (folder / name).write_text(text)


def set_config(**values):
    def damage(folder: Path) -> None:
        about = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(about | values))

    return damage


def as_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self):
            return print, ("run",)

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


WRONG = {
    "config of text": set_config(hidden_size="x"),
    "config of a list": set_config(num_hidden_layers=[1]),
    "config of null": set_config(num_attention_heads=None),
    "no heads": set_config(num_attention_heads=0),
    "negative": set_config(intermediate_size=-1),
    "unknown model": set_config(model_type="nothing"),
    "no model": set_config(model_type=3),
    "another activation": set_config(hidden_act="nothing"),
    "a list": change("config.json", "[]"),
    "half": change("config.json", '{"model_type"'),
    "deep": change("config.json", "[" * 100_000),
    "weights of text": change("model.safetensors", "hello"),
    "tokenizer of text": change("tokenizer.json", "hello"),
    "tokenizer of a number": change("tokenizer.json", "3"),
    "tokenizer empty": change("tokenizer.json", "{}"),
    "tokenizer settings": change("tokenizer_config.json", '{"tokenizer_class": 3}'),
    "generation settings": change("generation_config.json", '{"max_length": "x"'),
    "pickle": as_pickle,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_model_folder_whose_content_is_wrong_is_one_line(wrong, files, tmp_path, capsys):
    folder = Path(save_model(tmp_path / "model"))
    WRONG[wrong](folder)
    flags = {"model_name_or_path": folder, "dataset_name": files["pairs"], "output_dir": tmp_path / "run"}
    code = cli.main(["train", *words(flags), "--device", "cpu", "--max_steps", "1"])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if wrong != "generation settings":  # which nothing here reads
        assert code == 2
        assert str(folder) in error or "config.json" in error
        assert not (tmp_path / "run").exists()
