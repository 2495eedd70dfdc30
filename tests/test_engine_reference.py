"""The reference cache: used when everything it depends on is the same, and never when it is not or is damaged."""

import pytest
import torch

from prefuse.engine import reference
from prefuse.engine.batches import examples_of
from prefuse.engine.data import load_examples
from prefuse.engine.model import load_model, load_tokenizer
from prefuse.engine.reference import cache_key, reference_logps
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, weights, write_rows


@pytest.fixture
def setup(tmp_path):
    config = settings(model_name_or_path=save_model(tmp_path / "m"), dataset_name="d", output_dir="o")
    rows = write_rows(tmp_path / "p.jsonl", PAIRS)
    tokenizer = load_tokenizer(config.model_name_or_path)
    lm = load_model(config.model_name_or_path, config, torch.device("cpu"))
    return lm, examples_of(load_examples(rows, "pair", tokenizer, 64).examples), tmp_path / "cache"


ORDER = [[0, 3, 5, 7], [1, 2, 4], [6, 8, 9, 10, 11]]


def test_values_go_to_their_rows_whatever_the_batches(setup):
    lm, examples, _ = setup
    batched = reference_logps(lm, examples, ORDER)
    alone = reference_logps(lm, examples, [[i] for i in range(len(examples))])
    for index, (a, b) in enumerate(zip(batched, alone, strict=True)):
        assert a.dtype == torch.float32
        assert len(a) == sum(len(completion) for _, completion in examples.sequences[index])
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_second_time_it_is_read_and_says_so(setup, monkeypatch, caplog):
    lm, examples, cache = setup
    computed = reference_logps(lm, examples, ORDER, str(cache))
    monkeypatch.setattr(reference, "_compute", None)  # nothing to compute any more
    caplog.set_level("INFO", logger="prefuse")
    stored = reference_logps(lm, examples, ORDER, str(cache))
    assert all(torch.equal(a, b) for a, b in zip(computed, stored, strict=True))
    assert "reference log-probabilities of 12 examples read from" in caplog.text


@pytest.mark.parametrize("damage", ["flip", "cut", "about", "gone"])
def test_a_damaged_entry_is_computed_again(setup, damage, caplog):
    lm, examples, cache = setup
    computed = reference_logps(lm, examples, ORDER, str(cache))
    (entry,) = cache.iterdir()
    values = entry / "logps.safetensors"
    data = bytearray(values.read_bytes())
    data[-1] ^= 1
    {
        "flip": lambda: values.write_bytes(data),
        "cut": lambda: values.write_bytes(data[:-9]),
        "about": lambda: (entry / "about.json").write_text('{"key": 1'),
        "gone": lambda: (entry / "about.json").unlink(),
    }[damage]()
    again = reference_logps(lm, examples, ORDER, str(cache))
    assert all(torch.equal(a, b) for a, b in zip(computed, again, strict=True))
    assert "is damaged: computing it again" in caplog.text
    caplog.clear()
    reference_logps(lm, examples, ORDER, str(cache))
    assert "is damaged" not in caplog.text


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
