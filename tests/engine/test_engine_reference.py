"""The reference cache: used when everything it depends on is the same, and never when it is not or is damaged."""

import dataclasses
import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from prefuse.engine.data import Demonstration, load_examples
from prefuse.engine.data.batches import examples_of
from prefuse.engine.model.load import load_model, load_tokenizer
from prefuse.engine.run import reference_logps as reference
from prefuse.engine.run.files import sha256_of
from prefuse.engine.run.ranks import Ranks
from prefuse.engine.run.reference_logps import cache_key, reference_logps
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, weights, write_rows


@pytest.fixture(autouse=True)
def _warnings_alone(caplog):
    """A command that ran in this process before has left the level at INFO."""
    caplog.set_level("WARNING", logger="prefuse")


@pytest.fixture
def setup(tmp_path):
    config = settings(model_name_or_path=save_model(tmp_path / "m"), dataset_name="d", output_dir="o")
    rows = write_rows(tmp_path / "p.jsonl", PAIRS)
    tokenizer = load_tokenizer(config.model_name_or_path)
    lm = load_model(config.model_name_or_path, config, torch.device("cpu"))
    return lm, examples_of(load_examples(rows, "pair", tokenizer, 64).examples), tmp_path / "cache"


SHARD = "logps-00001-of-00001.safetensors"
ORDER = [[0, 3, 5, 7], [1, 2, 4], [6, 8, 9, 10, 11]]


def test_values_go_to_their_rows_whatever_the_batches(setup):
    lm, examples, _ = setup
    batched = reference_logps(lm, examples, ORDER)
    alone = reference_logps(lm, examples, [[i] for i in range(len(examples))])
    for index, (a, b) in enumerate(zip(batched, alone, strict=True)):
        assert a.dtype == torch.float32
        assert len(a) == sum(len(completion) for _, completion in examples.sequences[index])
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.fixture
def passes(monkeypatch):
    """The batches that the reference was asked about."""
    seen, real = [], reference.completion_logps
    monkeypatch.setattr(reference, "completion_logps", lambda lm, batch: seen.append(batch.rows) or real(lm, batch))
    return seen


def same(one, two):
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_second_time_it_is_read_and_one_batch_is_computed_again(setup, passes, caplog):
    lm, examples, cache = setup
    computed = reference_logps(lm, examples, ORDER, str(cache))
    assert len(passes) == len(ORDER)
    caplog.set_level("INFO", logger="prefuse")
    for _ in range(2):
        passes.clear()
        assert same(reference_logps(lm, examples, ORDER, str(cache)), computed)
        assert len(passes) == 1
        assert passes[0] in [[examples.rows[i] for i in indices] for indices in ORDER]
        checked = passes[0]
    assert passes == [checked]
    assert "reference log-probabilities of 12 examples read from" in caplog.text
    assert not list(cache.glob("*.tmp"))


def test_numbers_from_other_batches_are_the_same_to_rounding_and_taken(setup, passes, caplog):
    lm, examples, cache = setup
    computed = reference_logps(lm, examples, ORDER, str(cache))
    padding_free = dataclasses.replace(examples, padding_free=True)
    passes.clear()
    assert same(reference_logps(lm, padding_free, [[i] for i in range(12)], str(cache)), computed)
    assert len(passes) == 1
    assert not caplog.records


