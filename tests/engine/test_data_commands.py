"""`prefuse data`: what is counted, what is written, and that nothing is lost uncounted."""

import gzip
import json

import pytest

from prefuse.engine.cli import main
from prefuse.engine.data import guess
from prefuse.engine.data.forms import ReadOptions, read_records
from prefuse.engine.data.records import ColumnMissing, DataError
from prefuse.engine.data.sources import open_source
from prefuse.engine.data.stats import characters, measure_rows
from prefuse.engine.report.data_page import bars, histogram
from rows import write_lines
from tiny_run import save_model

HH = "\n\nHuman: hi\n\nAssistant: Yes?\n\nHuman: Name one\n\nAssistant:"
PAIRS = [
    {"id": i, "prompt": f"q{i % 8}", "chosen": "long answer " * (1 + i % 3), "rejected": "no"}
    | {"score_chosen": i, "score_rejected": 1}
    for i in range(12)
]
LISTS = [
    {"question": "Q", "responses": ["a", "b", "c"], "scores": [1, 3, 2]},
    {"question": "R", "responses": ["a", "b"], "scores": [1, 1]},
]


def run(*words):
    return main(["data", *map(str, words)])


def rows_of(path):
    return [row for _, row in open_source(str(path)).rows()]


def stats_of(tmp_path, rows, kind):
    return measure_rows(read_records(write_lines(tmp_path / "rows.jsonl", rows), kind).outcomes, characters)


def test_duplicates_and_contradictions_of_pairs(tmp_path):
    pair = {"prompt": "Q", "chosen": "A", "rejected": "BB"}
    rows = [pair, pair, pair | {"chosen": "BB", "rejected": "A"}, pair | {"prompt": "R"}, pair | {"chosen": ""}]
    stats = stats_of(tmp_path, rows, "pair")
    assert (stats.records, stats.prompts, stats.duplicates, stats.contradictions) == (4, 2, 1, 3)
    assert stats.longer_chosen == (1, 0, 3)
    assert stats.skipped == {'"chosen" is empty': 1}


def test_balance_and_contradictions_of_labels(tmp_path):
    row = {"prompt": "Q", "completion": "A", "label": True}
    stats = stats_of(tmp_path, [row, row | {"label": False}, row | {"completion": "B"}], "labelled")
    assert (dict(stats.labels), stats.contradictions, stats.duplicates) == ({True: 2, False: 1}, 2, 0)


def test_bars_show_every_value_that_occurs():
    assert histogram([0, 0, 9, 5], 9, bins=10) == [2, 0, 0, 0, 0, 1, 0, 0, 0, 1]
    assert len(bars([0, 10], 10)) == 32
    assert set(bars([0] * 1000 + [10], 10)) == {" ", "▁", "█"}


