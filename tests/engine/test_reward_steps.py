"""`prefuse reward --reward_loss steps`: rows as TRL has them, scores at the ends of steps, a model that others read."""

import dataclasses

import pytest
import torch
from peft import AutoPeftModelForTokenClassification
from transformers import AutoModelForTokenClassification, AutoTokenizer

from prefuse.engine.cli import main
from prefuse.engine.data.batches import IGNORE_INDEX, collate
from prefuse.engine.data.records import DataError
from prefuse.engine.data.steps import load_steps
from prefuse.engine.errors import UserError
from prefuse.engine.model.load import load_tokenizer
from prefuse.engine.model.reward_model import load_step_model, loader_of
from prefuse.engine.train import train
from tiny_run import read_log, save_model, settings, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
ROWS = [
    {"prompt": f"what is {noun}?", "completions": [f"it is {noun}", "no", "it is blue"][: 1 + i % 3],
     "labels": [True, False, True][: 1 + i % 3]}
    for i, noun in enumerate(["the sky", "the sea", "grass", "a house", "the sun", "ice"] * 2)
]  # fmt: skip
BAD = [
    {"prompt": "what?", "completions": ["a", "b"], "labels": [True]},
    {"prompt": "what?", "completions": [], "labels": []},
    {"prompt": "what?", "completions": ["a"], "labels": [1.5]},
    {"prompt": [], "completions": ["a"], "labels": [True]},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "steps.jsonl", ROWS)


def config_of(model, rows="d", out="o", **changes):
    base = {"model_name_or_path": str(model), "dataset_name": rows, "output_dir": str(out), "reward_loss": "steps"}
    return settings("reward", **base | {"eval_fraction": 0.3, "num_train_epochs": 6.0} | changes)


def test_a_column_of_text_that_nothing_reads_stops_the_run(model, tmp_path, capsys):
    path = write_rows(tmp_path / "rows.jsonl", [row | {"system": "Be brief.", "id": "a1"} for row in ROWS])
    with pytest.raises(DataError, match=r'"system" holds text, .* Fix: put it into prompt; or --columns unused=system'):
        load_steps(path, "train", load_tokenizer(model), config_of(model))
    load_steps(path, "train", load_tokenizer(model), config_of(model, columns="unused=system"))
    assert "columns not used: system, id" in capsys.readouterr().out


def test_a_row_is_its_prompt_and_its_steps_with_a_score_behind_each(model, rows, tmp_path):
    tokenizer = load_tokenizer(model)
    examples, skipped = load_steps(rows, "train", tokenizer, config_of(model))
    assert skipped == []
    assert examples.right.tolist() == [label for row in ROWS for label in row["labels"]]
    for index, row in enumerate(ROWS):
        ((prompt, ids),) = examples.sequences_of(index)
        assert prompt[0] == tokenizer.bos_token_id
        assert tokenizer.decode(prompt[1:]) == row["prompt"]
        assert tokenizer.decode(ids) == "".join(f"{step}\n" for step in row["completions"])
        ends = [i for i, learned in enumerate(examples.learned_of(index).tolist()) if learned]
        assert [tokenizer.decode(ids[: end + 1]).count("\n") for end in ends] == list(range(1, len(row["labels"]) + 1))
        assert all(tokenizer.decode(ids[: end + 1]).endswith("\n") for end in ends)
    some = examples.select([3, 2])
    batch = collate(dataclasses.replace(some, padding_free=True), [0, 1])
    assert batch.step_labels.tolist() == [*ROWS[3]["labels"], *ROWS[2]["labels"]]
    assert batch.num_learned == len(batch.step_labels) == int((batch.targets != IGNORE_INDEX).sum())
    other = dataclasses.replace(some, right=~some.right)
    assert list(other.rows_as_bytes()) != list(some.rows_as_bytes())


def test_bad_rows_are_named_and_counted(model, tmp_path):
    path = write_rows(tmp_path / "bad.jsonl", [*ROWS, *BAD])
    _, skipped = load_steps(path, "train", load_tokenizer(model), config_of(model))
    assert [skip.row for skip in skipped] == [f"bad.jsonl:{n}" for n in range(13, 17)]
    assert "2 booleans or shares of 1, one for each step" in skipped[0].reason
    with pytest.raises(DataError, match="has no column completions"):
        load_steps(write_rows(tmp_path / "p.jsonl", [{"prompt": "a", "labels": [True]}]), "train",
                   load_tokenizer(model), config_of(model))  # fmt: skip
    with pytest.raises(UserError, match="center_rewards_coefficient has no meaning with reward_loss steps"):
        config_of(model, center_rewards_coefficient=0.1)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_run_learns_and_transformers_reads_it(lora, model, rows, tmp_path):
    out = tmp_path / "run"
    train(
        config_of(model, rows, out, use_peft=lora, **({"lora_r": 4} if lora else {}), num_train_epochs=25.0), "reward"
    )
    log = read_log(out)
    steps = [
        row for row in log if "loss" in row
    ]  # of the rows that are learned: those held out are four, too few to say
    assert steps[0]["loss"] > 0.5
    assert steps[-1]["loss"] < 0.05
    assert steps[-1]["accuracy"] == 1.0
    assert loader_of(out) is load_step_model
    assert "ForTokenClassification.from_pretrained('run', num_labels=2)" in (out / "README.md").read_text()
    assert not (out / "held_out_scores.jsonl").exists()  # steps have no pair to show
    tokenizer = AutoTokenizer.from_pretrained(out)
    read = AutoPeftModelForTokenClassification if lora else AutoModelForTokenClassification
    own = read.from_pretrained(out, num_labels=2).eval()
    ids = tokenizer(["what is the sky?it is the sky\nno\n"], return_tensors="pt")
    with torch.no_grad():
        logits = own(**ids).logits[0]
        ours = load_step_model(str(out), config_of(out), torch.device("cpu")).model(**ids).logits[0]
    torch.testing.assert_close(ours, logits, rtol=0, atol=0)
    if lora:
        words = ["merge", "--model_name_or_path", str(out), "--output_dir", str(tmp_path / "whole")]
        assert main(words) == 0
        merged = AutoModelForTokenClassification.from_pretrained(tmp_path / "whole").eval()
        torch.testing.assert_close(merged(**ids).logits[0], logits, rtol=1e-5, atol=1e-5)