def test_rows_that_no_batch_has_are_not_asked_about_and_come_when_they_are_wanted(setup, passes, caplog):
    lm, examples, cache = setup
    caplog.set_level("INFO", logger="prefuse")
    part = reference_logps(lm, examples, ORDER[:1], str(cache))
    assert passes == [[examples.rows[i] for i in ORDER[0]]]
    with pytest.raises(AssertionError, match="was not asked about example 1"):
        part[1]
    first = {i: part[i].clone() for i in ORDER[0]}
    passes.clear()
    again = reference_logps(lm, examples, ORDER[:1], str(cache))
    assert len(passes) == 1  # the one that is compared
    assert "reference log-probabilities of 4 examples read from" in caplog.text
    passes.clear()
    # Other batches: what is known stays, to the last bit, though another batch would give it other last bits.
    whole = reference_logps(lm, examples, [[0, 1], [2, 3, 4], [5, 7], [6, 8, 9, 10, 11]], str(cache))
    assert [len(rows) for rows in passes] == [2, 2, 3, 5]  # one to compare, [5, 7]; then all others
    assert all(torch.equal(x[i], first[i]) for i in ORDER[0] for x in (again, whole))
    passes.clear()
    assert same(reference_logps(lm, examples, ORDER, str(cache)), whole)
    assert len(passes) == 1
    assert len(list(cache.iterdir())) == 1
    assert not list(cache.glob("*/known*"))
    assert "computing it again" not in caplog.text


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + bytes([1 ^ data[-1]])])
def test_which_rows_are_known_is_checked_too(damage, setup, caplog):
    lm, examples, cache = setup
    computed = reference_logps(lm, examples, ORDER[:1], str(cache))
    (known,) = cache.glob("*/known.safetensors")
    known.write_bytes(damage(known.read_bytes()))
    again = reference_logps(lm, examples, ORDER[:1], str(cache))
    assert "known.safetensors does not have the hash" in caplog.text
    assert all(torch.equal(again[i], computed[i]) for i in ORDER[0])


def rewrite(entry, change):
    """Another set of numbers, with the hashes to it: nothing but the reference itself can tell."""
    path = entry / SHARD
    save_file({"logps": change(load_file(path)["logps"])}, path)
    about = json.loads((entry / "about.json").read_text())
    about["shards"][SHARD] = sha256_of(path)
    (entry / "about.json").write_text(json.dumps(about))


@pytest.mark.parametrize(
    "change",
    [lambda x: x - 0.01, lambda x: x * 1.001, lambda x: x.roll(1), torch.zeros_like],
    ids=["shifted", "scaled", "rolled", "zeros"],
)
def test_numbers_that_the_reference_would_not_say_now_are_computed_again(change, setup, passes, caplog):
    lm, examples, cache = setup
    computed = reference_logps(lm, examples, ORDER, str(cache))
    (entry,) = cache.iterdir()
    rewrite(entry, change)
    passes.clear()
    assert same(reference_logps(lm, examples, ORDER, str(cache)), computed)
    assert len(passes) == 1 + len(ORDER)
    assert f"{entry} differs from what the reference says now, by " in caplog.text
    assert "times what rounding explains: computing it again" in caplog.text
    passes.clear()
    assert same(reference_logps(lm, examples, ORDER, str(cache)), computed)
    assert len(passes) == 1


DAMAGE = {
    "flip": "does not have the hash",
    "cut": "does not have the hash",
    "shard": "No such file",
    "about": "is damaged",
    "gone": "No such file",
    "few": "has (5,) numbers, expected",
    "none": "is damaged",
    "key": "is not what its key says",
    "nan": "differs from what the reference says now, by inf times",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_computed_again(setup, damage, caplog):
    lm, examples, cache = setup
    computed = reference_logps(lm, examples, ORDER, str(cache))
    (entry,) = cache.iterdir()
    values, about = entry / SHARD, entry / "about.json"
    data = bytearray(values.read_bytes())
    data[-1] ^= 1
    said = json.loads(about.read_text())
    {
        "flip": lambda: values.write_bytes(data),
        "cut": lambda: values.write_bytes(data[:-9]),
        "shard": lambda: values.unlink(),
        "about": lambda: about.write_text('{"key": 1'),
        "gone": lambda: about.unlink(),
        "few": lambda: rewrite(entry, lambda x: x[:5].clone()),
        "none": lambda: about.write_text(json.dumps(said | {"shards": {}})),
        "key": lambda: about.write_text(json.dumps(said | {"key": said["key"] | {"dtype": "torch.float64"}})),
        "nan": lambda: rewrite(entry, lambda x: x * float("nan")),
    }[damage]()
    assert same(reference_logps(lm, examples, ORDER, str(cache)), computed)
    assert ": computing it again" in caplog.text
    assert DAMAGE[damage] in caplog.text
    caplog.clear()
    reference_logps(lm, examples, ORDER, str(cache))
    assert not caplog.records


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_where_nothing_can_be_written_the_numbers_are_there_all_the_same(error, setup, monkeypatch, caplog):
    from safetensors import torch as safetensors_torch

    def full(tensors, path):
        path.write_bytes(b"half")
        raise error

    lm, examples, cache = setup
    computed = reference_logps(lm, examples, ORDER)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_torch, "save_file", full)
        assert same(reference_logps(lm, examples, ORDER, str(cache)), computed)
    assert "could not be written" in caplog.text
    assert "No space left on device" in caplog.text
    assert not list(cache.iterdir())
    caplog.clear()
    assert same(reference_logps(lm, examples, ORDER, "/proc/prefuse"), computed)
    assert "could not be written" in caplog.text


