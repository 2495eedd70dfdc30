"""Bad input loses nothing: what stops the run, what skips and names a row, one test for each message."""

import json

import pytest

from prefuse.engine.data import DataError, load_examples, load_prompts, summarize_skipped
from tiny_tokenizer import CHATML, tiny_tokenizer

PLAIN = tiny_tokenizer()
CHAT = tiny_tokenizer(chat_template=CHATML)
USER, GOOD, BAD = ({"role": role, "content": c} for role, c in (("user", "Q"), ("assistant", "A"), ("assistant", "B")))
PAIR = {"prompt": "Q", "chosen": "A", "rejected": "B"}
CHAT_PAIR = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
LABELLED = {"prompt": "Q", "completion": "A", "label": True}


def write(path, content):
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------------------
# What stops the run

BROKEN_FILES = {
    "empty json": ("rows.json", "", "rows.json is empty"),
    "empty jsonl": ("rows.jsonl", "\n \n", "rows.jsonl is empty"),
    "no rows": ("rows.json", "[]", "rows.json has no rows"),
    "no rows in an object": ("rows.json", {"data": []}, "rows.json has no rows"),
    "broken json": ("rows.json", '[{"a": 1},\n {"a" 2}]', "not valid JSON: .* line 2 column 7"),
    "an array and an object": ("rows.json", '[{"a": 1}]\n{"a": 2}', r"not valid JSON: Extra data: line 2 column 1"),
    "an array that ends early": (
        "rows.json",
        '[{"a": 1}',
        r"not valid JSON: Expecting ',' delimiter: line 1 column 10",
    ),
    "no comma": ("rows.json", '[{"a": 1} {"a": 2}]', r"not valid JSON: Expecting ',' delimiter: line 1 column 11"),
    "a comma too many": ("rows.json", '[{"a": 1},,{"a": 2}]', r"not valid JSON: Expecting value: line 1 column 11"),
    "latin-1": ("rows.json", '[\n{"a": "café"}]'.encode("latin-1"), r"UTF-8: byte 0xe9 at offset 12 \(line 2\)"),
    "latin-1 jsonl": ("rows.jsonl", '{"a": "café"}'.encode("latin-1"), r"UTF-8: byte 0xe9 at offset 10 \(line 1\)"),
    "utf-16": ("rows.jsonl", '{"a": "b"}'.encode("utf-16"), r"rows.jsonl is UTF-16 \(or UTF-32\), not UTF-8"),
    "not parquet": ("rows.parquet", "PAR1 no", "rows.parquet is not a readable Parquet file"),
    "no data": ("rows.txt", "a,b", r"nothing that is read begins with 'a,b'; expected JSON, JSON lines, CSV or TSV"),
    "no json": ("rows.json", "prompt", r"rows.json is not valid JSON: it begins with 'prompt', expected \[ or \{"),
    "csv without rows": ("rows.csv", "a,b", r"rows.csv has no rows"),
    "csv that names a column twice": ("rows.csv", "a,a\n1,2", r"must name each column once; it has 'a', 'a'"),
    "lfs pointer": (
        "rows.jsonl",
        "version https://git-lfs.github.com/spec/v1\noid",
        r"is a Git LFS pointer, .*git lfs pull",
    ),
    "html": ("rows.jsonl", "<!DOCTYPE html>\n<html>", "is an HTML page, not data"),
    "zip": ("rows.jsonl", b"PK\x03\x04...", "is a ZIP archive"),
    "no object": ("rows.json", ["a", 2], r"(?s)none of its 2 rows is an object.*rows.json:0: the row is a string"),
    "no line": ("rows.jsonl", "{\n{", r"(?s)none of its 2 rows is an object.*rows.jsonl:1: not valid JSON"),
}


@pytest.mark.parametrize(("name", "content", "message"), BROKEN_FILES.values(), ids=BROKEN_FILES)
def test_a_file_that_cannot_be_read_stops_the_run(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message):
        load_examples(write(tmp_path / name, content), "pair", PLAIN, 64)


