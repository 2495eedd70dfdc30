"""The balance loss of a mixture of experts: TRL's numbers from flat batches, the same however a step is cut."""

import json

import pytest
import torch
import transformers
from datasets import Dataset

import trainer_runs
from kill_resume import Server
from prefuse.engine import cli
from prefuse.models.router import hidden_and_balance, router_of
from prefuse.models.trunk import UnsupportedModel
from prefuse.packing import pack, padded
from tiny_run import LABELLED, PAIRS, SHAPE, read_log, save_model, weights, write_rows

SETTINGS = {"vocab_size": 300, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 1}
MIXTRAL = SETTINGS | SHAPE | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5}


# What TRL 1.16 itself says on the transformers of constraints.txt.
pytestmark = pytest.mark.filterwarnings(r"ignore:`(is_)?gradient_checkpointing\w*` is deprecated:FutureWarning")


def mixtral(**options):
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**MIXTRAL | options)).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("mixture") / "model", model=mixtral(), chat_template=None)


def run(model, tmp_path, rows, command="train", *, name="run", **changes):
    flags = {"model_name_or_path": model, "dataset_name": write_rows(tmp_path / "rows.jsonl", rows)}
    flags |= {"output_dir": tmp_path / name, "device": "cpu", "impl": "torch", "eval_fraction": 0, "save_steps": 0}
    flags |= {"learning_rate": 1e-3, "warmup_ratio": 0, "adam_epsilon": 1e-3, "logging_steps": 1}
    flags |= {"num_train_epochs": 3, "per_device_train_batch_size": 8} | changes
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    (tmp_path / f"{name}.argv").write_text("\n".join(words))
    assert cli.main([command, *words]) == 0
    return tmp_path / name


# ---------------------------------------------------------------------------------------------------------
# The number


def test_shared_prompts_and_padding_count_as_in_the_models_own_forward():
    """A flat batch, and the padded one, against `aux_loss` of the model on the padded batch; with its gradients."""
    model = mixtral()
    groups = [([5, 6, 7, 8, 9], [[10, 11], [12]]), ([13, 14], [[15, 16, 17, 18], [19, 20]])]
    rows = padded([(prompt, side) for prompt, sides in groups for side in sides])
    own = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_router_logits=True).aux_loss
    expected = torch.autograd.grad(own, (model.model.embed_tokens.weight, model.model.layers[0].mlp.gate.weight))
    assert not torch.allclose(own, model(input_ids=rows.input_ids, output_router_logits=True).aux_loss, rtol=1e-3)
    for tokens in (pack(groups), rows):
        hidden, got = hidden_and_balance(model, tokens, router_of(model))
        assert hidden.shape == (9, 32)
        torch.testing.assert_close(got, own, rtol=1e-5, atol=0)
        grads = torch.autograd.grad(got, (model.model.embed_tokens.weight, model.model.layers[0].mlp.gate.weight))
        for one, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert model.config.output_router_logits is False  # as it was
    assert not model.model._forward_hooks


def test_models_without_that_loss_are_refused():
    with pytest.raises(UnsupportedModel, match="no mixture of experts"):
        router_of(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SETTINGS | SHAPE)))
    model = mixtral()
    model.num_experts_per_tok = 1  # its own forward goes on by this number, its layers by another
    own = model.forward
    model.forward = lambda **inputs: own(**inputs) | {"aux_loss": torch.tensor(3.0)}
    with pytest.raises(UnsupportedModel, match=r"cannot be computed|of its own: 3, by its router"):
        router_of(model)


# ---------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("kind", ["dpo", "kto", "sft"])
def test_three_steps_beside_trl(kind, model, tmp_path):
    """TRL 1.16 with its default, the model's own weight: losses, aux_loss, gradient norms and the weights it ends with.

    A step sees all rows, so that the order in which the two draw them does not matter. KTO's mismatches are drawn
    otherwise, so from its second step on it has another z0.
    """
    import trl

    rows = LABELLED[:8] if kind == "kto" else PAIRS[:8]
    command, more = ("sft", {}) if kind == "sft" else ("train", {"loss_type": kind, "beta": 0.1})
    ours = run(model, tmp_path, rows, command, output_router_logits="true", **more)
    theirs = by_trl(trl, kind, rows, model, tmp_path)
    mine = read_log(ours)
    logged = [row for row in theirs.state.log_history if "aux_loss" in row]
    assert len(mine) == len(logged) == 3
    steps = 1 if kind == "kto" else 3
    for one, other in zip(mine[:steps], logged[:steps], strict=True):
        for name in ("loss", "aux_loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=2e-5), name
    ended = dict(transformers.AutoModelForCausalLM.from_pretrained(ours).named_parameters())
    for name, value in () if kind == "kto" else theirs.model.named_parameters():
        torch.testing.assert_close(ended[name].detach(), value.detach(), rtol=0, atol=1e-5)


def by_trl(trl, kind, rows, model, tmp_path):
    trainer = {"dpo": trl.DPOTrainer, "kto": trl.KTOTrainer, "sft": trl.SFTTrainer}[kind]
    config = {"dpo": trl.DPOConfig, "kto": trl.KTOConfig, "sft": trl.SFTConfig}[kind]
    if kind == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    args = trainer_runs.arguments(
        config, tmp_path / "trl", max_steps=-1, num_train_epochs=3, per_device_train_batch_size=8, warmup_steps=0
    )  # fmt: skip
    made = trainer(
        model=model, args=args, train_dataset=Dataset.from_list(rows),
        processing_class=transformers.AutoTokenizer.from_pretrained(model),
    )  # fmt: skip
    made.train()
    return made


def test_the_same_however_a_step_is_cut_but_for_what_its_definition_says(model, tmp_path):
    """The preference loss is one number; the balance loss is a mean over the batches that the trunk runs."""
    whole = read_log(run(model, tmp_path, PAIRS[:4] * 2, output_router_logits="true", max_steps=1, name="whole"))[0]
    cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "output_router_logits": "true"}
    flat = read_log(run(model, tmp_path, PAIRS[:4] * 2, max_steps=1, name="cut", **cut))[0]
    rows = read_log(run(model, tmp_path, PAIRS[:4] * 2, max_steps=1, name="padded", padding_free="false", **cut))[0]
    for one in (flat, rows):
        assert one["loss"] - 0.5 * one["aux_loss"] == pytest.approx(whole["loss"] - 0.5 * whole["aux_loss"], rel=1e-5)
    assert flat["aux_loss"] == pytest.approx(whole["aux_loss"], rel=1e-6)  # both microbatches fit one flat batch
    assert rows["aux_loss"] == pytest.approx(whole["aux_loss"], rel=0.01)  # a product of two means: not linear
    assert rows["aux_loss"] != pytest.approx(whole["aux_loss"], rel=1e-4)


