"""LoRA: what it computes, what the reference is, what it costs, what is written and read again."""

import dataclasses
import json
import math
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

import prefuse
from prefuse.bench.timing import peak_bytes
from prefuse.engine import train as train_module
from prefuse.engine.cli import main
from prefuse.engine.data import load_examples
from prefuse.engine.data.batches import collate, examples_of
from prefuse.engine.errors import UserError
from prefuse.engine.model.adapted_linear import adapted_linear
from prefuse.engine.model.adapters import adapter_state, adapters_off, base_state
from prefuse.engine.model.forward import completion_logps, fused_loss
from prefuse.engine.model.load import load_model, load_tokenizer
from prefuse.engine.run.reference_logps import reference_logps
from prefuse.engine.train import train
from prefuse.kernels.cost import count_cost
from tiny_run import PAIRS, read_log, save_model, settings, weights, write_rows

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def lora(model, pairs="d", out="o", **changes):
    base = {"model_name_or_path": model, "dataset_name": pairs, "output_dir": str(out), "use_peft": True}
    return settings(**base | {"lora_r": 4, "lora_alpha": 8} | changes)


def loaded(model, **changes):
    config = lora(model, **changes)
    return load_model(model, config, CPU, trains=True)


def examples_at(pairs, model, count=6, padding_free=True):
    rows = load_examples(pairs, "pair", load_tokenizer(model), 64).examples[:count]
    return dataclasses.replace(examples_of(rows), padding_free=padding_free)


