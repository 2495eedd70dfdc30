"""`prefuse.transformers` on models with adapters, compiled or wrapped: the same values and gradients as alone."""

import copy
import gc
from pathlib import Path

import pytest
import torch

import prefuse.models.inside
import prefuse.transformers
import wrapped_worker
from prefuse.transformers import (
    sequence_logps,
)
from transformers_cases import (
    BATCHES,
    COEFFICIENTS,
    TRUNK,
    assert_same_gradients,
    build,
    gradients,
    lora,
    oracle,
    padded,
    refuse,
)

# PEFT itself still calls it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PEFT = {
    "trunk": lambda: lora(*TRUNK),
    "tied": lambda: lora(*TRUNK, model=build("Qwen3")),
    "head": lambda: lora(*TRUNK, "lm_head"),
    "head alone": lambda: lora("lm_head", r=5, use_rslora=True),
    "head with a bias": lambda: lora("lm_head", model=build("Phi"), lora_bias=True),
    "head under a cap": lambda: lora("lm_head", model=build("Gemma3"), ensure_weight_tying=False),
    "modules_to_save": lambda: lora(*TRUNK, modules_to_save=["lm_head"]),
    "modules_to_save, whole": lambda: lora(*TRUNK, modules_to_save=["lm_head", "embed_tokens"]),
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("kind", PEFT)
def test_peft_values_and_gradients_are_those_of_the_logits(kind):
    model = PEFT[kind]().double()
    sums = torch.stack([x.sum() for x in oracle(model)])
    expected = gradients(model, (sums * COEFFICIENTS).sum())
    for make in BATCHES.values():
        got = sequence_logps(model, **make())
        torch.testing.assert_close(got, sums, rtol=1e-9, atol=1e-9)
        assert_same_gradients(gradients(model, (got * COEFFICIENTS).sum()), expected, rtol=1e-6)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("kind", PEFT)
def test_the_reference_is_the_model_with_its_adapters_off(kind):
    model = PEFT[kind]()
    with torch.no_grad():
        policy = sequence_logps(model, **padded())
        with model.disable_adapter():
            got = sequence_logps(model, **padded())
            wanted = torch.stack([x.sum() for x in oracle(model)])
        torch.testing.assert_close(got, wanted.double(), rtol=1e-5, atol=1e-5)
        assert (policy - got).abs().max() > 1e-2
        assert torch.equal(sequence_logps(model, **padded()), policy)


