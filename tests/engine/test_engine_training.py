"""Whole runs on a tiny model: the first loss, what accumulation may change, what is written, what learning does."""

import dataclasses
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

import prefuse
from prefuse.engine import train as train_module
from prefuse.engine.config.settings import Config
from prefuse.engine.data import load_examples
from prefuse.engine.data.batches import collate, examples_of, mismatched
from prefuse.engine.data.dataset import kind_of
from prefuse.engine.data.order import mismatches_of_epoch
from prefuse.engine.errors import UserError
from prefuse.engine.evaluate import compare, evaluate_command
from prefuse.engine.model.forward import LanguageModel, fused_loss, reference_point
from prefuse.engine.model.load import load_model, load_tokenizer
from prefuse.engine.run.optimizer import learning_rate, make_optimizer
from prefuse.engine.run.reference_logps import reference_logps
from prefuse.engine.train import train
from prefuse.transformers import head_of
from tiny_run import LABELLED, PAIRS, read_log, save_model, settings, weights, write_rows

FIRST_LOSS = {"dpo": math.log(2), "ipo": 1 / (4 * 0.1**2), "kto": 0.5}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "labelled.jsonl", LABELLED)


# ---------------------------------------------------------------------------------------------------------
# The loss


def naive_logp(model, prompt, completion):
    """log pi(completion | prompt) from the model's own logits, one sequence without padding, in float64."""
    ids = torch.tensor([prompt + completion])
    logps = torch.log_softmax(model(input_ids=ids).logits[0], -1)
    return torch.stack([logps[len(prompt) + t - 1, token] for t, token in enumerate(completion)])


def naive_loss(name, policy, ref, examples, others):
    """The papers' equations on naive log-probabilities; `others` are KTO's mismatched examples."""
    ratio = lambda x, y: naive_logp(policy, x, y) - naive_logp(ref, x, y).detach()  # noqa: E731
    beta, losses = 0.1, []
    if name == "sft":
        tokens = torch.cat([naive_logp(policy, e.prompt, e.completion) for e in examples])
        return -tokens.mean()
    if name == "kto":
        ratios = [ratio(x.prompt, examples[j].completion).sum() for x, j in zip(examples, others, strict=True)]
        z0 = torch.stack(ratios).mean().clamp(min=0).detach()
    for example in examples:
        if name == "kto":
            r = ratio(example.prompt, example.completion).sum()
            losses.append(1 - torch.sigmoid(beta * (r - z0) if example.label else beta * (z0 - r)))
        else:
            chosen, rejected = ratio(example.prompt, example.chosen), ratio(example.prompt, example.rejected)
            if name == "dpo":
                losses.append(-torch.log(torch.sigmoid(beta * (chosen.sum() - rejected.sum()))))
            else:
                losses.append((chosen.mean() - rejected.mean() - 1 / (2 * beta)) ** 2)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize("name", ["sft", "dpo", "ipo", "kto"])
def test_the_engines_loss_and_gradient_equal_the_naive_ones(name, padding_free, model, other_model, pairs):
    tokenizer = load_tokenizer(model)
    loss = {"sft": prefuse.SFT(), "dpo": prefuse.DPO(), "ipo": prefuse.IPO(), "kto": prefuse.KTO()}[name]
    config = settings(model_name_or_path=model, dataset_name=pairs, output_dir="x")
    rows = load_examples(pairs, kind_of(loss), tokenizer, 64).examples[:6]
    lm, ref = (double(load_model(path, config, torch.device("cpu"))) for path in (model, other_model))
    others = mismatches_of_epoch([row.prompt for row in rows], seed=0, epoch=0)

    wanted = naive_loss(name, lm.model, ref.model, rows, others)
    wanted.backward()
    gradients = {n: p.grad.clone() for n, p in lm.model.named_parameters()}
    lm.model.zero_grad()

    examples = dataclasses.replace(examples_of(rows), padding_free=padding_free)
    everything, z0 = list(range(len(rows))), None
    ref_logps = reference_logps(ref, examples, [everything]) if loss.uses_reference else None
    if name == "kto":
        swapped = mismatched(examples, others, max_length=64)
        z0 = reference_point(lm, [collate(swapped, everything, reference_logps(ref, swapped, [everything]))])
    out = fused_loss(lm, collate(examples, everything, ref_logps), loss, z0=z0)
    out.loss.backward()
    # The engine keeps log-probabilities in float32; IPO squares their distance from 5.
    torch.testing.assert_close(out.loss.double(), wanted.detach(), rtol=1e-5, atol=1e-6)
    for key, parameter in lm.model.named_parameters():
        scale = max(gradient.abs().max().item() for gradient in gradients.values())
        torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-4, atol=1e-5 * scale)


