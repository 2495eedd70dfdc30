"""The dataset cache: the same rows and the same words as without it, a miss where anything is another, never half."""

import json
import logging
import os
import subprocess
import sys
import time

import pytest

from prefuse.engine.data import cache, examples, load_examples
from prefuse.engine.data.templates import TextOptions
from tiny_run import PAIRS, save_model, settings, write_rows
from tiny_tokenizer import CHATML, LINES, tiny_tokenizer

BAD = {"prompt": 7, "chosen": "a", "rejected": "b"}
TALKS = [{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "it is blue"}]}] * 3


@pytest.fixture(autouse=True)
def _every_file_is_large_enough(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "FEWEST_BYTES", 1)
    monkeypatch.setenv("PREFUSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def reads(monkeypatch):
    """How often rows were read."""
    seen, real = [], examples._read_examples
    monkeypatch.setattr(examples, "_read_examples", lambda *given: seen.append(given[0]) or real(*given))
    return seen


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", [*PAIRS, BAD])


def entries(tmp_path):
    return sorted((tmp_path / "cache" / "datasets").iterdir())


@pytest.mark.parametrize("kind", ["pair", "labelled", "sft"])
def test_the_second_time_nothing_is_read_and_all_is_the_same(kind, rows, reads, tmp_path, caplog):
    first = load_examples(rows, kind, tiny_tokenizer(), 24)
    caplog.set_level(logging.INFO, logger="prefuse")
    second = load_examples(rows, kind, tiny_tokenizer(), 24)
    assert len(reads) == 1
    assert second == first
    assert second.fingerprint == first.fingerprint
    assert second.skipped[0].row == "rows.jsonl:13"
    assert second.prompts_cut > 0
    assert second.examples.select([3, 1]) == first.examples.select([3, 1])
    (entry,) = entries(tmp_path)
    assert f"the tokens of {rows} are read from {entry}" in caplog.text


def test_masks_words_and_a_template_that_was_given_come_back(tmp_path, reads, caplog):
    source = write_rows(tmp_path / "talks.jsonl", TALKS)
    seen = []
    for _ in range(2):
        caplog.clear()
        tokenizer = tiny_tokenizer()
        dataset = load_examples(source, "sft", tokenizer, 64)
        assert dataset.examples.learned is not None or dataset.examples[0].learned is None
        said = [line for line in caplog.messages if "no chat template" in line]
        seen.append((list(dataset.examples), said, tokenizer.chat_template))
    assert len(reads) == 1
    assert seen[0] == seen[1]
    assert len(seen[0][1]) == 1
    assert seen[0][2]


def test_masks_of_several_turns_come_back(tmp_path, reads):
    turns = [{"role": role, "content": "it is"} for role in ("user", "assistant", "user", "assistant")]
    source = write_rows(tmp_path / "talks.jsonl", [{"messages": turns}] * 2)
    one, two = (load_examples(source, "sft", tiny_tokenizer(chat_template=CHATML), 64) for _ in range(2))
    assert len(reads) == 1
    assert one == two
    assert one.examples.learned is not None
    assert not one.examples.learned.all()


def other_day(monkeypatch):
    monkeypatch.setattr(cache, "datetime", type("", (), {"date": type("", (), {"today": lambda: "another day"})}))


OTHERS = {
    "content": lambda given, patch: write_rows(given["path"], [*PAIRS[1:], BAD]),
    "same size": lambda given, patch: write_rows(
        given["path"], [PAIRS[0] | {"chosen": PAIRS[0]["chosen"][::-1]}, *PAIRS[1:], BAD]
    ),
    "tokenizer": lambda given, patch: given.update(tokenizer=tiny_tokenizer(lines=(*LINES, "hello you, hello you"))),
    "special tokens": lambda given, patch: given.update(tokenizer=tiny_tokenizer(adds=())),
    "template": lambda given, patch: given.update(tokenizer=tiny_tokenizer(chat_template=CHATML)),
    "kind": lambda given, patch: given.update(kind="labelled"),
    "length": lambda given, patch: given.update(max_length=25),
    "split": lambda given, patch: given.update(split="test"),
    "text": lambda given, patch: given.update(text=TextOptions(truncation_mode="keep_start")),
    "columns": lambda given, patch: given.update(columns="prompt=prompt,chosen=rejected,rejected=chosen"),
    "share": lambda given, patch: given.update(max_skipped=0.4),
    "code": lambda given, patch: patch.setattr(cache, "_code_hash", lambda: "another"),
    "library": lambda given, patch: patch.setattr(cache.importlib.metadata, "version", lambda name: "another"),
}


def load(given):
    given = dict(given)
    return load_examples(
        str(given.pop("path")), given.pop("kind", "pair"), given.pop("tokenizer", None) or tiny_tokenizer(),
        given.pop("max_length", 24), **given,
    )  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_whatever_the_ids_depend_on_is_in_the_key(name, rows, reads, tmp_path, monkeypatch):
    given = {"path": tmp_path / "rows.jsonl"}
    load(given)
    OTHERS[name](given, monkeypatch)
    load(given)
    load(given)
    assert len(reads) == 2
    assert len(entries(tmp_path)) == 2


def test_what_they_do_not_depend_on_is_not(rows, reads, tmp_path, monkeypatch):
    first = load({"path": tmp_path / "rows.jsonl"})
    moved = tmp_path / "elsewhere" / "rows.jsonl"
    moved.parent.mkdir()
    (tmp_path / "rows.jsonl").rename(moved)
    os.utime(moved, (1, 1))
    second = load({"path": moved, "seed": 3})
    load({"path": moved, "text": TextOptions(date="2020-01-01")})  # the template prints none
    assert len(reads) == 1
    assert second.source == str(moved)
    assert second.examples == first.examples


def test_a_dataset_of_the_hub_is_kept_under_its_whole_name(reads, tmp_path, monkeypatch, caplog):
    """No network here: `datasets.load_dataset` reads the same rows for each name into the cache of `datasets`."""
    import datasets

    from prefuse.engine.data.sources import source

    def load_dataset(path, **_):
        rows = write_rows(tmp_path / "hub.jsonl", [*PAIRS, BAD | {"prompt": None}])
        return real("json", data_files=str(rows), split="train", cache_dir=str(tmp_path / "hub"))

    datasets.disable_progress_bars()
    real = datasets.load_dataset
    monkeypatch.setattr(source, "require_repository", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    caplog.set_level(logging.INFO, logger="prefuse")
    first = load_examples("ann/pairs", "pair", tiny_tokenizer(), 24)
    second = load_examples("ann/pairs", "pair", tiny_tokenizer(), 24)
    assert len(reads) == 1
    assert second == first
    assert "the tokens of ann/pairs are read from" in caplog.text
    other = load_examples("bob/pairs", "pair", tiny_tokenizer(), 24)
    assert len(reads) == 2
    assert (second.skipped[0].row, other.skipped[0].row) == ("ann/pairs:12", "bob/pairs:12")


def test_the_day_counts_where_the_template_prints_it(tmp_path, reads, monkeypatch):
    source = write_rows(tmp_path / "talks.jsonl", TALKS)
    template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    for date, count in ("2026-01-01", 1), ("2026-01-01", 1), ("2026-01-02", 2), (None, 3), (None, 3):
        load_examples(source, "sft", tiny_tokenizer(chat_template=template), 64, text=TextOptions(date=date))
        assert len(reads) == count
    other_day(monkeypatch)
    load_examples(source, "sft", tiny_tokenizer(chat_template=template), 64, text=TextOptions(date="2026-01-02"))
    assert len(reads) == 3
    load_examples(source, "sft", tiny_tokenizer(chat_template=template), 64, text=TextOptions(date="2026-01-03"))
    assert len(reads) == 4


DAMAGE = {
    "flip": lambda entry: flip(entry / "completions-values.npy"),
    "cut": lambda entry: (entry / "rows-values.npy").write_bytes((entry / "rows-values.npy").read_bytes()[:-1]),
    "array": lambda entry: (entry / "prompts-starts.npy").unlink(),
    "about": lambda entry: (entry / "about.json").write_text("{"),
    "gone": lambda entry: (entry / "about.json").unlink(),
    "key": lambda entry: (entry / "about.json").write_text(
        json.dumps(json.loads((entry / "about.json").read_text()) | {"key": {}})
    ),
    "field": lambda entry: (entry / "about.json").write_text(
        json.dumps(json.loads((entry / "about.json").read_text()) | {"dataset": {"skipped": []}})
    ),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_entry_is_read_again_and_written_anew(name, rows, reads, tmp_path, caplog):
    first = load_examples(rows, "pair", tiny_tokenizer(), 24)
    (entry,) = entries(tmp_path)
    DAMAGE[name](entry)
    assert load_examples(rows, "pair", tiny_tokenizer(), 24) == first
    assert "is damaged" in caplog.text
    caplog.clear()
    assert load_examples(rows, "pair", tiny_tokenizer(), 24) == first
    assert len(reads) == 2
    assert "is damaged" not in caplog.text
    assert entries(tmp_path) == [entry]


def test_where_nothing_can_be_written_the_rows_are_there_all_the_same(rows, reads, caplog):
    for _ in range(2):
        assert len(load_examples(rows, "pair", tiny_tokenizer(), 24, cache="/proc/prefuse").examples) == 12
    assert len(reads) == 2
    assert "could not be written" in caplog.text


def test_a_failing_write_leaves_nothing(rows, tmp_path, monkeypatch, caplog):
    def full(path, array):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.np, "save", full)
    assert len(load_examples(rows, "pair", tiny_tokenizer(), 24).examples) == 12
    assert "No space left on device" in caplog.text
    assert not entries(tmp_path)


def test_runs_that_write_at_once_leave_one_whole_entry(rows, reads, tmp_path, monkeypatch, caplog):
    real, nested = cache.flush, []

    def meanwhile(path):
        if not nested:
            nested.append(True)
            load_examples(rows, "pair", tiny_tokenizer(), 24)
        real(path)

    monkeypatch.setattr(cache, "flush", meanwhile)
    first = load_examples(rows, "pair", tiny_tokenizer(), 24)
    assert len(entries(tmp_path)) == 1
    assert load_examples(rows, "pair", tiny_tokenizer(), 24) == first
    assert len(reads) == 2
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_what_is_too_small_to_be_worth_it_or_not_wanted_is_not_kept(rows, reads, tmp_path, monkeypatch):
    load_examples(rows, "pair", tiny_tokenizer(), 24, cache="none")
    monkeypatch.setattr(cache, "FEWEST_BYTES", 1 << 20)
    load_examples(rows, "pair", tiny_tokenizer(), 24)
    assert not (tmp_path / "cache").exists()


def test_a_folder_and_a_mixture_are_kept_by_all_their_files(tmp_path, reads):
    folder = tmp_path / "many"
    folder.mkdir()
    write_rows(folder / "train-a.jsonl", PAIRS[:4])
    write_rows(folder / "train-b.jsonl", PAIRS[4:])
    mixture = [{"path": str(folder / f"train-{name}.jsonl")} for name in "ab"]
    for source in str(folder), mixture:
        reads.clear()
        first, second = (load_examples(source, "pair", tiny_tokenizer(), 64) for _ in range(2))
        assert first == second
        assert len(reads) == 1
    write_rows(folder / "train-b.jsonl", PAIRS[5:])
    for source in str(folder), mixture:
        assert len(load_examples(source, "pair", tiny_tokenizer(), 64).examples) == 11
    assert len(reads) == 3
    weighted = [part | {"fraction": 0.5} for part in mixture]
    assert len(load_examples(weighted, "pair", tiny_tokenizer(), 64).examples) == 8
    assert len(load_examples(weighted[::-1], "pair", tiny_tokenizer(), 64).examples) == 8
    assert len(reads) == 5


def test_the_folder_stays_bounded_and_leftovers_go(rows, tmp_path, monkeypatch):
    folder = tmp_path / "cache" / "datasets"
    for number, length in enumerate((24, 25, 26)):
        load({"path": rows, "max_length": length})
        newest = max(entries(tmp_path), key=lambda path: path.stat().st_mtime_ns)
        os.utime(newest, (number + 1, number + 1))
    load({"path": rows, "max_length": 24})  # used last
    oldest = min(entries(tmp_path), key=lambda path: path.stat().st_mtime)
    for name, age in ("old.1.tmp", 2 * cache.LEFT_OVER), ("new.2.tmp", 0):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    size = sum(file.stat().st_size for file in oldest.iterdir())
    monkeypatch.setattr(cache, "MOST_BYTES", int(3.5 * size))
    load({"path": rows, "max_length": 27})
    names = {path.name for path in entries(tmp_path)}
    assert oldest.name not in names
    assert "old.1.tmp" not in names
    assert "new.2.tmp" in names
    assert len(names) == 3 + 1


def test_where_it_lies(monkeypatch, tmp_path):
    assert cache.folder_of("auto") == tmp_path / "cache" / "datasets"
    monkeypatch.delenv("PREFUSE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder_of("auto") == tmp_path / "xdg" / "prefuse" / "datasets"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.folder_of("auto") == tmp_path / "home" / ".cache" / "prefuse" / "datasets"
    assert cache.folder_of("here") == cache.Path("here")
    assert cache.folder_of("none") is None


KILLED = """
import os, sys
from prefuse.engine.data import cache, load_examples
from tiny_tokenizer import tiny_tokenizer
cache.FEWEST_BYTES = 1
left, real = int(sys.argv[2]), cache.flush
def flush(path):
    global left
    left -= 1
    if left < 0:
        os._exit(9)
    real(path)
cache.flush = flush
load_examples(sys.argv[1], "pair", tiny_tokenizer(), 24)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_no_half_entry(rows, reads, tmp_path, caplog):
    import tiny_tokenizer as module

    environment = os.environ | {"PYTHONPATH": os.path.dirname(module.__file__)}
    for number in (0, 4, 10):
        run = subprocess.run([sys.executable, "-c", KILLED, rows, str(number)], env=environment, cwd=tmp_path)
        assert run.returncode == 9
    assert all(path.suffix == ".tmp" for path in entries(tmp_path))
    first, second = (load_examples(rows, "pair", tiny_tokenizer(), 24) for _ in range(2))
    assert first == second
    assert len(reads) == 1
    assert not [record for record in caplog.records if record.levelname != "INFO"]


def test_a_run_takes_the_folder_from_its_settings(rows, tmp_path, reads):
    from prefuse.engine.data.dataset import read_training_data

    config = settings(
        model_name_or_path=save_model(tmp_path / "m"), dataset_name=rows, output_dir="o",
        dataset_cache=str(tmp_path / "own"), eval_fraction=0.2,
    )  # fmt: skip
    one, two = (read_training_data(config, config.loss(), tiny_tokenizer()) for _ in range(2))
    assert len(reads) == 1
    assert [list(part) for part in one] == [list(part) for part in two]
    assert len(list((tmp_path / "own").iterdir())) == 1
