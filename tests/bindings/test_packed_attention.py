"""Flat batches with shared prompts through transformers' models: equal to their sequences one by one, in float64."""

import functools
import threading

import pytest
import torch
import transformers
from torch.utils.checkpoint import checkpoint

from attention_cases import LENGTHS, inputs, reference_varlen
from prefuse.attention import check_packing, flat_hidden, packed_hidden, use_packed_attention
from prefuse.kernels.attention import shared_prefix
from prefuse.models import flat
from prefuse.packing import Segments, pack
from prefuse.transformers import UnsupportedModel, trunk_hidden
from tiny_run import SHAPE

TINY = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.1, **SHAPE}
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8}
MODELS = {
    "Llama": (transformers.LlamaConfig, {}),
    "Qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "Gemma2": (transformers.Gemma2Config, MIXED | {"attn_logit_softcapping": 2.0}),
    "Gemma3": (transformers.Gemma3TextConfig, MIXED),
    "Mistral": (transformers.MistralConfig, {"sliding_window": 4}),
    "GPTNeoX": (transformers.GPTNeoXConfig, {}),
}
# The prompt of five is longer than the window of 4, and so are some completions.
GROUPS = [
    ([7, 8, 9, 10, 11, 12, 13], [[20, 21, 22], [30, 31, 32, 33, 34, 35]]),
    ([40], [[41, 42]]),
    ([50, 51, 52, 53, 54], [[60], [61, 62], [63], [64, 65, 66, 67, 68, 69], [61, 62]]),
]


def build(name, dtype=torch.float64, **more):
    torch.manual_seed(0)
    config, options = MODELS[name]
    return transformers.AutoModelForCausalLM.from_config(config(**TINY | options | more)).to(dtype).eval()


def padded_hidden(model, groups):  # -> (N, D)
    """The duplicated, padded computation, by the model as transformers made it."""
    sequences = [(prompt, completion) for prompt, completions in groups for completion in completions]
    width = max(len(prompt + completion) for prompt, completion in sequences)
    if isinstance(model, transformers.Gemma2ForCausalLM) and model.dtype == torch.float64:
        # One by one: its float64 mask overflows in a float32 softmax, and padding behind the window makes nan of it.
        return torch.cat([run_padded(model, [sequence], 0) for sequence in sequences])
    return run_padded(model, sequences, width)


def run_padded(model, sequences, width):
    rows = [prompt + completion for prompt, completion in sequences]
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    hidden = trunk_hidden(model, ids, mask)
    return torch.cat([hidden[i, len(p) - 1 : len(p + c) - 1] for i, (p, c) in enumerate(sequences)])


