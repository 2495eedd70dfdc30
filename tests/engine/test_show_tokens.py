"""`prefuse show-tokens`: what is shown of a row is what training takes of it, and nothing of it does more than show."""

import json
import re

import pytest

from prefuse.engine import show
from prefuse.engine.cli import main
from prefuse.engine.report.screen import HIDDEN
from tiny_run import LABELLED, PAIRS, save_model, write_rows

STEPS = [{"prompt": "what is grass?", "completions": ["the sky", "it is green"], "labels": [True, False]}] * 3
TALK = [
    {"messages": [
        {"role": "user", "content": "hello"}, {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "what is grass?"}, {"role": "assistant", "content": "green"},
    ]}
] * 2  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tokens") / "model")


@pytest.fixture
def shown(model, tmp_path, capsys):
    """The lines that a command shows of rows."""

    def show_rows(rows, *words, code=0):
        file = write_rows(tmp_path / "rows.jsonl", rows)
        command = ["--model_name_or_path", model, "--dataset_name", file, "--dataset_cache", "none", "--device", "cpu"]
        assert main(["show-tokens", *words, *command]) == code
        said = capsys.readouterr()
        return said.err if code else said.out

    return show_rows


def test_both_answers_of_a_pair_stand_with_their_parts(shown):
    said = shown(PAIRS, "--row", "2")
    assert "rows.jsonl:2" in said
    assert "rows.jsonl:1\n" not in said
    parts = re.findall(r"^    (prompt|learned: made (?:more|less) likely)", said, re.MULTILINE)
    assert parts == ["prompt", "learned: made more likely", "prompt", "learned: made less likely"]
    text = "".join(said.split()).replace("│", "")
    assert "whatcolouristhesky?" in text.replace("Ġ", "")
    assert "itisgreenandblue" in text


def test_the_first_rows_are_shown_and_ids_are_those_of_training(shown, model):
    from prefuse.engine.data.examples import load_examples
    from prefuse.engine.model.load import load_tokenizer
    from tiny_run import settings

    said = shown(PAIRS, "--rows", "2", "--ids")
    assert said.count("chosen: ") == 2
    tokenizer = load_tokenizer(model, settings(model_name_or_path=model, dataset_name="x", output_dir="y"))
    file = re.search(r"^(\S*rows\.jsonl): ", said, re.MULTILINE)[1]
    (example, *_) = load_examples(file, "pair", tokenizer, 1024, cache="none").examples
    chosen = said[said.index("chosen: ") : said.index("rejected: ")]
    grid = "".join(line.split("learned", 1)[-1] for line in chosen.splitlines()[1:])
    assert [int(number) for number in re.findall(r" (\d+)(?=│|\s|$)", grid)] == [*example.prompt, *example.chosen]


@pytest.mark.parametrize(
    ("command", "rows", "words", "parts"),
    [
        ("train", LABELLED, ["--loss_type", "kto"], {"prompt", "learned: made less likely"}),
        ("sft", TALK, [], {"prompt", "learned", "in the completion, not learned"}),
        ("sft", TALK, ["--sft_turns", "last"], {"prompt", "learned"}),
        ("reward", PAIRS, [], {"prompt", "answer: read by the reward model", "where its score stands"}),
        ("reward", STEPS, ["--reward_loss", "steps"], {"prompt", "answer: read", "where its score stands"}),
    ],
)
def test_parts_of_every_command(command, rows, words, parts, shown):
    said = shown(rows, "--command", command, "--rows", "1", *words)
    found = set(re.findall(r"^    (\S[^\n]*?)(?: {2,}|$)", said, re.MULTILINE))
    assert {part for part in found if not any(part.startswith(wanted) for wanted in parts)} == set()
    assert {wanted for wanted in parts if not any(part.startswith(wanted) for part in found)} == set()


def test_control_characters_and_markup_are_text(shown):
    row = {"prompt": "a\x1b[2J\u202eb", "chosen": "[bold]x[/bold]\x07", "rejected": "[red]y :smile:"}
    said = shown([row])
    assert not HIDDEN.search(said)
    squeezed = "".join(said.split()).replace("│", "")
    for text in ("[bold]x[/bold]", "[red]y", ":smile:", "\\x1b[2J", "\\u202e", "\\x07"):
        assert text in squeezed, text


def test_a_row_that_is_skipped_says_why_and_one_that_is_not_there_what_there_is(shown):
    rows = [*PAIRS, {"prompt": "a", "chosen": "", "rejected": "b"}]
    assert 'rows.jsonl:13 is skipped: "chosen" is empty' in shown(rows, "--row", "13", code=2)
    assert "there are 12 examples and 1 skipped rows" in shown(rows, "--row", "99", code=2)


def test_a_held_out_row_says_so(shown):
    said = shown(PAIRS, "--row", "1", "--eval_fraction", "0.9", "--seed", "1")
    held = shown(PAIRS, "--row", "12", "--eval_fraction", "0.9", "--seed", "1")
    assert ", held out" in said + held


def test_the_settings_of_a_run_say_its_command(shown, tmp_path):
    (tmp_path / "config.yaml").write_text("sft_turns: last\n")
    (tmp_path / "run.json").write_text(json.dumps({"command": "sft"}))
    assert show._command_of_run(["--config", str(tmp_path / "config.yaml")]) == "sft"
    assert show._command_of_run([f"--config={tmp_path / 'config.yaml'}"]) == "sft"
    assert "completion: " in shown(TALK, "--config", str(tmp_path / "config.yaml"))


@pytest.mark.parametrize("words", [["--rows", "0"], ["--rows", "x"], ["--command", "merge"], ["--betta", "1"]])
def test_what_is_wrong_is_one_line(words, shown):
    assert shown(PAIRS, *words, code=2).count("\n") == 1


def test_a_mistyped_flag_of_its_own_is_named(shown):
    assert "did you mean --row" in shown(PAIRS, "--rowz", "1", code=2)
    assert "did you mean beta" in shown(PAIRS, "--betta", "1", code=2)
