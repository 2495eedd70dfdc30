"""Every way a causal LM is known to make logits goes through the fused head; any other is refused by name."""

import dataclasses

import pytest
import torch
import transformers

import prefuse
from prefuse.transformers import Head, UnsupportedModel, check_head, head_of, trunk_hidden
from tiny_run import SHAPE

TINY = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "head_dim": 8, **SHAPE}
GPT = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "n_embd": 32, "n_layer": 2, "n_head": 4}

# One of each kind of head: plain, tied, with a bias, with a cap, with a factor, with a divisor.
ARCHITECTURES = {
    "Llama": (transformers.LlamaConfig, TINY),
    "Qwen3": (transformers.Qwen3Config, TINY | {"tie_word_embeddings": True}),
    "GPT2": (transformers.GPT2Config, GPT),
    "Phi": (transformers.PhiConfig, {k: v for k, v in TINY.items() if k != "head_dim"}),
    "Gemma2": (transformers.Gemma2Config, TINY | {"final_logit_softcapping": 5.0}),
    "Gemma3": (transformers.Gemma3TextConfig, TINY | {"final_logit_softcapping": 3.0}),
    "Cohere": (transformers.CohereConfig, TINY | {"logit_scale": 0.25}),
    "Granite": (transformers.GraniteConfig, TINY | {"logits_scaling": 8.0}),
    "OPT": (transformers.OPTConfig, {"vocab_size": 300, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
                                     "num_attention_heads": 4, "word_embed_proj_dim": 32}),
}  # fmt: skip
IDS = torch.arange(40).reshape(2, 20) * 7 % 300


def build(name):
    config, settings = ARCHITECTURES[name]
    model = transformers.AutoModelForCausalLM.from_config(config(**settings)).eval()
    with torch.no_grad():  # so that a bias, zero at first, matters
        for parameter in head_of(model).weight, head_of(model).bias:
            if parameter is not None:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fused_head_is_the_models_own(name, dtype):
    check_head(build(name).to(dtype), IDS)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_and_gradients_equal_those_of_the_logits(name):
    model = build(name).double()
    targets = IDS[:, 1:].flatten()

    def gradients(logps):
        model.zero_grad()
        logps.mean().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    logits = model(input_ids=IDS).logits[:, :-1].flatten(0, 1)
    plain = torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
    head = head_of(model)
    hidden = trunk_hidden(model, IDS)[:, :-1].flatten(0, 1)
    fused = prefuse.linear_logprobs(hidden, head.weight, targets, **head.options(), impl="torch")
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)
    wanted, got = gradients(plain), gradients(fused)
    assert got.keys() == wanted.keys()
    for key, grad in wanted.items():  # a tied weight gets the embedding's part and the head's
        torch.testing.assert_close(got[key], grad, rtol=1e-4, atol=1e-6 * max(1.0, grad.abs().max().item()))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("Gemma2", {"softcap": None}),
        ("Cohere", {"logit_scale": 1.0}),
        ("Granite", {"logit_scale": 8.0}),
        ("Phi", {"bias": None}),
    ],
)
def test_a_head_read_wrongly_is_found(monkeypatch, name, wrong):
    """The check itself is worth its name only if dropping a cap, a scale or a bias fails it."""
    model = build(name)
    mistaken = dataclasses.replace(head_of(model), **wrong)
    monkeypatch.setattr("prefuse.models.head.head_of", lambda model: mistaken)
    with pytest.raises(UnsupportedModel, match=f"{name}.*ForCausalLM: log-probabilities from its logits"):
        check_head(model, IDS)


class ScaledLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.01
        return output


class CappedLlama(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = 1000 * torch.tanh(output.logits / 1000)
        return output


@pytest.mark.parametrize("unknown", [ScaledLlama, CappedLlama])
def test_a_model_that_changes_its_logits_unknown_to_us_is_refused(unknown):
    # A fresh model's logits are far below 1000: the cap shows only once the probe makes them loud.
    model = unknown(transformers.LlamaConfig(**TINY)).eval()
    with pytest.raises(UnsupportedModel, match=f"{unknown.__name__}: .* differ by"):
        check_head(model, IDS)


def test_the_check_leaves_the_model_as_it_was():
    model = build("Llama")
    before = model(input_ids=IDS).logits
    check_head(model, IDS)
    assert torch.equal(model(input_ids=IDS).logits, before)


class AdaptedLinear(torch.nn.Linear):
    """Stands for a LoRA or quantized layer: linear by name, with a forward of its own."""


def test_heads_that_are_not_plain_are_refused():
    model = build("Llama")
    model.lm_head = AdaptedLinear(32, 300, bias=False)
    with pytest.raises(
        UnsupportedModel, match=r"head of LlamaForCausalLM is a .*AdaptedLinear, expected torch\.nn\.Linear"
    ):
        head_of(model)


def test_a_model_without_a_head_is_refused():
    model = transformers.LlamaModel(transformers.LlamaConfig(**TINY))
    with pytest.raises(UnsupportedModel, match="LlamaModel has no output embeddings: expected a causal LM"):
        head_of(model)


def test_an_encoder_decoder_is_refused():
    config = transformers.T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    with pytest.raises(UnsupportedModel, match="T5ForConditionalGeneration is an encoder-decoder"):
        head_of(transformers.T5ForConditionalGeneration(config))


def test_an_auxiliary_loss_is_refused():
    config = transformers.MixtralConfig(**TINY, num_local_experts=2, output_router_logits=True)
    with pytest.raises(UnsupportedModel, match="auxiliary router loss"):
        head_of(transformers.MixtralForCausalLM(config))


def test_head_logits_follow_the_formula():
    hidden, weight, bias = torch.randn(3, 8), torch.randn(11, 8), torch.randn(11)
    got = Head(weight, bias, softcap=2.0, logit_scale=0.5).logits(hidden)
    torch.testing.assert_close(got, 2.0 * torch.tanh(0.5 * (hidden @ weight.T + bias) / 2.0))


def test_hidden_states_have_no_dropout_in_eval_mode():
    """The engine trains in it: with the dropout that GPT-2's config asks for, two passes are equal."""
    model = build("GPT2")
    assert model.config.attn_pdrop > 0
    assert torch.equal(trunk_hidden(model, IDS), trunk_hidden(model, IDS))
