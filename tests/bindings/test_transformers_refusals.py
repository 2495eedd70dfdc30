"""What `prefuse.transformers` refuses: models, heads and arguments that it does not compute, each by name."""

import inspect
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement

from prefuse.packing import pack
from prefuse.transformers import (
    UnsupportedModel,
    UnsupportedVersion,
    head_of,
    sequence_logps,
)
from transformers_cases import GROUPS, ROWS, TINY, TRUNK, V, build, flat, lora, oracle, padded, refuse

# PEFT itself still calls it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROOT = Path(__file__).resolve().parents[2]


class ScaledLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.001
        return output


class CappedLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1000 * torch.tanh(output.logits / 1000)
        return output


class BiasedLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, V)
        return output


@pytest.mark.parametrize("unknown", [ScaledLlama, CappedLlama, BiasedLlama])
def test_a_transform_of_the_logits_that_the_config_does_not_tell_of(unknown):
    model = unknown(transformers.LlamaConfig(**TINY)).eval()
    for _ in range(2):
        refuse(model, f"the forward of {unknown.__name__} does something to its logits that its config does not tell")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [("Gemma3", "final_logit_softcapping", 2.0), ("Granite", "logits_scaling", 4.0), ("Cohere", "logit_scale", 1.0)],
)
def test_a_config_that_is_changed_later(name, option, value):
    """Gemma and Granite read theirs in every forward; Cohere did so once, and now does not what its config says."""
    model = build(name)
    sequence_logps(model, **padded())
    setattr(model.config, option, value)
    if name == "Cohere":
        refuse(model, "does something to its logits")
    else:
        wanted = torch.stack([x.sum() for x in oracle(model)]).double()
        torch.testing.assert_close(sequence_logps(model, **padded()), wanted, rtol=1e-5, atol=1e-5)


