"""Flat batches in the engine: the same training as with padded ones, fewer tokens run, and a way back where refused."""

import dataclasses
import math

import pytest
import torch
import transformers

from prefuse.engine.config.settings import Config, validate
from prefuse.engine.data import Labelled, load_examples
from prefuse.engine.data.batches import collate, examples_of
from prefuse.engine.errors import UserError
from prefuse.engine.evaluate import compare
from prefuse.engine.model import flops
from prefuse.engine.model.flops import measured_flops, peak_flops, training_flops, trunk_weights
from prefuse.engine.model.forward import LanguageModel
from prefuse.engine.model.load import load_model, load_tokenizer
from prefuse.engine.report.log import Window
from prefuse.engine.run import plan as run
from prefuse.engine.train import train
from prefuse.transformers import head_of
from tiny_run import PAIRS, SHAPE, read_log, save_model, settings, weights, write_rows


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Eleven pairs; two of them once more with another answer, so that pairs share prompts too."""
    again = [PAIRS[i] | {"rejected": "grass grass"} for i in (0, 4)]
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", [*PAIRS[:11], *again])


def trained(tmp_path, name, model, data, command="train", **changes):
    out = tmp_path / name
    config = settings(
        command, model_name_or_path=model, dataset_name=data, output_dir=str(out),
        adam_epsilon=1e-2,  # else Adam blows up the last bits of gradients that are nearly zero
        **changes,
    )  # fmt: skip
    train(config, command)
    return weights(out), read_log(out)


RATES = {"tokens_per_second", "samples_per_second", "pairs_per_second", "tokens_saved", "mfu"}


def assert_same_training(one, two):
    (weights_one, log_one), (weights_two, log_two) = one, two
    for key, value in weights_one.items():
        torch.testing.assert_close(weights_two[key], value, rtol=0, atol=2e-6 * value.abs().max().item())
    assert len(log_one) == len(log_two)
    for a, b in zip(log_one, log_two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - RATES:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=2e-6), key


ANOTHER = [pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "kto")]


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("name", ["sft", "dpo", *ANOTHER])
def test_training_is_the_same_as_with_padded_batches(name, model, pairs, tmp_path):
    command = "sft" if name == "sft" else "train"
    changes = {"loss_type": name.replace("sft", "dpo"), "eval_fraction": 0.2, "num_train_epochs": 2.0}
    padded = trained(tmp_path, "padded", model, pairs, command, padding_free=False, **changes)
    flat = trained(tmp_path, "flat", model, pairs, command, padding_free=True, **changes)
    by_tokens = trained(tmp_path, "bins", model, pairs, command, max_tokens_per_batch=40, **changes)
    assert_same_training(flat, padded)
    assert_same_training(by_tokens, padded)
    saved = [[row["tokens_saved"] for row in log if "tokens_saved" in row] for _, log in (padded, flat, by_tokens)]
    assert set(saved[0]) == {0.0}
    assert all(0.05 < share < 0.9 for share in saved[1])
    assert name in ("sft", "kto") or min(saved[1]) > 0.25  # a prompt of each pair less


@pytest.mark.slow
def test_the_first_rewards_are_exactly_zero_in_flat_batches_of_any_size(model, pairs, tmp_path, caplog):
    for budget in (None, 30, 64):
        for loss_type in ("dpo", "kto"):
            _, log = trained(
                tmp_path, f"{loss_type}{budget}", model, pairs, loss_type=loss_type, max_tokens_per_batch=budget,
                max_steps=1, eval_fraction=0.2, padding_free=True,
            )  # fmt: skip
            first, _ = (row for row in log if row["step"] == 0 or "loss" in row)
            assert first["eval_rewards/chosen"] == first["eval_rewards/rejected"] == 0.0
            step = next(row for row in log if "loss" in row)
            assert step["rewards/chosen"] == step["rewards/rejected"] == 0.0
            assert step["loss"] == pytest.approx(math.log(2) if loss_type == "dpo" else 0.5, abs=1e-7)
    assert "was expected" not in caplog.text


def test_z0_of_a_microbatch_is_that_of_so_many_rows(model, pairs, tmp_path):
    """Cut by tokens, the paper's habit would depend on lengths: there microbatches stay what they are."""
    changes = {"loss_type": "kto", "z0_scope": "microbatch", "per_device_train_batch_size": 2,
               "gradient_accumulation_steps": 2, "learning_rate": 0.1}  # fmt: skip
    padded = trained(tmp_path, "padded", model, pairs, padding_free=False, **changes)
    assert_same_training(trained(tmp_path, "flat", model, pairs, padding_free=True, **changes), padded)
    whole = trained(tmp_path, "step", model, pairs, **changes | {"z0_scope": "step"})
    assert whole[1][-1]["loss"] != pytest.approx(padded[1][-1]["loss"], rel=1e-4)


