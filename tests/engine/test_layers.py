"""Checkpointed, compiled and Liger's layers: the same numbers, and less memory, few compilations, no other loss."""

import dataclasses
import inspect
import shutil
import types

import pytest
import torch
import torch._dynamo.utils
from transformers.models.llama import modeling_llama

import prefuse
from prefuse.bench.timing import peak_bytes
from prefuse.engine.data import load_examples
from prefuse.engine.data.batches import collate, examples_of
from prefuse.engine.errors import UserError
from prefuse.engine.model import layers
from prefuse.engine.model.forward import completion_logps, fused_loss
from prefuse.engine.model.layers import decoder_layers, use_liger
from prefuse.engine.model.load import load_model, load_tokenizer
from prefuse.engine.train import train
from tiny_run import PAIRS, read_log, save_model, settings, weights, write_rows

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft's
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),  # Dynamo's
]
CPU = torch.device("cpu")
LORA = {"use_peft": True, "lora_r": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def loaded(model, **changes):
    config = settings(**{"model_name_or_path": model, "dataset_name": "d", "output_dir": "o"} | changes)
    return load_model(model, config, CPU, trains=True)


def examples_at(pairs, model, padding_free=True):
    rows = load_examples(pairs, "pair", load_tokenizer(model), 64).examples
    return dataclasses.replace(examples_of(rows), padding_free=padding_free)


def batch_of(examples, indices):
    counts = [sum(len(completion) for _, completion in group) for group in examples.sequences]
    return collate(examples, indices, [torch.linspace(-3, -1, count) for count in counts])


def gradients(lm, batch):
    torch.manual_seed(3)  # for dropout
    lm.model.zero_grad()
    fused_loss(lm, batch, prefuse.DPO()).loss.backward()
    found = {name: p.grad.clone() for name, p in lm.model.named_parameters() if p.grad is not None}
    assert found
    return found


# ---------------------------------------------------------------------------------------------------------
# Gradient checkpointing


@pytest.mark.parametrize("padding_free", [False, True])
@pytest.mark.parametrize(
    "changes", [{}, {"bf16": True}, LORA, LORA | {"lora_dropout": 0.5}], ids=["float32", "bf16", "lora", "dropout"]
)
def test_checkpointed_gradients_are_the_same_bits(changes, padding_free, model, pairs):
    batch = batch_of(examples_at(pairs, model, padding_free), range(8))
    plain, again = loaded(model, **changes), loaded(model, gradient_checkpointing=True, **changes)
    if "use_peft" in changes:  # as they are made, one of the two matrices is zero, and so is the other's gradient
        for lm in plain, again:
            torch.manual_seed(4)
            for name, p in lm.model.named_parameters():
                if p.requires_grad:
                    assert "lora_" in name
                    p.data += 0.1 * torch.randn(p.shape)
    wanted, got = gradients(plain, batch), gradients(again, batch)
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], value) for name, value in wanted.items())
    assert all(value.abs().max() > 0 for value in got.values())
    assert torch.equal(completion_logps(plain, batch), completion_logps(again, batch))


def test_a_layer_runs_twice_where_a_gradient_is_taken_and_once_elsewhere(model, pairs):
    batch = batch_of(examples_at(pairs, model), range(8))
    lm = loaded(model, gradient_checkpointing=True)
    gradients(lm, batch)  # at its first flat batch a model is compared with itself
    calls = []
    for layer in decoder_layers(lm.model):
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # a layer is left when all is there again
    gradients(lm, batch)
    assert len(calls) == 2 * 2
    completion_logps(lm, batch)
    assert len(calls) == 2 * 2 + 2