class InPlace(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits.mul_(1.0)
        return output


class Twice(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        self.lm_head(torch.zeros(*kwargs["input_ids"].shape, 32))
        return super().forward(*args, **kwargs)


class Around(transformers.LlamaForCausalLM):
    def forward(self, input_ids=None, **kwargs):
        hidden = self.model(input_ids=input_ids, **kwargs)[0]
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=hidden @ self.lm_head.weight.T)


@pytest.mark.parametrize(("kind", "words"), [(InPlace, "changed its head's output in place"),
                                             (Twice, "called it 2 times"), (Around, "did not call it")])  # fmt: skip
def test_a_head_that_is_used_in_another_way(kind, words):
    refuse(kind(transformers.LlamaConfig(**TINY)).eval(), f"{kind.__name__} was to call its head (Linear) once", words)


def stand_in(module, name, base=torch.nn.Module, **members):
    """A class of this name, as a library that is not here has it."""
    kind = type(name, (base,), {"forward": lambda self, x: x, "__module__": module, **members})
    layer = kind.__new__(kind)
    torch.nn.Module.__init__(layer)
    layer.weight = torch.nn.Parameter(torch.zeros(V, 16, dtype=torch.uint8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("module", "name", "fix"),
    [
        ("bitsandbytes.nn.modules", "Linear8bitLt", 'BitsAndBytesConfig(..., llm_int8_skip_modules=["lm_head"])'),
        ("bitsandbytes.nn.modules", "Linear4bit", 'BitsAndBytesConfig(..., llm_int8_skip_modules=["lm_head"])'),
        ("hqq.core.quantize", "HQQLinear", 'HqqConfig(..., skip_modules=["lm_head"])'),
        ("gptqmodel.nn_modules.qlinear.torch", "TorchQuantLinear", "quantized with lm_head=False"),
        ("awq.modules.linear.gemm", "WQLinear_GEMM", 'AwqConfig(..., modules_to_not_convert=["lm_head"])'),
        ("optimum.quanto.nn", "QLinear", 'QuantoConfig(..., modules_to_not_convert=["lm_head"])'),
        ("transformers.integrations.eetq", "EetqLinear", 'EetqConfig(..., modules_to_not_convert=["lm_head"])'),
        ("transformers.integrations.finegrained_fp8", "FP8Linear", "FineGrainedFP8Config(..., modules_to_not_convert"),
        ("compressed_tensors.linear", "CompressedLinear", '"lm_head" under ignore'),
    ],
)
def test_a_quantized_head(module, name, fix):
    model = build()
    model.lm_head = stand_in(module, name)
    refuse(model, f"the head of LlamaForCausalLM is quantized ({module}.{name})", fix)


def test_options_that_messages_name_exist_in_transformers():
    from prefuse.models.head import QUANTIZED

    for advice in QUANTIZED.values():
        if advice[0].isupper():
            config, option = advice.split("(")[0], advice.split("..., ")[1].split("=")[0]
            parameters = inspect.signature(getattr(transformers, config).__init__).parameters
            assert option in parameters, advice


class AffineQuantizedTensor(torch.Tensor):
    """Stands for torchao's: a linear layer stays nn.Linear, and its weight is another kind of tensor."""

    __module__ = "torchao.dtypes.affine_quantized_tensor"


def test_a_quantized_weight_in_a_plain_layer():
    model = build()
    weight = model.lm_head.weight.detach().as_subclass(AffineQuantizedTensor)
    model.lm_head.weight = torch.nn.Parameter(weight)
    refuse(model, "is quantized (torch.nn.modules.linear.Linear with a torchao", "TorchAoConfig(..., modules_to_not_c")
    model = build()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to(torch.float8_e4m3fn), requires_grad=False)
    refuse(model, "is quantized (", "with a weight of torch.float8_e4m3fn", "load the model with a plain head")


def test_a_lora_on_a_quantized_head():
    model = lora("lm_head")
    model.base_model.model.lm_head.base_layer = stand_in("bitsandbytes.nn.modules", "Linear4bit")
    refuse(model, "is quantized (bitsandbytes.nn.modules.Linear4bit)")


ADVICE = ('exclude_modules=["lm_head"]', 'modules_to_save=["lm_head"]', "merge_and_unload()")


def test_adapters_on_the_head_that_are_not_lora():
    import peft

    model = peft.get_peft_model(build(), peft.LoHaConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    refuse(model, "the head of LlamaForCausalLM is a peft.tuners.loha.layer.Linear, expected torch.nn.Linear", *ADVICE)
    refuse(lora("lm_head", use_dora=True), "the head's adapter 'default' is a DoraLinearVariant, expected", *ADVICE)
    # and what the advice says is right
    excluded = peft.LoraConfig(r=2, use_dora=True, target_modules="all-linear", exclude_modules=["lm_head"])
    sequence_logps(peft.get_peft_model(build(), excluded), **padded())
    merged = lora("lm_head", use_dora=True).double()
    wanted = torch.stack([x.sum() for x in oracle(merged)])
    torch.testing.assert_close(sequence_logps(merged.merge_and_unload(), **padded()), wanted, rtol=1e-8, atol=1e-8)


def test_head_of_gives_no_half_of_a_head():
    model = lora("lm_head")
    with pytest.raises(UnsupportedModel, match=r"has a LoRA adapter, so its weight is no single matrix: prefuse\.tra"):
        head_of(model.base_model.model)
    model = lora(*TRUNK, modules_to_save=["lm_head"])
    trained = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head_of(model.base_model.model).weight is trained
    with model.disable_adapter():
        assert head_of(model.base_model.model).weight is not trained


def test_prompts_that_peft_adds():
    import peft

    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    refuse(peft.get_peft_model(build(), config), "PROMPT_TUNING adds tokens of its own", "expected adapters in layers")


def test_tokens_that_peft_trains_in_a_tied_head():
    import peft

    config = peft.LoraConfig(r=2, target_modules=TRUNK, trainable_token_indices=[5, 6], task_type="CAUSAL_LM")
    refuse(peft.get_peft_model(build("Qwen3"), config), "TrainableTokensWrapper, expected torch.nn.Linear")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("DataParallel", "use DistributedDataParallel"),
        ("FullyShardedDataParallel", "use fully_shard (FSDP2)"),
        ("DeepSpeedEngine", "use DistributedDataParallel or fully_shard (FSDP2)"),
    ],
)
def test_wrappers_that_cannot_be_gone_through(name, fix):
    refuse(stand_in("library", name), f"a model in library.{name} cannot run here: {fix}")


def test_weights_that_are_elsewhere():
    model = build()
    model.lm_head.weight.data = torch.empty(0)
    refuse(model, "has no weight here (partitioned, as by DeepSpeed ZeRO-3)", "fully_shard (FSDP2)")
    model = build()
    model.lm_head.to("meta")
    refuse(model, "has no weight here (offloaded)", "keep it on the device that runs the model")