def shake(lm, scale=0.2):
    """Adapters that change something: as they are made, one of the two matrices is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in lm.model.named_parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator))
                assert "lora_" in name or "modules_to_save" in name


# ---------------------------------------------------------------------------------------------------------
# What is computed


@pytest.mark.parametrize("padding_free", [False, True])
def test_gradients_are_those_of_the_merged_weights_through_the_product(padding_free, model, pairs):
    """W + s B A with s = alpha / r: dA = s B.T dW and dB = s dW A.T, where dW is that of a model without adapters."""
    examples = examples_at(pairs, model, padding_free=padding_free)
    lm = loaded(model)
    shake(lm)
    everything = list(range(len(examples)))
    ref_logps = [values - 0.1 for values in reference_logps(lm, examples, [everything])]
    batch = collate(examples, everything, ref_logps)
    fused_loss(lm, batch, prefuse.DPO()).loss.backward()

    state, scale = base_state(lm.model), 8 / 4
    parts = {name: p for name, p in lm.model.named_parameters() if p.requires_grad}
    plain = load_model(model, settings(model_name_or_path=model, dataset_name="d", output_dir="o"), CPU)
    with torch.no_grad():
        for name, p in plain.model.named_parameters():
            p.copy_(state[name])
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_A.default.weight" in parts:
                p += scale * parts[f"{layer}.lora_B.default.weight"] @ parts[f"{layer}.lora_A.default.weight"]
    fused_loss(plain, batch, prefuse.DPO()).loss.backward()
    checked = 0
    for name, p in plain.model.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{layer}.lora_A.default.weight" not in parts:
            continue
        a, b = (parts[f"{layer}.lora_{x}.default.weight"] for x in "AB")
        for got, wanted in (a.grad, scale * b.T @ p.grad), (b.grad, scale * p.grad @ a.T):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())
            checked += 1
    assert checked == 2 * 2 * 7  # two matrices in each of seven linear layers, twice
    assert lm.model.lm_head.weight.grad is None


def test_with_adapters_off_it_is_the_base_model_to_the_bit(model, pairs):
    plain = load_model(model, settings(model_name_or_path=model, dataset_name="d", output_dir="o"), CPU)
    lm = loaded(model, lora_modules_to_save=["norm", "lm_head"])
    shake(lm)
    batch = collate(examples_at(pairs, model), range(6))
    wanted = completion_logps(plain, batch)
    trainable = [p.requires_grad for p in lm.model.parameters()]
    with adapters_off(lm.model):
        assert torch.equal(completion_logps(lm, batch), wanted)
        assert [p.requires_grad for p in lm.model.parameters()] == trainable
    assert not torch.allclose(completion_logps(lm, batch), wanted, atol=1e-2)
    own = plain.model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in base_state(lm.model).items())
    assert base_state(lm.model).keys() == own.keys()


@pytest.mark.parametrize(("changes", "passes"), [({}, 2), ({"lora_modules_to_save": ["lm_head"]}, 3)])
def test_a_frozen_head_costs_two_passes(changes, passes, model, pairs):
    lm = loaded(model, **changes)
    examples = examples_at(pairs, model)
    batch = collate(examples, range(6), reference_logps(lm, examples, [range(6)]))
    with count_cost() as one:
        completion_logps(lm, batch)
    with count_cost() as cost:
        fused_loss(lm, batch, prefuse.DPO()).loss.backward()
    assert cost.launches["product"] == passes
    assert passes > 2 or cost.flops == 2 * one.flops > 0


def test_dropout_is_drawn_where_gradients_are_taken_and_nowhere_else(model, pairs):
    lm = loaded(model, lora_dropout=0.5)
    shake(lm)
    examples = examples_at(pairs, model)
    ref_logps = reference_logps(lm, examples, [range(6)])
    batch = collate(examples, range(6), ref_logps)
    assert torch.equal(completion_logps(lm, batch), completion_logps(lm, batch))
    losses = [fused_loss(lm, batch, prefuse.DPO()).loss.item() for _ in range(2)]
    assert losses[0] != losses[1]
    with torch.no_grad():
        assert fused_loss(lm, batch, prefuse.DPO()).rewards.abs().max() == 0


class _Scaled(TorchDispatchMode):
    """The shapes of what is multiplied by a number."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.mul and (not torch.is_tensor(args[1]) or args[1].ndim == 0):
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("alpha", "width"), [(8, 4), (6, 32)])
def test_what_an_adapter_adds_has_the_bits_of_peft_and_is_scaled_where_it_is_narrow(alpha, width, model):
    """Where alpha / r is a power of two, between the matrices; elsewhere peft computes."""
    lm = loaded(model, lora_alpha=alpha, lora_target_modules=["o_proj"])
    layer = next(m for m in lm.model.modules() if hasattr(m, "lora_A"))
    matrices = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    shake(lm)
    found = {}
    for name, forward in {"own": layer.forward, "peft": type(layer).forward.__get__(layer)}.items():
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with _Scaled() as scaled:
            y = forward(x)
        found[name] = [y, *torch.autograd.grad(y.square().sum(), [x, *matrices])], scaled.shapes
    assert found["own"][1] == [(5, width)]
    assert found["peft"][1] == [(5, 32)]
    for own, peft in zip(found["own"][0], found["peft"][0], strict=True):
        assert torch.equal(own, peft)


