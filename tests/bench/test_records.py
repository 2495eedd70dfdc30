"""Results of `prefuse bench`: every file holds to schema.json and to its own details; bad files are refused by name;
rows of two results are compared in the direction in which a measure is better."""

import copy
import json
import math
import re
import sys

import jsonschema
import pytest

from prefuse.bench import compare, record, show, summaries
from prefuse.bench.cli import GROUPS, VERBS, main
from prefuse.bench.record import BadRecord, load_results, read_result, write_result

RECORDS = load_results([record.RESULTS])


@pytest.fixture
def packing():
    """Any small record, to be changed."""
    return next(copy.deepcopy(x) for x in RECORDS if x.verb == "packing")


def save(path, made):
    path.write_text(json.dumps(made.data()))
    return path


def raw(made):
    """What a verb hands to `write_result`."""
    return {"environment": made.environment, "settings": made.settings, **made.details}


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(json.loads(record.SCHEMA.read_text()))


@pytest.mark.parametrize("made", RECORDS, ids=lambda x: x.path.stem)
def test_every_result_is_what_its_details_say(made):
    """Rows are never typed: they are made again from what was measured."""
    assert made.rows
    assert made.rows == summaries.ROWS[made.verb](raw(made))
    assert made.keys == list(summaries.KEYS[made.verb])
    assert not any("/" in str(value) for value in made.settings.values() if isinstance(value, str))


@pytest.mark.parametrize("made", RECORDS, ids=lambda x: x.path.stem)
def test_every_result_says_how_it_came_about(made):
    """Device, versions, commit and command; a seed wherever anything is drawn."""
    assert made.device["name"]
    assert made.environment["packages"].keys() >= {"torch", "prefuse"}
    assert made.commit
    assert made.command.startswith(("prefuse bench ", "python checkout.py "))
    assert made.seed is not None or made.verb in ("architectures", "templates")  # they draw from fixed seeds


def test_every_verb_that_measures_on_a_cpu_has_a_result():
    """Only a GPU's is missing."""
    assert {x.verb for x in RECORDS} >= summaries.ROWS.keys() - {"gpu"}


def test_every_verb_that_makes_rows_has_keys_and_every_measure_a_direction():
    assert summaries.ROWS.keys() == summaries.KEYS.keys()
    assert {better for _, better in summaries.MEASURES.values()} == {"lower", "higher", "neither"}


WRONG = {
    "no commit": ({"commit": "yesterday"}, "commit"),
    "no device": ({"device": {"kind": "tpu", "name": "x", "threads": 1}}, "device.kind"),
    "no packages": ({"environment": {"time": "2026-01-01T00:00:00Z", "python": "3.11"}}, "environment"),
    "a nested row": ({"rows": [{"batches": "flat", "tokens": [1, 2]}]}, "rows.0.tokens"),
    "an unknown column": ({"rows": [{"batches": "flat", "furlongs": 1}]}, "furlongs"),
    "a NaN": ({"rows": [{"batches": "flat", "seconds": math.nan}]}, "no measurement"),
    "the same twice": ({"rows": [{"batches": "flat"}, {"batches": "flat"}]}, "two rows"),
    "a peer without reason or version": ({"peers": {"TRL": {"version": None}}}, "peers.TRL"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_file_is_refused_by_name_and_place(packing, tmp_path, name):
    changes, said = WRONG[name]
    for field, value in changes.items():
        setattr(packing, field, value)
    path = save(tmp_path / "packing.json", packing)
    with pytest.raises(BadRecord, match=r"packing\.json") as error:
        read_result(path)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "prefuse.bench/9"}', '{"format": "prefuse.bench/1"}', "\udcff"]
)
def test_what_is_no_record_is_refused_by_name(tmp_path, text):
    path = tmp_path / "strange.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(BadRecord, match=r"strange\.json"):
        read_result(path)


@pytest.mark.parametrize("made", RECORDS[:3] + RECORDS[-3:], ids=lambda x: x.path.stem)
def test_files_of_before_the_form_are_read_through_the_same_door(tmp_path, made):
    old = {value: key for key, value in record.OLD_NAMES.items()}.get(made.verb, made.verb)
    path = tmp_path / f"{old}-some-chip.json"
    path.write_text(json.dumps(raw(made)))
    again = read_result(path)
    assert (again.verb, again.rows, again.commit) == (made.verb, made.rows, None)


def test_a_result_knows_its_command_and_commit_without_folders(packing, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["prefuse bench packing", "--data", "/home/someone/pairs.json", "--model=/tmp/a/b/"]
    )
    packing.settings["data"] = "/home/someone/pairs.json"
    made = write_result(tmp_path / "packing.json", "packing", raw(packing), seed=3)
    again = read_result(tmp_path / "packing.json")
    assert again.data() == made.data()
    assert again.command == "prefuse bench packing --data pairs.json --model=b"
    assert again.settings["data"] == "pairs.json"
    assert again.seed == 3
    assert again.commit is None or len(again.commit.removesuffix("+changes")) == 40


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["prefuse", "bench", *map(str, words)])
    return main(list(map(str, words)))