def test_runs_that_write_at_once_leave_one_whole_entry(setup, monkeypatch, caplog):
    """Two runs of a sweep find nothing, compute the same, and write it: the second while the first is not done."""
    lm, examples, cache = setup
    real, nested = reference.publish, []

    def meanwhile(aside, final):
        if not nested:
            nested.append(True)
            reference_logps(lm, examples, ORDER, str(cache))
        real(aside, final)

    monkeypatch.setattr(reference, "publish", meanwhile)
    computed = reference_logps(lm, examples, ORDER, str(cache))
    assert len(list(cache.iterdir())) == 1
    assert same(reference_logps(lm, examples, ORDER, str(cache)), computed)
    assert nested
    assert not [record for record in caplog.records if record.levelname != "INFO"]


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 12))
@hypothesis_settings(deadline=None, max_examples=30)
def test_any_number_of_ranks_reads_what_another_number_wrote(writers, readers, count):
    """Each rank writes its shard; readers take their shards in turn, and together have every number once."""
    examples = examples_of([Demonstration([1], [2] * (1 + i % 3), f"r:{i}") for i in range(count)])
    logps = [torch.rand(1 + i % 3) for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        entry = Path(folder) / "entry"
        entry.mkdir()
        shards = {}
        for rank in range(writers):
            name = reference._shard(rank, writers)
            save_file({"logps": torch.cat(logps).tensor_split(writers)[rank].clone()}, entry / name)
            shards[name] = sha256_of(entry / name)
        (entry / "about.json").write_text(json.dumps({"key": {}, "shards": shards}))
        total = 0
        for rank in range(readers):
            part, fault = reference._read(entry, {}, examples, OneOfMany(rank, readers))
            assert fault is None
            total = total + part.values
        assert torch.equal(total, torch.cat(logps))


class OneOfMany(Ranks):
    """A rank that hears only itself."""

    def sum_(self, x):
        return x

    def texts(self, text):
        return [text]


def test_the_key_changes_with_all_that_the_numbers_depend_on(setup):
    lm, examples, _ = setup
    base = cache_key(lm, examples)
    assert cache_key(lm, examples) == base

    assert cache_key(lm, examples.select(range(11))) != base
    lm.model.config.rms_norm_eps *= 2
    assert cache_key(lm, examples) != base
    lm.model.config.rms_norm_eps /= 2
    assert cache_key(lm, examples) == base
    with torch.no_grad():
        lm.model.lm_head.weight[5, 5] += 1e-3
    assert cache_key(lm, examples) != base


def in_vain(*args):
    raise AssertionError("the reference was computed again")


CHANGES = {
    "learning rate": {"learning_rate": 3e-3, "lr_scheduler_type": "cosine"},
    "batches": {"per_device_train_batch_size": 3, "padding_free": False, "seed": 7},
    "ipo": {"loss_type": "ipo", "beta": 0.5},
    "kto": {"loss_type": "kto"},  # its mismatches are computed
    "lora": {"use_peft": True},
    "another policy": {"model_name_or_path": "other", "ref_model_name_or_path": "m"},
}


@pytest.mark.quick_cases(every=4)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("name", CHANGES)
def test_runs_of_one_reference_and_the_same_rows_share_it(name, tmp_path, monkeypatch, caplog):
    base = {
        "model_name_or_path": save_model(tmp_path / "m"), "dataset_name": write_rows(tmp_path / "p.jsonl", PAIRS),
        "reference_cache": str(tmp_path / "cache"), "max_steps": 3, "loss_type": "dpo",
    }  # fmt: skip
    train(settings(**base, output_dir=str(tmp_path / "one")), "train")
    entries = {path.name for path in (tmp_path / "cache").iterdir()}
    assert len(entries) == 1
    more = dict(CHANGES[name])
    if "ref_model_name_or_path" in more:
        more = {
            "model_name_or_path": save_model(tmp_path / "other", seed=3),
            "ref_model_name_or_path": str(tmp_path / "m"),
        }
    if name != "kto":
        monkeypatch.setattr(reference, "_compute", in_vain)
    caplog.set_level("INFO", logger="prefuse")
    train(settings(**base | more | {"output_dir": str(tmp_path / "two")}), "train")
    read = [record.getMessage() for record in caplog.records if " read from " in record.getMessage()]
    assert len(read) == 1
    assert "computing it again" not in caplog.text
    now = {path.name for path in (tmp_path / "cache").iterdir()}
    assert now - entries == set() or name == "kto"
    if name not in ("another policy", "kto"):
        first = read_log(tmp_path / "two")[0]
        assert abs(first["rewards/margins"]) < 1e-5  # from other batches, to rounding


def test_another_reference_finds_nothing(tmp_path):
    base = {"dataset_name": write_rows(tmp_path / "p.jsonl", PAIRS), "reference_cache": str(tmp_path / "cache")}
    for number, more in enumerate(({"seed": 0}, {"seed": 1}, {"seed": 0, "rms_norm_eps": 1e-3})):
        model = save_model(tmp_path / f"m{number}", **more)
        config = settings(**base, model_name_or_path=model, output_dir=str(tmp_path / f"o{number}"), max_steps=1)
        train(config, "train")
        assert len(list((tmp_path / "cache").iterdir())) == number + 1


def test_a_run_with_a_full_cache_equals_one_with_an_empty_cache(tmp_path):
    base = {
        "model_name_or_path": save_model(tmp_path / "m"), "dataset_name": write_rows(tmp_path / "p.jsonl", PAIRS),
        "reference_cache": str(tmp_path / "cache"), "loss_type": "kto", "max_steps": 8, "eval_fraction": 0.2,
    }  # fmt: skip
    for name in "one", "two":
        train(settings(**base, output_dir=str(tmp_path / name)), "train")
    # rows and two epochs of mismatches, held-out rows and their mismatches
    assert len(list((tmp_path / "cache").iterdir())) == 5
    assert all(torch.equal(weights(tmp_path / "one")[k], v) for k, v in weights(tmp_path / "two").items())
    assert read_log(tmp_path / "one")[0] == read_log(tmp_path / "two")[0]


@pytest.mark.slow
def test_a_short_run_asks_about_its_own_rows_and_a_longer_one_goes_on_from_there(tmp_path, passes):
    base = {
        "model_name_or_path": save_model(tmp_path / "m"), "dataset_name": write_rows(tmp_path / "p.jsonl", PAIRS),
        "loss_type": "kto", "per_device_train_batch_size": 3, "padding_free": False,
    }  # fmt: skip

    def run(name, cache, steps):
        passes.clear()
        folder = tmp_path / name
        train(settings(**base, output_dir=str(folder), reference_cache=str(tmp_path / cache), max_steps=steps), "train")
        return sum(map(len, passes)), weights(folder)

    count, _ = run("short", "grows", 2)
    assert count == 2 * 2 * 3  # two steps of three rows, and as many mismatches
    count, grown = run("long", "grows", 9)  # 24 rows in 8 steps, then one step of a second epoch
    compared = 2 * 3
    assert count == compared + (24 - 6) + (24 - 6) + 3
    count, fresh = run("fresh", "new", 9)
    assert count == 24 + 24 + 3
    assert all(torch.equal(grown[name], fresh[name]) for name in fresh)
    count, repeated = run("repeated", "grows", 9)
    assert count == 3 * 3
    assert all(torch.equal(repeated[name], fresh[name]) for name in fresh)