def test_inspect_says_what_is_there_and_draws_it(tmp_path, capsys):
    source = write_lines(tmp_path / "rows.jsonl", [*PAIRS, PAIRS[0], {"prompt": "x", "chosen": "a", "rejected": ""}])
    assert run("inspect", source, "--picture", tmp_path / "lengths.png") == 0
    said = capsys.readouterr().out
    for words in (
        "14 rows of prompt/chosen/rejected, read as pair",
        "distinct prompts",
        "1 (7.7%)",
        "chosen is longer",
        "characters",
    ):
        assert words in said
    assert '"rejected" is empty' in said
    assert "rows.jsonl:14" in said
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_with_a_tokenizer_counts_tokens_and_what_the_template_refuses(tmp_path, capsys):
    refusal = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = "{% for m in messages %}" + refusal + "{{ m.content }}{% endfor %}"
    model = save_model(tmp_path / "model", chat_template=template)
    good = {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    bad = {"messages": [{"role": "system", "content": "S"}, *good["messages"]]}
    assert run("inspect", write_lines(tmp_path / "rows.jsonl", [good, bad]), "--tokenizer", model) == 0
    said = capsys.readouterr().out
    assert "tokens" in said
    assert "no system" in said
    assert "rows.jsonl:2" in said


def user(text):
    return [{"role": "user", "content": text}]


def assistant(text):
    return [{"role": "assistant", "content": text}]


CONVERTED = {
    "pairs": [
        {"prompt": user("Q"), "chosen": assistant("b"), "rejected": assistant("a")}
        | {"score_chosen": 3.0, "score_rejected": 1.0}
    ],
    "labelled": [
        {"prompt": user("Q"), "completion": assistant("b"), "label": True},
        {"prompt": user("Q"), "completion": assistant("a"), "label": False},
    ],
    "scored": [  # those of a tie too: each has a score of its own
        {"prompt": user("Q"), "completion": assistant("a"), "score": 1.0},
        {"prompt": user("Q"), "completion": assistant("b"), "score": 3.0},
        {"prompt": user("Q"), "completion": assistant("c"), "score": 2.0},
        {"prompt": user("R"), "completion": assistant("a"), "score": 1.0},
        {"prompt": user("R"), "completion": assistant("b"), "score": 1.0},
    ],
    "sft": [{"messages": user("Q") + assistant("b")}],
}


@pytest.mark.parametrize("to", CONVERTED)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet"])
def test_convert(tmp_path, capsys, to, suffix):
    source, out = write_lines(tmp_path / "lists.jsonl", LISTS), tmp_path / f"out{suffix}"
    assert run("convert", source, out, "--to", to) == 0
    assert rows_of(out) == CONVERTED[to]
    said = capsys.readouterr().out
    assert f"{len(CONVERTED[to])} rows written" in said
    assert ("1 not: a tie: all its answers have one score" in said) == (to != "scored")
    if suffix == ".jsonl.gz":
        assert gzip.open(out).read()


def test_convert_makes_turns_of_transcripts(tmp_path):
    source = write_lines(tmp_path / "hh.jsonl", [{"chosen": HH + " A", "rejected": HH + " B"}])
    assert run("convert", source, tmp_path / "out.jsonl", "--to", "pairs", "--as_turns") == 0
    (row,) = rows_of(tmp_path / "out.jsonl")
    assert [(turn["role"], turn["content"]) for turn in row["prompt"]] == [
        ("user", "hi"), ("assistant", "Yes?"), ("user", "Name one"),
    ]  # fmt: skip
    assert (row["chosen"], row["rejected"]) == (assistant("A"), assistant("B"))


def test_convert_reads_scores_without_thresholds_and_labels_with_them(tmp_path):
    source = write_lines(tmp_path / "rated.jsonl", [{"prompt": "Q", "response": "A", "rating": n} for n in (1, 3, 5)])
    assert run("convert", source, tmp_path / "scored.jsonl", "--to", "scored") == 0
    assert [row["score"] for row in rows_of(tmp_path / "scored.jsonl")] == [1.0, 3.0, 5.0]
    assert run("convert", source, tmp_path / "labelled.jsonl", "--to", "labelled", "--good_from", 4, "--bad_to", 2) == 0
    assert [row["label"] for row in rows_of(tmp_path / "labelled.jsonl")] == [False, True]


def test_what_was_converted_reads_back_as_the_same_records(tmp_path):
    source = write_lines(tmp_path / "pairs.jsonl", PAIRS)
    assert run("convert", source, tmp_path / "again.jsonl", "--to", "pairs") == 0
    first, second = (list(read_records(str(path), "pair").outcomes) for path in (source, tmp_path / "again.jsonl"))
    assert [(r.prompt, r.sides, r.scores) for r in first] == [(r.prompt, r.sides, r.scores) for r in second]


TALK = [*user("Q"), *assistant("early"), *user("R")]


def test_demonstrations_of_several_turns_keep_what_is_learned(tmp_path):
    """In "messages" every answer is learned: a pair, whose last answer alone is, becomes prompt and completion."""
    pair = {"prompt": TALK, "chosen": assistant("A"), "rejected": assistant("B")}
    told = {"messages": [*TALK, *assistant("A")]}
    for name, row, expected in (
        ("pair", pair, {"prompt": TALK, "completion": assistant("A")}),
        ("label", told | {"label": True}, {"prompt": TALK, "completion": assistant("A")}),
        ("whole", told, told),
    ):
        source = write_lines(tmp_path / f"{name}.jsonl", [row])
        assert run("convert", source, tmp_path / f"{name}.out.jsonl", "--to", "sft") == 0
        assert rows_of(tmp_path / f"{name}.out.jsonl") == [expected]


def test_keys_of_turns_are_written_as_they_were(tmp_path):
    turns = [*user("Q"), {"role": "assistant", "content": "A", "weight": 1, "thinking": "six sevens"}]
    source = write_lines(tmp_path / "rows.jsonl", [{"messages": turns}])
    assert run("convert", source, tmp_path / "out.jsonl", "--to", "sft") == 0
    assert rows_of(tmp_path / "out.jsonl") == [{"messages": turns}]


def test_filter_and_split_write_rows_of_the_configuration_that_they_read(tmp_path):
    for name in "ab":
        write_lines(tmp_path / f"{name}.jsonl", [row | {"prompt": f"{name} {row['prompt']}"} for row in PAIRS])
    head = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{head}---\n")
    assert run("filter", tmp_path, tmp_path / "out.jsonl", "--dataset_config", "b") == 0
    assert [row["prompt"][0] for row in rows_of(tmp_path / "out.jsonl")] == ["b"] * len(PAIRS)


def test_filter_keeps_rows_as_they_stand_and_counts_the_others(tmp_path, capsys):
    pair = {"prompt": "Q", "chosen": "aaaa", "rejected": "bb", "id": 7, "score_chosen": 5, "score_rejected": 1}
    rows = [
        pair,
        pair,
        pair | {"chosen": "a" * 9, "id": 8},
        pair | {"prompt": "R", "score_rejected": 4.5},
        pair | {"prompt": "S", "chosen": "bb", "rejected": "aaaa"},
        pair | {"prompt": "S"},
        pair | {"prompt": "T" * 50},
        pair | {"prompt": "U", "chosen": ""},
    ]
    source, out = write_lines(tmp_path / "rows.jsonl", rows), tmp_path / "kept.jsonl"
    flags = "--min_score_gap 1 --max_length_ratio 3 --max_prompt_characters 20 --drop_duplicates --drop_contradictions"
    assert run("filter", source, out, *flags.split()) == 0
    assert rows_of(out) == [pair]
    said = capsys.readouterr().out
    for line in (
        "1 rows written", "2 not: another row says the opposite", "1 not: an earlier row equals it",
        "1 not: one answer is more than 3 times as long", "1 not: the scores differ by less than 1",
        "1 not: its prompt has more than 20 characters", '1 not: "chosen" is empty',
    ):  # fmt: skip
        assert line in said
    assert sum(int(line.split()[0]) for line in said.splitlines() if " not: " in line) + 1 == len(rows)


def test_split_keeps_the_rows_of_a_prompt_together(tmp_path, capsys):
    source = write_lines(tmp_path / "rows.jsonl", PAIRS)
    assert run("split", source, tmp_path / "parts", "--eval_fraction", 0.25) == 0
    train, test = (rows_of(tmp_path / "parts" / f"{name}.jsonl") for name in ("train", "test"))
    assert sorted(row["id"] for row in train + test) == list(range(12))
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert len({row["prompt"] for row in test}) == 2
    assert [row["id"] for _, row in open_source(str(tmp_path / "parts"), "test").rows()] == [row["id"] for row in test]
    assert "no prompt in both" in capsys.readouterr().out


MISTAKES = {
    "a file that exists": (("convert", "{rows}", "{rows}", "--to", "pairs"), "exists: give another name"),
    "a name of no known kind": (("convert", "{rows}", "{dir}/a.txt", "--to", "pairs"), "ends in .jsonl, .jsonl.gz"),
    "no folder": (("filter", "{rows}", "{dir}/b/a.jsonl"), "in a folder that does not exist"),
    "no source": (("inspect",), "data inspect: the following arguments are required: source"),
    "no verb": ((), "data: the following arguments are required: VERB"),
    "an unknown flag": (("inspect", "{rows}", "--lenght", "3"), "unrecognized arguments: --lenght 3"),
    "a number that is none": (("inspect", "{rows}", "--good_from", "x"), "good_from must be a number or null, got 'x'"),
    "too few prompts": (("split", "{rows}", "{dir}/parts", "--eval_fraction", "1"), "too few to hold out"),
    "a share of 7": (("split", "{rows}", "{dir}/parts", "--eval_fraction", "7"), "7 is no number from 0 to 1"),
    "no number": (("filter", "{rows}", "{dir}/a.jsonl", "--min_score_gap", "nan"), "nan is no number from 0 on"),
    "a length below 0": (("filter", "{rows}", "{dir}/a.jsonl", "--min_characters", "-1"), "-1 is no number from 0 on"),
    "no room": (("inspect", "{rows}", "--max_length", "1"), "1 is no number from 2 on"),
    "a picture of no known kind": (("inspect", "{rows}", "--picture", "{dir}/a.xyz"), "a name that ends in .png"),
    "a picture nowhere": (("inspect", "{rows}", "--picture", "{dir}/b/a.png"), "in a folder that does not exist"),
    "no such tokenizer": (("inspect", "{rows}", "--tokenizer", "{dir}/none"), "none does not exist"),
    "no such rows": (("inspect", "{dir}/none.jsonl"), "no such file or folder"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capsys, words, message):
    source = write_lines(tmp_path / "rows.jsonl", PAIRS)
    before = json.dumps(rows_of(source))
    assert run(*(word.format(rows=source, dir=tmp_path) for word in words)) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1
    assert json.dumps(rows_of(source)) == before


def test_values_of_parquet_that_json_has_no_word_for(tmp_path, capsys):
    import datetime
    from decimal import Decimal

    import pyarrow
    import pyarrow.parquet

    columns = {"prompt": ["Q"], "response": ["A"], "score": [Decimal("4.50")], "day": [datetime.date(2026, 1, 2)]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    assert run("filter", tmp_path / "rows.parquet", tmp_path / "out.jsonl") == 0
    assert rows_of(tmp_path / "out.jsonl") == [{"prompt": "Q", "response": "A", "score": 4.5, "day": "2026-01-02"}]
    pyarrow.parquet.write_table(pyarrow.table(columns | {"extra": [b"x"]}), tmp_path / "bytes.parquet")
    words = ("filter", tmp_path / "bytes.parquet", tmp_path / "no.jsonl", "--columns", "unused=extra")
    assert run(*words) == 2
    assert "write .parquet instead" in capsys.readouterr().err


def test_pairs_that_come_from_several_rows_are_converted_first(tmp_path, capsys):
    rows = [{"prompt": "Q", "response": text, "score": score} for text, score in (("a", 1), ("b", 2))]
    source = write_lines(tmp_path / "rows.jsonl", rows)
    assert run("filter", source, tmp_path / "out.jsonl", "--kind", "pair") == 2
    assert "comes from several rows: run `prefuse data convert` first" in capsys.readouterr().err
    assert run("convert", source, tmp_path / "out.jsonl", "--to", "pairs") == 0
    assert [(row["chosen"], row["rejected"]) for row in rows_of(tmp_path / "out.jsonl")] == [("b", "a")]


def test_a_kind_is_tried_after_another_only_where_columns_are_missing(monkeypatch):
    """Whatever the words of another error: it may name a file, a column, or a text of the row."""
    tried = []

    def refuse(source, kind, split, options):
        tried.append(kind)
        raise DataError("a column is missing.jsonl: no such file") if kind == "labelled" else ColumnMissing("no pairs")

    monkeypatch.setattr(guess, "read_records", refuse)
    with pytest.raises(DataError, match="no such file"):
        guess.read_as("a column is missing.jsonl", "auto", "train", ReadOptions())
    assert tried == ["pair", "labelled"]
