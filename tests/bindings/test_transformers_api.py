"""`prefuse.transformers` on whole models: values and gradients are what the model's own logits would give."""

import copy
import inspect
import json
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement

import prefuse
import ranks
import wrapped_worker
from largest_tensor import LargestTensor
from prefuse.packing import pack
from prefuse.transformers import (
    UnsupportedModel,
    UnsupportedVersion,
    fuse_loss,
    head_of,
    sequence_logps,
    sft_loss,
    token_logps,
)
from tiny_run import SHAPE

# PEFT itself still calls it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ROOT = Path(__file__).resolve().parents[2]
V = 300
TINY = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "head_dim": 8, **SHAPE}
TINY |= {"initializer_range": 0.2}
GPT = {"vocab_size": V, "bos_token_id": 0, "eos_token_id": 1, "n_embd": 32, "n_layer": 2, "n_head": 4}

# Heads: plain; tied; with a bias; with a cap (and sliding windows); with a factor, tied; with a divisor; and two with
# learned positions.
ARCHITECTURES = {
    "Llama": (transformers.LlamaConfig, TINY),
    "Qwen3": (transformers.Qwen3Config, TINY | {"tie_word_embeddings": True}),
    "Phi": (transformers.PhiConfig, {k: v for k, v in TINY.items() if k != "head_dim"}),
    "Gemma3": (transformers.Gemma3TextConfig, TINY | {"final_logit_softcapping": 5.0, "sliding_window": 6}),
    "Cohere": (transformers.CohereConfig, TINY | {"logit_scale": 0.25}),
    "Granite": (transformers.GraniteConfig, TINY | {"logits_scaling": 8.0}),
    "GPT2": (transformers.GPT2Config, GPT),
    "OPT": (transformers.OPTConfig, {"vocab_size": V, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2,
                                     "num_attention_heads": 4, "word_embed_proj_dim": 32}),
}  # fmt: skip


def build(name="Llama", **changes):
    config, settings = ARCHITECTURES[name]
    model = transformers.AutoModelForCausalLM.from_config(
        config(**settings | changes), attn_implementation="sdpa"
    ).eval()
    bias = getattr(model.get_output_embeddings(), "bias", None)
    if bias is not None:  # zero at first
        torch.nn.init.normal_(bias, std=0.3)
    return model


# Of unequal lengths, one with a single token that counts, one whose first token is labelled, one with none that counts.
LENGTHS, PROMPTS = (11, 7, 13, 5), (4, 6, 0, 5)
ROWS = [[(17 * i + 29 * j * j + 3) % (V - 3) + 3 for j in range(length)] for i, length in enumerate(LENGTHS)]


def padded(side="right", rows=ROWS, prompts=PROMPTS, width=15):
    """input_ids, labels and attention_mask, each (B, width)."""
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for row, prompt in zip(rows, prompts, strict=True):
        pad = width - len(row)
        for name, values, fill in (
            ("input_ids", row, 2),
            ("labels", [-100] * prompt + row[prompt:], -100),
            ("attention_mask", [1] * len(row), 0),
        ):
            batch[name].append(values + [fill] * pad if side == "right" else [fill] * pad + values)
    return {name: torch.tensor(values) for name, values in batch.items()}


def flat(rows=ROWS, prompts=PROMPTS):
    ids = torch.tensor([[i for row in rows for i in row]])
    labels = [x for row, prompt in zip(rows, prompts, strict=True) for x in [-100] * prompt + row[prompt:]]
    cu_seqlens = torch.tensor([0, *map(len, rows)]).cumsum(0).int()
    return {"input_ids": ids, "labels": torch.tensor([labels]), "cu_seqlens": cu_seqlens}


BATCHES = {"right": padded, "left": lambda: padded("left"), "flat": flat}


def oracle(model, rows=ROWS, prompts=PROMPTS, temperature=1.0):
    """Per sequence the log-probabilities of its tokens that count: each sequence by itself, from the model's logits."""
    result = []
    for row, prompt in zip(rows, prompts, strict=True):
        logits = model(input_ids=torch.tensor([row]), use_cache=False).logits[0, :-1] / temperature
        chosen = torch.log_softmax(logits, -1).gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
        result.append(chosen[max(prompt, 1) - 1 :])
    return result