def test_two_adapters_of_a_head_add_up():
    import peft

    model = lora("lm_head")
    model.add_adapter("second", peft.LoraConfig(r=3, lora_alpha=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    for name, p in model.named_parameters():
        if "second" in name:
            p.data.normal_(std=0.2)
    seen = {}
    for active in (["default"], ["second"], ["default", "second"]):
        model.base_model.set_adapter(active)
        got = sequence_logps(model, **padded())
        torch.testing.assert_close(got, torch.stack([x.sum() for x in oracle(model)]).double(), rtol=1e-5, atol=1e-5)
        seen[len(active), active[0]] = got.detach()
    first, second, both = seen.values()
    assert (first - both)[:3].abs().min() > 1e-3
    assert (second - both)[:3].abs().min() > 1e-3


def test_a_merged_adapter_is_in_the_weight():
    model = lora(*TRUNK, "lm_head").double()
    wanted = sequence_logps(model, **padded())
    model.merge_adapter()
    torch.testing.assert_close(sequence_logps(model, **padded()), wanted, rtol=1e-9, atol=1e-9)
    with model.disable_adapter():  # as PEFT itself, which takes it out again for this
        off = sequence_logps(model, **padded())
        torch.testing.assert_close(off, torch.stack([x.sum() for x in oracle(model)]), rtol=1e-9, atol=1e-9)
        assert (off - wanted).abs().max() > 1e-2
    torch.testing.assert_close(sequence_logps(model.merge_and_unload(), **padded()), wanted, rtol=1e-9, atol=1e-9)


def test_the_adapter_of_a_head_sees_its_own_dropout():
    """A mask instead of a random one, so that rows which never reach the head do not matter."""

    class EveryThird(torch.nn.Module):
        def forward(self, x):
            return x * (torch.arange(x.shape[-1]) % 3 != 0) * 1.5

    model = lora("lm_head", lora_dropout=0.3).double()
    without = sequence_logps(model, **padded())
    model.base_model.model.lm_head.lora_dropout["default"] = EveryThird()
    sums = torch.stack([x.sum() for x in oracle(model)])
    got = sequence_logps(model, **padded())
    torch.testing.assert_close(got, sums, rtol=1e-9, atol=1e-9)
    expected = gradients(model, sums.sum())
    assert_same_gradients(gradients(model, got.sum()), expected, rtol=1e-7)
    assert (got - without)[:3].abs().min() > 1e-4


def test_a_dropout_that_is_random_is_on_in_training_only():
    model = lora("lm_head", lora_dropout=0.5)
    batch = padded()
    assert torch.equal(sequence_logps(model, **batch), sequence_logps(model, **batch))
    model.train()

    def seeded(seed):
        torch.manual_seed(seed)
        return sequence_logps(model, **batch)

    assert torch.equal(seeded(1), seeded(1))
    assert not torch.equal(seeded(1), seeded(2))


def test_an_adapter_below_the_last_bit_of_a_bfloat16_head_counts():
    """Merged into the weight, all but a few of its digits would be rounded away."""
    model = lora("lm_head").bfloat16()
    layer = model.base_model.model.lm_head
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(2**-9)
    hidden = torch.randn(64, 32).bfloat16()
    from prefuse.models.head import as_product

    rows, weight, _ = as_product(layer, hidden)
    base = hidden.double() @ layer.base_layer.weight.double().T
    a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
    delta = 2.0 * hidden.double() @ a.T @ b.T
    merged = layer.base_layer.weight + layer.get_delta_weight("default")
    ours = (rows.double() @ weight.double().T - base - delta).norm() / delta.norm()
    theirs = (hidden.double() @ merged.double().T - base - delta).norm() / delta.norm()
    assert ours < 0.01
    assert theirs > 5 * ours


def test_an_adapter_that_transformers_put_there():
    import peft

    model = build()
    try:
        model.add_adapter(peft.LoraConfig(r=4, target_modules=[*TRUNK, "lm_head"]))
    except (ImportError, ValueError) as error:  # transformers 5.24.0 asks for peft 0.22 here, before its release
        if "PEFT" not in str(error):
            raise
        pytest.skip(f"this transformers does not take this peft: {error}")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    wanted = torch.stack([x.sum() for x in oracle(model)]).double()
    torch.testing.assert_close(sequence_logps(model, **padded()), wanted, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# torch.compile


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", ["torch.compile", *(pytest.param(x, marks=pytest.mark.slow) for x in ("model.compile", "the trunk"))]
)
def test_a_compiled_model_is_itself_before_and_after(how):
    torch._dynamo.reset()
    model = build("Gemma3", num_hidden_layers=1)
    batch = padded()
    expected = sequence_logps(model, **batch)
    wanted = gradients(model, expected.sum())
    logits = model(batch["input_ids"]).logits
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend="aot_eager")
    elif how == "model.compile":
        model.compile(backend="aot_eager")
    else:
        model.model = torch.compile(model.model, backend="aot_eager")
    for _ in range(2):
        got = sequence_logps(compiled, **batch)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        found = {name.replace("_orig_mod.", ""): grad for name, grad in gradients(model, got.sum()).items()}
        assert_same_gradients(found, wanted)
        torch.testing.assert_close(compiled(batch["input_ids"]).logits, logits)  # no trace of ours is left in it
    torch._dynamo.reset()


def _through_fuse_loss(model, batch):
    return prefuse.transformers.fuse_loss(model)(batch["input_ids"], labels=batch["input_ids"]).loss


def _through_sft_loss(model, batch):
    loss = prefuse.transformers.sft_loss(model)
    return loss(model(batch["input_ids"]), batch["input_ids"])


DOORS = {"sequence_logps": lambda model, batch: sequence_logps(model, **batch),
         "fuse_loss": _through_fuse_loss, "sft_loss": _through_sft_loss}  # fmt: skip


@pytest.mark.parametrize(
    "door", [x if x == "sequence_logps" else pytest.param(x, marks=pytest.mark.slow) for x in DOORS]
)
def test_the_compiler_sees_the_models_own_code_alone(door):
    """It also read what is kept here of all models, and raised IndexError where one was collected meanwhile.

    (torch 2.13.0.) The hook is called between a function's new code and its guards, where other models go.
    """
    torch._dynamo.reset()
    batch = padded()
    others = [build(), build()]
    for other in others:
        sequence_logps(other, **batch)
    model = build("Gemma3", num_hidden_layers=1).train()
    expected = DOORS[door](copy.deepcopy(model), batch)
    compiled = []

    def hook(code, new_code):
        compiled.append(code.co_filename)
        others.clear()
        gc.collect()

    model.compile(backend="aot_eager")
    handle = torch._dynamo.convert_frame.register_bytecode_hook(hook)
    try:
        torch.testing.assert_close(DOORS[door](model, batch), expected, rtol=1e-5, atol=1e-5)
    finally:
        handle.remove()
        torch._dynamo.reset()
    assert compiled
    ours = Path(prefuse.models.inside.__file__).parent
    assert not [name for name in compiled if Path(name).is_relative_to(ours)]


WRAPPED = [*wrapped_worker.CASES, *(f"{name}, one rank alone has rows" for name in ("ddp", "fsdp")),
           *(f"loss {name}" for name in wrapped_worker.LOSSES)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", WRAPPED)
def test_wrappers_give_the_numbers_of_one_process(case, wrapped):
    """To float32's rounding of a few layers, over two steps: against logits in float64, of one process."""
    assert wrapped[case]["values"] <= 2e-5
    assert wrapped[case]["gradients"]
    for name, error in wrapped[case]["gradients"].items():
        assert error <= 1e-5, name


@pytest.mark.parametrize("wrap", ["ddp", "ddp find_unused", "fsdp", "fsdp head alone resharded", "fsdp cast"])
def test_wrappers_of_one_process(wrap, alone):
    model, plain = wrapped_worker.CASES[wrap](), wrapped_worker.llama()
    batch = padded()
    with torch.no_grad():
        reference = sequence_logps(model, **batch)
    got = sequence_logps(model, **batch)
    assert torch.equal(got, reference)
    wanted = sequence_logps(plain, **batch)
    assert torch.equal(got, wanted)
    got.sum().backward()
    expected = gradients(plain, wanted.sum())
    found = wrapped_worker.gradients_of(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_a_wrapper_that_goes_around_the_model(alone):
    class Deaf(torch.nn.parallel.DistributedDataParallel):
        def forward(self, **inputs):
            return torch.zeros(1, 30, 1)

    refuse(Deaf(build()), "Deaf did not call the forward of its LlamaForCausalLM: give the model inside")


def test_a_part_of_a_sharded_model_is_refused(alone):
    """The decoder's weights would be there, the head's are not: the root was gone around."""
    model = wrapped_worker.fsdp(wrapped_worker.llama())
    inner = wrapped_worker.llama()
    inner.lm_head.weight = model.lm_head.weight
    refuse(inner, "is a DTensor inside the model's forward", "under fully_shard, call the root module")
