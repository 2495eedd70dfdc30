"""`prefuse.transformers` on whole models: values and gradients are what the model's own logits would give."""

import copy

import pytest
import torch

import prefuse
from largest_tensor import LargestTensor
from prefuse.packing import pack
from prefuse.transformers import (
    sequence_logps,
    token_logps,
)
from transformers_cases import (
    ARCHITECTURES,
    BATCHES,
    COEFFICIENTS,
    GROUPS,
    PROMPTS,
    ROWS,
    assert_same_gradients,
    build,
    flat,
    gradients,
    oracle,
    padded,
)

# PEFT itself still calls it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


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
