"""`prefuse doctor --command`: what each command will take, against the models and the answers that it then has."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification, LlamaForTokenClassification

from online_runs import PROMPTS, online, write_rule
from prefuse.engine import doctor
from prefuse.engine.cli import main
from prefuse.engine.config.setting import EVERY
from prefuse.engine.config.settings import Config, validate
from prefuse.engine.config.yaml_file import write_yaml
from prefuse.engine.model.size import cache_per_token, size_of
from prefuse.engine.run import needs
from prefuse.engine.score.scorers import model_of
from tiny_run import PAIRS, SHAPE, save_model, settings, write_rows


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("needs")
    about = LlamaConfig(vocab_size=300, **SHAPE, num_labels=1)
    torch.manual_seed(0)
    save_model(folder / "rm", model=LlamaForSequenceClassification(about))
    save_model(folder / "prm", model=LlamaForTokenClassification(LlamaConfig(vocab_size=300, **SHAPE, num_labels=2)))
    (folder / "constitution.yaml").write_text("principles: [Be kind.]\ncritiques: [{critique: a, revision: b}]\n")
    return {
        "folder": folder, "model": save_model(folder / "model"), "pairs": write_rows(folder / "pairs.jsonl", PAIRS),
        "prompts": write_rows(folder / "prompts.jsonl", PROMPTS), "rule": f"{write_rule(folder)}:vowels",
    }  # fmt: skip


def given_of(files, command):
    """The settings that each command cannot be without."""
    own = {"model_name_or_path": files["model"], "dataset_name": files["pairs"]}
    out = {"output_dir": str(files["folder"] / "run"), "eval_fraction": 0.0}
    prompts, written = {"dataset_name": files["prompts"]}, {"output_file": str(files["folder"] / "out.jsonl")}
    sampled = {"num_generations": 4, "scorer": [files["rule"]]}
    online_steps = {"per_device_train_batch_size": 16, "max_completion_length": 8}
    more = {
        "sft": out, "train": out, "reward": out, "online": out | prompts | sampled | online_steps,
        "eval": {"ref_model_name_or_path": files["model"]}, "generate": {"num_prompts": 5, "max_new_tokens": 7},
        "label": prompts | written | sampled,
        "revise": prompts | written | {"constitution": str(files["folder"] / "constitution.yaml")},
    }  # fmt: skip
    return own | more[command]


def needs_of(files, command, **changes):
    config = validate(Config(**given_of(files, command) | changes), command)
    folders = [model_of(spec) for spec in config.scorer or ()]
    return needs.estimate_needs(config, command, [folder for folder in folders if folder]), config


@pytest.mark.parametrize("command", EVERY)
def test_every_command_that_reads_a_config_is_estimated(command, files, tmp_path, capsys):
    lines = "".join(f"{name}: {json.dumps(value)}\n" for name, value in given_of(files, command).items())
    (tmp_path / "run.yaml").write_text(lines)
    assert main(["doctor", "--config", str(tmp_path / "run.yaml"), "--command", command]) == 0
    shown = capsys.readouterr().out
    assert "GiB are free" in shown
    how = "a trial of a few layers" if command in ("sft", "train", "reward") else "FLOP/s"
    assert how in " ".join(shown.replace("│", " ").split())
    trained = "0.0 M of them trained" if command in ("eval", "generate", "label", "revise") else "M of them trained"
    assert trained in shown


def test_the_file_of_a_run_says_its_command(files, tmp_path, capsys):
    config = validate(Config(**given_of(files, "online")), "online")
    write_yaml(config, tmp_path / "config.yaml", "online")
    assert main(["doctor", "--config", str(tmp_path / "config.yaml")]) == 0
    assert "answers of 8 tokens at most" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("kind", ["whole", "lora", "adapters", "reward", "heads", "prm", "judge"])
def test_weights_are_counted_as_the_loaded_model_has_them(kind, files, tmp_path):
    from prefuse.engine.model.load import load_model
    from prefuse.engine.model.reward_model import load_reward_model, load_step_model
    from prefuse.engine.train import train

    command, changes, device = "train", {}, torch.device("cpu")
    if kind in ("lora", "adapters"):
        changes = {"use_peft": True, "lora_r": 3}
    if kind == "adapters":
        run = {"dataset_name": files["pairs"], "output_dir": str(tmp_path / "run"), "max_steps": 1}
        train(settings(model_name_or_path=files["model"], **run, **changes), "train")
        changes = {"use_peft": True, "model_name_or_path": str(tmp_path / "run")}
    if kind == "heads":
        command, changes = "reward", {"reward_heads": 3}
    command = "reward" if kind == "reward" else command
    if kind in ("prm", "judge"):
        path = str(files["folder"] / kind) if kind == "prm" else files["model"]
        config = settings(model_name_or_path=path, dataset_name="d", output_dir="o")
        found, load = needs.scorer_size(path, config), load_step_model if kind == "prm" else load_model
        lm = load(path, config, device)
        assert found.trained == 0
    else:
        found, config = needs_of(files, command, **changes)
        found, load = found.model, load_reward_model if command == "reward" else load_model
        lm = load(config.model_name_or_path, config, device, trains=True)
        assert found.trained == sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
    assert found.weights == sum(p.numel() for p in lm.model.parameters())


@pytest.mark.parametrize("changes", [{"max_steps": 3}, {"num_train_epochs": 1.0, "num_iterations": 2}], ids=str)
def test_answers_that_are_counted_are_those_that_are_sampled(changes, files, tmp_path):
    found, _ = needs_of(files, "online", **changes)
    online(files["model"], tmp_path, **{"max_steps": -1, **changes}, learning_rate=1e-4)
    rows = [json.loads(line) for file in tmp_path.glob("run/samples/*.jsonl") for line in file.read_text().splitlines()]
    drawn = sum(len(row["answers"]) for row in rows if "answers" in row)
    assert f" {drawn} answers of 8 tokens at most" in found.tokens
    assert found.at_most


def test_models_that_stay_beside_the_policy_count(files):
    alone, _ = needs_of(files, "online")
    own = alone.model.weights * 4
    assert alone.standing == 0
    assert needs_of(files, "online", beta=0.1)[0].standing == own  # a reference
    assert needs_of(files, "online", beta=0.1, use_peft=True)[0].standing == 0  # the policy without its adapters
    scored, _ = needs_of(files, "online", scorer=[str(files["folder"] / "rm")])
    assert own > scored.standing > own / 2  # without its output head
    assert scored.operations > alone.operations
    judged, _ = needs_of(files, "label", scorer=[f"judge={files['model']}"])
    assert judged.standing == own
    kept, left = needs_of(files, "train")[0], needs_of(files, "train", loss_type="simpo")[0]
    assert (kept.passing, left.passing) == (own, 0)
    served = {"server_base_url": "http://localhost:1/v1", "server_type": "openai"}
    assert needs_of(files, "online", **served)[0].cache == 0 < alone.cache


def test_keys_and_values_are_those_that_transformers_keeps(files):
    from transformers import AutoModelForCausalLM, DynamicCache

    config = settings(model_name_or_path=files["model"], dataset_name="d", output_dir="o")
    about = size_of(files["model"], config, AutoModelForCausalLM, trains=False).about
    model = AutoModelForCausalLM.from_pretrained(files["model"])
    out = model(torch.ones(2, 11, dtype=torch.long), use_cache=True)
    cache = next(kept for kept in out.values() if isinstance(kept, DynamicCache))  # its name changes with 5.24
    kept = sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values))
    assert kept == 2 * 11 * cache_per_token(config, about)


def test_sampling_reads_all_weights_for_each_token_of_a_batch(files):
    """5 prompts, 7 tokens at most, by `given_of`: one by one, by threes, all at once."""
    for side_by_side, batches in ((1, 5), (3, 2), (8, 1)):
        found, _ = needs_of(files, "generate", per_device_eval_batch_size=side_by_side)
        assert found.moved == batches * 7 * found.model.weights * 4
    assert needs_of(files, "train")[0].moved == 0
    assert needs_of(files, "online")[0].moved > 0
    slow, fast = (needs_of(files, "generate", per_device_eval_batch_size=n)[0] for n in (1, 8))
    said = [doctor._time_of_run(found, torch.device("cpu")).said for found in (slow, fast)]
    assert all("bytes/s" in line and line.startswith("at most ") for line in said)


def test_a_longer_answer_a_second_scorer_and_more_answers_take_more(files):
    base = needs_of(files, "eval", scorer=[files["rule"]])[0].operations
    for changes in ({"max_new_tokens": 256}, {"num_generations": 2, "temperature": 1.0},
                    {"scorer": [str(files["folder"] / "rm")]}):  # fmt: skip
        assert needs_of(files, "eval", **{"scorer": [files["rule"]], **changes})[0].operations > base, changes


def test_a_folder_that_is_no_model_is_one_line(files, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    lines = given_of(files, "train") | {"model_name_or_path": str(tmp_path / "empty")}
    (tmp_path / "run.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in lines.items()))
    assert main(["doctor", "--config", str(tmp_path / "run.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_given_answers_are_not_estimated_and_said_so(files):
    found, _ = needs_of(files, "label", model_name_or_path=None, dataset_name=files["pairs"])
    assert found.operations == 0
    check = doctor._time_of_run(found, torch.device("cpu"))
    assert (check.state, check.said) == ("note", "not estimated for answers that are given")
