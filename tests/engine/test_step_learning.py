"""Process rewards from end to end on the sorting task: rollouts find the first wrong step, and a model learns to."""

import json
import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from prefuse.engine import cli
from prefuse.engine.score.steps import load_step_classifier
from tiny_run import write_rows

LETTERS = "abcdefgh"
BETWEEN = " ; "
RULE = """
def ascending(prompts, completions, **kwargs):
    letters = [sorted(prompt.removeprefix("sort ").removesuffix(" =>").split()) for prompt in prompts]
    return [float(c.replace(";", " ").split() == own) for c, own in zip(completions, letters)]
"""


def problems(count, rng):
    for _ in range(count):
        letters = rng.sample(LETTERS, 4)
        yield f"sort {' '.join(letters)} =>", sorted(letters)


def with_one_mistake(steps, rng):
    """A letter that does not belong at its place, and where."""
    place = rng.randrange(len(steps))
    wrong = rng.choice([letter for letter in LETTERS if letter != steps[place]])
    return [*steps[:place], wrong, *steps[place + 1 :]], place


def solutions(count, rng):
    rows = []
    for i, (prompt, steps) in enumerate(problems(count, rng)):
        said, place = (steps, len(steps)) if i % 3 == 0 else with_one_mistake(steps, rng)
        rows.append({"prompt": prompt, "completions": said, "first_wrong": place})
    return rows


def run(*words):
    assert cli.main([str(word) for word in words]) == 0


@pytest.mark.slow
def test_rollouts_find_the_first_wrong_step_and_a_model_learns_to(tmp_path):
    rng = random.Random(1)
    words = ["<end>", "sort", "=>", ";", *LETTERS]
    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>", pad_token="<end>")
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(words), bos_token_id=None, eos_token_id=0, pad_token_id=0, **shape)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    shown = [{"prompt": p, "completion": BETWEEN.join(steps)} for p, steps in problems(1500, rng)]
    labelled, held = solutions(1500, rng), solutions(90, rng)
    (tmp_path / "rule.py").write_text(RULE)
    common = ["--device", "cpu", "--per_device_train_batch_size", 32, "--save_steps", 0]
    run("sft", "--model_name_or_path", tmp_path / "base", "--dataset_name",
        write_rows(tmp_path / "shown.jsonl", shown), "--output_dir", tmp_path / "sft", "--num_train_epochs", 6,
        "--learning_rate", 3e-3, "--eval_fraction", 0, *common)  # fmt: skip
    run("label", "--label_form", "steps", "--model_name_or_path", tmp_path / "sft", "--dataset_name",
        write_rows(tmp_path / "solutions.jsonl", labelled), "--scorer", f"{tmp_path / 'rule.py'}:ascending",
        "--num_generations", 3, "--max_new_tokens", 8, "--step_separator", BETWEEN, "--device", "cpu",
        "--per_device_eval_batch_size", 256, "--output_file", tmp_path / "steps.jsonl")  # fmt: skip
    made = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert len(made) == len(labelled)
    truth = [[i < row["first_wrong"] for i in range(4)] for row in labelled]
    right = [a == b for row, own in zip(made, truth, strict=True) for a, b in zip(row["labels"], own, strict=True)]
    assert sum(right) / len(right) > 0.97
    run("reward", "--reward_loss", "steps", "--model_name_or_path", tmp_path / "sft", "--dataset_name",
        tmp_path / "steps.jsonl", "--output_dir", tmp_path / "prm", "--num_train_epochs", 10, "--learning_rate", 2e-3,
        "--step_separator", BETWEEN, "--eval_fraction", 0, *common)  # fmt: skip
    scorer = load_step_classifier(str(tmp_path / "prm"), torch.device("cpu"), "min", None, 32, None)
    assert scorer.separator == BETWEEN  # as it was trained
    scores = scorer.score([row["prompt"] for row in held], [[BETWEEN.join(row["completions"])] for row in held])
    good = torch.tensor([row["first_wrong"] == 4 for row in held])
    values = scores.values[:, 0]
    pairs = values[good][:, None] > values[~good]
    assert pairs.double().mean() > 0.8
    found = scorer.steps([row["prompt"] for row in held], [BETWEEN.join(row["completions"]) for row in held])
    first = [next((i for i, p in enumerate(own) if p < 0.5), 4) for own in found]
    assert sum(a == row["first_wrong"] for a, row in zip(first, held, strict=True)) / len(held) > 0.6
