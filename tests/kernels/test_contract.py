"""The numerics contract: exact where it is exact, the same bits where it says so, no NaN, no cancelled gradient.

Both implementations are held to it; the Triton kernels interpreted where there is no GPU, so at small sizes.
"""

import pytest
import torch

import prefuse
from contract_cases import DTYPES, IMPLS, LN2, head, on
from prefuse.bench.truth import oracle
from prefuse.bench.truth.head_cases import NEEDS, evaluate, random_inputs
from prefuse.kernels import slices
from prefuse.kernels.tiles import table as configs

pytest.importorskip("triton")

from prefuse.kernels import launch


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(slices, "TILE", {"cpu": (8, 16), "cuda": (8, 16)})


# ---- a policy equal to its reference -------------------------------------------------------------

# Ten sequences of many lengths, one of them empty; a token here and there is ignored.
LENGTHS = [7, 1, 12, 3, 0, 5, 1, 1, 9, 2]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
N = sum(LENGTHS)


def assert_no_preference(out):
    """Every pair's loss is ln 2 and every reward 0, to the last bit."""
    assert torch.equal(out.losses.cpu(), LN2.expand(len(out.losses)))
    assert not out.rewards.any()
    assert abs(out.loss.item() - LN2.item()) <= 2**-24  # one unit in the last place of ln 2
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert out.metrics[name][0] == 0, name


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("per_sequence", [False, True], ids=["per token", "per sequence"])
@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_equal_policies_have_a_loss_of_exactly_ln_2(impl, dtype, needs, per_sequence, device):
    place = on(impl, device)
    inputs = random_inputs(N, 24, 100, dtype, bias=True, ignored=0.1, device=place)
    cu_seqlens = CU_SEQLENS.to(place)
    with torch.no_grad():
        ref_logps = evaluate(head(impl), inputs).logps
        if per_sequence:
            ref_logps = prefuse.preference_loss(ref_logps, None, cu_seqlens, prefuse.SFT()).logps
    policy = inputs.leaves(NEEDS[needs])
    out = prefuse.linear_preference_loss(
        policy.hidden, policy.weight, policy.targets, cu_seqlens, ref_logps, bias=policy.bias, impl=impl
    )
    assert_no_preference(out)
    out.loss.backward()
    assert policy.hidden.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_ln_2_whatever_the_reference_was_batched_with(impl, dtype, device):
    """The reference's log-probabilities come from another order, other batches and another packing."""
    place = on(impl, device)
    inputs = random_inputs(N, 24, 100, dtype, ignored=0.1, device=place)
    order = torch.randperm(N).to(place)
    batches = [evaluate(head(impl), rows_of(inputs, part)).logps for part in order.split([1, 17, N - 18])]
    ref_logps = torch.empty(N, device=place).index_copy_(0, order, torch.cat(batches))
    policy = inputs.leaves(NEEDS["trainable"])
    out = prefuse.linear_preference_loss(
        policy.hidden, policy.weight, policy.targets, CU_SEQLENS.to(place), ref_logps, impl=impl
    )
    assert_no_preference(out)


# ---- the same bits -------------------------------------------------------------------------------


def rows_of(inputs, rows):
    return inputs.but(hidden=inputs.hidden[rows], targets=inputs.targets[rows])


def assert_rows_keep_their_bits(run, inputs, splits):
    """Each row has the same log-probability in another order, in batches of `splits`, and beside ignored rows."""
    n = len(inputs.targets)
    expected = run(inputs)
    assert torch.equal(run(inputs), expected), "a second run"
    order = torch.randperm(n).to(expected.device)
    assert torch.equal(run(rows_of(inputs, order)), expected[order]), "permuted"
    for size in splits:
        parts = [run(rows_of(inputs, slice(i, i + size))) for i in range(0, n, size)]
        assert torch.equal(torch.cat(parts), expected), f"batches of {size}"
    padded = order.repeat_interleave(3)
    hidden, targets = inputs.hidden[padded], inputs.targets[padded].clone()
    targets[1::3] = targets[2::3] = -100
    assert torch.equal(run(inputs.but(hidden=hidden, targets=targets))[::3], expected[order]), (
        "packed with ignored rows"
    )