def test_invalid_utf8_in_parquet_stops_the_run(tmp_path):
    import pyarrow
    import pyarrow.parquet

    strings = pyarrow.array([b"good", b"caf\xe9"]).view("string")
    pyarrow.parquet.write_table(pyarrow.table({"text": strings}), tmp_path / "rows.parquet")
    with pytest.raises(DataError, match=r"rows\.parquet is not a readable Parquet file: 'utf-8' codec"):
        load_examples(str(tmp_path / "rows.parquet"), "sft", PLAIN, 64)


@pytest.mark.parametrize("source", ["missing.json", "./missing", "/missing/folder", "a/b/c"])
def test_a_source_that_is_not_there_stops_the_run(source):
    with pytest.raises(DataError, match="no such file or folder"):
        load_examples(source, "pair", PLAIN, 64)


def test_a_hub_name_that_does_not_load_stops_the_run(monkeypatch):
    import datasets

    from prefuse.engine.data.sources import source

    def refuse(path, name, split):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub")

    monkeypatch.setattr(source, "require_repository", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"org/name: no such file or folder here, .* Couldn't reach 'org/name'"):
        load_examples("org/name", "pair", PLAIN, 64)


def test_a_folder_without_data_stops_the_run(tmp_path):
    with pytest.raises(DataError, match=r"a folder without \.json, .*, \.arrow files \(plain or"):
        load_examples(str(tmp_path), "pair", PLAIN, 64)


def test_a_split_that_is_not_there_stops_the_run(tmp_path):
    write(tmp_path / "train.json", [PAIR])
    write(tmp_path / "test.json", [PAIR])
    with pytest.raises(DataError, match='no split "validation"; it has test, train'):
        load_examples(str(tmp_path), "pair", PLAIN, 64, split="validation")
    (tmp_path / "train.json").unlink()
    with pytest.raises(DataError, match='no split "train"; it has test'):
        load_examples(str(tmp_path), "pair", PLAIN, 64)


def test_a_broken_saved_dataset_stops_the_run(tmp_path):
    write(tmp_path / "state.json", "{}")
    with pytest.raises(DataError, match="a saved dataset that cannot be read"):
        load_examples(str(tmp_path), "pair", PLAIN, 64)


MISSING_COLUMNS = {
    "pair": (
        {"question": "Q", "chosen": "A"},
        r'a column is missing for "pair" data\. Found: question, chosen\. Accepted: prompt/chosen/rejected; '
        r"prompt with two answers and a verdict; .* Fix: name the columns, as in --columns prompt=question,",
    ),
    "labelled": (
        {"prompt": "Q", "completion": "A"},
        r"Accepted: .*; prompt/completion/label or messages/label; .* "
        r'or use it as "sft" data, whose prompt/completion it has\.$',
    ),
    "sft": ({"prompt": "Q", "anwser": "A"}, "Found: prompt, anwser.*prompt/completion, instruction/output or text"),
}


@pytest.mark.parametrize("kind", MISSING_COLUMNS)
def test_a_missing_column_stops_the_run_naming_what_is_there_what_is_accepted_and_a_fix(tmp_path, kind):
    row, message = MISSING_COLUMNS[kind]
    with pytest.raises(DataError, match=message):
        load_examples(write(tmp_path / "rows.json", [row]), kind, PLAIN, 64)


def test_prompts_need_a_prompt(tmp_path):
    with pytest.raises(DataError, match='a column is missing for "prompt" data'):
        load_prompts(write(tmp_path / "rows.json", [{"ask": "Q"}]), PLAIN, 64)


