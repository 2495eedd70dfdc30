"""Outputs that docs show are what the commands print: `show-tokens` in docs/cli.md, `data inspect` in docs/data.md."""

import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prefuse.engine.cli import main
from tiny_run import save_model, write_rows

DOCS = Path(__file__).resolve().parents[2] / "docs"


def shown_in(page, start):
    """The block of a page whose first line begins with `start`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    (block,) = [
        x for _, x in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE) if x.startswith(start)
    ]
    return block.splitlines()


def letters_tokenizer():
    """One token a word, as in the demo."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", "sort", "=>", *"bcfgkmz"])}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")


def test_the_row_of_show_tokens(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_model(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    letters_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(
        tmp_path / "pairs.jsonl",
        [{"prompt": "sort g f z b k m c =>", "chosen": "b c f g k m z", "rejected": "z m k g f c b"}],
    )
    words = ["--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--dataset_cache", "none"]
    assert main(["show-tokens", *words, "--device", "cpu"]) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = shown_in("cli.md", "pairs.jsonl:1")
    assert printed[printed.index(shown[0]) :][: len(shown)] == shown


def rows_as_shown():
    """300 rows, of which 5 equal another and 131 have the longer answer chosen."""
    rows = [
        {"id": i, "system": "Be brief.", "question": f"question {i}", "chosen": "a" * (9 if i < 126 else 3),
         "rejected": "b" * 6}
        for i in range(295)
    ]  # fmt: skip
    return rows + [row | {"id": 295 + i} for i, row in enumerate(rows[:5])]


@pytest.mark.parametrize("ending", [[], ["--html", "rows.html"]])
def test_the_counts_of_data_inspect(ending, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", rows_as_shown())
    assert main(["data", "inspect", "rows.jsonl", *ending]) == 0
    printed = capsys.readouterr()
    lines = [line.rstrip() for line in (printed.out + printed.err).splitlines()]
    shown = shown_in("data.md", "rows.jsonl: 300 rows")
    assert shown.pop() == "..."
    for line in shown:
        assert line in lines