def double(lm):
    model = lm.model.double()
    return LanguageModel(model, head_of(model), lm.device, torch.float64, lm.impl)


# ---------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize(
    ("loss_type", "data"), [("dpo", "pairs"), ("ipo", "pairs"), ("kto", "labelled"), ("kto", "pairs")]
)
def test_a_run_starts_at_zero_log_ratio_and_learns(loss_type, data, model, tmp_path, request, capsys, caplog):
    source = request.getfixturevalue(data)
    out = tmp_path / "run"
    config = settings(
        model_name_or_path=model, dataset_name=source, output_dir=str(out), loss_type=loss_type,
        num_train_epochs=3.0, eval_fraction=0.2, learning_rate=2e-2,
    )  # fmt: skip
    train(config, "train")
    log = read_log(out)
    steps = [row for row in log if "loss" in row]
    evaluations = [row for row in log if "eval_loss" in row]
    first = FIRST_LOSS[loss_type]
    assert abs(steps[0]["loss"] - first) <= 1e-5 * max(1, first)
    assert abs(evaluations[0]["eval_loss"] - first) <= 1e-5 * max(1, first)
    assert evaluations[0]["step"] == 0
    for name in "rewards/chosen", "rewards/rejected":  # one of them may be absent from a few labelled rows
        assert evaluations[0].get(f"eval_{name}", 0) == 0 == steps[0].get(name, 0)
    assert abs(evaluations[0]["eval_kl_to_ref"]) < 1e-10 < 1e-4 < evaluations[-1]["eval_kl_to_ref"]
    assert sum(row["loss"] for row in steps[-3:]) < 0.7 * sum(row["loss"] for row in steps[:3])
    assert steps[-1]["step"] == evaluations[-1]["step"] == len(steps)
    assert "was expected" not in caplog.text
    printed = capsys.readouterr().out
    assert ("each of 12 pairs is used as one desirable" in printed) == ((loss_type, data) == ("kto", "pairs"))
    assert "0 skipped" in printed
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_supervised_fine_tuning_learns_and_leaves_a_loadable_model(model, pairs, tmp_path):
    out = tmp_path / "run"
    config = settings("sft", model_name_or_path=model, dataset_name=pairs, output_dir=str(out), num_train_epochs=8.0)
    metrics = train(config, "sft")
    log = read_log(out)
    assert metrics["loss"] < 0.5 * log[0]["loss"]
    assert not any("rewards/chosen" in row for row in log)
    trained = AutoModelForCausalLM.from_pretrained(out).eval()
    assert trained.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = torch.tensor([tokenizer("what is the sky?")["input_ids"]])
    text = tokenizer.decode(trained.generate(ids, max_new_tokens=3, do_sample=False)[0])
    assert text.startswith("<s>what is the sky?it is")
    assert (out / "config.yaml").read_text().startswith("# prefuse sft --config config.yaml\n")