def test_passes_are_cut_by_tokens(model, pairs, tmp_path, monkeypatch):
    sizes = []
    real = run.collate

    def counting(*args):
        batch = real(*args)
        sizes.append((batch.num_items, batch.tokens.num_tokens))
        return batch

    monkeypatch.setattr(run, "collate", counting)
    monkeypatch.setattr(
        "prefuse.engine.train.check_end", lambda *args, **kwargs: None
    )  # it looks at the first step's rows again
    changes = {"max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    trained(tmp_path, "one", model, pairs, **changes)
    assert sum(items for items, _ in sizes) == 8
    assert len(sizes) <= 2  # a padded batch of one pair of 64 + 64 tokens has room for many short pairs
    sizes.clear()
    trained(tmp_path, "many", model, pairs, max_tokens_per_batch=40, **changes)
    assert sum(items for items, _ in sizes) == 8
    assert len(sizes) > 2
    assert all(tokens <= 40 or items == 1 for items, tokens in sizes)
    sizes.clear()
    trained(tmp_path, "padded", model, pairs, padding_free=False, **changes)
    assert [items for items, _ in sizes] == [1] * 8


def test_evaluation_is_the_same(model, pairs, tmp_path):
    other = save_model(tmp_path / "other", seed=1)
    config = settings(
        "eval", model_name_or_path=model, ref_model_name_or_path="-", dataset_name=pairs, eval_fraction=1.0,
        loss_type="kto", max_tokens_per_batch=50,
    )  # fmt: skip
    examples = examples_of(load_examples(pairs, "labelled", load_tokenizer(model), 64).examples)
    flat = dataclasses.replace(examples, padding_free=True)
    lm, ref = (load_model(path, config, torch.device("cpu")) for path in (model, other))
    wanted, got = compare(lm, ref, examples, config), compare(lm, ref, flat, config)
    assert wanted.keys() == got.keys()
    for name, value in wanted.items():
        assert got[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


STABLELM = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.1, **SHAPE}


def test_a_model_that_takes_no_flat_batches_trains_on_padded_ones_and_this_is_said(pairs, tmp_path, caplog):
    stablelm = transformers.StableLmForCausalLM(transformers.StableLmConfig(**STABLELM))
    folder = save_model(tmp_path / "model", model=stablelm)
    _, log = trained(tmp_path, "run", folder, pairs, max_steps=1, eval_fraction=0.2)
    step = next(row for row in log if "loss" in row)
    assert step["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert step["tokens_saved"] == 0.0
    assert "got no segments of its flat batch" in caplog.text
    assert "Batches are padded, and prompts run once for each completion" in caplog.text
    with pytest.raises(UserError, match=r"StableLmAttention got no segments .*; set padding_free to false"):
        trained(tmp_path, "strict", folder, pairs, padding_free=True)
    caplog.clear()
    trained(tmp_path, "plain", folder, pairs, padding_free=False, max_steps=1)
    assert "flat batch" not in caplog.text


def test_a_reference_that_takes_none_decides_for_both(model, pairs, tmp_path, caplog):
    stablelm = transformers.StableLmForCausalLM(transformers.StableLmConfig(**STABLELM))
    ref = save_model(tmp_path / "ref", model=stablelm)
    _, log = trained(tmp_path, "run", model, pairs, ref_model_name_or_path=ref, max_steps=1)
    assert log[0]["tokens_saved"] == 0.0
    assert "Batches are padded" in caplog.text


def test_settings_of_flat_batches_are_checked():
    base = Config(model_name_or_path="m", dataset_name="d", output_dir="o")
    with pytest.raises(UserError, match="max_tokens_per_batch must be at least 1, got 0"):
        validate(dataclasses.replace(base, max_tokens_per_batch=0), "train")
    with pytest.raises(UserError, match="max_tokens_per_batch is about flat batches: drop it, or padding_free false"):
        validate(dataclasses.replace(base, max_tokens_per_batch=9, padding_free=False), "train")
    config = dataclasses.replace(base, max_length=100)
    assert config.token_budget(4, sequences=2) == 800
    assert dataclasses.replace(config, max_tokens_per_batch=70).token_budget(4, sequences=2) == 70


# ---------------------------------------------------------------------------------------------------------
# Rates


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
def test_weights_and_flops_counted_by_hand(model):
    lm = load_model(model, settings(model_name_or_path=model, dataset_name="d", output_dir="o"), torch.device("cpu"))
    # two layers: q and o of 32 x 32, k and v of 16 x 32 (half the heads), three matrices of 64 x 32
    trunk = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert trunk_weights(lm.model) == (trunk, 0)
    rows = [Labelled([1, 2, 3], [4, 5], True, "f:0"), Labelled([1, 2, 3], [6], False, "f:1")]
    examples = dataclasses.replace(examples_of(rows), padding_free=True)
    batch = collate(examples, [0, 1])
    assert training_flops(lm, batch) == 6 * (trunk * 6 + 300 * 32 * 3)  # six tokens run, three are predicted
    # Frozen weights have no gradient of their own. Rank 4 beside each matrix: 4 * (rows + columns).
    config = settings(model_name_or_path=model, dataset_name="d", output_dir="o", use_peft=True, lora_r=4)
    lm = load_model(model, config, torch.device("cpu"), trains=True)
    adapters = 2 * 4 * (2 * (32 + 32) + 2 * (16 + 32) + 3 * (64 + 32))
    assert trunk_weights(lm.model) == (trunk + adapters, trunk)
    assert training_flops(lm, batch) == (4 * trunk + 6 * adapters) * 6 + 4 * 300 * 32 * 3


def test_the_peak_is_known_for_some_gpus_and_measured_on_a_cpu(model, monkeypatch):
    lm = load_model(model, settings(model_name_or_path=model, dataset_name="d", output_dir="o"), torch.device("cpu"))
    assert peak_flops(lm) == measured_flops(torch.float32)
    on_gpu = dataclasses.replace(lm, device=torch.device("cuda"), compute_dtype=torch.bfloat16)
    for name, peak in (("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA T4", None)):
        monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(on_gpu) == peak
    monkeypatch.setattr(flops.torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops(dataclasses.replace(on_gpu, compute_dtype=torch.float32)) is None
    mixtral = transformers.MixtralForCausalLM(transformers.MixtralConfig(**STABLELM, num_local_experts=2))
    for where in on_gpu, lm:
        experts = LanguageModel(mixtral, head_of(mixtral), where.device, torch.bfloat16, "torch")
        assert peak_flops(experts) is None  # a token does not meet all of its weights


def test_what_a_cpu_could_do_is_the_best_of_a_few_products(monkeypatch):
    times = iter([0.0, 9.0, 10.0, 10.5, 20.0, 20.25, 30.0, 31.0])  # the first, however it went, does not count
    monkeypatch.setattr(flops.time, "perf_counter", lambda: next(times))
    assert measured_flops.__wrapped__(torch.float32, size=8, rounds=3) == 2 * 8**3 / 0.25


def test_rates_are_over_the_time_since_the_last_line(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("prefuse.engine.report.log.time.perf_counter", lambda: clock[0])
    window = Window(peak_flops=1e6)
    window.count(tokens=500, samples=4, flops=3e5)
    window.count(tokens=300, samples=4, flops=1e5)
    clock[0] += 2.0
    means = window.means()
    assert means == {"tokens_per_second": 400.0, "samples_per_second": 4.0, "mfu": pytest.approx(0.2)}
    pairs = Window(item="pair")
    pairs.count(tokens=500, samples=4, flops=3e5)
    clock[0] += 2.0
    assert pairs.means() == {"tokens_per_second": 250.0, "samples_per_second": 2.0, "pairs_per_second": 2.0}
    clock[0] -= 2.0
    window.clear()
    plain = Window()
    clock[0] += 1.0
    assert window.means()["samples_per_second"] == 0
    assert "mfu" not in plain.means()


def test_rates_and_savings_are_logged(model, pairs, tmp_path, capsys):
    _, log = trained(tmp_path, "run", model, pairs, max_steps=1)
    assert log[0]["pairs_per_second"] == log[0]["samples_per_second"] > 0
    assert 0 < log[0]["mfu"] < 1
    _, log = trained(tmp_path, "kto", model, pairs, max_steps=1, loss_type="kto")
    assert "pairs_per_second" not in log[0]
    assert f"tokens_saved {log[0]['tokens_saved']:.4g}" in capsys.readouterr().out