def test_a_layer_with_its_adapter_is_the_formula_and_makes_no_tensor_of_what_the_adapter_adds():
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 300), (400, 300), (400,), (4, 300), (400, 4))  # x, weight, bias, first, second
    x, weight, bias, first, second = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes)
    leaves = [t.requires_grad_() for t in (x, first, second)]

    def formula(x, weight, bias, first, second, scaling):
        return torch.einsum("...d,ed->...e", x, weight + scaling * second @ first) + bias

    results = []
    for layer in (adapted_linear, formula):
        y = layer(x, weight, bias, first, second, 0.5)
        results.append((y, *torch.autograd.grad(y.sin().sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)

    def step():
        y = adapted_linear(x, weight, bias, first, second, 0.5)
        y.backward(grad)

    grad = torch.ones(2, 5, 400, dtype=torch.float64)
    outputs, gradients = 8 * 10 * 400, 8 * (10 * 300 + 4 * 300 + 400 * 4)
    assert peak_bytes(step) <= outputs + gradients + 8 * 3 * 10 * 4  # and three times r numbers for each token


def test_every_rank_draws_the_same_adapters_whatever_was_drawn_before(model):
    made, later = [], []
    for seed, changes in ((5, {}), (6, {}), (6, {"lora_r": 7})):
        torch.manual_seed(seed)
        lm = loaded(model, **changes)
        made.append({name: p for name, p in lm.model.named_parameters() if p.requires_grad})
        later.append(torch.rand(()).item())
    assert all(torch.equal(p, made[1][name]) for name, p in made[0].items())
    assert later[0] != later[1] == later[2]  # and what is drawn later does not depend on them


# ---------------------------------------------------------------------------------------------------------
# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_target_modules": ["q_proj", "lm_head"]}, r"LoRA on the head \(lm_head\) would be left out"),
        ({"lora_target_modules": ["nothing"]}, "lora_target_modules or lora_modules_to_save: .*nothing"),
        ({"lora_target_modules": ["q_proj", "roj"]}, "lora_target_modules: no module of the model is called roj"),
        ({"lora_modules_to_save": ["nothing"]}, "lora_modules_to_save: no module of the model is called nothing"),
        ({"lora_target_modules": ["act_fn"]}, "lora_target_modules or lora_modules_to_save: .*SiLU.* is not supported"),
    ],
)
def test_adapters_that_cannot_be_are_named(changes, message, model):
    with pytest.raises(UserError, match=message):
        loaded(model, **changes)


@pytest.mark.parametrize(
    ("targets", "found"),
    [(None, 14), (["q_proj"], 2), (["q_proj", "mlp.up_proj"], 4), ([r".*layers\.1\..*_proj"], 7), (["all-linear"], 14)],
)
def test_layers_are_chosen_by_name_or_pattern(targets, found, model):
    lm = loaded(model, lora_target_modules=targets)
    assert sum("lora_A" in name for name, _ in lm.model.named_parameters()) == found


def test_training_does_not_start_from_adapters(model, pairs, tmp_path):
    train(lora(model, pairs, tmp_path / "run", max_steps=1), "train")
    with pytest.raises(UserError, match="run holds adapters, and training of all weights starts from a whole model"):
        train(lora(str(tmp_path / "run"), pairs, tmp_path / "again", use_peft=False, lora_r=16, lora_alpha=32), "train")


# ---------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("changes", [{}, {"lora_modules_to_save": ["lm_head", "norm"]}, {"lora_dropout": 0.2}])
def test_a_run_starts_at_ln_2_learns_and_leaves_adapters_that_peft_reads(changes, model, pairs, tmp_path, monkeypatch):
    runs, prepare = [], train_module.prepare
    monkeypatch.setattr(train_module, "prepare", lambda *args: runs.append(prepare(*args)) or runs[-1])
    out = tmp_path / "run"
    config = lora(model, pairs, out, num_train_epochs=3.0, eval_fraction=0.2, save_steps=4, **changes)
    train(config, "train")
    steps = [row for row in read_log(out) if "loss" in row]
    assert abs(steps[0]["loss"] - math.log(2)) <= 1e-7
    assert steps[0]["rewards/chosen"] == steps[0]["rewards/rejected"] == 0
    assert sum(row["loss"] for row in steps[-3:]) < 0.8 * sum(row["loss"] for row in steps[:3])

    lm = runs[0].lm
    for folder in (out, out / "checkpoint-4"):
        files = {path.name for path in folder.iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json"} <= files
        assert not {"model.safetensors", "config.json"} & files
    trained = sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
    assert sum(value.numel() for value in weights(out).values()) == trained
    state = load_file(out / "checkpoint-4" / "optimizer-00001.safetensors")
    assert sum(value.numel() for key, value in state.items() if key.startswith("exp_avg.")) == trained

    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), out).eval()
    ids = torch.arange(20, 30)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, lm.model(ids).logits)
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == model


