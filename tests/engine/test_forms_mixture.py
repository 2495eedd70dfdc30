"""Several sources as one, with TRL's names and TRL's shares."""

import pytest

from prefuse.engine.cli import parse
from prefuse.engine.config.yaml_file import read_yaml
from prefuse.engine.data import DataError, load_examples
from prefuse.engine.data.forms import read_records
from rows import said, write_lines
from tiny_tokenizer import CHATML, tiny_tokenizer


@pytest.fixture
def sets(tmp_path):
    strings = [{"prompt": f"q{i}", "chosen": "A", "rejected": "B"} for i in range(10)]
    questions = [{"question": f"r{i}", "response_a": "A", "response_b": "B", "winner": "a"} for i in range(6)]
    return write_lines(tmp_path / "a.jsonl", strings), write_lines(tmp_path / "b.jsonl", questions)


def prompts(datasets):
    return [said(record)[0].removeprefix("user: ") for record in read_records(datasets, "pair").outcomes]


def test_sources_of_several_forms_stand_one_behind_the_other(sets):
    assert prompts(list(sets)) == [f"q{i}" for i in range(10)] + [f"r{i}" for i in range(6)]
    dataset = load_examples(list(sets), "pair", tiny_tokenizer(chat_template=CHATML), 64)
    assert (dataset.rows, len(dataset.examples)) == (16, 16)
    assert dataset.form == "prompt/chosen/rejected + question/response_a/response_b/winner"
    assert dataset.notes == ["rows whose first answer is the chosen one: 6"]


def test_fractions_give_the_shares_that_trl_gives(sets):
    pytest.importorskip("trl")
    from trl.scripts.utils import DatasetConfig, DatasetMixtureConfig, get_dataset

    for shares in ((0.5, 0.5), (3, 1), (0.1, 0.9)):
        mixture = [{"path": path, "fraction": share} for path, share in zip(sets, shares, strict=True)]
        ours = prompts(mixture)
        theirs = DatasetMixtureConfig(
            datasets=[DatasetConfig("json", data_files=path, fraction=s) for path, s in zip(sets, shares, strict=True)]
        )
        rows = get_dataset(theirs)["train"]
        assert ours == [row["prompt"] or row["question"] for row in rows]


def test_a_part_may_name_its_columns(sets, tmp_path):
    path = write_lines(tmp_path / "c.jsonl", [{"prompt": "s", "chosen": "A", "rejected": "B", "why": "text"}])
    assert prompts([{"path": path, "columns": ["prompt", "chosen", "rejected"]}]) == ["s"]
    with pytest.raises(DataError, match='"why" holds text'):
        prompts([{"path": path}])


REFUSED = {
    "one without fraction": ([{"path": "a", "fraction": 1}, {"path": "b"}], "for all of the sources or for none"),
    "fraction 0": ([{"path": "a", "fraction": 0}], "a fraction must be above 0"),
    "fraction text": ([{"path": "a", "fraction": "half"}], "fraction 'half' is not a number"),
    "no path": ([{"fraction": 1}], "expected a path and|expected a path, and perhaps"),
    "unknown key": ([{"path": "a", "weight": 1}], "has the entry .*'weight'"),
}


@pytest.mark.parametrize(("datasets", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_mixture_is_refused(datasets, message):
    with pytest.raises(DataError, match=message):
        read_records(datasets, "pair")


def test_pairs_and_labelled_rows_do_not_mix(sets, tmp_path):
    labelled = write_lines(tmp_path / "d.jsonl", [{"prompt": "s", "completion": "A", "label": True}])
    with pytest.raises(DataError, match=r"a mixture of pairs and of other rows .* convert them first"):
        read_records([sets[0], labelled], "labelled")


def test_a_mixture_comes_from_yaml_and_from_flags(tmp_path):
    (tmp_path / "run.yaml").write_text("datasets:\n- path: a.jsonl\n  fraction: 0.7\n- path: b\n  fraction: 0.3\n")
    assert read_yaml(tmp_path / "run.yaml").datasets == [
        {"path": "a.jsonl", "fraction": 0.7},
        {"path": "b", "fraction": 0.3},
    ]
    _, config = parse(["train", "--datasets", "path=a.jsonl,fraction=0.7", "path=b,fraction=0.3"])
    assert config.datasets == ["path=a.jsonl,fraction=0.7", "path=b,fraction=0.3"]