COEFFICIENTS = torch.tensor([0.7, -1.3, 0.4, 2.0], dtype=torch.float64)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, wanted, rtol=1e-4):
    """To `rtol` of each tensor, but for what rounding of the largest leaves in a small one."""
    assert got.keys() == wanted.keys()
    size = max(grad.norm() for grad in wanted.values())
    assert size > 0
    for name, grad in wanted.items():
        assert (got[name] - grad).norm() <= rtol * grad.norm() + 1e-2 * rtol * size, name


@pytest.mark.parametrize("form", BATCHES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_values_and_gradients_are_those_of_the_logits(name, form):
    if form == "flat" and name == "GPT2":
        pytest.skip("its attention dropout keeps flat batches out even in eval mode")
    model = build(name).double()
    wanted = oracle(model)
    sums = torch.stack([x.sum() for x in wanted])
    got = sequence_logps(model, **BATCHES[form](), impl="torch")
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, sums, rtol=1e-9, atol=1e-9)
    assert got[3] == 0
    expected = gradients(model, (sums * COEFFICIENTS).sum())
    assert_same_gradients(gradients(model, (got * COEFFICIENTS).sum()), expected, rtol=1e-7)


def test_the_reference_implementation_agrees():
    model = build().double()
    got = sequence_logps(model, **padded(), impl="reference")
    torch.testing.assert_close(got, torch.stack([x.sum() for x in oracle(model)]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", BATCHES)
def test_every_reduction_has_the_same_numbers(form):
    model = build().double()
    batch = BATCHES[form]()
    wanted = oracle(model)
    tokens = sequence_logps(model, **batch, reduction="none")
    assert tokens.shape == batch["labels"].shape
    packed = token_logps(model, **batch)
    assert packed.cu_seqlens.tolist() == [0, *torch.tensor([len(x) for x in wanted]).cumsum(0).tolist()]
    assert packed.cu_seqlens.dtype == torch.int32
    torch.testing.assert_close(packed.logps, torch.cat(wanted), rtol=1e-9, atol=1e-9)
    # at t, that of labels[:, t]; exactly 0 wherever nothing counts
    counts = tokens != 0
    assert counts.sum() == sum(map(len, wanted))
    assert (batch["labels"][counts] != -100).all()
    assert torch.equal(tokens[counts], packed.logps)
    assert torch.equal(sequence_logps(model, **batch), torch.stack([x.double().sum() for x in packed.logps.split(
        packed.cu_seqlens.diff().tolist())]))  # fmt: skip
    means = torch.tensor([x.double().mean().item() if len(x) else 0.0 for x in wanted])
    torch.testing.assert_close(sequence_logps(model, **batch, reduction="mean"), means.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "mean", "none"])
def test_each_reduction_passes_the_gradient_on(reduction):
    model = build().double()
    batch = padded()
    got = sequence_logps(model, **batch, reduction=reduction)
    wanted = oracle(model)
    lengths = [max(len(x), 1) for x in wanted]
    factor = [c / n if reduction == "mean" else c for c, n in zip(COEFFICIENTS, lengths, strict=True)]
    expected = gradients(model, sum(f * x.sum() for f, x in zip(factor, wanted, strict=True)))
    upstream = COEFFICIENTS[:, None] if reduction == "none" else COEFFICIENTS
    assert_same_gradients(gradients(model, (got * upstream).sum()), expected, rtol=1e-7)


def test_without_labels_every_token_but_the_first_counts():
    model = build().double()
    wanted = torch.stack([x.sum() for x in oracle(model, prompts=(0, 0, 0, 0))])
    for make in BATCHES.values():
        batch = make()
        del batch["labels"]
        torch.testing.assert_close(sequence_logps(model, **batch), wanted, rtol=1e-9, atol=1e-9)


def test_rows_without_padding_need_no_mask():
    model = build().double()
    ids = torch.tensor([row[:5] for row in ROWS])
    wanted = torch.stack([x.sum() for x in oracle(model, rows=ids.tolist(), prompts=(2,) * 4)])
    labels = ids.masked_fill(torch.arange(5) < 2, -100)
    torch.testing.assert_close(sequence_logps(model, ids, labels), wanted, rtol=1e-9, atol=1e-9)


def test_positions_that_are_given_are_the_models():
    model = build().double()
    batch = padded()
    positions = torch.arange(15)[None].expand(4, 15) * 2 + 3
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], position_ids=positions).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    tokens = torch.log_softmax(logits, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    wanted = (tokens * (targets != -100)).sum(-1)
    got = sequence_logps(model, **batch, position_ids=positions)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    assert (got - sequence_logps(model, **batch)).abs().max() > 1e-3


def test_temperature_divides_the_logits():
    model = build("Gemma3").double()  # after its cap
    wanted = torch.stack([x.sum() for x in oracle(model, temperature=0.6)])
    torch.testing.assert_close(sequence_logps(model, **padded(), temperature=0.6), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["Llama", "Gemma3"])
def test_padding_and_neighbours_change_nothing(name):
    """Exact in exact arithmetic; in float32 to the rounding of the trunk's matrix products."""
    model = build(name)
    alone = torch.stack([sequence_logps(model, **padded(rows=[r], prompts=[p], width=len(r)))[0]
                         for r, p in zip(ROWS, PROMPTS, strict=True)])  # fmt: skip
    for batch in (padded(), padded("left"), padded(width=24), padded(rows=ROWS[::-1], prompts=PROMPTS[::-1]), flat()):
        got = sequence_logps(model, **batch)
        got = got.flip(0) if batch["input_ids"][0, 0] == ROWS[-1][0] else got
        torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)


