"""Attention over shared prompts equals attention over each sequence alone: the function, whole models, and refusals."""

import functools
import inspect
import sys
import threading
import types

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from prefuse.attention import (
    Gather,
    check_packing,
    flat_hidden,
    gather,
    packed_hidden,
    shared_prefix_attention,
    token_places,
    use_packed_attention,
)
from prefuse.models import flat as attention
from prefuse.packing import Segments, pack
from prefuse.transformers import UnsupportedModel, trunk_hidden
from tiny_run import SHAPE

# One completion, a pair, five of them; prompts and completions of one token; a prompt longer than any window below.
LENGTHS = [[9, 4, 6], [1, 3], [5, 1], [4, 2, 1, 7, 1, 3], [12, 8, 1]]
HEADS = [(4, 4), (4, 2), (4, 1)]  # all key heads of their own, shared by two, by all
WINDOWS = [None, 1, 3, 9, 100]
CPU = torch.device("cpu")


def naive(query, key, value, scale, window, softcap):  # (H, T, d), (K, T, d), (K, T, d) of one sequence -> (H, T, d)
    """From the definition, one query token of one head at a time, in float64."""
    share = len(query) // len(key)
    heads = []
    for h, q in enumerate(query):
        rows = []
        for t in range(len(q)):
            first = 0 if window is None else max(0, t - window + 1)
            scores = key[h // share, first : t + 1] @ q[t] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append(torch.softmax(scores, 0) @ value[h // share, first : t + 1])
        heads.append(torch.stack(rows))
    return torch.stack(heads)


def duplicated(query, key, value, lengths, **options):  # (1, H, T, d) -> (1, H, T, d)
    """Every sequence alone. All copies of a prompt's outputs are equal; the first one is kept."""
    outputs, start = [], 0
    for prompt, *completions in lengths:
        own = start + prompt
        for i, completion in enumerate(completions):
            places = [*range(start, start + prompt), *range(own, own + completion)]
            out = naive(*(x[0][:, places] for x in (query, key, value)), **options)
            outputs.append(out if i == 0 else out[:, prompt:])
            own += completion
        start = own
    return torch.cat(outputs, 1)[None]


def inputs(heads, d=8, dtype=torch.float64, lengths=LENGTHS, requires_grad=True):
    tokens = sum(map(sum, lengths))
    shapes = [(1, h, tokens, d) for h in (heads[0], heads[1], heads[1])]
    return [torch.randn(shape, dtype=dtype).mul(2).requires_grad_(requires_grad) for shape in shapes]


def reference_varlen(q, k, v, cu_q, cu_k, max_q, max_k, scale, window_size, softcap):
    """flash_attn_varlen_func by its documentation: causal, sequences aligned at their end, `window_size` tokens to the
    left and right of the one that stands at the same place."""
    assert q.is_contiguous()
    assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
    assert (cu_q.diff().max(), cu_k.diff().max(), cu_q[-1], cu_k[-1]) == (max_q, max_k, len(q), len(k))
    left, right = window_size
    assert right == 0
    outputs = []
    for (q0, q1), (k0, k1) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        share = q.shape[1] // k.shape[1]
        keys, values = (x[k0:k1].repeat_interleave(share, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        column = torch.arange(k1 - k0)[None]
        hidden = (column > place) | ((left >= 0) & (column < place - left))
        weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


@pytest.fixture(params=["sdpa", "varlen"])
def backend(request, monkeypatch):
    """The variable-length path runs here with an attention written from the kernels' documentation."""
    if request.param == "varlen":
        emulated = functools.partial(attention._varlen, attend=reference_varlen)
        monkeypatch.setitem(attention._BACKENDS, "varlen", emulated)
        monkeypatch.setattr(attention, "_why_not", lambda *args: None)
    return request.param


def documented_flash_attn(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """The signature of flash-attn 2.8; causal makes of the right end of the window 0."""
    assert causal
    assert deterministic
    assert (dropout_p, alibi_slopes, return_attn_probs, block_table) == (0.0, None, False, None)
    rest = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, (window_size[0], 0))
    return reference_varlen(q, k, v, *rest, softcap or None)


def documented_torch_varlen(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    """What torch's checks before it calls its kernel; causal only where the right end of the window says so."""
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert (return_aux, seqused_k, block_table, num_splits) == (None, None, None, None)
    return reference_varlen(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size, None)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("name", "softcap"), [("flash_attn", None), ("flash_attn", 1.5), ("varlen", None)])
def test_gpu_kernels_are_called_as_their_documentation_says(name, softcap, heads, window, monkeypatch):
    from torch.nn.attention import varlen

    used = {"query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k", "scale", "window_size", "enable_gqa"}
    assert used <= inspect.signature(varlen.varlen_attn).parameters.keys()  # of the torch that is installed
    assert attention._torch_varlen_parameters()
    stand_in = types.SimpleNamespace(flash_attn_varlen_func=documented_flash_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(varlen, "varlen_attn", documented_torch_varlen)
    monkeypatch.setattr(attention, "_why_not", lambda *args: None)
    x = inputs(heads, requires_grad=False)
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    got = shared_prefix_attention(*x, Segments(LENGTHS), **options, backend=name)
    torch.testing.assert_close(got, duplicated(*x, LENGTHS, **options), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("chosen", "dtype", "head", "capability", "softcap", "installed"),
    [
        ("flash_attn", torch.bfloat16, 64, (9, 0), None, True),
        ("flash_attn", torch.float16, 64, (8, 0), 50.0, True),
        ("varlen", torch.bfloat16, 64, (9, 0), None, False),
        ("flex", torch.bfloat16, 64, (9, 0), 50.0, False),  # Gemma 2
        ("flex", torch.float32, 64, (9, 0), None, True),
        ("flex", torch.bfloat16, 320, (9, 0), None, True),
        ("flex", torch.bfloat16, 64, (7, 5), None, True),
        ("sdpa", torch.float64, 64, (9, 0), None, True),
        ("sdpa", torch.bfloat16, 8, (7, 0), None, True),
    ],
)
def test_what_auto_takes_on_a_gpu(chosen, dtype, head, capability, softcap, installed, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: installed or None)
    tensor = types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 4, 9, head))
    assert attention._choose(tensor, tensor, softcap) == chosen


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_outputs_and_gradients_equal_those_of_each_sequence_alone(heads, window, softcap, backend):
    x = inputs(heads)
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    got = shared_prefix_attention(*x, Segments(LENGTHS), **options, backend=backend)
    weights = torch.randn_like(got)
    expected = duplicated(*x, LENGTHS, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    # Outputs of a prompt are counted once, as they come; keys and values get gradients from all of its completions.
    wanted = torch.autograd.grad((expected * weights).sum(), x)
    for a, b in zip(torch.autograd.grad((got * weights).sum(), x), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_scale_is_that_of_torch_unless_given(backend):
    x = inputs((4, 2), d=16, requires_grad=False)
    got = shared_prefix_attention(*x, Segments(LENGTHS), backend=backend)
    expected = duplicated(*x, LENGTHS, scale=0.25, window=None, softcap=None)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("window", [None, 3, 40])
@pytest.mark.parametrize("name", ["flash_attn", "varlen", "flex"])
def test_gpu_kernels_are_as_near_the_truth_as_torchs_attention(name, window, softcap, device):
    """Yardstick: the same inputs, in the same dtype, one segment at a time."""
    lengths = [[70, 30, 60], [5, 130], [1, 1, 1], [200, 64, 1, 9]]
    x = [t.detach().to(device, torch.bfloat16).requires_grad_() for t in inputs((8, 2), d=64, lengths=lengths)]
    problem = attention._why_not(name, x[0], x[2], softcap)
    if problem is not None:
        pytest.skip(problem)
    segments, weights = Segments(lengths), torch.randn(x[0].shape, device=device)

    def run(backend, tensors):
        out = shared_prefix_attention(*tensors, segments, window=window, softcap=softcap, backend=backend)
        return [t.double() for t in (out.detach(), *torch.autograd.grad((out * weights).sum(), tensors))]

    truth = run("sdpa", [t.detach().double().requires_grad_() for t in x])
    for got, yardstick, wanted in zip(run(name, x), run("sdpa", x), truth, strict=True):
        floor = torch.finfo(torch.bfloat16).eps * wanted.abs().max()
        assert (got - wanted).abs().max() <= 2 * (yardstick - wanted).abs().max() + floor


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_flex_attention_sees_the_same(heads, window, softcap):
    """Run eagerly, without gradients: torch has no others on a CPU."""
    x = inputs(heads, requires_grad=False)
    options = {"scale": 0.3, "window": window, "softcap": softcap}
    got = shared_prefix_attention(*x, Segments(LENGTHS), **options, backend="flex")
    # torch's eager Flex computes in float64 here too
    torch.testing.assert_close(got, duplicated(*x, LENGTHS, **options), rtol=1e-10, atol=1e-10)


def test_values_may_have_a_head_size_of_their_own():
    query, key, _ = inputs((4, 2))
    value = torch.randn(1, 2, query.shape[2], 5, dtype=torch.float64)
    got = shared_prefix_attention(query, key, value, Segments(LENGTHS))
    expected = duplicated(query, key, value, LENGTHS, scale=8**-0.5, window=None, softcap=None)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [None, 5])
def test_siblings_and_other_groups_are_not_seen(window, backend):
    """Bit by bit: whatever stands in another completion, or another group, changes nothing."""
    x = inputs((4, 2), requires_grad=False)
    segments = Segments(LENGTHS)
    before = shared_prefix_attention(*x, segments, window=window, backend=backend)
    group, side, _ = token_places(segments, CPU)
    for g, s in ((0, 2), (3, 3)):
        mine = (group == g) & (side == s)
        changed = [torch.where(mine[:, None], torch.randn_like(t) * 9, t) for t in x]
        after = shared_prefix_attention(*changed, segments, window=window, backend=backend)
        assert torch.equal(after[:, :, ~mine], before[:, :, ~mine])
        assert not torch.equal(after[:, :, mine], before[:, :, mine])


def test_two_runs_are_equal_bit_by_bit(backend):
    x = inputs((4, 2), dtype=torch.float32)
    segments = Segments(LENGTHS)
    runs = [
        torch.autograd.grad(shared_prefix_attention(*x, segments, window=6, backend=backend).square().sum(), x)
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_is_followed_as_torchs_attention_does():
    query, key, value = inputs((4, 2), dtype=torch.float32, requires_grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = shared_prefix_attention(query, key, value.bfloat16(), Segments(LENGTHS))
        capped = shared_prefix_attention(query, key, value.bfloat16(), Segments(LENGTHS), softcap=50.0)
    assert (got.dtype, capped.dtype) == (torch.bfloat16, torch.bfloat16)
    rounded = [t.bfloat16().double() for t in (query, key, value)]
    for out, softcap in (got, None), (capped, 50.0):
        expected = duplicated(*rounded, LENGTHS, scale=8**-0.5, window=None, softcap=softcap)
        # values near 2 and weights, each rounded to 8 bits
        torch.testing.assert_close(out.double(), expected, rtol=0.02, atol=0.03 if softcap is None else 0.2)


def test_kernels_that_know_nothing_of_autocast_get_its_dtype(monkeypatch):
    seen = []

    def attend(q, k, v, *rest):
        seen.append((q.dtype, k.dtype, v.dtype))
        return reference_varlen(q, k, v, *rest)

    monkeypatch.setitem(attention._BACKENDS, "varlen", functools.partial(attention._varlen, attend=attend))
    monkeypatch.setattr(attention, "_why_not", lambda *args: None)
    x = inputs((4, 2), dtype=torch.float32, requires_grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shared_prefix_attention(*x, Segments(LENGTHS), backend="varlen")
    shared_prefix_attention(*x, Segments(LENGTHS), backend="varlen")
    mixed = [x[0], x[1], x[2].bfloat16()]  # float32 norms of queries and keys, in a bfloat16 model
    shared_prefix_attention(*mixed, Segments(LENGTHS), backend="varlen")
    assert seen == [(torch.bfloat16,) * 3, (torch.float32,) * 3, (torch.bfloat16,) * 3]


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation returned."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.size = max(self.size, tensor.numel())
        return out


def test_nothing_of_the_square_of_the_batch_is_allocated():
    lengths = [[16, 8, 8]] * 20
    x = inputs((1, 1), lengths=lengths)
    with LargestTensor() as largest:
        shared_prefix_attention(*x, Segments(lengths), window=7).sum().backward()
    assert largest.size <= 640 * 8 < 640 * 640


def test_only_the_keys_in_the_window_are_gathered():
    segments = Segments([[12, 8, 1]])
    full, near, self = (attention.varlen_index(segments, window, CPU) for window in (None, 3, 1))
    assert full.cu_seqlens_k.diff().tolist() == [12, 20, 13]
    assert near.cu_seqlens_k.diff().tolist() == [12, 10, 3]
    assert near.keys.index.tolist()[12:15] == [10, 11, 12]
    assert self.cu_seqlens_k.diff().tolist() == full.cu_seqlens_q.diff().tolist() == [12, 8, 1]


def test_token_places():
    group, side, position = token_places(Segments([[2, 1, 2], [1, 1]]), CPU)
    assert group.tolist() == [0, 0, 0, 0, 0, 1, 1]
    assert side.tolist() == [0, 0, 1, 2, 2, 0, 1]
    assert position.tolist() == [0, 1, 2, 2, 3, 0, 1]


def test_gradients_of_repeated_rows_are_added_in_one_order():
    index = torch.tensor([3, 0, 3, 1, 3, 0])
    rows = Gather.of(index, CPU)
    assert all(len(set(r.tolist())) == len(r) for r, _ in rows.rounds)  # so no two writes meet, on any device
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 2, dtype=torch.float64)
    got = gather(x, rows)
    assert torch.equal(got, x[index])
    wanted = torch.zeros(5, 2, dtype=torch.float64)
    for place, row in enumerate(index.tolist()):
        wanted[row] += weights[place]
    assert torch.equal(torch.autograd.grad((got * weights).sum(), x)[0], wanted)


def test_wrong_arguments_are_named():
    query, key, value = inputs((4, 2), requires_grad=False)
    segments = Segments(LENGTHS)
    with pytest.raises(ValueError, match=r"one flat batch of its segments' \d+ tokens, got query \(2, 4"):
        shared_prefix_attention(query.expand(2, -1, -1, -1), key, value, segments)
    with pytest.raises(ValueError, match="one flat batch of its segments' 3 tokens"):
        shared_prefix_attention(query, key, value, Segments([[2, 1]]))
    with pytest.raises(ValueError, match="keys and values for each token, with heads that divide"):
        shared_prefix_attention(query[:, :3], key, value, segments)
    with pytest.raises(ValueError, match=r'backend "fast" cannot run here: expected one of auto, flash_attn'):
        shared_prefix_attention(query, key, value, segments, backend="fast")
    for name in "flash_attn", "varlen":
        with pytest.raises(ValueError, match=rf'"{name}" cannot run here: it takes float16 or bfloat16 on CUDA, got'):
            shared_prefix_attention(query, key, value, segments, backend=name)


# ---------------------------------------------------------------------------------------------------------
# Whole models

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
    monkeypatch.setattr(attention, "_choose", lambda *args: "varlen")
    monkeypatch.setattr(attention, "_why_not", lambda *args: None)
    emulated = functools.partial(attention._varlen, attend=reference_varlen)
    monkeypatch.setitem(attention._BACKENDS, "varlen", emulated)
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
    is_causal_window = attention._is_causal_window
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
    mask = attention.PackedMask(segments, None)
    with pytest.raises(UnsupportedModel, match=message):
        attention._attention("sdpa", torch.nn.Identity(), *x, mask, segments, **options)


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