@pytest.mark.parametrize("loss_type", ["dpo", "kto"])
def test_a_resumed_run_equals_an_uninterrupted_one_bitwise(loss_type, model, pairs, tmp_path):
    """With dropout, so that the random state counts too."""
    changes = {"loss_type": loss_type, "save_steps": 2, "lora_dropout": 0.3, "eval_fraction": 0.2}
    train(lora(model, pairs, tmp_path / "straight", **changes), "train")
    shutil.copytree(tmp_path / "straight", tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        if path.name != "checkpoint-2" and path.name != "metrics.jsonl":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(lora(model, pairs, tmp_path / "again", resume=True, **changes), "train")
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "again")
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[key]) for key, value in one.items())


def test_adapters_are_not_resumed_on_another_base(model, pairs, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(model, base)
    train(lora(str(base), pairs, tmp_path / "run", max_steps=2, save_steps=1), "train")
    changed = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        changed.model.norm.weight[3] += 1e-3
    changed.save_pretrained(base)
    (tmp_path / "run/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="the model that the run starts from is not the same: 1 of 21 tensors differ"):
        train(lora(str(base), pairs, tmp_path / "run", max_steps=2, save_steps=1, resume=True), "train")


@pytest.mark.parametrize("changes", [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "lora_modules_to_save": ["norm"]}])
def test_adapters_are_float32_on_a_bfloat16_base(changes, model, pairs, tmp_path, caplog):
    out = tmp_path / "run"
    train(lora(model, pairs, out, num_train_epochs=2.0, **changes), "train")
    assert all(value.dtype == torch.float32 for value in weights(out).values())
    assert loaded(model, **changes).model.model.embed_tokens.weight.dtype == torch.bfloat16
    log = read_log(out)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert log[-1]["loss"] < log[0]["loss"]
    assert "too coarse" not in caplog.text
    lm = load_model(str(out), lora(model, **changes), CPU)  # as `eval` reads it
    read, written = adapter_state(lm.model, lm.adapters), weights(out)
    assert read.keys() == written.keys()
    assert all(torch.equal(value, written[name]) for name, value in read.items())


def test_eval_and_generate_read_adapters(model, pairs, tmp_path, capsys):
    out = tmp_path / "run"
    train(lora(model, pairs, out, num_train_epochs=3.0, eval_fraction=0.2), "train")
    last = [row for row in read_log(out) if "eval_loss" in row][-1]
    words = ["--dataset_name", pairs, "--device", "cpu", "--max_length", "64", "--model_name_or_path", str(out)]
    words += ["--ref_model_name_or_path", model, "--eval_fraction", "0.2"]
    found = tmp_path / "eval.json"
    assert main(["eval", *words, "--output_file", str(found)]) == 0
    metrics = json.loads(found.read_text())
    assert metrics["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)
    assert metrics["kl_to_ref"] == pytest.approx(last["eval_kl_to_ref"], rel=1e-3)
    found = tmp_path / "answers.jsonl"
    assert main(["generate", *words, "--max_new_tokens", "4", "--output_file", str(found)]) == 0
    answers = [json.loads(line) for line in found.read_text().splitlines()]
    assert answers
    assert any(row["model"] != row["reference"] for row in answers)

    for name, message in (
        ("adapter_model.safetensors", "has no weights: expected adapter_model.safetensors beside adapter_config.json"),
        ("tokenizer.json", ""),  # then the base model's is read
    ):
        half = tmp_path / name
        shutil.copytree(out, half)
        for path in half.glob(f"{name.split('.')[0]}*"):
            path.unlink()
        capsys.readouterr()
        code = main(["generate", *words[:-4], "--model_name_or_path", str(half), "--max_new_tokens", "2"])
        assert code == (2 if message else 0)
        assert message in capsys.readouterr().err
    (out / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    assert main(["eval", *words]) == 2
    assert "does not say what its base model is" in capsys.readouterr().err