# A group of two completions, one of one, one of three: their prompts run once.
GROUPS = [(ROWS[0][:4], [ROWS[0][4:], [9, 8]]), (ROWS[1][:3], [ROWS[1][3:]]), (ROWS[2][:2], [[5], [6, 7], [7, 6, 5]])]


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Qwen3"])
def test_prompts_shared_by_completions_run_once(name):
    model = build(name).double()
    rows = [prompt + completion for prompt, completions in GROUPS for completion in completions]
    prompts = [len(prompt) for prompt, completions in GROUPS for _ in completions]
    wanted = oracle(model, rows, prompts)
    packed = pack(GROUPS)
    got = token_logps(model, packed)
    torch.testing.assert_close(got.logps, torch.cat(wanted), rtol=1e-9, atol=1e-9)
    assert torch.equal(got.cu_seqlens, packed.cu_seqlens)
    upstream = torch.linspace(-1, 2, len(got.logps), dtype=torch.float64)
    expected = gradients(model, (torch.cat(wanted) * upstream).sum())
    assert_same_gradients(gradients(model, (got.logps * upstream).sum()), expected, rtol=1e-6)  # rotations are float32
    torch.testing.assert_close(sequence_logps(model, packed), torch.stack([x.sum() for x in wanted]))


def test_policy_and_reference_of_the_same_weights_have_log_ratios_of_exactly_zero():
    policy = build(tie_word_embeddings=False)
    reference = copy.deepcopy(policy).requires_grad_(False)
    for batch in (padded(), flat(), {"input_ids": pack(GROUPS[:2] + GROUPS[:1])}):
        got = token_logps(policy, **batch)
        with torch.no_grad():
            ref = token_logps(reference, **batch)
        assert got.logps.requires_grad
        assert torch.equal(got.logps, ref.logps)
        assert torch.equal(sequence_logps(policy, **batch), sequence_logps(reference, **batch))
    pairs = token_logps(policy, **padded())
    out = prefuse.preference_loss(pairs.logps, pairs.logps.detach(), pairs.cu_seqlens, loss=prefuse.DPO())
    assert out.losses.tolist() == [torch.tensor(2.0).log().item()] * 2


def test_two_calls_give_the_same_bits():
    model = build()
    first, second = ([*gradients(model, sequence_logps(model, **padded()).sum()).values()] for _ in range(2))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("form", BATCHES)
def test_no_logits_are_made(form):
    """300 x 100 of them would be larger than anything else: the head's tiles, weights and hidden states."""
    model = build(vocab_size=4000)
    rows = [[(7 * i + j) % 3900 + 3 for j in range(100)] for i in range(3)]
    batch = (flat if form == "flat" else lambda **k: padded(form, **k, width=110))(rows=rows, prompts=(40, 50, 60))
    with LargestTensor() as ours:
        sequence_logps(model, **batch).sum().backward()
    with LargestTensor() as theirs:
        model(input_ids=batch["input_ids"], use_cache=False).logits.sum().backward()
    assert theirs.largest >= 4 * 300 * 4000
    assert ours.largest <= 4 * 256 * 2048 + 1  # a tile of the portable head