@pytest.mark.parametrize("name", ["sft", "dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_how_a_step_is_accumulated_does_not_change_the_update(name, model, tmp_path):
    """11 pairs in steps of 8. In twos the last step is a microbatch of 2 and one of 1; sft counts tokens, so there no
    two microbatches weigh the same."""
    pairs = write_rows(tmp_path / "pairs.jsonl", PAIRS[:11])
    results = []
    for microbatch, accumulation in ((8, 1), (1, 8), (2, 4), (3, 1)):
        out = tmp_path / f"{microbatch}x{accumulation}"
        config = settings(
            model_name_or_path=model, dataset_name=pairs, output_dir=str(out), loss_type=name.replace("sft", "dpo"),
            per_device_train_batch_size=microbatch, gradient_accumulation_steps=accumulation,
            adam_epsilon=1e-2,  # else Adam blows up the last bits of gradients that are nearly zero
        )  # fmt: skip
        train(config, "sft" if name == "sft" else "train")
        results.append((weights(out), read_log(out)))
    (one, log), *same, (other, _) = results
    for again, log_again in same:
        for key, value in one.items():
            torch.testing.assert_close(again[key], value, rtol=0, atol=1e-6 * value.abs().max().item())
        assert len(log_again) == len(log) == (3 if name == "kto" else 2)
        for a, b in zip(log, log_again, strict=True):
            for key in a.keys() - {
                "tokens_per_second",
                "samples_per_second",
                "pairs_per_second",
                "tokens_saved",
                "mfu",
            }:
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    assert any(not torch.allclose(other[key], value, rtol=0, atol=1e-4) for key, value in one.items())


def test_z0_scope_microbatch_is_another_update(model, pairs, tmp_path):
    logs = []
    for scope in ("step", "microbatch"):
        out = tmp_path / scope
        train(
            settings(
                model_name_or_path=model, dataset_name=pairs, output_dir=str(out), loss_type="kto", z0_scope=scope,
                per_device_train_batch_size=1, gradient_accumulation_steps=8, learning_rate=0.1,
            ),
            "train",
        )  # fmt: skip
        logs.append(read_log(out))
    assert logs[0][0]["loss"] == logs[1][0]["loss"]  # z0 is 0 in the first step, however it is taken
    assert logs[0][-1]["loss"] != logs[1][-1]["loss"]


@pytest.mark.parametrize("loss_type", ["dpo", "kto"])
def test_a_model_with_dropout_in_its_config_trains_without(loss_type, tmp_path, pairs, caplog):
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=1))
    folder = save_model(tmp_path / "gpt2", model=gpt2)
    out = tmp_path / "run"
    train(settings(model_name_or_path=folder, dataset_name=pairs, output_dir=str(out), loss_type=loss_type), "train")
    assert read_log(out)[0]["loss"] == pytest.approx(FIRST_LOSS[loss_type], abs=1e-5)
    assert "was expected" not in caplog.text
    assert json.loads((out / "config.json").read_text())["attn_pdrop"] == 0.1  # and the config keeps its own


def test_a_second_model_can_be_the_reference(model, other_model, pairs, tmp_path, caplog):
    out = tmp_path / "run"
    config = settings(
        model_name_or_path=model,
        ref_model_name_or_path=other_model,
        dataset_name=pairs,
        output_dir=str(out),
        max_steps=1,
    )
    train(config, "train")
    row = read_log(out)[0]
    assert abs(row["rewards/chosen"]) > 0.01
    assert "was expected" not in caplog.text  # nobody said that the first loss is ln 2 now


def test_a_reference_with_another_tokenizer_is_refused_or_named(model, pairs, tmp_path, caplog):
    def config(name, **options):
        other = save_model(tmp_path / name, **options)
        tokenizer = AutoTokenizer.from_pretrained(other)
        tokenizer.add_tokens(["<new>"])
        tokenizer.save_pretrained(other)
        return settings(
            model_name_or_path=model, ref_model_name_or_path=other, dataset_name=pairs, max_steps=1,
            output_dir=str(tmp_path / f"{name}-run"),
        )  # fmt: skip

    with pytest.raises(UserError, match="the model has 300 tokens and the reference 310: expected two models with"):
        train(config("larger", vocab_size=310), "train")
    train(config("same"), "train")
    assert "the tokenizers of model and reference differ in 1 entries" in caplog.text