def changed(packing, tmp_path, **numbers):
    """(before, after): two files, the second with other numbers in its last row."""
    before = save(tmp_path / "before.json", packing)
    packing.rows[-1].update(numbers)
    return before, save(tmp_path / "after.json", packing)


@pytest.mark.parametrize(
    ("change", "status"),
    [(1.0, 0), (0.95, 0), (0.85, 1), (1.5, 0)],
    ids=["equal", "within the threshold", "slower", "faster"],
)
def test_compare_says_what_became_worse(packing, tmp_path, monkeypatch, change, status):
    speed = packing.rows[-1]["pairs_per_second"]
    files = changed(packing, tmp_path, pairs_per_second=speed * change)
    assert run(monkeypatch, "compare", *files) == status
    assert run(monkeypatch, "compare", *files, "--threshold", "2") == 0


def test_compare_misses_rows_and_numbers_that_are_gone(packing, tmp_path, monkeypatch, capsys):
    before = save(tmp_path / "before.json", packing)
    lost = copy.deepcopy(packing)
    lost.rows[-1].pop("seconds")
    assert run(monkeypatch, "compare", before, save(tmp_path / "lost.json", lost)) == 1
    lost.rows.pop()
    assert run(monkeypatch, "compare", before, save(tmp_path / "gone.json", lost)) == 1
    assert "gone: flat" in capsys.readouterr().out


def test_compare_leaves_times_of_another_device_out(packing, tmp_path, monkeypatch, capsys):
    before = save(tmp_path / "before.json", packing)
    packing.device = packing.device | {"name": "a slower one"}
    for row in packing.rows:
        row["seconds"] *= 3
    after = save(tmp_path / "after.json", packing)
    assert run(monkeypatch, "compare", before, after) == 0
    assert "times are left out" in capsys.readouterr().out
    assert run(monkeypatch, "compare", before, after, "--measures", "seconds") == 1


def test_worse_is_in_the_direction_of_the_measure():
    assert compare.worsening(1.0, 2.0, "lower") == 2.0
    assert compare.worsening(1.0, 2.0, "higher") == 0.5
    assert compare.worsening(0.0, 0.0, "lower") == 1.0
    assert compare.worsening(0.0, 1e-9, "lower") == math.inf
    assert compare.worsening(True, False, "higher") == math.inf  # was deterministic, and is not any more
    assert compare.worsening(False, True, "higher") == 0.0


def test_mistakes_are_one_line_and_exit_2(packing, tmp_path, monkeypatch, capsys):
    path = save(tmp_path / "packing.json", packing)
    packing.verb = "online"
    packing.rows, packing.keys, packing.measures = [], ["implementation"], {}
    for words in (
        ["compare", path, tmp_path / "absent.json"],
        ["compare", path, save(tmp_path / "online.json", packing)],
        ["show", tmp_path / "nowhere"],
        ["shwo"],
        ["show", "--htlm", "page.html"],
        ["head", "--lossses", "dpo"],
    ):
        assert run(monkeypatch, *words) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "did you mean" in said or words[0] not in ("shwo", "head")


def test_show_prints_every_result_and_no_markup_of_a_name(packing, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    packing.rows[0]["batches"] = "[red]padded[/]"
    packing.peers = {"TRL": {"version": None, "absent": "not installed"}}
    assert run(monkeypatch, "show", save(tmp_path / "packing.json", packing)) == 0
    said = capsys.readouterr().out
    assert "[red]padded[/]" in said
    assert "TRL was not measured: not installed" in said
    assert run(monkeypatch, "show") == 0
    said = capsys.readouterr().out
    assert all(x.device["name"] in said for x in RECORDS)


def test_the_page_is_whole_and_takes_no_markup_from_a_file(packing, tmp_path, monkeypatch):
    attack = "<script>alert(1)</script>"
    packing.rows[0]["batches"], packing.notes, packing.command = attack, [attack], f"prefuse bench {attack}"
    packing.settings["attack"] = attack
    paths = [save(tmp_path / "packing.json", packing), record.RESULTS / "accuracy.json"]
    assert run(monkeypatch, "show", *paths, "--html", tmp_path / "page.html") == 0
    text = (tmp_path / "page.html").read_text()
    assert "<script>alert" not in text
    assert text.count("&lt;script&gt;") >= 4
    assert text.count("<table") >= 2  # one for each result
    assert not re.findall(r"(?:src|href)=[\"'](?!#)", text)
    assert "1.8" in text


def test_numbers_are_short():
    numbers = (0.93642, 723.555, 3.374e-6, 12605, True, None, 12605.4, 1.0)
    assert [show.number(x) for x in numbers] == ["0.9364", "723.6", "3.37e-06", "12605", "yes", "", "12605", "1"]


def test_verbs_have_files_and_old_names_stay(monkeypatch, capsys):
    for verb in VERBS:
        assert (record.ROOT / "bench" / f"{verb}.py").is_file(), verb
    assert sum(map(len, GROUPS.values())) == len(VERBS)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, "loading", "--help")
    assert end.value.code == 0
    assert "prefuse bench data" in capsys.readouterr().out
