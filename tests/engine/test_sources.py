"""Files of every layout, told by their first bytes; folders with named splits; what is no data is refused by name."""

import bz2
import contextlib
import gzip
import json
import lzma
import os
import subprocess
import sys

import pytest

from prefuse.engine.data import DataError, load_examples
from prefuse.engine.data.sources import BadRow, open_source

ROWS = [
    {"prompt": "é字", "chosen": "good, better", "rejected": 'bad "x"\nbad'},
    {"prompt": "R", "chosen": "c", "rejected": "d"},
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
COLUMNS = {column: [row[column] for row in ROWS] for column in ROWS[0]}


def rows_of(path, split="train", config=None):
    return [row for _, row in open_source(str(path), split, config).rows()]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def zstd(data):
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


TURNS = [[{"role": "user", "content": q}, {"role": "assistant", "content": "A"}] for q in "QR"]


@pytest.mark.parametrize(
    "content",
    ["".join(json.dumps(turns) + "\n" for turns in TURNS), json.dumps(TURNS), json.dumps(TURNS, indent=1)],
    ids=["a line each", "an array of arrays", "over several lines"],
)
def test_an_array_of_turns_in_the_place_of_a_row_is_its_conversation(tmp_path, content):
    assert rows_of(write(tmp_path / "rows.jsonl", content)) == [{"messages": turns} for turns in TURNS]


def test_other_arrays_in_the_place_of_rows_are_named(tmp_path):
    path = write(tmp_path / "rows.jsonl", '["a", "b"]\n[1, 2]\n[]\n[[{"role": "user"}]]\n')
    with pytest.raises(DataError, match=r"none of its 4 rows is an object with columns:\n.*:1: the row is a list"):
        load_examples(str(path), "pair", None, 64, cache="none")


CSV = 'prompt,chosen,rejected\né字,"good, better","bad ""x""\nbad"\nR,c,d\n'
FILES = {
    "array": ("rows.json", json.dumps(ROWS)),
    "lines in .json": ("rows.json", LINES),
    "array in .jsonl": ("rows.jsonl", "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]"),
    "lines in .csv": ("rows.csv", LINES),
    "ndjson": ("rows.ndjson", LINES),
    "objects over lines": ("rows.json", "\n".join(json.dumps(row, indent=1) for row in ROWS)),
    "data": ("rows.json", json.dumps({"version": 1, "data": ROWS})),
    "a viewer's rows": ("rows.json", json.dumps({"rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)]})),
    "splits": ("rows.json", json.dumps({"train": ROWS, "test": ROWS[:1]}, indent=1)),
    "columns": ("rows.json", json.dumps(COLUMNS)),
    "columns of pandas": ("rows.json", json.dumps({c: dict(enumerate(v)) for c, v in COLUMNS.items()})),
    "lines of arrays": ("rows.jsonl", "".join(json.dumps([row]) + "\n" for row in ROWS)),
    "byte-order mark": ("rows.jsonl", "\ufeff" + LINES),
    "csv": ("rows.csv", CSV),
    "csv, byte-order mark": ("rows.csv", "\ufeff" + CSV),
    "tsv": ("rows.tsv", CSV.replace(",", "\t").replace("good\t better", "good, better")),
    "tabs in .csv": ("rows.csv", CSV.replace(",", "\t").replace("good\t better", "good, better")),
    "gz": ("rows.jsonl.gz", gzip.compress(LINES.encode())),
    "gz without the name": ("rows.jsonl", gzip.compress(LINES.encode())),
    "bz2": ("rows.json.bz2", bz2.compress(json.dumps(ROWS).encode())),
    "xz": ("rows.csv.xz", lzma.compress(CSV.encode())),
}


@pytest.mark.parametrize(("name", "content"), FILES.values(), ids=FILES)
def test_a_file_is_told_by_its_bytes(tmp_path, name, content):
    assert rows_of(write(tmp_path / name, content)) == ROWS


def test_zstd_parquet_and_both_arrow_formats(tmp_path):
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(ROWS)
    pyarrow.parquet.write_table(table, tmp_path / "rows.bin")
    pyarrow.feather.write_feather(table, tmp_path / "rows.arrow")
    with pyarrow.ipc.new_stream(tmp_path / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    write(tmp_path / "rows.jsonl.zst", zstd(LINES.encode()))
    for name in ("rows.bin", "rows.arrow", "stream.arrow", "rows.jsonl.zst"):
        assert rows_of(tmp_path / name) == ROWS


def test_the_only_row_of_a_file_is_a_row(tmp_path):
    row = {"messages": [{"role": "user", "content": "Q"}], "id": 1}
    pair = {"chosen": [{"role": "user"}], "rejected": [{"role": "user"}]}
    for one in (row, pair, {"prompt": "Q", "scores": [1, 2]}):
        assert rows_of(write(tmp_path / "one.jsonl", json.dumps(one))) == [one]
        assert rows_of(write(tmp_path / "one.json", json.dumps(one, indent=1))) == [one]


def test_splits_within_a_document(tmp_path):
    path = write(tmp_path / "rows.json", json.dumps({"train": ROWS, "test": ROWS[:1]}))
    assert rows_of(path, "test") == ROWS[:1]
    with pytest.raises(DataError, match='no split "dev"; it has train, test'):
        rows_of(path, "dev")


DEEP = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
DIGITS = '{"score": ' + "9" * 5000 + "}"
BAD = {
    "deep": (DEEP, "it is nested too deeply to be read"),
    "digits": (DIGITS, "it holds a number of more than 4300 digits"),
}


@pytest.mark.parametrize(("text", "reason"), BAD.values(), ids=BAD)
@pytest.mark.parametrize("layout", ["lines", "array"])
def test_one_bad_row_is_one_bad_row(tmp_path, text, reason, layout):
    parts = [json.dumps(ROWS[0]), text, json.dumps(ROWS[1])]
    content = "\n".join(parts) if layout == "lines" else "[" + ", ".join(parts) + "]"
    first, bad, last = rows_of(write(tmp_path / "rows.jsonl", content))
    assert [first, last] == ROWS
    assert isinstance(bad, BadRow)
    assert str(bad) == reason


@pytest.mark.parametrize("line", ["[" * 1000 + "]" * 1000, "[" * 100_000 + "]" * 100_000, "[1, 2]", '["]"]'])
def test_a_first_line_that_is_an_array_is_one_bad_row(tmp_path, line):
    first, *rest = rows_of(write(tmp_path / "rows.jsonl", f"{line}\n{LINES}"))
    assert not isinstance(first, dict)
    assert rest == ROWS


def test_a_broken_first_line_is_one_bad_row(tmp_path):
    bad, *rest = rows_of(write(tmp_path / "rows.jsonl", '{"prompt": \n' + LINES))
    assert isinstance(bad, BadRow)
    assert rest == ROWS


def test_a_key_that_stands_twice_in_a_row_stops_the_run(tmp_path):
    with pytest.raises(DataError, match=r'rows.jsonl:2 names "prompt" twice'):
        rows_of(write(tmp_path / "rows.jsonl", '{"prompt": "Q"}\n{"prompt": "Q", "text": "A", "prompt": "R"}\n'))
    inside = '{"tools": {"a": 1, "a": 2}, "prompt": "Q"}\n'
    assert rows_of(write(tmp_path / "rows.jsonl", inside * 2)) == [{"tools": {"a": 2}, "prompt": "Q"}] * 2


def test_values_longer_than_a_window_are_read_whole(tmp_path, monkeypatch):
    from prefuse.engine.data.sources import json_text

    monkeypatch.setattr(json_text, "CHUNK", 3)
    for content in (json.dumps(ROWS), json.dumps(ROWS, indent=2), "[1, 23, 456]", f"[{DIGITS},\n1]"):
        rows = rows_of(write(tmp_path / "rows.json", content))
        assert rows[1:] == (json.loads(content) if "999" not in content else [0, 1])[1:]
    with pytest.raises(DataError, match=r"line 3 column 8$"):
        rows_of(write(tmp_path / "rows.json", '[{"a": 1},\n {"a": 2},\n  {"a" 2}]'))


def test_cells_of_a_table(tmp_path):
    turns = [{"role": "user", "content": "Q"}]
    text = (
        f'messages,label,score\n"{json.dumps(turns).replace(chr(34), chr(34) * 2)}",,1\n"{turns}",x,2\n[1],x,3\na,b\n'
    )
    *rows, bad = rows_of(write(tmp_path / "rows.csv", text))
    assert rows == [
        {"messages": turns, "label": None, "score": "1"},
        {"messages": turns, "label": "x", "score": "2"},
        {"messages": "[1]", "label": "x", "score": "3"},
    ]
    assert str(bad) == "it has 2 cells, the first line has 3"


def test_what_pandas_writes_into_cells(tmp_path):
    """Its index has no name in the header; numpy writes turns without commas between them."""
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    text = f',messages\n0,"[{turns[0]}\n {turns[1]}]"\n'
    assert rows_of(write(tmp_path / "rows.csv", text)) == [{"Unnamed: 0": "0", "messages": turns}]


def test_columns_that_datasets_wrote_as_json_text_are_read_back(tmp_path):
    """Also a content "12", which such a column keeps as the number 12."""
    import datasets

    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
    rows = [
        {"messages": [{"role": "user", "content": "12"}, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    ]
    datasets.disable_progress_bars()
    lists = datasets.Features({"messages": datasets.List(datasets.Json())})
    parts = datasets.Features(
        {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Json()})}
    )
    datasets.Dataset.from_list(rows, features=lists).to_parquet(tmp_path / "lists.parquet")
    assert rows_of(tmp_path / "lists.parquet") == rows
    plain = [{"messages": [{"role": t["role"], "content": t["content"]} for t in row["messages"]]} for row in rows]
    datasets.Dataset.from_list(plain, features=parts).to_parquet(tmp_path / "parts.parquet")
    assert rows_of(tmp_path / "parts.parquet") == plain
    datasets.Dataset.from_list(rows, features=lists).save_to_disk(tmp_path / "saved")
    assert rows_of(tmp_path / "saved") == rows


# ---------------------------------------------------------------------------------------------------------
# Folders


def make(folder, *names):
    for name in names:
        write(folder / name, json.dumps({"text": name}) + "\n")
    return folder


def texts(folder, split, config=None):
    return [row["text"] for row in rows_of(folder, split, config)]


def test_shards_name_their_split(tmp_path):
    names = [
        f"data/{split}-0000{i}-of-00002.jsonl" for split in ("train_prefs", "train_sft", "test_prefs") for i in (0, 1)
    ]
    make(tmp_path, *names)
    assert texts(tmp_path, "train_prefs") == names[:2]
    assert texts(tmp_path / "data", "train_sft") == names[2:4]
    with pytest.raises(DataError, match='no split "train"; it has test_prefs, train_prefs, train_sft'):
        texts(tmp_path, "train")


def test_files_with_a_word_and_more_can_be_asked_for_by_their_whole_name(tmp_path):
    make(tmp_path, "train_prefs.jsonl", "train_sft.jsonl", "test_prefs.jsonl")
    assert texts(tmp_path, "train_prefs") == ["train_prefs.jsonl"]
    with pytest.raises(DataError, match=r"several purposes \(train_prefs.jsonl, train_sft.jsonl\).* train_prefs,"):
        texts(tmp_path, "train")
    make(tmp_path / "told", "train_prefs.jsonl", "train_sft.jsonl")
    header = "configs:\n- config_name: default\n  data_files: '*.jsonl'\n"
    (tmp_path / "told" / "README.md").write_text(f"---\n{header}---\n")  # who says so means it
    assert texts(tmp_path / "told", "train") == ["train_prefs.jsonl", "train_sft.jsonl"]
    make(tmp_path / "parts", "train_a.jsonl", "train_b.jsonl")
    assert texts(tmp_path / "parts", "train") == ["train_a.jsonl", "train_b.jsonl"]  # as datasets.load_dataset


def test_splits_are_those_of_datasets(tmp_path):
    """The same files for the same split as `datasets` finds, where it finds any."""
    from datasets.data_files import get_data_patterns, resolve_pattern

    layouts = [
        ("train.jsonl", "test.jsonl"), ("a/train/0.jsonl", "a/test/0.jsonl"), ("my-train-0.jsonl", "my_dev.jsonl"),
        ("data/random-00000-of-00001.jsonl", "data/train-00000-of-00001.jsonl"),
        ("validation/x.jsonl", "training 1.jsonl"),
        ("a.jsonl", "b.jsonl"), ("strained.jsonl", "attest.jsonl"),
    ]  # fmt: skip
    for number, layout in enumerate(layouts):
        folder = make(tmp_path / f"set{number}", *layout)
        for split, patterns in get_data_patterns(str(folder)).items():
            theirs = set()
            for pattern in patterns:
                with contextlib.suppress(FileNotFoundError):  # of several patterns, one that fits nothing
                    theirs |= {os.path.relpath(file, folder) for file in resolve_pattern(pattern, str(folder))}
            assert theirs
            assert set(texts(folder, str(split))) >= theirs, layout


def test_the_readme_says_which_files_are_a_split(tmp_path):
    make(tmp_path, "one.jsonl", "two.jsonl", "three/x.jsonl")
    write(
        tmp_path / "README.md",
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: one.jsonl\n  - split: rest\n"
        "    path: [two.jsonl]\n- config_name: other\n  data_files: three/*\n---\n# Data\n",
    )
    assert texts(tmp_path, "train") == ["one.jsonl"]
    assert texts(tmp_path, "rest") == ["two.jsonl"]
    assert texts(tmp_path, "train", "other") == ["three/x.jsonl"]
    with pytest.raises(DataError, match='no configuration "more"; it has default, other'):
        texts(tmp_path, "train", "more")


@pytest.mark.parametrize("entry", ["3", "{split: [], path: a}", "[{path: a.jsonl}]", "{train: a.jsonl}"])
def test_a_readme_that_names_no_files_is_one_line(tmp_path, entry):
    make(tmp_path, "a.jsonl")
    write(tmp_path / "README.md", f"---\nconfigs:\n- config_name: [odd]\n  data_files: {entry}\n---\n")
    with pytest.raises(DataError, match=r"README.md has .* among its data_files; expected a path, or {split, path}"):
        texts(tmp_path, "train")


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs and few links there")
def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"rows.jsonl is a FIFO"):
        open_source(str(tmp_path / "rows.jsonl"))
    with pytest.raises(DataError, match=r"rows.jsonl is a FIFO"):
        open_source(str(tmp_path))
    os.remove(tmp_path / "rows.jsonl")
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match="part of a loop of links"):
        open_source(str(tmp_path / "a.jsonl"))
    os.remove(tmp_path / "a.jsonl")
    with pytest.raises(DataError, match=r"b.jsonl is a link to nothing"):
        open_source(str(tmp_path))
    os.remove(tmp_path / "b.jsonl")
    make(tmp_path, "rows.jsonl")
    (tmp_path / "again").symlink_to(tmp_path)
    with pytest.raises(DataError, match=r"again is a link to a folder that holds it .* a loop of links"):
        open_source(str(tmp_path))


@pytest.mark.slow
def test_rows_are_not_held_in_memory(tmp_path):
    """Reading 60 MB of lines or of an array takes less memory than the file has."""
    row = json.dumps({"text": "x" * 3000})
    write(tmp_path / "lines.jsonl", "\n".join([row] * 20_000))
    write(tmp_path / "array.json", "[" + ",".join([row] * 20_000) + "]")
    script = (
        "import resource, sys\nfrom prefuse.engine.data.sources import open_source\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert sum(1 for _ in open_source(sys.argv[1]).rows()) == 20_000\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    )
    for name in ("lines.jsonl", "array.json"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / name)], capture_output=True, text=True, check=True
        )
        assert int(done.stdout) < 30_000  # KiB


def test_keys_that_arrow_gave_to_every_turn_are_taken_out_again(tmp_path):
    import pyarrow
    import pyarrow.parquet

    turns = [{"role": "user", "content": "Q", "name": "Ann"}, {"role": "assistant", "content": "A"}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": turns, "id": None}]), tmp_path / "rows.parquet")
    assert rows_of(tmp_path / "rows.parquet") == [{"messages": turns, "id": None}]
