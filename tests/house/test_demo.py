"""The demo's parts: its rule, its data, and that it says so when nothing was learnt. `make demo` is the whole."""

import importlib.util
import json
import random
import sys
from pathlib import Path

import pytest
import torch

from prefuse.engine.data import load_examples

PATH = Path(__file__).resolve().parents[2] / "examples" / "demo.py"


@pytest.fixture(scope="module")
def demo():
    spec = importlib.util.spec_from_file_location("prefuse_demo", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def small(demo, monkeypatch):
    """The demo with so few rows that it trains for a handful of steps."""
    monkeypatch.setattr(demo, "DEMONSTRATIONS", 80)
    monkeypatch.setattr(demo, "PAIRS", 30)
    monkeypatch.setattr(demo, "HELD_OUT", 20)
    return demo


def read(folder):
    """The rows of every file, by its name."""
    return {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in folder.glob("*.jsonl")}


@pytest.fixture
def data(small, tmp_path):
    small.write_data(tmp_path)
    return read(tmp_path)


@pytest.mark.parametrize(
    ("answer", "order"),
    [
        ("a b d x", "ascending"),
        ("x d b a", "descending"),
        ("a b x d", None),  # not in order
        ("a b d", None),  # a letter short: still ascending
        ("a b d x z", None),  # a letter too many
        ("a b d d x", None),  # a letter twice
        ("a b d y", None),  # another letter
        ("", None),
        ("sort d x a b", None),
    ],
)
def test_an_answer_counts_only_with_exactly_the_letters_of_its_prompt_in_order(demo, answer, order):
    assert demo.order_of("sort d x a b =>", answer) == order


def test_the_rule_agrees_with_the_pairs(demo):
    for pair in demo.make_pairs(200, random.Random(1)):
        assert demo.order_of(pair["prompt"], pair["chosen"]) == "ascending"
        assert demo.order_of(pair["prompt"], pair["rejected"]) == "descending"


def test_no_letters_are_shared_between_files_that_must_not_know_each_other(data):
    letters = {name: [frozenset(row["prompt"].split()) for row in rows] for name, rows in data.items()}
    separate = [*letters["demonstrations"], *letters["pairs"], *letters["held_out"]]
    assert len(separate) == 80 + 30 + 20 == len(set(separate))
    assert set(letters["labelled"]) == set(letters["pairs"])


def test_demonstrations_are_correct_in_either_order_about_equally_often(demo, data):
    orders = [demo.order_of(row["prompt"], row["completion"]) for row in data["demonstrations"]]
    assert set(orders) == {"ascending", "descending"}
    assert 0.3 < orders.count("ascending") / len(orders) < 0.7


def test_labels_follow_the_rule(demo, data):
    for row in data["labelled"]:
        assert demo.order_of(row["prompt"], row["completion"]) == ("ascending" if row["label"] else "descending")


def test_data_depends_on_the_seed_alone(small, data, tmp_path):
    again = tmp_path / "again"
    again.mkdir()
    small.write_data(again)
    assert read(again) == data


@pytest.mark.parametrize(
    ("name", "kind"),
    [("demonstrations", "sft"), ("pairs", "pair"), ("labelled", "labelled"), ("held_out", "pair")],
)
def test_the_engine_reads_every_row_and_the_tokenizer_every_word(demo, data, tmp_path, name, kind):
    tokenizer = demo.make_tokenizer()
    dataset = load_examples(str(tmp_path / f"{name}.jsonl"), kind, tokenizer, max_length=32)
    assert dataset.skipped == []
    shown = [tokenizer.decode(example.prompt) for example in dataset.examples]
    assert shown == [row["prompt"] for row in data[name]]


def test_a_folder_that_the_demo_did_not_make_is_left_alone(demo, tmp_path):
    folder = tmp_path / "runs"
    (demo.fresh(folder) / "old.txt").touch()
    assert [path.name for path in demo.fresh(folder).iterdir()] == [demo.MARKER]

    (folder / demo.MARKER).rename(folder / "thesis.tex")
    with pytest.raises(SystemExit, match="was not made by the demo"):
        demo.fresh(folder)
    assert (folder / "thesis.tex").exists()


def test_claims(demo):
    sft = demo.Result(accuracy=0.0, margin=0.0, kl=0.0, ascending=0.5, correct=0.98, seconds=1.0)
    aligned = demo.Result(accuracy=1.0, margin=5.0, kl=0.1, ascending=0.97, correct=0.98, seconds=1.0)
    assert demo.broken_claims({"sft": sft, "dpo": aligned, "kto": aligned}) == []
    # A model no better than its reference breaks two claims: it neither answers nor rewards as preferred.
    assert len(demo.broken_claims({"sft": sft, "dpo": sft, "kto": aligned})) == 2
    # Where SFT answers as preferred already, nothing is shown.
    assert len(demo.broken_claims({"sft": aligned, "dpo": aligned, "kto": aligned})) == 1


@pytest.mark.slow
def test_a_run_too_short_to_learn_goes_through_every_command_and_then_fails(small, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        assert small.main() == 1
    finally:
        torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    for command in ("sft", "train --loss_type dpo", "train --loss_type kto", "eval", "generate", "reward"):
        assert f"$ prefuse {command} --" in shown
    assert "not so: DPO answers as preferred: over 90% ascend" in shown
    assert "not so: the reward model agrees with the rule in over 90% of both" in shown
    for name in ("sft", "dpo", "kto", "reward"):
        assert (tmp_path / small.FOLDER / name / "curves.png").stat().st_size > 10_000