def test_only_tokens_that_count_reach_the_head(monkeypatch):
    seen = []
    plain = prefuse.linear_logprobs

    def spy(hidden, weight, targets, **options):
        seen.append((len(hidden), targets.tolist()))
        return plain(hidden, weight, targets, **options)

    monkeypatch.setattr("prefuse.models.logps.linear_logprobs", spy)
    for make in BATCHES.values():
        sequence_logps(build(), **make())
    count = [row[max(prompt, 1) :] for row, prompt in zip(ROWS, PROMPTS, strict=True)]
    assert seen == [(sum(map(len, count)), [token for row in count for token in row])] * 3


def test_a_batch_in_which_nothing_counts_still_has_its_gradients():
    model = build()
    batch = padded()
    batch["labels"].fill_(-100)
    got = sequence_logps(model, **batch)
    assert got.tolist() == [0, 0, 0, 0]
    found = gradients(model, got.sum())
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert all(not grad.any() for grad in found.values())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", BATCHES)
def test_gradient_checkpointing_changes_no_bit(form, reentrant):
    model = build().train()  # without dropout
    plain = sequence_logps(model, **BATCHES[form]())
    wanted = gradients(model, plain.sum())
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    got = sequence_logps(model, **BATCHES[form]())
    assert torch.equal(got, plain)
    found = gradients(model, got.sum())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Granite"])
