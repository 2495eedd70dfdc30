"""`linear_policy_loss`: it is `policy_loss` of the head's log-probabilities, in every mode, and its first ratio is 1.

The truth is plain PyTorch in float64 with all logits (`oracle.head`); bits are compared where modes promise them.
"""

import math

import pytest
import torch

import prefuse
from largest_tensor import LargestTensor
from prefuse import GRPO, RLOO, PPOClip, Reinforce
from prefuse.bench.timing import peak_bytes
from prefuse.bench.truth import oracle

LENGTHS = [5, 9, 1, 7, 0, 8]
CU_SEQLENS = torch.tensor([0, *LENGTHS]).cumsum(0).int()
N, S, D, V = sum(LENGTHS), len(LENGTHS), 12, 90
HEAD = {"softcap": 4.0, "logit_scale": 0.7, "temperature": 0.8}
LOSSES = [
    GRPO(), GRPO("grpo", beta=0.2, entropy_coef=0.05), GRPO("dr_grpo", max_completion_length=9), RLOO(), Reinforce(),
    PPOClip(reduction="token", entropy_coef=0.1), GRPO("grpo", importance_sampling_level="sequence"),
]  # fmt: skip


def inputs(n=N, dtype=torch.float64, vocabulary=V):
    g = torch.Generator().manual_seed(5)
    hidden, ref_hidden = (torch.randn(n, D, generator=g, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(vocabulary, D, generator=g, dtype=torch.float64)
    targets = torch.randint(vocabulary, (n,), generator=g)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets, ref_hidden.to(dtype)


GROUPS = 90_000  # bytes: two tiles of 256 rows and 40 columns, of the four that 900 tokens need
ADVANTAGES = torch.tensor([1.0, -0.5, 2.0, -1.5, 0.3, 0.7])


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("workspace", [0, None])
def test_it_is_the_loss_of_the_heads_log_probabilities(loss, workspace):
    hidden, weight, targets, ref_hidden = inputs()
    with torch.no_grad():
        old = prefuse.linear_logprobs(hidden + 0.1 * ref_hidden, weight, targets, **HEAD)
        ref = prefuse.linear_logprobs(ref_hidden, weight, targets, **HEAD)
    ref_logps = ref if "ref_logps" in loss.policy_needs else None
    out = prefuse.linear_policy_loss(
        hidden,
        weight,
        targets,
        CU_SEQLENS,
        old,
        ADVANTAGES,
        ref_logps=ref_logps,
        loss=loss,
        workspace=workspace,
        **HEAD,
    )
    logps, extra = oracle.head(hidden, weight, targets, **HEAD)
    truth = prefuse.policy_loss(logps, old, ADVANTAGES, CU_SEQLENS, loss, ref_logps=ref_logps, entropy=extra["entropy"])
    assert out.loss.item() == pytest.approx(truth.loss.item(), rel=1e-6)
    for ours, theirs in zip(gradients(out.loss, hidden, weight), gradients(truth.loss, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(out.logps, logps.detach(), rtol=1e-12, atol=1e-12)
    metrics, expected = prefuse.reduce_metrics(out.metrics), prefuse.reduce_metrics(truth.metrics)
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert "entropy" in metrics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["frozen", "stash", "lean", "groups"])
def test_the_first_ratio_is_exactly_1_in_every_mode(mode, dtype):
    """`old_logps` of a pass without gradients: nothing is clipped, and the loss is minus the mean advantage exactly."""
    lengths = [30 * n for n in LENGTHS] if mode == "groups" else LENGTHS
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    hidden, weight, targets, _ = inputs(sum(lengths), dtype, 40)
    with torch.no_grad():
        old = prefuse.linear_logprobs(hidden, weight, targets, temperature=0.7)
    weight = weight.detach() if mode == "frozen" else weight
    workspace = {"lean": 0, "groups": GROUPS}.get(mode)
    loss = GRPO("grpo", epsilon=0.0)
    out = prefuse.linear_policy_loss(
        hidden, weight, targets, cu, old, ADVANTAGES, loss=loss, workspace=workspace, temperature=0.7
    )
    assert torch.equal(out.logps, old)
    exact = torch.where(torch.tensor(lengths) > 0, -ADVANTAGES.double(), 0.0)
    torch.testing.assert_close(out.losses.double(), exact, rtol=2e-7, atol=0)
    assert all(out.metrics[f"clip_ratio/{name}"][0] == 0 for name in ("low_mean", "high_mean", "region_mean"))
    itself = prefuse.linear_policy_loss(
        hidden, weight, targets, cu, None, ADVANTAGES, loss=loss, workspace=workspace, temperature=0.7
    )
    assert torch.equal(itself.losses, out.losses)
    assert (type(out.loss.grad_fn).__name__ == "WithGradientsBackward") == (mode == "groups")
    out.loss.backward()
    assert hidden.grad.abs().sum() > 0


def test_groups_have_the_gradients_and_the_entropy_of_one_pass():
    """A workspace for some answers at a time makes the gradients in the forward: the same numbers."""
    lengths = [30 * n for n in LENGTHS]
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    hidden, weight, targets, ref_hidden = inputs(sum(lengths), torch.float32, 40)
    with torch.no_grad():
        old = prefuse.linear_logprobs(hidden + 0.02 * ref_hidden, weight, targets)
    outs, grads = [], []
    for workspace in (0, GROUPS):
        out = prefuse.linear_policy_loss(hidden, weight, targets, cu, old, ADVANTAGES, workspace=workspace)
        outs.append(out)
        grads.append(gradients(3 * out.loss, hidden, weight))
    assert [type(out.loss.grad_fn).__name__ == "WithGradientsBackward" for out in outs] == [False, True]
    assert torch.equal(outs[0].logps, outs[1].logps)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-7)
    assert prefuse.reduce_metrics(outs[0].metrics) == pytest.approx(prefuse.reduce_metrics(outs[1].metrics), rel=1e-6)
    assert prefuse.reduce_metrics(outs[0].metrics)["clip_ratio/region_mean"] > 0


def test_the_exact_kl_as_a_term():
    """beta times the mean of `linear_kl`, with its gradient."""
    hidden, weight, targets, ref_hidden = inputs()
    ref_weight = weight.detach().clone()
    kl = prefuse.linear_kl(hidden, weight, ref_hidden, ref_weight)
    loss = GRPO(beta=0.3, kl_estimator="exact")
    out = prefuse.linear_policy_loss(hidden, weight, targets, CU_SEQLENS, None, torch.zeros(S), loss=loss, kl=kl)
    logits, ref_logits = hidden @ weight.T, ref_hidden @ ref_weight.T
    log_p = torch.log_softmax(logits, -1)
    truth = (log_p.exp() * (log_p - torch.log_softmax(ref_logits, -1))).sum(-1).mean() * 0.3
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-6)
    assert prefuse.reduce_metrics(out.metrics)["kl"] == pytest.approx(truth.item() / 0.3, rel=1e-9)
    for ours, theirs in zip(gradients(out.loss, hidden, weight), gradients(truth, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def test_the_entropy_bonus_has_the_exact_gradient():
    hidden, weight, targets, _ = inputs()
    loss = GRPO(entropy_coef=0.5)
    out = prefuse.linear_policy_loss(hidden, weight, targets, CU_SEQLENS, None, torch.zeros(S), loss=loss)
    log_p = torch.log_softmax(hidden @ weight.T, -1)
    truth = 0.5 * (log_p.exp() * log_p).sum(-1).mean()
    assert out.loss.item() == pytest.approx(truth.item(), rel=1e-6)
    for ours, theirs in zip(gradients(out.loss, hidden, weight), gradients(truth, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_ignored_tokens_count_nowhere(loss):
    """Whatever stands there, NaN too: the same loss and gradients as without them."""
    hidden, weight, targets, ref_hidden = inputs()
    keep = torch.ones(N, dtype=torch.bool)
    keep[[1, 6, 7, 13, 29]] = False
    with torch.no_grad():
        old = prefuse.linear_logprobs(hidden + 0.1 * ref_hidden, weight, targets)
        ref = prefuse.linear_logprobs(ref_hidden, weight, targets)
    a = ADVANTAGES.repeat_interleave(torch.tensor(LENGTHS)).double()
    counts = torch.stack([part.sum() for part in keep.split(LENGTHS)])
    cu = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    short = prefuse.linear_policy_loss(
        hidden[keep],
        weight,
        targets[keep],
        cu,
        old[keep],
        a[keep],
        ref_logps=ref[keep] if "ref_logps" in loss.policy_needs else None,
        loss=loss,
    )
    nan = torch.where(keep, 0.0, math.nan)
    full = prefuse.linear_policy_loss(
        hidden, weight, torch.where(keep, targets, -100), CU_SEQLENS, old + nan, a + nan,
        ref_logps=ref + nan if "ref_logps" in loss.policy_needs else None, loss=loss,
    )  # fmt: skip
    assert full.loss.item() == pytest.approx(short.loss.item(), rel=1e-6)
    ours, theirs = gradients(full.loss, hidden, weight), gradients(short.loss, hidden, weight)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    assert not ours[0][~keep].any()
    assert prefuse.reduce_metrics(full.metrics) == pytest.approx(prefuse.reduce_metrics(short.metrics), rel=1e-9)


def test_no_logits_are_made():
    """The largest tensor that a step allocates is far below N x V."""
    n, vocabulary = 300, 40_000
    hidden, weight, targets, _ = inputs(n, torch.float32, vocabulary)
    cu, advantages = torch.tensor([0, 100, 200, 300], dtype=torch.int32), torch.tensor([1.0, -1.0, 0.5])
    loss = GRPO(entropy_coef=0.1)
    with LargestTensor() as seen:
        prefuse.linear_policy_loss(
            hidden, weight, targets, cu, None, advantages, loss=loss, workspace=0
        ).loss.backward()
    assert seen.largest < 4 * n * vocabulary / 4


@pytest.mark.parametrize("trains_head", [True, False])
def test_memory_is_flat_in_the_vocabulary(trains_head):
    """Beyond the gradient of the head, which has its size, a step takes what it takes with an eighth of the columns."""
    n, advantages = 256, torch.tensor([1.0, -1.0])
    peaks = []
    for vocabulary in (8_000, 64_000):
        hidden, weight, targets, _ = inputs(n, torch.float32, vocabulary)
        weight.requires_grad_(trains_head)
        cu = torch.tensor([0, 100, n], dtype=torch.int32)

        def step(given=(hidden, weight, targets, cu)):
            out = prefuse.linear_policy_loss(*given, None, advantages, loss=GRPO(entropy_coef=0.1), workspace=0)
            out.loss.backward()

        step()
        hidden.grad = weight.grad = None
        peaks.append(peak_bytes(step) - (weight.nbytes if trains_head else 0))
    assert 0 < peaks[1] < 1.1 * peaks[0], peaks
    assert peaks[1] < n * 64_000 * 4 / 4, peaks  # one tensor of logits has four times as much