def gradients(model, hidden):
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model.zero_grad()
    (hidden * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, wanted, tolerance=1e-6):
    assert got.keys() == wanted.keys()
    for name, grad in wanted.items():
        scale = max(1.0, grad.abs().max().item())
        torch.testing.assert_close(got[name], grad, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_a_flat_batch_equals_the_duplicated_padded_one(name):
    model = build(name)
    expected = padded_hidden(model, GROUPS)
    wanted = gradients(model, expected)
    got = packed_hidden(model, pack(GROUPS))
    assert model.config._attn_implementation.startswith("prefuse_packed_")
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    assert_same_gradients(gradients(model, got), wanted)
    assert check_packing(model) < 1e-5


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3", "Mistral"])
def test_windows_and_caps_matter_here(name):
    """Otherwise the equalities above would prove nothing about them."""
    more = {"Gemma2": {"attn_logit_softcapping": None}}.get(name, {"sliding_window": 100})
    same, other = build(name), build(name, **more)
    assert (packed_hidden(same, pack(GROUPS)) - packed_hidden(other, pack(GROUPS))).abs().max() > 1e-3


def test_the_variable_length_path_runs_whole_models(monkeypatch):
    monkeypatch.setattr(shared_prefix, "_choose", lambda *args: "varlen")
    monkeypatch.setattr(shared_prefix, "_why_not", lambda *args: None)
    emulated = functools.partial(shared_prefix._varlen, attend=reference_varlen)
    monkeypatch.setitem(shared_prefix._BACKENDS, "varlen", emulated)
    for name in "Gemma2", "Mistral":
        model = build(name)
        expected = padded_hidden(model, GROUPS)
        wanted = gradients(model, expected)
        got = packed_hidden(model, pack(GROUPS))
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
        assert_same_gradients(gradients(model, got), wanted)


def test_hidden_states_do_not_depend_on_the_order_of_the_groups():
    model = build("Mistral")
    forward, backward = flat_hidden(model, pack(GROUPS)), flat_hidden(model, pack(GROUPS[::-1]))
    lengths = [len(p) + sum(map(len, cs)) for p, cs in GROUPS]
    for a, b in zip(forward.split(lengths), backward.split(lengths[::-1])[::-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_finds_the_same_attention(name, reentrant):
    """It runs the layers again in the backward, when packed_hidden has long returned."""
    model = build(name).train()  # no dropout in these
    wanted = gradients(model, packed_hidden(model, pack(GROUPS)))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    got = gradients(model, packed_hidden(model, pack(GROUPS)))
    assert_same_gradients(got, wanted, tolerance=1e-12)


def test_a_trunk_run_again_outside_packed_hidden_is_stopped():
    """Not by its layers but as a whole: its masks would be made anew, for one long text."""
    model = build("Llama")
    trunk = model.model
    model.model.forward = functools.partial(checkpoint, trunk.forward, use_reentrant=False)
    hidden = packed_hidden(model, pack(GROUPS))
    with pytest.raises(UnsupportedModel, match=r"LlamaAttention got the segments .*, and NoneType as its mask"):
        hidden.sum().backward()


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mistral"])
def test_all_other_calls_are_as_they_were(name, tmp_path):
    model = build(name, torch.float32)
    ids = torch.arange(24).reshape(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # a padded prompt

    def outputs():
        text = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
        return model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids).logits, text

    before = outputs()
    check_packing(model)
    assert model.config._attn_implementation.startswith("prefuse_packed_")
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(), strict=True))
    model.save_pretrained(tmp_path)
    assert "prefuse" not in (tmp_path / "config.json").read_text()


def test_threads_do_not_meet():
    """One runs flat batches while others run other ones, and padded ones."""
    model = build("Mistral", torch.float32)
    batches = [pack(GROUPS), pack(GROUPS[:1]), pack(GROUPS[1:])]
    ids = torch.arange(40).reshape(4, 10)
    jobs = [functools.partial(flat_hidden, model, packed) for packed in batches]
    jobs.append(lambda: trunk_hidden(model, ids))
    with torch.no_grad():
        alone = [job() for job in jobs]
    wrong, start = [], threading.Barrier(len(jobs))

    def repeat(job, expected):
        start.wait()
        with torch.no_grad():
            wrong.extend(None for _ in range(20) if not torch.equal(job(), expected))

    threads = [threading.Thread(target=repeat, args=each) for each in zip(jobs, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---------------------------------------------------------------------------------------------------------
# Refusals

REFUSED = {
    "Bloom": (transformers.BloomConfig, {}, "attention is not taken from transformers' AttentionInterface"),
    "GptOss": (transformers.GptOssConfig, {"num_local_experts": 2}, "GptOssAttention has attention sinks"),
    "Qwen3Next": (transformers.Qwen3NextConfig, {"num_experts": 2}, "layers of the kind linear_attention"),
    "StableLm": (transformers.StableLmConfig, {}, "StableLmAttention got no segments of its flat batch"),
    "Phi3": (
        transformers.Phi3Config,
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8,
                             "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        "its longrope rotary embedding depends on the longest sequence of the batch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_flat_batches_cannot_be_exact_for_are_refused(name):
    config, options, reason = REFUSED[name]
    model = transformers.AutoModelForCausalLM.from_config(config(**TINY | options)).eval()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=reason):
        check_packing(model)
    assert model.config._attn_implementation == before


class ChunkedLlama(transformers.LlamaModel):
    """Asks for Llama 4's mask, in which attention starts anew every so many tokens."""

    def forward(self, *args, **kwargs):
        from transformers.masking_utils import create_chunked_causal_mask as chunked
        from transformers.models.llama import modeling_llama

        usual = modeling_llama.create_causal_mask
        modeling_llama.create_causal_mask = chunked
        try:
            return super().forward(*args, **kwargs)
        finally:
            modeling_llama.create_causal_mask = usual


def test_a_mask_that_is_no_window_is_refused():
    model = build("Llama")
    model.config.attention_chunk_size = 4096  # longer than any probe: no comparison of outputs would find it
    model.model.__class__ = ChunkedLlama
    with pytest.raises(UnsupportedModel, match="attention mask that is neither causal nor a sliding window"):
        check_packing(model)


def test_rules_of_masks():
    from transformers import masking_utils

    causal, window = masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function
    chunked = masking_utils.chunked_causal_mask_function(9, torch.zeros(1, dtype=torch.int))
    is_causal_window = flat._is_causal_window
    assert is_causal_window(causal, None)
    assert all(is_causal_window(window(size), size) for size in (1, 2, 7, 4096, 10**5))
    assert not is_causal_window(window(7), None)
    assert not is_causal_window(causal, 7)
    assert not is_causal_window(window(7), 8)
    assert not is_causal_window(window(8), 7)
    assert not is_causal_window(chunked, None)
    assert not is_causal_window(chunked, 9)
    assert not is_causal_window(lambda b, h, q, k: torch.ones(5, 5, dtype=torch.bool)[q, k], None)  # of one batch

    def elsewhere(b, h, q, k):
        raise RuntimeError("Expected all tensors to be on the same device")

    assert not is_causal_window(elsewhere, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dropout": 0.1}, "has attention dropout, which flat batches do not: set it to 0, or call model.eval()"),
        ({"is_causal": False}, "is not causal: expected a decoder"),
        ({"sliding_window": 7}, "a sliding window of 7, but its mask has None: which is meant"),
        ({"position_bias": torch.zeros(1)}, "has a position bias"),
    ],
)
def test_options_of_a_layer_that_are_not_computed_are_refused(options, message):
    x = inputs((4, 2), requires_grad=False)
    segments = Segments(LENGTHS)
    mask = flat.PackedMask(segments, None)
    with pytest.raises(UnsupportedModel, match=message):
        flat._attention("sdpa", torch.nn.Identity(), *x, mask, segments, **options)


def test_dropout_of_a_model_in_training_is_refused():
    model = build("Llama", attention_dropout=0.1).train()
    with pytest.raises(UnsupportedModel, match="LlamaAttention has attention dropout"):
        packed_hidden(model, pack(GROUPS))


class Shift(torch.nn.Module):
    """Mixes in the token before, whatever text it belongs to: as a convolution or a state would."""

    def forward(self, ids):
        embedded = torch.nn.functional.embedding(ids, self.weight)
        return embedded + 0.5 * embedded.roll(1, dims=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_crosses_tokens_unknown_to_us_is_found_by_the_comparison(dtype):
    check_packing(build("Llama", dtype))  # rounding is not refused
    model = build("Llama", dtype)
    model.model.embed_tokens.__class__ = Shift
    with pytest.raises(UnsupportedModel, match=r"hidden states of a flat batch .* differ .* use padded batches"):
        check_packing(model)
    assert model.config._attn_implementation == "sdpa"
    use_packed_attention(model)  # asked for by name it is not compared
    assert model.config._attn_implementation == "prefuse_packed_sdpa"


def test_an_implementation_from_elsewhere_is_refused():
    model = build("Llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModel, match=r'attn_implementation="flex_attention": load it with "sdpa" or "eager"'):
        use_packed_attention(model)