@pytest.mark.slow
def test_checkpointed_layers_need_less_memory(tmp_path, pairs):
    """At its peak a layer holds what its own backward needs, and of the other seven their inputs."""
    deep = save_model(tmp_path / "deep", num_hidden_layers=8)
    batch = batch_of(examples_at(pairs, deep), list(range(12)) * 4)
    kept = {}
    for checkpointing in (False, True):
        lm = loaded(deep, gradient_checkpointing=checkpointing)
        gradients(lm, batch)  # so that the gradients' own memory is there already
        sizes = {}

        def keep(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = fused_loss(lm, batch, prefuse.DPO())
        weight_bytes = sum(sizes.get(p.untyped_storage().data_ptr(), 0) for p in lm.model.parameters())
        kept[checkpointing] = sum(sizes.values()) - weight_bytes
        del out
        peak = peak_bytes(lambda lm=lm: fused_loss(lm, batch, prefuse.DPO()).loss.backward())
        kept[checkpointing, "peak"] = peak
    assert kept[True] < 0.25 * kept[False]
    assert kept[True, "peak"] < 0.5 * kept[False, "peak"]


def test_a_checkpointed_run_ends_with_the_same_bits_and_may_be_switched_on_when_resumed(model, pairs, tmp_path):
    base = {"model_name_or_path": model, "dataset_name": pairs, "save_steps": 1}
    train(settings(**base, output_dir=str(tmp_path / "plain"), max_steps=3), "train")
    train(settings(**base, output_dir=str(tmp_path / "again"), max_steps=3, gradient_checkpointing=True), "train")
    shutil.rmtree(tmp_path / "again" / "checkpoint-3")
    train(settings(**base, output_dir=str(tmp_path / "again"), max_steps=3, resume=True), "train")
    assert all(torch.equal(weights(tmp_path / "again")[k], v) for k, v in weights(tmp_path / "plain").items())


# ---------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.fixture
def compilations():
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    counters.clear()


@pytest.mark.slow
def test_batches_of_any_shape_share_what_is_compiled(model, pairs, compilations):
    """Lengths, numbers of pairs and who shares a prompt all differ: the layers are compiled for the first of them."""
    examples = examples_at(pairs, model)
    plain = loaded(model)
    lm = loaded(model, torch_compile=True, torch_compile_backend="eager")
    before = compilations()
    for number, indices in enumerate([[0, 1, 2], [5, 0], [3, 7, 9, 11, 2], range(12), [8, 4, 6], [10, 1]]):
        batch = batch_of(examples, indices)
        got, wanted = gradients(lm, batch), gradients(plain, batch)
        for name, value in wanted.items():
            torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-6 * value.abs().max().item())
        if number == 0:
            first = compilations()
            assert first > before
    assert compilations() == first


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "changes"),
    [("inductor", {}), ("aot_eager", {"gradient_checkpointing": True}), ("aot_eager", LORA | {"loss_type": "kto"})],
    ids=str,
)
def test_a_compiled_run_is_an_eager_one_to_rounding(backend, changes, model, pairs, tmp_path, compilations, caplog):
    base = {"model_name_or_path": model, "dataset_name": pairs, "num_train_epochs": 2.0, "eval_fraction": 0.2}
    base |= {"adam_epsilon": 1e-2} | changes
    compiled = {"torch_compile": True, "torch_compile_backend": backend}
    for name, more in ("eager", {}), ("compiled", compiled):
        train(settings(**base | more, output_dir=str(tmp_path / name)), "train")
    assert compilations() > 0
    logs = [read_log(tmp_path / name) for name in ("eager", "compiled")]
    for one, two in zip(*logs, strict=True):
        for key in one.keys() & {"loss", "grad_norm", "eval_loss", "rewards/margins"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
    assert "was expected" not in caplog.text
    one, two = (weights(tmp_path / name) for name in ("eager", "compiled"))
    assert one.keys() == two.keys()  # the names are those of the model, not of what is compiled
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=0, atol=1e-5 * value.abs().max().item())


def test_a_compiler_that_cannot_run_is_one_line(model, compilations, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("no compiler in this machine\nand more")

    with pytest.raises(UserError, match="backend nothing cannot compile on cpu"):
        loaded(model, torch_compile=True, torch_compile_backend="nothing")
    torch._dynamo.register_backend(broken, name="broken")
    with pytest.raises(UserError, match=r"no compiler in this machine\. inductor needs a C") as error:
        loaded(model, torch_compile=True, torch_compile_backend="broken")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_without_a_cpp_compiler_inductor_is_refused(model, compilations):
    from torch._inductor import config as inductor

    refused = pytest.raises(UserError, match=r"the backend inductor cannot compile on cpu: .*inductor needs a C")
    # (patch, since a setting that was assigned, even what it was before, is no longer what it was.)
    with inductor.patch({"force_disable_caches": True, "cpp.cxx": ("no-such-compiler",)}), refused:
        loaded(model, torch_compile=True)


# ---------------------------------------------------------------------------------------------------------
# Liger


def test_liger_is_refused_where_it_cannot_run(model, monkeypatch):
    with pytest.raises(UserError, match="Liger's kernels run on a GPU, and the device is cpu: set it to false"):
        loaded(model, use_liger_kernel=True)
    lm = loaded(model)
    monkeypatch.setattr(lm.model.config, "model_type", "unheard_of")
    with pytest.raises(UserError, match="Liger has no kernels for models of the type unheard_of"):
        use_liger(lm.model, torch.device("cuda"))

    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(layers, "importlib", types.SimpleNamespace(import_module=absent))
    with pytest.raises(UserError, match=r"No module named 'liger_kernel.* pip install liger-kernel"):
        use_liger(lm.model, torch.device("cuda"))


def test_liger_patches_layers_and_leaves_the_models_forward_and_loss(model, monkeypatch):
    """Its kernels need a GPU; which functions are in place does not."""
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from liger_kernel.transformers.rope import liger_rotary_pos_emb
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):  # which it replaces for the whole process
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    lm = loaded(model)
    forward, cross_entropy = type(lm.model).forward, torch.nn.functional.cross_entropy
    use_liger(lm.model, torch.device("cuda"))
    for layer in decoder_layers(lm.model):
        assert layer.mlp.forward.__func__ is LigerSwiGLUMLP.forward
        assert layer.input_layernorm.forward.__func__ is LigerRMSNorm.forward
    assert lm.model.model.norm.forward.__func__ is LigerRMSNorm.forward
    assert modeling_llama.apply_rotary_pos_emb is liger_rotary_pos_emb
    assert lm.model.forward.__func__ is forward is type(lm.model).forward
    assert torch.nn.functional.cross_entropy is cross_entropy


def test_every_loss_of_liger_is_off_and_all_else_on(monkeypatch):
    from liger_kernel.transformers import monkey_patch

    for kind, patch in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN.items():
        asked = {}
        stand_in = lambda asked=asked, **options: asked.update(options)  # noqa: E731
        stand_in.__signature__ = inspect.signature(patch)
        monkeypatch.setitem(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, kind, stand_in)
        a_model = types.SimpleNamespace(config=types.SimpleNamespace(model_type=kind))
        use_liger(a_model, torch.device("cuda"))
        assert asked.pop("model") is a_model
        named = [n for n, p in inspect.signature(patch).parameters.items() if p.kind is not p.VAR_KEYWORD]
        assert asked.keys() == set(named) - {"model"}
        losses = {name for name in asked if "entropy" in name}
        assert all(value is (name not in losses) for name, value in asked.items())