def test_no_usable_row_stops_the_run_with_the_first_reasons(tmp_path):
    source = write(tmp_path / "rows.json", [PAIR | {"chosen": ""}] * 7)
    with pytest.raises(DataError, match="no usable row among 7") as caught:
        load_examples(source, "pair", PLAIN, 64)
    lines = str(caught.value).splitlines()
    assert lines[1] == '  rows.json:0: "chosen" is empty'
    assert len(lines) == 7
    assert lines[-1] == "  ... and 2 more"


@pytest.mark.parametrize(
    ("kind", "max_length", "message"),
    [
        ("pairs", 64, 'kind must be "pair", "labelled", "scored" or "sft", got \'pairs\''),
        ("pair", 1, "max_length must be at least 2, a prompt token and a completion token; got 1"),
    ],
)
def test_wrong_arguments_are_refused(kind, max_length, message):
    with pytest.raises(ValueError, match=message):
        load_examples("rows.json", kind, PLAIN, max_length)


# ---------------------------------------------------------------------------------------------------------
# What skips a row: (kind, a good row, the bad row, the reason)

BAD_ROWS = {
    "not an object": ("pair", PAIR, ["Q", "A", "B"], "the row is a list, expected an object"),
    "missing value": ("pair", PAIR, {"prompt": "Q", "chosen": "A"}, 'no value in "rejected"'),
    "null value": ("pair", PAIR, PAIR | {"prompt": None}, 'no value in "prompt"'),
    "number": ("pair", PAIR, PAIR | {"chosen": 7}, '"chosen" is a number, expected a string or a list of messages'),
    "boolean": ("pair", PAIR, PAIR | {"prompt": True}, '"prompt" is a boolean, expected'),
    "half a surrogate pair": (
        "pair",
        PAIR,
        PAIR | {"chosen": "ab\ud83d"},
        '"chosen" holds half a surrogate pair at character 2',
    ),
    "half a surrogate pair in a message": (
        "pair",
        CHAT_PAIR,
        CHAT_PAIR | {"prompt": [USER | {"content": "\udc00"}]},
        '"prompt" holds half a surrogate pair at character 0',
    ),
    "blank": ("pair", PAIR, PAIR | {"chosen": " \n"}, '"chosen" is empty: nothing but blanks'),
    "mixed sides": (
        "pair",
        {"chosen": "QA", "rejected": "QB"},
        {"chosen": "Q", "rejected": [USER]},
        '"chosen" and "rejected" must both be strings or both be messages',
    ),
    "another prompt": (
        "pair",
        CHAT_PAIR,
        {"prompt": "R", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        '"prompt" is a string, and it is none of the turns that chosen and rejected share',
    ),
    "empty chosen": ("pair", PAIR, PAIR | {"chosen": ""}, '"chosen" is empty'),
    "empty rejected": ("pair", CHAT_PAIR, CHAT_PAIR | {"rejected": []}, '"rejected" is empty'),
    "empty message": (
        "pair",
        CHAT_PAIR,
        CHAT_PAIR | {"rejected": [BAD | {"content": ""}]},
        '"rejected" is empty',
    ),
    "empty completion": ("labelled", LABELLED, LABELLED | {"completion": ""}, '"completion" is empty'),
    "empty text": ("sft", {"text": "A"}, {"text": ""}, '"completion" is empty'),
    "only a start": ("sft", {"text": "A"}, {"text": "<s>"}, '"completion" is empty: it has no token'),
    "equal sides": (
        "pair",
        PAIR,
        PAIR | {"rejected": "A"},
        '"chosen" equals "rejected", token by token: no preference to learn',
    ),
    "equal sides, unpaired": ("labelled", PAIR, PAIR | {"rejected": "A"}, '"chosen" equals "rejected"'),
    "message that is a string": (
        "pair",
        CHAT_PAIR,
        CHAT_PAIR | {"prompt": ["Q"]},
        'a turn of "prompt" is a string, expected {role, content} or {from, value}',
    ),
    "content that is a list": (
        "pair",
        CHAT_PAIR,
        CHAT_PAIR | {"prompt": [USER | {"content": ["Q"]}]},
        'the content of a "user" turn in "prompt" is a list, expected a string',
    ),
    "unknown role": (
        "pair",
        CHAT_PAIR,
        CHAT_PAIR | {"prompt": [USER | {"role": "robot"}]},
        "unknown role 'robot' in \"prompt\"; known: system, developer, user, assistant, tool",
    ),
    "unknown sender": (
        "pair",
        CHAT_PAIR,
        CHAT_PAIR | {"chosen": {"from": "bard", "value": "A"}},
        "unknown role 'bard' in \"chosen\"",
    ),
    "no role": ("pair", CHAT_PAIR, CHAT_PAIR | {"prompt": [{"content": "Q"}]}, "unknown role None in"),
    "role that is a list": (
        "pair",
        CHAT_PAIR,
        CHAT_PAIR | {"prompt": [USER | {"role": ["user"]}]},
        "unknown role ['user'] in",
    ),
    "user turn in a completion": (
        "pair",
        CHAT_PAIR,
        CHAT_PAIR | {"rejected": [USER]},
        '"rejected" has a turn from "user", expected assistant turns only',
    ),
    "last turn is not the assistant's": (
        "sft",
        {"messages": [USER, GOOD]},
        {"messages": [USER, GOOD, USER]},
        'the last turn of "messages" is from "user", expected "assistant"',
    ),
    "no turn": (
        "sft",
        {"messages": [USER, GOOD]},
        {"messages": []},
        'the last turn of "messages" is missing, expected "assistant"',
    ),
    "messages that are a string": (
        "sft",
        {"messages": [USER, GOOD]},
        {"messages": "Q"},
        '"messages" is a string, expected a list of messages',
    ),
    "no prompt turn": ("sft", {"messages": [USER, GOOD]}, {"messages": [GOOD]}, "the prompt has no turn"),
    "alpaca type": (
        "sft",
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "input": 3, "output": "A"},
        '"input" is a number, expected a string',
    ),
    "label 2": ("labelled", LABELLED, LABELLED | {"label": 2}, '"label" is 2, a number; expected true or false'),
    "label text": ("labelled", LABELLED, LABELLED | {"label": "maybe"}, "\"label\" is 'maybe', a string; expected"),
    "no label": ("labelled", LABELLED, LABELLED | {"label": None}, 'no value in "label"'),
    "no room": (
        "pair",
        PAIR,
        PAIR | {"rejected": "0123456789" * 7},
        '"rejected" has 71 tokens: max_length=64 leaves no room for the prompt',
    ),
    "no room at all": (
        "sft",
        PAIR,
        PAIR | {"chosen": "0123456789" * 6 + "012"},  # 63 and EOS: exactly max_length
        '"chosen" has 64 tokens: max_length=64 leaves no room for the prompt',
    ),
}


