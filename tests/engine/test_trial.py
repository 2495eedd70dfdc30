"""`prefuse doctor`'s trial: what a run will compute is counted exactly, and a few layers say how long it takes."""

import time

import pytest
import torch

from prefuse.engine import doctor
from prefuse.engine.config.settings import Config, validate
from prefuse.engine.report import clock as clock_module
from prefuse.engine.run import needs, trial
from prefuse.engine.run.setup import prepare
from prefuse.engine.train import train
from tiny_run import PAIRS, save_model, write_rows

ROOM = 1 << 30
KINDS = {
    "lora": ("train", {"use_peft": True}), "all weights": ("train", {}), "padded": ("train", {"padding_free": False}),
    "kto": ("train", {"loss_type": "kto"}), "without reference": ("train", {"loss_type": "simpo"}),
    "checkpointing": ("train", {"gradient_checkpointing": True}), "sft": ("sft", {}), "reward": ("reward", {}),
    "many small": ("train", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_length": 32}),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trial")
    return {
        "model_name_or_path": save_model(folder / "model", num_hidden_layers=6),
        "dataset_name": write_rows(folder / "pairs.jsonl", PAIRS), "output_dir": str(folder / "run"),
        "device": "cpu", "eval_fraction": 0.0, "max_length": 64, "save_steps": 0,
    }  # fmt: skip


def settings_of(files, kind, **changes):
    command, more = KINDS[kind]
    return command, validate(Config(**files | more | changes), command)


@pytest.mark.parametrize("kind", ["lora", "padded", "kto", "many small"])
@pytest.mark.parametrize("changes", [{"max_steps": 2}, {"num_train_epochs": 3.0}], ids=["two steps", "three epochs"])
def test_what_the_steps_run_is_counted(kind, changes, files, tmp_path):
    """Against the batches that the run's own plan makes, of all its epochs where their cuts do not change the sum."""
    command, config = settings_of(files, kind, output_dir=str(tmp_path), **changes)
    run = prepare(config, command)
    plan = trial.plan_of(run.data.examples, config, run.loss)
    batches = [batch for share in run.data.steps_from(0) for batch in share.batches]
    run.log.close()
    run.home.close()
    first = batches[: plan.microbatches]
    assert plan.steps == run.data.total_steps
    assert plan.epochs == (3.0 if "num_train_epochs" in changes else 1.0)
    assert plan.tokens == sum(batch.tokens.num_tokens for batch in first)
    assert plan.completions == sum(len(batch.targets) for batch in first)
    assert plan.largest == max(batch.tokens.num_tokens for batch in first)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_has_a_trial(kind, files):
    command, config = settings_of(files, kind)
    found = needs.estimate_needs(config, command, [], ROOM)
    assert not found.notes
    assert 0 < found.seconds < 600
    assert found.slower >= 1
    assert found.activations > 0
    said = doctor._time_of_run(found, torch.device("cpu")).said
    assert "by a trial of a few layers" in said
    rule = needs.estimate_needs(config, command, [])
    assert rule.operations == found.operations
    assert found.activations == pytest.approx(rule.activations, rel=0.6)


def test_more_layers_tokens_and_epochs_take_as_much_longer():
    made = trial.Trial(100, 50, 1.0, 0.5, 2.0, 0.25, 0.75, 1e-3, 10, 7, 1.0)
    plan = trial.Plan(3, 2.0, 4, 200, 100, 60, [0])
    # Twice: 200 / 100 tokens in 5 layers, 4 microbatches' rest, 100 / 50 tokens of the head; then 3 steps of 1000.
    assert made.training(plan, 5, 1000) == pytest.approx(2 * (2 * 5 + 4 * 0.5 + 2 * 2.0) + 3)
    assert made.reading(plan, 5) == pytest.approx(2 * 5 * 0.25 + 2 * 0.75)
    assert made.activations(60, 5) == int(0.6 * (5 * 10 + 7))


def test_layers_are_back_after_a_trial(files):
    from prefuse.engine.model.layers import decoder_layers
    from prefuse.engine.model.load import load_model

    _, config = settings_of(files, "all weights")
    model = load_model(config.model_name_or_path, config, torch.device("cpu")).model
    layers = decoder_layers(model)
    with trial._only(model, layers[:2]):
        assert len(decoder_layers(model)) == 2
        assert len(model(torch.ones(1, 3, dtype=torch.long), output_hidden_states=True).hidden_states) == 3
    assert decoder_layers(model) == layers


@pytest.mark.parametrize(
    ("changes", "room", "said"),
    [({}, 1000, "too little memory"), ({"load_in_4bit": True, "use_peft": True}, ROOM, "load_in_4bit")],
)
def test_without_a_trial_time_is_an_interval_and_says_why(changes, room, said, files):
    command, config = settings_of(files, "lora", **changes)
    found = needs.estimate_needs(config, command, [], room)
    shown = doctor._time_of_run(found, torch.device("cpu")).said
    assert found.seconds is None
    assert said in shown
    assert " to " in shown.split(":")[0]


def test_lists_with_an_entry_for_each_layer_are_cut(tmp_path):
    from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    about = Gemma3TextConfig(vocab_size=300, num_hidden_layers=6, layer_types=kinds, **shape)
    path = save_model(tmp_path, model=Gemma3ForCausalLM(about))
    config = Config(model_name_or_path=path, dataset_name="d", output_dir="o")
    cut = needs.cut_model(path, config, AutoModelForCausalLM, 4)
    assert cut.config.layer_types == kinds[:4]
    assert len(cut.model.layers) == 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "all weights"])
def test_a_run_takes_what_the_trial_says(kind, tmp_path, monkeypatch):
    """CPU seconds, so that other programs do not count. On two real runs of SmolLM2 they were 1% to 6% apart."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    shape = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 12}
    files = {
        "model_name_or_path": save_model(tmp_path / "model", **shape), "dataset_name": write_rows(
            tmp_path / "pairs.jsonl", [dict(pair, chosen=pair["chosen"] * 20) for pair in PAIRS] * 2
        ), "output_dir": str(tmp_path / "run"), "device": "cpu", "eval_fraction": 0.0, "save_steps": 0,
    }  # fmt: skip
    command, config = settings_of(files, kind)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        said = needs.estimate_needs(config, command, [], ROOM).seconds
        train(config, command)
    finally:
        torch.set_num_threads(threads)
    seconds = clock_module.clock.seconds
    took = sum(seconds[part] for part in ("trunk", "head", "reference", "optimizer"))
    assert 0.7 < said / took < 1.4, (said, took)
