"""Samples by a server: it gets each round's weights, its tokens are learned from, and a resumed run keeps its answers.

The servers here are stand-ins (tests/lib/fake_server.py); test_served_real.py has `transformers serve`.
"""

import json
import re

import pytest
import torch

from fake_server import serving
from online_runs import PROMPTS, online
from prefuse.engine import label, train
from prefuse.engine.config.settings import Config, validate
from prefuse.engine.errors import UserError
from prefuse.engine.generate import generate
from tiny_run import save_model, weights, write_rows
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def rounds_of(folder):
    return [
        [json.loads(line) for line in path.read_text().splitlines()] for path in sorted(folder.glob("samples/*.jsonl"))
    ]


def at(fake, kind="vllm", **changes):
    return {"server_base_url": fake.url, "server_type": kind, "server_timeout": 60.0} | changes


RELOAD = ["/sleep?level=2", "/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache"]


def test_each_round_is_sampled_by_the_weights_of_its_step(model, tmp_path):
    with serving(TOKENIZER) as fake:
        steps = online(model, tmp_path, max_steps=3, **at(fake))
    told = [path for path in fake.paths if path != "/v1/completions"]
    assert told == RELOAD * 3
    body = fake.completions()[0]
    assert body["model"] == str((tmp_path / "run/served/weights").absolute())
    assert body["n"] == 4
    assert body["stop_token_ids"] == [1]
    assert (body["top_k"], body["top_p"], body["min_p"], body["repetition_penalty"]) == (-1, 1.0, 0.0, 1.0)
    assert all(isinstance(token, int) for token in body["prompt"])
    assert len({b["seed"] for b in fake.completions()}) == 3 * 4
    rounds = rounds_of(tmp_path / "run")
    assert [head["weights"] for head, *_ in rounds] == [0, 1, 2]
    assert [line["staleness"] for line in steps] == [0, 0, 0]
    for line in steps:
        assert line["completions/not_round_trip"] == 0
        assert 0 <= line["sampling/sampling_logp_difference/mean"] <= line["sampling/sampling_logp_difference/max"]
        assert line["clip_ratio/region_mean"] == 0  # the first ratio is 1: the trainer's own log-probabilities count
    for _, *rows in rounds:
        for row in rows:
            for ids, text in zip(row["ids"], row["answers"], strict=True):
                assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


def test_text_alone_is_tokenized_again_and_staleness_grows(model, tmp_path):
    with serving(TOKENIZER, says_tokens=False) as fake:
        steps = online(model, tmp_path, max_steps=3, server_model="there", **at(fake, "openai"))
        fake.odd = True
        odd = online(model, tmp_path, out="odd", max_steps=1, **at(fake, "openai"))
    assert [line["staleness"] for line in steps] == [0, 1, 2]
    assert set(fake.paths) == {"/v1/completions"}
    body = fake.completions()[0]
    assert body["model"] == "there"
    assert TOKENIZER(body["prompt"])["input_ids"] in [TOKENIZER(row["prompt"])["input_ids"] for row in PROMPTS]
    assert all(line["completions/not_round_trip"] == 0 for line in steps)
    assert not any("sampling/" in name for name in steps[0])
    assert 0 < odd[0]["completions/not_round_trip"] <= 1
    for _, *rows in rounds_of(tmp_path / "run"):
        for row in rows:
            assert [ids[-1] == 1 for ids in row["ids"]] == row["stopped"]
            for ids, text in zip(row["ids"], row["answers"], strict=True):
                assert TOKENIZER.decode(ids, skip_special_tokens=True) == text