@pytest.mark.parametrize(("kind", "good", "bad", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_skipped_counted_and_named_and_the_others_are_kept(tmp_path, kind, good, bad, reason):
    dataset = load_examples(write(tmp_path / "rows.json", [good, bad, good]), kind, CHAT, 64)
    (skipped,) = dataset.skipped
    assert skipped.row == "rows.json:1"
    assert skipped.reason.startswith(reason)
    assert {example.row for example in dataset.examples} == {"rows.json:0", "rows.json:2"}
    assert dataset.rows == 3


def test_a_broken_jsonl_line_is_a_bad_row_named_by_its_line(tmp_path):
    good = json.dumps(PAIR)
    dataset = load_examples(write(tmp_path / "rows.jsonl", f"{good}\n\n{good[:-1]}\n{good}\n"), "pair", PLAIN, 64)
    assert [pair.row for pair in dataset.examples] == ["rows.jsonl:1", "rows.jsonl:4"]
    (skipped,) = dataset.skipped
    assert skipped.row == "rows.jsonl:3"
    assert skipped.reason.startswith("not valid JSON: Expecting ',' delimiter at column")


def test_an_empty_prompt_without_a_token_to_start_from_is_a_bad_row(tmp_path):
    bare = tiny_tokenizer(bos=False, eos=False, adds=())
    rows = [{"prompt": "Q", "completion": "A"}, {"prompt": "", "completion": "A"}]
    dataset = load_examples(write(tmp_path / "rows.json", rows), "sft", bare, 64)
    (skipped,) = dataset.skipped
    assert (skipped.row, len(dataset.examples)) == ("rows.json:1", 1)
    assert skipped.reason == "the prompt is empty, and the tokenizer has neither BOS nor EOS to start from"


# Templates that real models have: one refuses the system role, one thinks aloud only in the last turn, one
# drops what stands before "</think>".
TEMPLATES = {
    "refuses a role": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML,
        {"messages": [{"role": "system", "content": "S"}, USER, GOOD]},
        "the chat template refuses it: System role not supported",
    ),
    "breaks the prefix": (
        "{% for m in messages %}[{{ m.content }}{{ '|last' if loop.last and m.content == 'R' }}]{% endfor %}",
        {"messages": [USER | {"content": "R"}, GOOD]},
        'the chat template renders the prompt otherwise when "completion" follows: no true prefix'
        ". No argument of the template helps. Fix: give another --chat_template",
    ),
    "drops text": (
        "{% for m in messages %}[{{ m.content.split('</think>')[-1] }}]{% endfor %}",
        {"messages": [USER, GOOD | {"content": "why</think>A"}]},
        'the chat template drops or rewrites text of "completion": its reasoning (<think>...</think>)'
        ". No argument of the template helps. Fix: give another --chat_template",
    ),
    "renders nothing": (
        "{% for m in messages if m.content != 'nothing' %}{{ m.content }}{% endfor %}",
        {"messages": [USER | {"content": "nothing"}, GOOD]},
        'the chat template drops or rewrites the text of a "user" turn'
        ". No argument of the template helps. Fix: give another --chat_template",
    ),
}


@pytest.mark.parametrize(("template", "bad", "reason"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_row_that_the_chat_template_does_not_carry_is_skipped(tmp_path, template, bad, reason):
    source = write(tmp_path / "rows.json", [{"messages": [USER, GOOD]}, bad])
    dataset = load_examples(source, "sft", tiny_tokenizer(chat_template=template), 64)
    (skipped,) = dataset.skipped
    assert (skipped.row, skipped.reason) == ("rows.json:1", reason)
    assert len(dataset.examples) == 1


def test_templates_may_trim_white_space(tmp_path):
    template = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    source = write(tmp_path / "rows.json", [{"messages": [USER, GOOD | {"content": " A \n"}]}])
    assert load_examples(source, "sft", tiny_tokenizer(chat_template=template), 64).skipped == []


def test_the_summary_groups_rows_by_reason_and_says_how_many_it_leaves_out(tmp_path):
    rows = [PAIR, *[PAIR | {"chosen": ""}] * 4, PAIR | {"prompt": 1}, PAIR | {"prompt": 2.5}, [], "x"]
    source = write(tmp_path / "rows.json", rows)
    with pytest.raises(
        DataError, match=r"8 of 9 rows cannot be used, more than max_skipped 0.5 allows:\n  rows.json:1: "
    ):
        load_examples(source, "pair", PLAIN, 64)
    dataset = load_examples(source, "pair", PLAIN, 64, max_skipped=1)
    assert summarize_skipped(dataset, limit=2).splitlines() == [
        f"{tmp_path}/rows.json: 9 rows as prompt/chosen/rejected, 8 skipped",
        '  skipped rows.json:1, rows.json:2 and 2 more: "chosen" is empty',
        '  skipped rows.json:5, rows.json:6: "prompt" is a number, expected a string or a list of messages',
        "  ... and 2 more reasons",
    ]