@pytest.mark.slow
def test_two_ranks_make_the_update_of_one_process(model, tmp_path):
    """The same microbatches on both ranks as one behind the other."""
    flags = {"output_router_logits": "true", "padding_free": "false", "per_device_train_batch_size": 2}
    flags |= {"num_train_epochs": 2, "eval_dataset": write_rows(tmp_path / "held.jsonl", PAIRS[8:])}
    one = run(model, tmp_path, PAIRS[:8], name="one", gradient_accumulation_steps=2, **flags)
    words = (tmp_path / "one.argv").read_text().split("\n")
    alone, server = read_log(one), Server()
    for parallel in ("ddp", "fsdp"):
        two = tmp_path / parallel
        argv = ["train", *words, "--parallel", parallel]
        argv[argv.index(str(one))], argv[argv.index("--gradient_accumulation_steps") + 1] = str(two), "1"
        assert server.run(argv, 2, tmp_path / "log") == [0, 0], (tmp_path / "log.0").read_text()
        together = read_log(two)
        assert [row["step"] for row in alone] == [row["step"] for row in together]
        for row, other in zip(alone, together, strict=True):
            for name in {"loss", "aux_loss", "grad_norm", "eval_loss", "eval_aux_loss"} & row.keys():
                assert other[name] == pytest.approx(row[name], rel=1e-5), (name, row["step"])
        for name, value in weights(one).items():
            torch.testing.assert_close(weights(two)[name], value, rtol=0, atol=1e-5)
    assert {"aux_loss", "eval_aux_loss"} <= set().union(*alone)
    server.close()


def test_held_out_rows_have_it_too(model, tmp_path):
    out = run(
        model, tmp_path, PAIRS[:8], output_router_logits="true", router_aux_loss_coef=2.0, learning_rate=0, max_steps=1,
        eval_fraction=0.5,
    )  # fmt: skip
    first, step, last = read_log(out)
    assert first["eval_aux_loss"] == pytest.approx(last["eval_aux_loss"], rel=1e-6)
    assert last["eval_loss"] == pytest.approx(0.693147 + 2.0 * last["eval_aux_loss"], rel=1e-5)
    assert step["loss"] == pytest.approx(0.693147 + 2.0 * step["aux_loss"], rel=1e-5)


def test_what_is_said_and_refused(model, tmp_path, capsys, caplog):
    run(model, tmp_path, PAIRS[:4], max_steps=1)
    assert "TRL adds it with a weight of 0.5; --output_router_logits true does so here" in caplog.text
    rows = write_rows(tmp_path / "few.jsonl", PAIRS[:4])
    llama = save_model(tmp_path / "llama")
    asked = {"--output_router_logits": "true"}
    for given, wanted in (
        ({"--model_name_or_path": llama} | asked, "output_router_logits: LlamaForCausalLM is no mixture of experts"),
        ({"--router_aux_loss_coef": "0.1"}, "only with output_router_logits true"),
        (asked | {"--router_aux_loss_coef": "0"}, "router_aux_loss_coef must be above 0"),
        (asked | {"--torch_compile": "true"}, "output_router_logits does not go with torch_compile"),
    ):
        flags = {"--model_name_or_path": model, "--dataset_name": rows, "--output_dir": tmp_path / "no"} | given
        assert cli.main(["train", "--device", "cpu", *(str(x) for pair in flags.items() for x in pair)]) == 2
        assert wanted in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_a_config_that_asks_for_it(tmp_path, capsys):
    """What transformers' own forward would add is added here once, and not by that forward too."""
    asks = save_model(tmp_path / "asks", model=mixtral(output_router_logits=True), chat_template=None)
    argv = ["train", "--device", "cpu", "--model_name_or_path", asks, "--output_dir", str(tmp_path / "no")]
    assert cli.main([*argv, "--dataset_name", write_rows(tmp_path / "few.jsonl", PAIRS[:4])]) == 2
    assert "give --output_router_logits true to add it, or set it to false there" in capsys.readouterr().err
    out = run(asks, tmp_path, PAIRS[:4], max_steps=1, output_router_logits="true")
    step = read_log(out)[0]
    assert step["loss"] == pytest.approx(0.693147 + 0.5 * step["aux_loss"], rel=1e-5)
    assert json.loads((out / "config.json").read_text())["router_aux_loss_coef"] == 0.5
