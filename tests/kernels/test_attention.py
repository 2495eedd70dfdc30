"""Shared-prefix attention against every sequence alone, in float64; GPU kernels by stand-ins that follow their docs."""

import functools
import inspect
import sys
import types

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attention_cases import LENGTHS, inputs, reference_varlen
from prefuse.kernels.attention import shared_prefix
from prefuse.kernels.attention.gather import Gather, gather
from prefuse.kernels.attention.segments import Segments, token_places
from prefuse.kernels.attention.shared_prefix import shared_prefix_attention

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


@pytest.fixture(params=["sdpa", "varlen"])
def backend(request, monkeypatch):
    """The variable-length path runs here with an attention written from the kernels' documentation."""
    if request.param == "varlen":
        emulated = functools.partial(shared_prefix._varlen, attend=reference_varlen)
        monkeypatch.setitem(shared_prefix._BACKENDS, "varlen", emulated)
        monkeypatch.setattr(shared_prefix, "_why_not", lambda *args: None)
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
    assert shared_prefix._torch_varlen_parameters()
    stand_in = types.SimpleNamespace(flash_attn_varlen_func=documented_flash_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    monkeypatch.setattr(varlen, "varlen_attn", documented_torch_varlen)
    monkeypatch.setattr(shared_prefix, "_why_not", lambda *args: None)
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
    monkeypatch.setattr(shared_prefix.importlib.util, "find_spec", lambda name: installed or None)
    tensor = types.SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 4, 9, head))
    assert shared_prefix._choose(tensor, tensor, softcap) == chosen


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
    problem = shared_prefix._why_not(name, x[0], x[2], softcap)
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


@pytest.mark.quick_cases(every=4)
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


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("heads", HEADS)
def test_queries_a_few_at_a_time_leave_out_what_none_of_them_sees(heads, window, monkeypatch):
    monkeypatch.setattr(shared_prefix, "QUERIES", 2)
    attend, pairs = torch.nn.functional.scaled_dot_product_attention, []

    def counting(query, key, value, **options):
        pairs.append((query.shape[2], key.shape[2]))
        return attend(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counting)
    x = inputs(heads)
    got = shared_prefix_attention(*x, Segments(LENGTHS), window=window)
    options = {"scale": x[0].shape[-1] ** -0.5, "window": window, "softcap": None}
    expected = duplicated(*x, LENGTHS, **options)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(y.sin().sum(), x) for y in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-10)
    parts = [(rows, keys) for rows, keys in pairs if rows <= 2]
    assert parts
    assert all(keys <= window + rows - 1 for rows, keys in parts if window is not None)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("window", [None, 2])
def test_an_empty_completion_changes_nothing(window, softcap, backend):
    results = []
    for lengths in [[3, 2], [2, 4]], [[3, 2, 0], [2, 0, 4]]:
        torch.manual_seed(0)
        x = [torch.randn(1, 2, 11, 8, requires_grad=True) for _ in range(3)]
        out = shared_prefix_attention(*x, Segments(lengths), window=window, softcap=softcap, backend=backend)
        results.append([out, *torch.autograd.grad(out.sin().sum(), x)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


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

    monkeypatch.setitem(shared_prefix._BACKENDS, "varlen", functools.partial(shared_prefix._varlen, attend=attend))
    monkeypatch.setattr(shared_prefix, "_why_not", lambda *args: None)
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
    full, near, self = (shared_prefix.varlen_index(segments, window, CPU) for window in (None, 3, 1))
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
