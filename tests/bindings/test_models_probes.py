"""Models are tried on a few tokens before they are used: what looks ahead, cuts its logits, has another loss or another
padding is refused in one line, and what is plain under another name is taken."""

import pytest
import torch
import transformers

from prefuse.models.flat import check_packing, packed_hidden
from prefuse.models.rope import hold_rope
from prefuse.models.trunk import trunk_hidden
from prefuse.packing import pack
from prefuse.transformers import UnsupportedModel, check_head, fuse_loss, head_of, sequence_logps

V = 60
TINY = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SHARED = TINY | {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
IDS = torch.randint(5, V, (2, 11), generator=torch.Generator().manual_seed(0))


def stirred(config, model_class=None, seed=0):
    torch.manual_seed(seed)
    model = (
        transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
        if model_class is None
        else model_class(config)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.3)
    return model.double().eval()


def own_logps(model, ids=IDS):  # (B,)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0].sum(-1)


def bart(**more):
    return transformers.BartConfig(
        vocab_size=V, d_model=16, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=24,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, forced_eos_token_id=None, **more,
    )  # fmt: skip


def mixtral(**more):
    return transformers.MixtralConfig(**SHARED, num_local_experts=4, num_experts_per_tok=2, **more)


@pytest.mark.parametrize("doing", ["sequence_logps", "check_head", "fuse_loss"])
def test_a_model_that_looks_ahead_is_refused(doing):
    model = stirred(transformers.BertGenerationConfig(**TINY, max_position_embeddings=64, pad_token_id=0))
    do = {
        "sequence_logps": lambda: sequence_logps(model, IDS),
        "check_head": lambda: check_head(model, IDS),
        "fuse_loss": lambda: fuse_loss(model)(input_ids=IDS, labels=IDS),
    }
    with pytest.raises(UnsupportedModel, match=r"looks ahead.*is_decoder"):
        do[doing]()


def test_a_loss_that_does_not_shift_is_refused():
    model = stirred(bart(), transformers.BartForCausalLM)
    torch.testing.assert_close(sequence_logps(model, IDS), own_logps(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedModel, match="does not shift its labels"):
        fuse_loss(model)(input_ids=IDS, labels=IDS)


def test_a_loss_with_more_in_it_is_refused():
    class Penalized(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if output.loss is not None:
                output.loss = output.loss + 1.0
            return output

    model = stirred(transformers.LlamaConfig(**SHARED), Penalized)
    with pytest.raises(UnsupportedModel, match="is not the cross-entropy of the next token"):
        fuse_loss(model)(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("asked", ["call", "config"])
def test_the_router_loss_is_added_where_it_is_asked_for(asked):
    model = stirred(mixtral(router_aux_loss_coef=0.5, output_router_logits=asked == "config"))
    more = {"output_router_logits": True} if asked == "call" else {}
    inputs = {"input_ids": IDS, "labels": IDS, "use_cache": False}
    expected, plain = model(**inputs, **more).loss, model(**inputs | {"output_router_logits": False}).loss
    assert expected - plain > 0.1
    got = fuse_loss(model)(**inputs, **more).loss
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-6, atol=1e-6)
    got = fuse_loss(model)(**inputs | {"output_router_logits": False}).loss
    torch.testing.assert_close(got.double(), plain.double(), rtol=1e-6, atol=1e-6)


def test_a_vocabulary_that_is_cut():
    """Inkling's way: the head has more rows than there are logits."""

    class Cut(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits[..., : V - 8]
            return output

    model = stirred(transformers.LlamaConfig(**SHARED), Cut)
    ids = IDS.clamp(max=V - 9)
    with pytest.raises(UnsupportedModel, match=rf"they have {V - 8} columns, its head {V}"):
        sequence_logps(model, ids)
    model.config.unpadded_vocab_size = V - 8
    torch.testing.assert_close(sequence_logps(model, ids), own_logps(model, ids), rtol=1e-5, atol=1e-5)
    assert head_of(model).weight.shape[0] == V - 8
    check_head(model, ids[:1])


def test_positions_that_do_not_count_from_zero():
    """RoBERTa counts from its padding id on: padded on the right it is itself, padded on the left it is refused."""
    config = transformers.RobertaConfig(**TINY, is_decoder=True, max_position_embeddings=64, pad_token_id=0)
    model = stirred(config)
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    padded = IDS.masked_fill(mask == 0, 0)
    got = sequence_logps(model, padded, attention_mask=mask)
    expected = torch.cat([own_logps(model, IDS[:1]), own_logps(model, IDS[1:, :7])])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedModel, match="padded on the left"):
        sequence_logps(model, padded.flip(1), attention_mask=mask.flip(1))


def test_flat_batches_are_tried_by_whoever_takes_one():
    """A trunk that adds to every state the mean of its batch: only a comparison with rows alone finds it."""

    class Mixing(transformers.LlamaForCausalLM):
        pass

    model = stirred(transformers.LlamaConfig(**SHARED), Mixing)
    embed = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: embed(ids) + embed(ids)[:, :1]  # the row's first token
    packed = pack([([5, 6, 7], [[8, 9], [10]]), ([11, 12], [[13]])])
    for take in (lambda: packed_hidden(model, packed), lambda: sequence_logps(model, packed)):
        with pytest.raises(UnsupportedModel, match="flat batch"):
            take()


def test_trying_changes_neither_mode_nor_random_state():
    model = stirred(transformers.LlamaConfig(**SHARED, attention_dropout=0.1)).train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    fused = fuse_loss(model)
    torch.manual_seed(1)
    first = fused(input_ids=IDS, labels=IDS).loss  # tried here
    after = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(fused(input_ids=IDS, labels=IDS).loss, first)
    assert torch.equal(after, torch.get_rng_state())
    assert [m.training for m in model.modules()] == modes


def test_a_mask_that_the_model_reads_itself_is_one_line():
    class Reading(transformers.LlamaForCausalLM):
        pass

    model = stirred(transformers.LlamaConfig(**SHARED), Reading)
    layer = model.model.layers[0]
    run = layer.forward
    layer.forward = lambda x, attention_mask=None, **more: run(
        x, attention_mask=attention_mask if attention_mask is None or attention_mask.dtype else None, **more
    )
    with pytest.raises(UnsupportedModel, match="cannot run flat batches: AttributeError"):
        check_packing(model)


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_rope_that_follows_the_batch_is_held(kind):
    rope = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "original_max_position_embeddings": 8}
    options = SHARED | {"pad_token_id": 0, "rope_parameters": rope}
    if kind == "longrope":
        config = transformers.Phi3Config(**options, max_position_embeddings=64, original_max_position_embeddings=8)
    else:
        config = transformers.LlamaConfig(**options, max_position_embeddings=8)
    model = stirred(config)
    short, long = IDS[:1, :5], torch.cat([IDS, IDS], 1)
    states = lambda ids: trunk_hidden(model, ids)[:1, :5].detach()  # noqa: E731
    both = torch.cat([torch.nn.functional.pad(short, (0, 17)), long[1:]])
    assert not torch.allclose(states(short), states(both), atol=1e-3)
    assert hold_rope(model, 22) == [kind]
    torch.testing.assert_close(states(short), states(both))
    held = states(short)
    trunk_hidden(model, long)
    assert torch.equal(states(short), held)
    assert hold_rope(model, 5) == [kind]
    assert not torch.allclose(states(short), held, atol=1e-3)
    assert hold_rope(stirred(transformers.LlamaConfig(**SHARED)), 22) == []