def test_what_is_no_causal_lm_of_transformers():
    refuse(torch.nn.Linear(3, 3), "got torch.nn.modules.linear.Linear", "prefuse.padded.batch_logps", error=TypeError)
    refuse(transformers.LlamaModel(transformers.LlamaConfig(**TINY)), "LlamaModel has no output embeddings")
    shape = {"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4}
    refuse(transformers.T5ForConditionalGeneration(transformers.T5Config(**shape)), "is an encoder-decoder")
    mixtral = transformers.MixtralConfig(**TINY, num_local_experts=2, output_router_logits=True)
    refuse(transformers.MixtralForCausalLM(mixtral), "set output_router_logits to false")


def test_models_that_take_no_flat_batches():
    refuse(build("GPT2").train(), "attention dropout", "set it to 0, or call model.eval()", **flat())


@pytest.mark.parametrize(
    ("library", "version", "need"),
    [
        ("transformers", "4.57.1", ">= 5.23, < 6.0"),
        ("transformers", "5.9.0", ">= 5.23, < 6.0"),
        ("transformers", "6.0.0.dev0", ">= 5.23, < 6.0"),
        ("peft", "0.18.0", ">= 0.21, < 1.0"),
    ],
)
def test_versions_that_this_was_not_written_for(monkeypatch, library, version, need):
    model = lora(*TRUNK)
    monkeypatch.setattr(__import__(library), "__version__", version)
    what = f"{library} {version} is installed, but prefuse needs {library} {need}: pip install '{library}"
    refuse(model, what, error=UnsupportedVersion)


def test_a_peft_that_the_model_does_not_use_may_be_any(monkeypatch):
    import peft

    monkeypatch.setattr(peft, "__version__", "0.1.0")
    sequence_logps(build(), **padded())


def test_versions_are_those_of_the_package():
    from prefuse.models.trunk import VERSIONS

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = {Requirement(line).name: Requirement(line).specifier for line in project["optional-dependencies"]["train"]}
    for library, (first, last) in VERSIONS.items():
        low, high, below = (".".join(map(str, x)) for x in (first, last, (first[0], first[1] - 1)))
        assert low in listed[library]
        assert below not in listed[library]
        assert library == "peft" or high not in listed[library]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reduction": "total"}, 'reduction must be "sum", "mean" or "none", got \'total\''),
        ({"input_ids": torch.zeros(5, dtype=torch.long)}, r"expected input_ids \(B, T\) of integers, got \(5,\)"),
        ({"input_ids": torch.zeros(4, 15)}, r"of integers, got \(4, 15\) of torch.float32"),
        ({"labels": torch.zeros(4, 14)}, r"shape \(4, 15\), got \(4, 14\); labels are shifted inside"),
        ({"attention_mask": torch.ones(4, 3)}, r"expected attention_mask of input_ids' shape \(4, 15\), got \(4, 3\)"),
        ({"position_ids": torch.zeros(4, 9)}, r"expected position_ids for 15 tokens, got \(4, 9\)"),
        ({"cu_seqlens": torch.tensor([0, 15])}, "give cu_seqlens or attention_mask, not both"),
        ({"cu_seqlens": torch.tensor([0, 15]), "attention_mask": None}, r"expected a flat batch \(1, T\)"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        sequence_logps(build(), **padded() | change)


@pytest.mark.parametrize("ends", [[1, 36], [0, 35], [0, 9, 9, 36], [0, 20, 10, 36], []])
def test_offsets_that_do_not_fit(ends):
    with pytest.raises(ValueError, match="expected cu_seqlens to rise from 0 to the 36 tokens"):
        sequence_logps(build(), **flat() | {"cu_seqlens": torch.tensor(ends, dtype=torch.int32)})


def test_a_packed_batch_is_given_alone():
    with pytest.raises(ValueError, match="a Packed knows its labels, positions and lengths"):
        sequence_logps(build(), pack(GROUPS), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="use token_logps for a Packed"):
        sequence_logps(build(), pack(GROUPS), reduction="none")
    with pytest.raises(TypeError, match=r"input_ids must be a torch.Tensor or a prefuse.packing.Packed, got list"):
        sequence_logps(build(), ROWS)
