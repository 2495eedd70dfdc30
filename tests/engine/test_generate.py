"""`prefuse generate`: the settings alone shape the text, and what the model cannot take is refused in one line."""

import json
import shutil

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from prefuse.engine import cli
from tiny_run import PAIRS, save_model, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {"model": save_model(folder / "model"), "pairs": write_rows(folder / "pairs.jsonl", PAIRS)}


def answers(model, pairs, out, *options):
    words = ["generate", "--model_name_or_path", model, "--dataset_name", pairs, "--output_file", str(out)]
    assert cli.main([*words, "--max_new_tokens", "12", "--num_prompts", "4", *options]) == 0
    return [json.loads(line)["model"] for line in out.read_text().splitlines()]


@pytest.mark.parametrize("options", [[], ["--temperature", "0.7"]])
def test_the_folders_generation_config_does_not_shape_the_text(options, files, tmp_path, capsys):
    plain = answers(files["model"], files["pairs"], tmp_path / "plain.jsonl", *options)
    model = AutoModelForCausalLM.from_pretrained(files["model"])
    model.generation_config.update(
        repetition_penalty=5.0, no_repeat_ngram_size=2, suppress_tokens=[5, 6, 7, 8], min_new_tokens=12, top_k=1,
        do_sample=True, num_beams=2, forced_eos_token_id=9, max_length=7, temperature=3.0,
    )  # fmt: skip
    shaped = tmp_path / "shaped"
    save_model(shaped, model=model)
    # The settings are in force where nobody replaces them, so that this test can fail.
    ids = torch.tensor([[5, 6, 7]])
    own = AutoModelForCausalLM.from_pretrained(shaped)
    assert own.generation_config.repetition_penalty == 5.0
    plainly = transformers.GenerationConfig(do_sample=False, max_new_tokens=12)
    first = AutoModelForCausalLM.from_pretrained(files["model"])
    first.generation_config = plainly
    assert not torch.equal(own.generate(ids, max_new_tokens=12), first.generate(ids, generation_config=plainly))
    capsys.readouterr()
    assert answers(str(shaped), files["pairs"], tmp_path / "shaped.jsonl", *options) == plain
    shown = capsys.readouterr().out
    assert "not used, though generation_config.json" in shown
    assert "repetition_penalty 5.0" in shown


def test_greedy_text_is_the_most_likely_token_each_time(files, tmp_path):
    (first, *_) = answers(files["model"], files["pairs"], tmp_path / "out.jsonl")
    model = AutoModelForCausalLM.from_pretrained(files["model"])
    from prefuse.engine.data.examples import load_prompts
    from prefuse.engine.model.load import load_tokenizer

    tokenizer = load_tokenizer(files["model"])
    ids = list(load_prompts(files["pairs"], tokenizer, 1024)[0].ids)
    start = len(ids)
    while len(ids) < start + 12 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert first.strip() == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_positions_and_tokens_that_the_model_lacks(files, tmp_path, capsys):
    config = GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    short = save_model(tmp_path / "short", model=GPT2LMHeadModel(config))
    words = ["--model_name_or_path", short, "--dataset_name", files["pairs"]]
    assert cli.main(["generate", *words, "--max_new_tokens", "48"]) == 2
    assert "GPT2LMHeadModel takes at most 48 tokens, and the prompt of" in (error := capsys.readouterr().err)
    assert "lower max_new_tokens" in error
    assert cli.main(["generate", *words, "--max_new_tokens", "2"]) == 0
    long = write_rows(tmp_path / "long.jsonl", [{**PAIRS[0], "chosen": "green " * 60}, *PAIRS])
    train = ["train", "--model_name_or_path", short, "--dataset_name", long, "--eval_fraction", "0", "--max_steps", "1"]
    assert cli.main([*train, "--output_dir", str(tmp_path / "run")]) == 2
    assert "GPT2LMHeadModel takes at most 48 tokens, and long.jsonl:1 has" in capsys.readouterr().err
    small = save_model(tmp_path / "small", vocab_size=50)
    assert cli.main(["generate", "--model_name_or_path", small, "--dataset_name", files["pairs"]]) == 2
    assert "is outside the model's vocabulary of 50" in capsys.readouterr().err


def test_prompts_without_what_the_run_put_into_them_are_said(files, tmp_path, capsys):
    """A system prompt is saved with neither the model nor its tokenizer; in the run's config.yaml it is."""
    folder = tmp_path / "run"
    shutil.copytree(files["model"], folder)
    (folder / "config.yaml").write_text("system_prompt: Be brief.\nchat_template_kwargs: null\n")
    said = "was trained with --system_prompt 'Be brief.'"
    for command in ("generate", "eval"):
        words = [command, "--model_name_or_path", str(folder), "--dataset_name", files["pairs"], "--device", "cpu"]
        words += ["--eval_fraction", "1.0", "--loss_type", "simpo"] if command == "eval" else ["--max_new_tokens", "2"]
        assert cli.main(words) == 0
        shown = capsys.readouterr().out
        assert said in " ".join(shown.split())
        assert "chat_template_kwargs" not in shown
        assert cli.main([*words, "--system_prompt", "Be brief."]) == 0
        assert "was trained with" not in capsys.readouterr().out