def test_models_whose_heads_differ_in_padding_alone_compare_over_the_common_tokens(model, pairs, tmp_path):
    """The reference is the model itself with ten more rows that no token has, and large logits in them."""
    same = AutoModelForCausalLM.from_pretrained(model)
    same.resize_token_embeddings(310, mean_resizing=False)
    with torch.no_grad():
        same.lm_head.weight[300:] = 5 * torch.randn(10, same.config.hidden_size)
    padded = save_model(tmp_path / "padded", model=same)
    report = tmp_path / "eval.json"
    evaluate_command(
        settings(
            "eval", model_name_or_path=padded, ref_model_name_or_path=model, dataset_name=pairs, eval_fraction=1.0,
            output_file=str(report),
        )
    )  # fmt: skip
    metrics = json.loads(report.read_text())
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["kl_to_ref"] < 1e-9
    assert metrics["rewards/ties"] == 1
    out = str(tmp_path / "run")
    train(
        settings(
            model_name_or_path=model, ref_model_name_or_path=padded, dataset_name=pairs, output_dir=out, max_steps=1,
            eval_fraction=0.2,
        ), "train",
    )  # fmt: skip
    assert read_log(out)[0]["eval_kl_to_ref"] < 1e-9


def test_every_skipped_row_is_named_in_the_run_folder(model, tmp_path, capsys):
    bad = [{"prompt": "a", "chosen": "", "rejected": "b"}, {"prompt": "a", "chosen": "c", "rejected": "c"}]
    source = write_rows(tmp_path / "pairs.jsonl", [*bad, *PAIRS])
    out = tmp_path / "run"
    train(settings(model_name_or_path=model, dataset_name=source, output_dir=str(out), max_steps=1), "train")
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [row["row"] for row in skipped] == ["pairs.jsonl:1", "pairs.jsonl:2"]
    assert "14 rows" in (printed := capsys.readouterr().out)
    assert f"all 2 skipped rows are named in {out / 'skipped.jsonl'}" in printed


def test_kto_holds_out_two_prompts_where_a_share_would_be_one(model, labelled, tmp_path, capsys):
    out = str(tmp_path / "run")
    train(
        settings(
            model_name_or_path=model, dataset_name=labelled, output_dir=out, loss_type="kto",
            eval_fraction=0.01, max_steps=1,
        ),
        "train",
    )  # fmt: skip
    assert "2 of 12 held out" in capsys.readouterr().out


def test_bfloat16_weights_are_warned_about(model, pairs, tmp_path, caplog):
    out = tmp_path / "run"
    config = settings(model_name_or_path=model, dataset_name=pairs, output_dir=str(out), dtype="bfloat16", max_steps=1)
    train(config, "train")
    assert "dtype bfloat16: at a learning rate of 0.01 most weights are too coarse" in caplog.text
    assert weights(out)["lm_head.weight"].dtype == torch.bfloat16


def test_bf16_autocast_keeps_float32_weights(model, pairs, tmp_path):
    out = tmp_path / "run"
    config = settings(model_name_or_path=model, dataset_name=pairs, output_dir=str(out), bf16=True, max_steps=2)
    train(config, "train")
    assert weights(out)["lm_head.weight"].dtype == torch.float32
    assert read_log(out)[0]["loss"] == pytest.approx(math.log(2), abs=1e-2)


def test_a_first_loss_that_is_off_is_reported(model, pairs, tmp_path, monkeypatch, caplog):
    """Plants what a reference left in another mode does: log-probabilities that are not the policy's."""
    from prefuse.engine.run import plan

    real = plan.reference_logps

    def shifted(*args):
        logps = real(*args)
        logps.values -= 0.01 * (torch.arange(len(logps.values)) % 7)
        return logps

    monkeypatch.setattr(plan, "reference_logps", shifted)
    out = str(tmp_path / "run")
    train(settings(model_name_or_path=model, dataset_name=pairs, output_dir=out, max_steps=1), "train")
    assert "but the policy still is its reference, so 0.6931472 within 1e-05 was expected" in caplog.text