@pytest.mark.slow
def test_a_resumed_run_keeps_the_answers_of_the_server(model, tmp_path, monkeypatch):
    """Killed after four steps with a checkpoint after two: the two rounds behind it are read from their files, for the
    server refuses to be asked again, and the weights come out the same."""
    settings = {"max_steps": 5, "save_steps": 2, "num_iterations": 1}
    with serving(TOKENIZER) as fake:
        online(model, tmp_path, out="whole", **settings, **at(fake))
    calls, original = [], train.optimizer_step

    def cut_off(run, *args):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("killed")
        return original(run, *args)

    with serving(TOKENIZER, once=True) as fake:
        with monkeypatch.context() as patch:
            patch.setattr(train, "optimizer_step", cut_off)
            with pytest.raises(RuntimeError, match="killed"):
                online(model, tmp_path, out="cut", **settings, **at(fake))
        assert len(rounds_of(tmp_path / "cut")) == 4
        online(model, tmp_path, out="cut", resume=True, **settings, **at(fake))
    assert rounds_of(tmp_path / "whole") == rounds_of(tmp_path / "cut")
    for x, y in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "cut").values(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.slow
def test_adapters_are_loaded_by_name_and_the_last_ones_dropped(model, tmp_path):
    with serving(TOKENIZER) as fake:
        online(model, tmp_path, max_steps=3, use_peft=True, lora_r=2, **at(fake))
    told = [(path, body) for path, body in fake.asked if path != "/v1/completions"]
    names = [body["lora_name"] for path, body in told if path == "/v1/load_lora_adapter"]
    assert len(set(names)) == 3
    assert [body["lora_name"] for path, body in told if path == "/v1/unload_lora_adapter"] == names[:2]
    assert {body["model"] for body in fake.completions()} == set(names)
    kept = sorted(path.name for path in (tmp_path / "run/served").iterdir())
    assert len(kept) == 2  # the last, and the one before, which the server may still have been reading
    assert (tmp_path / "run/served" / names[-1] / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_held_out_prompts_are_answered_by_the_weights_of_their_step(model, tmp_path):
    with serving(TOKENIZER) as fake:
        online(model, tmp_path, max_steps=2, eval_fraction=0.25, eval_steps=1, **at(fake, "sglang"))
    loads = [body["model_path"] for path, body in fake.asked if path == "/update_weights_from_disk"]
    assert [re.search(r"weights-(\d+)", path)[1] for path in loads] == ["000000", "000001", "000002"]
    sizes = [body.get("n", 1) for body in fake.completions()]
    assert sizes == [1] * 4 + ([4] * 4 + [1] * 4) * 2


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refuse": {"/v1/completions": (400, {"error": "too long"})}}, "gave no answer to .* status 400"),
        ({"refuse": {"/v1/completions": (200, {"choices": []})}}, "gave no answer to .* not as OpenAI's API has it"),
        ({"refuse": {"/v1/completions": (401, "")}}, "refuses the key .* server_api_key_env names"),
        ({"refuse": {"/collective_rpc": (404, "")}}, "status 404"),
        ({"refuse": {"/sleep?level=2": (500, "")}}, "did not take the weights of step 0"),
    ],
)  # fmt: skip
def test_a_server_that_fails_ends_the_run_in_one_line(options, message, model, tmp_path, monkeypatch):
    from prefuse.engine.score import client

    monkeypatch.setattr(client, "MOST_PAUSE", 0.0)
    with serving(TOKENIZER, **options) as fake, pytest.raises(UserError, match=message):
        online(model, tmp_path, max_steps=1, **at(fake))


def test_a_server_that_is_not_there(model, tmp_path):
    with pytest.raises(UserError, match=r"did not come up within server_timeout 0.1 s: start it"):
        online(model, tmp_path, server_base_url="http://127.0.0.1:9/v1", server_type="vllm", server_timeout=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server_base_url": "http://localhost/v1"}, "server_base_url and server_type go together"),
        ({"server_type": "vllm"}, "server_base_url and server_type go together"),
        ({"server_base_url": "http://x/v1", "server_type": "openai", "min_p": 0.1}, "has no min_p"),
        ({"server_base_url": "http://x/v1", "server_type": "sglang", "use_peft": True}, "takes whole weights"),
        (
            {"server_base_url": "http://x/v1", "server_type": "vllm", "use_transformers_continuous_batching": True},
            "for sampling in this process",
        ),
    ],
)
def test_settings_that_cannot_be(changes, message):
    given = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "scorer": ["length=5"]}
    with pytest.raises(UserError, match=message):
        validate(Config(**given | changes), "online")


@pytest.mark.parametrize("url", ["http://me:secret@localhost/v1", "localhost:8000/v1", "file:///v1"])
def test_an_address_that_is_none(url, model, tmp_path):
    with pytest.raises(UserError, match=r"(holds no user or password|expected the URL of a server)") as error:
        online(model, tmp_path, server_base_url=url, server_type="vllm")
    assert "secret" not in str(error.value)


def test_label_and_generate_ask_the_same_server(model, tmp_path):
    given = {"model_name_or_path": model, "dataset_name": write_rows(tmp_path / "p.jsonl", PROMPTS), "device": "cpu"}
    rule = tmp_path / "rule.py"
    rule.write_text("def longer(prompts, completions, **_):\n    return [len(c) for c in completions]\n")
    with serving(TOKENIZER) as fake:
        rest = {"num_generations": 3, "scorer": [f"{rule}:longer"], "max_new_tokens": 9}
        rest["score_cache"] = str(tmp_path / "kept")
        out = str(tmp_path / "labels.jsonl")
        label.label(validate(Config(**given, **rest, output_file=out, **at(fake)), "label"))
        assert len(fake.completions()) == len(PROMPTS)
        assert {body["model"] for body in fake.completions()} == {model}
        again = str(tmp_path / "again.jsonl")
        label.label(validate(Config(**given, **rest, output_file=again, **at(fake)), "label"))
        assert (tmp_path / "again.jsonl").read_text() == (tmp_path / "labels.jsonl").read_text()
        assert len(fake.completions()) == len(PROMPTS)  # what it said is kept
        found = generate(validate(Config(**given, max_new_tokens=9, num_prompts=2, **at(fake)), "generate"))
    assert len(found) == 2
    assert len(fake.completions()) == len(PROMPTS) + 2
    rows = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert rows
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in rows)


@pytest.mark.slow
def test_a_resumed_run_that_evaluates_first_knows_whose_weights_the_server_has(model, tmp_path):
    settings = {"eval_fraction": 0.25, "eval_steps": 2, "save_steps": 2}
    with serving(TOKENIZER) as fake:
        online(model, tmp_path, max_steps=2, **settings, **at(fake, "sglang"))
        steps = online(model, tmp_path, max_steps=4, resume=True, **settings, **at(fake, "sglang"))
    assert [line["staleness"] for line in steps if "staleness" in line] == [0, 0, 0, 0]
    assert [head["weights"] for head, *_ in rounds_of(tmp_path / "run")] == [0, 1, 2, 3]