# Row counts on both sides of a tile of 256, and down to one; depths where BLAS takes another path, one of them odd; two
# vocabulary slices, the second not whole.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 7, 64, 129])
def test_a_row_has_the_same_bits_in_any_batch(threads, d, dtype):
    inputs = random_inputs(700, d, 2500, dtype, bias=d == 7, ignored=0.05)

    def run(inputs):
        return evaluate(head("torch"), inputs).logps

    assert_rows_keep_their_bits(run, inputs, splits=[255, 257])
    for row in (0, 255, 699):  # one row alone
        alone = rows_of(inputs, slice(row, row + 1))
        assert torch.equal(run(alone), run(inputs)[row : row + 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output_has_the_same_bits_in_any_batch(threads, dtype):
    inputs = random_inputs(300, 17, 2100, dtype)
    options = {"outputs": oracle.OUTPUTS, "softcap": 8.0}

    def run(inputs):
        return torch.stack(list(evaluate(head("torch"), inputs, **options).outputs.values()), 1)

    assert_rows_keep_their_bits(run, inputs, splits=[99, 299])


@pytest.mark.parametrize(("d", "dtype"), [(7, torch.float32), (7, torch.bfloat16), (16, torch.bfloat16)])
def test_a_row_has_the_same_bits_in_any_batch_of_the_kernels(device, d, dtype):
    inputs = random_inputs(33, d, 120, dtype, bias=True, ignored=0.1, device=device)

    def run(inputs):
        return evaluate(head("triton"), inputs).logps

    assert_rows_keep_their_bits(run, inputs, splits=[15])


@pytest.mark.parametrize("impl", IMPLS)
def test_far_rows_have_the_same_bits_in_any_batch(impl, device, small_tiles):
    """Rows that are folded twice do not depend on which others are, either."""
    inputs = random_inputs(33, 9, 70, device=on(impl, device), bias=True)
    inputs.hidden[::5] *= 60.0

    def run(inputs):
        return evaluate(head(impl), inputs).logps

    assert (run(inputs) < -40).sum() > 3
    assert_rows_keep_their_bits(run, inputs, splits=[17])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("d", [7, 64])
def test_every_mode_makes_the_same_bits(d, dtype):
    inputs = random_inputs(300, d, 2100, dtype, bias=True, ignored=0.1)
    inputs.hidden[::7] *= 60.0  # some far rows
    grad = torch.ones(300)
    expected = evaluate(head("torch"), inputs).logps
    for needs in NEEDS.values():
        assert torch.equal(evaluate(head("torch"), inputs, needs, grad).logps, expected), needs
    assert torch.equal(evaluate(head("torch"), inputs, outputs=oracle.OUTPUTS).logps, expected)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("d", [7, 64])
def test_every_layout_makes_the_same_bits(d, dtype):
    inputs = random_inputs(300, d, 2100, dtype)  # no row ignored: picking the others would copy them
    expected = evaluate(head("torch"), inputs).logps
    unaligned = torch.cat([inputs.hidden.new_zeros(1), inputs.hidden.flatten()])[1:].view(300, d)
    sliced = torch.cat([inputs.hidden] * 3, 1)[:, d : 2 * d]
    for hidden in (inputs.hidden.T.contiguous().T, unaligned, sliced):
        assert torch.equal(evaluate(head("torch"), inputs.but(hidden=hidden)).logps, expected), hidden.stride()


@pytest.mark.parametrize("needs", ["trainable", "frozen head"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", IMPLS)
def test_a_second_run_has_the_same_bits(impl, dtype, needs, device):
    n, v = (300, 2100) if impl == "torch" else (20, 70)
    inputs = random_inputs(n, 17, v, dtype, bias=True, ignored=0.1, device=on(impl, device))
    grad = torch.randn(n, device=inputs.hidden.device)
    first, second = (evaluate(head(impl), inputs, NEEDS[needs], grad).tensors() for _ in range(2))
    for name, x in first.items():
        assert torch.equal(second[name], x), name


# ---- a long sequence keeps its digits ------------------------------------------------------------


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize(("impl", "d", "v"), [("torch", 64, 4000), ("torch", 256, 4000), ("triton", 64, 1000)])
def test_a_log_ratio_of_1024_tokens_is_right_to_1e_4_nats(impl, d, v, device, monkeypatch):
    """bf16 inputs, a policy a little off its reference; rounding logits to bf16 would cost some 0.2 nats."""
    if device.type == "cpu":  # interpreted with the tile of a GPU, which at this size is faster than many small ones

        def tile(kernel, chip, dtype, descriptors, d, v):
            return configs.Tile(128, 256, 64, 8, 3, descriptors)

        monkeypatch.setattr(launch, "choose", tile)
    policy = random_inputs(1024, d, v, torch.bfloat16, spread=3.0, device=on(impl, device))

    def near(x):
        return (x.float() + 0.02 * torch.randn_like(x.float())).to(x.dtype)

    reference = policy.but(hidden=near(policy.hidden), weight=near(policy.weight))
    token = [evaluate(head(impl), inputs).logps for inputs in (policy, reference)]
    truth = [evaluate(oracle.head, inputs.exact()).logps for inputs in (policy, reference)]
    cu_seqlens = torch.tensor([0, 1024], dtype=torch.int32, device=policy.hidden.device)
    labels = torch.tensor([True], device=policy.hidden.device)
    beta = 1.0
    out = prefuse.preference_loss(*token, cu_seqlens, prefuse.KTO(beta), labels=labels, z0=0.0)
    expected = oracle.sequence_sums(truth[0], [1024])[0] - oracle.sequence_sums(truth[1], [1024])[0]
    assert abs(expected) > 0.5
    # A reward is stored in float32: half a unit in its last place besides.
    assert abs(out.rewards.item() - expected) <= 1e-4 + abs(expected) * 2**-24