def test_autocast_is_the_models(name):
    """No worse than the same autocast through the logits, against float64; and in bf16, so not float32's bits."""
    model = build(name)
    exact = torch.stack([x.sum() for x in oracle(copy.deepcopy(model).double())])
    batch = padded()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = sequence_logps(model, **batch)
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        targets = batch["labels"][:, 1:]
        eager = torch.log_softmax(logits.float(), -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
        eager = (eager * (targets != -100)).sum(-1)
        got.sum().backward()
    error, theirs = (got - exact).abs().max(), (eager - exact).abs().max()
    assert 1e-5 < error <= 2 * theirs + 0.05  # both are mostly what bf16 makes of the trunk
    assert model.get_output_embeddings().weight.grad.dtype == torch.float32


def test_the_model_is_left_as_it_was():
    model = build("Gemma3")
    batch = padded()
    before, named = model(batch["input_ids"]).logits, {k: set(m.__dict__) for k, m in model.named_modules()}
    sequence_logps(model, **batch)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        sequence_logps(model, batch["input_ids"], batch["labels"].clamp(max=-1) - 5)
    assert torch.equal(model(batch["input_ids"]).logits, before)
    assert {k: set(m.__dict__) for k, m in model.named_modules()} == named


def test_a_forward_that_a_library_put_into_the_model_runs_and_stays():
    """As accelerate does, which puts autocast there."""
    model = build()
    plain = model.forward
    calls = []

    def forward(*args, **kwargs):
        calls.append(kwargs["input_ids"].shape)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return plain(*args, **kwargs)

    exact = sequence_logps(model, **padded())
    model.forward = forward
    got = sequence_logps(model, **padded())
    assert len(calls) == 1
    assert model.forward is forward
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = sequence_logps(build_like(model), **padded())
    assert torch.equal(got, wanted)
    assert not torch.equal(got, exact)


def build_like(model):
    twin = copy.copy(model)
    twin.__dict__ = {k: v for k, v in model.__dict__.items() if k != "forward"}
    return twin


def test_accelerate_prepares_the_model():
    """Its bf16 casts what the model returns to float32, inside which the head still computes under its autocast."""
    import accelerate

    model = build()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = sequence_logps(model, **padded())
    prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
    assert torch.equal(sequence_logps(prepared, **padded()), wanted)


# ---------------------------------------------------------------------------------------------------------
# PEFT


TRUNK = ["q_proj", "v_proj"]


def lora(*targets, model=None, **options):
    """A model in PEFT's LoRA whose adapters already do something."""
    peft = pytest.importorskip("peft")
    base = build() if model is None else model
    options = {"r": 4, "lora_alpha": 8, "target_modules": list(targets), "task_type": "CAUSAL_LM"} | options
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    for name, p in wrapped.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            p.data += 0.1 * torch.randn_like(p)
    return wrapped


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
    except ImportError as error:  # transformers 5.24.0 asks for peft 0.22 here, before its release
        pytest.skip(f"this transformers does not take this peft: {error}")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.1)
    wanted = torch.stack([x.sum() for x in oracle(model)]).double()
    torch.testing.assert_close(sequence_logps(model, **padded()), wanted, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# torch.compile


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


# ---------------------------------------------------------------------------------------------------------
# Many processes


@pytest.fixture(scope="module")
def wrapped(tmp_path_factory):
    """{case: what two ranks found}; they start once for all cases."""
    folder = tmp_path_factory.mktemp("wrapped")
    ranks.run(2, folder, ranks.LIB / "wrapped_worker.py", "out", timeout=280)
    return json.loads((folder / "out.json").read_text())


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


@pytest.fixture
def alone():
    """A process group of one."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


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


# ---------------------------------------------------------------------------------------------------------
# The loss of the Trainer


def batches(count=8):
    """Rows for a Trainer, whose numbers of labels differ so that a mean of means is another number."""
    g = torch.Generator().manual_seed(1)
    made = []
    for i in range(count):
        ids = torch.randint(3, V, (12,), generator=g)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()})
        made[-1]["labels"][: 1 + (5 * i) % 11] = -100
    return made


def trainer(model, folder, **options):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2,
                "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no",
                "disable_tqdm": True, "lr_scheduler_type": "constant", "optim": "sgd"}  # fmt: skip
    settings |= {"max_grad_norm": 1e9} | options.pop("settings", {})
    args = transformers.TrainingArguments(output_dir=str(folder), **settings)
    return transformers.Trainer(model=model, args=args, train_dataset=batches(), eval_dataset=batches(3), **options)


WAYS = {
    "fuse_loss": lambda model, **how: (fuse_loss(model, **how), {}),
    "compute_loss_func": lambda model, **how: (model, {"compute_loss_func": sft_loss(model, **how)}),
}


@pytest.mark.parametrize("kind", ["Llama", "tied", "lora on the head", "bf16", "checkpointed"])
@pytest.mark.parametrize("way", WAYS)
def test_a_trainer_has_the_loss_it_had(way, kind, tmp_path):
    """Steps of two accumulated microbatches: losses, gradient norms and weights; in bf16 to its rounding."""
    make = {"tied": lambda: build("Qwen3"), "lora on the head": lambda: lora(*TRUNK, "lm_head")}.get(kind, build)
    settings = {"bf16": {"bf16": True}, "checkpointed": {"activation_checkpointing": True}}.get(kind, {})
    seen, tolerance = [], 2e-2 if kind == "bf16" else 1e-5
    for fused in (False, True):
        torch.manual_seed(3)
        model, options = WAYS[way](make()) if fused else (make(), {})
        run = trainer(model, tmp_path, settings=settings, **options)
        run.train()
        logs = [row for row in run.state.log_history if "loss" in row]
        seen.append((logs, dict(model.named_parameters()), run.evaluate()["eval_loss"]))
    (logs, weights, evaluated), (got, found, also) = seen
    assert len(got) == len(logs) == 4
    for a, b in zip(got, logs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance)
    assert logs[-1]["loss"] < logs[0]["loss"]
    assert also == pytest.approx(evaluated, rel=tolerance)
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Cohere", "Granite", "Phi"])
def test_fuse_loss_is_the_models_loss(name):
    plain, fused = build(name).double(), fuse_loss(build(name).double())
    fused.load_state_dict(plain.state_dict())
    batch = padded()
    for more in ({}, {"num_items_in_batch": 7}, {"num_items_in_batch": torch.tensor(5)},
                 {"shift_labels": batch["labels"].roll(-3, 1)}):  # fmt: skip
        wanted, got = plain(**batch, **more), fused(**batch, **more)
        assert got.logits is None
        torch.testing.assert_close(got.loss, wanted.loss, rtol=1e-6, atol=1e-6)  # both float32
        expected = gradients(plain, wanted.loss)
        for workspace in (None, 0):
            again = fuse_loss(copy.deepcopy(plain), workspace=workspace)
            assert_same_gradients(gradients(again, again(**batch, **more).loss), expected, rtol=1e-6)


def test_without_labels_the_model_does_what_it_did():
    plain, fused = build(), fuse_loss(build())
    fused.load_state_dict(plain.state_dict())
    batch = padded()
    ids = batch["input_ids"][:, :4]
    assert torch.equal(fused(ids).logits, plain(ids).logits)
    written = [m.generate(ids, max_new_tokens=5, do_sample=False) for m in (plain, fused)]
    assert torch.equal(*written)
    assert torch.equal(sequence_logps(fused, **batch), sequence_logps(plain, **batch))
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    del fused.forward
    assert torch.equal(fused(**batch).loss, plain(**batch).loss)


def test_a_copy_of_a_fused_model_computes_with_its_own_weights():
    model = fuse_loss(build())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
    batch = padded()
    assert (twin(**batch).loss - model(**batch).loss).abs() > 1e-3
    gradients(twin, twin(**batch).loss)
    assert model.lm_head.weight.grad is None


@pytest.mark.parametrize("way", WAYS)
def test_log_probabilities_of_a_model_in_training_with_a_fused_loss(way):
    model = build().train()
    wanted = sequence_logps(model, **padded())
    WAYS[way](model)
    assert torch.equal(sequence_logps(model, **padded()), wanted)


@pytest.mark.parametrize("way", WAYS)
def test_no_logits_are_made_for_a_loss(way):
    model, options = WAYS[way](build(vocab_size=4000).train(), workspace=0)
    ids = torch.randint(0, 4000, (3, 110))
    with LargestTensor() as ours:
        if options:
            loss = options["compute_loss_func"](model(ids), ids, num_items_in_batch=100)
        else:
            loss = model(ids, labels=ids, num_items_in_batch=100).loss
        loss.backward()
    assert ours.largest <= 4 * 256 * 2048 + 1  # a tile of the portable head; the logits have 4 * 330 * 4000 bytes


def test_logits_in_eval_are_there_where_asked_for():
    batch = padded()
    model = fuse_loss(build(), logits_in_eval=True)
    assert model(**batch).logits.shape == (4, 15, V)
    assert model.train()(**batch).logits is None
    assert isinstance(fuse_loss(build())(**batch, return_dict=False), tuple)


def test_no_label_at_all_is_a_loss_of_zero():
    batch = padded()
    batch["labels"].fill_(-100)
    model = fuse_loss(build())
    loss = model(**batch).loss
    assert loss.item() == 0  # transformers' is nan
    assert set(gradients(model, loss)) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("install", [fuse_loss, sft_loss])
def test_a_loss_of_the_models_own_is_refused(install):
    def own_loss(logits, labels, vocab_size, **kwargs):
        return logits.sum()

    model = build()
    model.loss_function = own_loss
    with pytest.raises(UnsupportedModel, match=r"the loss of LlamaForCausalLM is own_loss, expected .*ForCausalLMLoss"):
        install(model)


def test_labels_of_another_shape():
    model = fuse_loss(build())
    with pytest.raises(ValueError, match=r"for each of the labels \(4, 15\), got \(4, 3, 32\): give labels"):
        model(**padded(), logits_to_keep=3)


def test_compute_loss_func_under_fully_shard_names_the_other_way(alone):
    model = wrapped_worker.llama().train()
    sft_loss(model)
    with pytest.raises(UnsupportedModel, match=r"use prefuse\.transformers\.fuse_loss\(model\), and no"):
        wrapped_worker.fsdp(model)(padded()["input_ids"])


@pytest.mark.parametrize("find_unused", [True, False])
def test_compute_loss_func_under_ddp(find_unused, alone):
    """The Trainer has it look for parameters that are not used, unless told otherwise: the head is used."""
    batch = padded()
    labels = batch.pop("labels")
    plain = wrapped_worker.llama().train()
    expected = gradients(plain, plain(**batch, labels=labels).loss)
    model = wrapped_worker.llama().train()
    loss = sft_loss(model)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)
    assert_same_gradients(gradients(model, loss(wrapped(**batch), labels)), expected)


# ---------------------------------------------------------------------------------------------------------
# What is refused, and what to do


def refuse(model, *words, error=UnsupportedModel, **batch):
    with pytest.raises(error) as caught:
        sequence_logps(model, **(batch or padded()))
    for word in words:
        assert word in str(caught.value)


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