def test_a_loss_that_is_no_number_stops_the_run_and_names_its_rows(model, pairs, tmp_path, monkeypatch):
    real, calls = train_module.fused_loss, []

    def sometimes_nan(lm, batch, *args):
        out = real(lm, batch, *args)
        calls.append(batch.rows)
        return dataclasses.replace(out, loss=out.loss * float("nan")) if len(calls) == 3 else out

    monkeypatch.setattr(train_module, "fused_loss", sometimes_nan)
    out = tmp_path / "run"
    config = settings(
        model_name_or_path=model, dataset_name=pairs, output_dir=str(out), per_device_train_batch_size=2,
        max_steps=6, save_steps=2, logging_steps=10, max_skipped_steps=0,
    )  # fmt: skip
    with pytest.raises(UserError, match=r"is not finite in step 3 at rows pairs.jsonl:\d+, ") as error:
        train(config, "train")
    assert all(row in str(error.value) for row in calls[2])
    # No later step has shown that the weights of checkpoint-2 are sound: it is set aside, and kept.
    assert [path.name for path in sorted(out.glob("checkpoint-*"))] == ["checkpoint-2.diverged"]
    assert all(torch.isfinite(value).all() for value in weights(out / "checkpoint-2.diverged").values())


def test_evaluating_a_model_against_itself_and_against_another(model, other_model, pairs):
    tokenizer = load_tokenizer(model)
    config = settings(
        "eval", model_name_or_path=model, ref_model_name_or_path="-", dataset_name=pairs, eval_fraction=1.0
    )
    examples = examples_of(load_examples(pairs, "pair", tokenizer, 64).examples)
    lm, ref = (load_model(path, config, torch.device("cpu")) for path in (model, other_model))
    same = compare(lm, lm, examples, config)
    assert same["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert same["rewards/margins"] == 0
    assert abs(same["kl_to_ref"]) < 1e-10

    kls = []
    for prompt, completion in (tokens for group in examples.sequences for tokens in group):
        ids = torch.tensor([prompt + completion])
        logits = [m.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double() for m in (lm, ref)]
        p, q = (torch.log_softmax(z, -1) for z in logits)
        kls.append((p.exp() * (p - q)).sum(-1).detach())
    assert compare(lm, ref, examples, config)["kl_to_ref"] == pytest.approx(torch.cat(kls).mean().item(), rel=1e-5)


# ---------------------------------------------------------------------------------------------------------
# Learning rate and optimizer


def test_the_learning_rate_rises_then_falls_and_never_is_zero():
    config = Config(learning_rate=1.0, warmup_ratio=0.2)
    linear = [learning_rate(step, 10, config) for step in range(10)]
    assert linear == pytest.approx([1 / 3, 2 / 3, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = [learning_rate(s, 10, dataclasses.replace(config, lr_scheduler_type="cosine")) for s in range(10)]
    assert cosine[2] == 1.0
    assert cosine[6] == pytest.approx(0.5)
    constant = [learning_rate(s, 10, dataclasses.replace(config, lr_scheduler_type="constant")) for s in range(10)]
    assert constant[2:] == [1.0] * 8
    by_steps = dataclasses.replace(config, warmup_steps=4)
    assert [learning_rate(step, 10, by_steps) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert learning_rate(0, 1, dataclasses.replace(config, warmup_ratio=1.0)) == 0.5


def test_norms_and_biases_do_not_decay(model):
    config = settings(model_name_or_path=model, dataset_name="d", output_dir="o", weight_decay=0.1)
    lm = load_model(model, config, torch.device("cpu"))
    decay, rest = make_optimizer(lm.model, config).param_groups
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decay["params"]} == {2}
    assert len(rest["params"]) == 5  # two norms a layer, and the last one
    assert len(decay["params"]) + len(rest["params"]) == len(list(lm.model.parameters()))
