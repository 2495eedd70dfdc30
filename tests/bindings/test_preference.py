"""From packed tokens to a loss: what is summed, divided, counted and detached."""

import math

import pytest
import torch

import prefuse
from prefuse import DPO, IPO, KTO, SFT
from prefuse.bench.truth import oracle
from prefuse.bench.truth.head_cases import random_inputs

LOSSES = [DPO(), DPO(label_smoothing=0.1), IPO(), IPO(average=False), KTO(desirable_weight=1.5), SFT()]
LENGTHS = [3, 1, 5, 2, 4, 6, 1, 7]
LABELS = torch.tensor([True, False, False, True, True, True, False, True])


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def batch(loss, lengths=LENGTHS, labels=LABELS, z0=0.1):
    """Arguments of `preference_loss`: random log-probabilities, of the policy with a gradient."""
    n = sum(lengths)
    logps = (-torch.rand(n) * 3).requires_grad_()
    ref_logps = -torch.rand(n) * 3 if loss.uses_reference else None
    options = {"labels": labels, "z0": z0} if isinstance(loss, KTO) else {}
    return {"logps": logps, "ref_logps": ref_logps, "cu_seqlens": offsets(lengths), "loss": loss, **options}


def expected_losses(loss, arguments, lengths):
    """The same in plain Python."""
    logps = oracle.sequence_sums(arguments["logps"].detach(), lengths)
    if isinstance(loss, SFT):
        return [-x for x in logps]
    refs = oracle.sequence_sums(arguments["ref_logps"], lengths)
    ratios = [x - y for x, y in zip(logps, refs, strict=True)]
    if isinstance(loss, KTO):
        rows = zip(ratios, arguments["labels"].tolist(), strict=True)
        weights = (loss.desirable_weight, loss.undesirable_weight)
        return [oracle.kto(r, label, arguments["z0"], loss.beta, *weights) for r, label in rows]
    if isinstance(loss, IPO):
        h = [r / max(n, 1) if loss.average else r for r, n in zip(ratios, lengths, strict=True)]
        return [oracle.ipo(*pair, loss.beta) for pair in zip(h[0::2], h[1::2], strict=True)]
    pairs = zip(ratios[0::2], ratios[1::2], strict=True)
    return [oracle.dpo(*pair, loss.beta, loss.label_smoothing) for pair in pairs]


@pytest.mark.parametrize("lengths", [LENGTHS, [0, 4, 5, 0, 0, 0, 2, 2]], ids=["full", "some empty"])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_every_loss_agrees_with_plain_python(loss, lengths):
    arguments = batch(loss, lengths)
    out = prefuse.preference_loss(**arguments)
    expected = torch.tensor(expected_losses(loss, arguments, lengths), dtype=torch.float64)
    torch.testing.assert_close(out.losses.double(), expected, rtol=2**-23, atol=2**-50)
    items = sum(lengths) if isinstance(loss, SFT) else len(expected)
    torch.testing.assert_close(out.loss.double(), expected.sum() / items, rtol=2**-23, atol=2**-50)
    out.loss.backward()
    assert arguments["logps"].grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_only_the_loss_carries_a_gradient(loss):
    out = prefuse.preference_loss(**batch(loss))
    assert out.loss.requires_grad
    assert out.loss.shape == ()
    for name, x in {"losses": out.losses, "logps": out.logps, "rewards": out.rewards, **out.metrics}.items():
        assert not x.requires_grad, name
    assert (out.loss.dtype, out.losses.dtype, out.rewards.dtype) == (torch.float32,) * 3
    assert out.logps.dtype == torch.float64
    assert out.rewards.shape == out.logps.shape == (8,)


def test_sequence_log_probabilities_are_right_to_float64():
    arguments = batch(SFT())
    out = prefuse.preference_loss(**arguments)
    expected = torch.tensor(oracle.sequence_sums(arguments["logps"].detach(), LENGTHS), dtype=torch.float64)
    torch.testing.assert_close(out.logps, expected, rtol=1e-15, atol=0)


# ---- the reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES[:-1], ids=repr)
def test_a_reference_per_sequence_equals_one_per_token(loss):
    arguments = batch(loss)
    per_token = prefuse.preference_loss(**arguments)
    sums = prefuse.preference_loss(arguments["ref_logps"], None, arguments["cu_seqlens"], SFT()).logps
    per_sequence = prefuse.preference_loss(**{**arguments, "ref_logps": sums})
    torch.testing.assert_close(per_sequence.losses, per_token.losses, rtol=2**-22, atol=0)
    torch.testing.assert_close(per_sequence.rewards, per_token.rewards, rtol=2**-22, atol=1e-15)


def test_where_every_sequence_is_one_token_float64_means_per_sequence():
    """Both shapes fit and both readings agree, because a sum of one token is the token."""
    arguments = batch(DPO(), [1, 1, 1, 1])
    per_token = prefuse.preference_loss(**arguments)
    per_sequence = prefuse.preference_loss(**{**arguments, "ref_logps": arguments["ref_logps"].double()})
    assert torch.equal(per_token.losses, per_sequence.losses)
    # Four tokens in four sequences, unevenly: now they differ.
    arguments["cu_seqlens"] = offsets([2, 0, 1, 1])
    ref = arguments["ref_logps"]
    by_token = prefuse.preference_loss(**arguments)
    by_sequence = prefuse.preference_loss(**{**arguments, "ref_logps": ref.double()})
    logps = oracle.sequence_sums(arguments["logps"].detach(), [2, 0, 1, 1])
    refs = oracle.sequence_sums(ref, [2, 0, 1, 1])
    for out, reference in ((by_token, refs), (by_sequence, ref.tolist())):
        expected = torch.tensor([0.1 * (x - y) for x, y in zip(logps, reference, strict=True)])
        torch.testing.assert_close(out.rewards, expected)


def test_token_differences_are_taken_before_they_are_summed():
    """A thousand tokens at -10 nats, the policy one float32 step above its reference on each."""
    step = 2.0**-20
    ref_logps = torch.full((1000,), -10.0)
    out = prefuse.preference_loss(ref_logps + step, ref_logps, offsets([1000, 0]), IPO(beta=1.0))
    assert out.rewards.tolist() == [1000 * step, 0.0]


def test_no_gradient_reaches_the_reference():
    arguments = batch(DPO())
    arguments["ref_logps"].requires_grad_()
    prefuse.preference_loss(**arguments).loss.backward()
    assert arguments["ref_logps"].grad is None


# ---- empty sequences and batches -----------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("lengths", [[], [0, 0], [0, 0, 0, 0]], ids=len)
def test_a_batch_without_tokens_has_defined_values_and_a_graph(loss, lengths):
    arguments = batch(loss, lengths, LABELS[: len(lengths)])
    out = prefuse.preference_loss(**arguments)
    assert out.loss.isfinite()
    assert out.losses.isfinite().all()
    assert not out.rewards.any()
    out.loss.backward()
    assert arguments["logps"].grad.shape == (0,)
    for name, value in prefuse.reduce_metrics(out.metrics).items():
        assert math.isfinite(value), name


def test_an_empty_side_is_a_log_ratio_of_zero():
    out = prefuse.preference_loss(torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.5]), offsets([2, 0]), DPO(0.1))
    assert out.losses.item() == pytest.approx(oracle.dpo(1.0, 0.0, 0.1))


# ---- num_items and accumulation ------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_microbatches_add_up_to_the_whole(loss, as_tensor):
    """1 x 8 sequences or 4 x 2, one step: the same loss, gradient and metrics, by the global count."""
    arguments = batch(loss)
    whole = prefuse.preference_loss(**arguments)
    whole.loss.backward()
    expected = arguments["logps"].grad.clone()
    arguments["logps"].grad = None

    items = {"pair": 4, "sequence": 8, "token": sum(LENGTHS)}[loss.per]
    items = torch.tensor(items) if as_tensor else items
    cuts = offsets(LENGTHS).tolist()
    total, metrics = 0.0, {}
    for s in range(0, 8, 2):
        tokens = slice(cuts[s], cuts[s + 2])
        part = {**arguments, "logps": arguments["logps"][tokens], "cu_seqlens": offsets(LENGTHS[s : s + 2])}
        if loss.uses_reference:
            part["ref_logps"] = arguments["ref_logps"][tokens]
        if isinstance(loss, KTO):
            part["labels"] = LABELS[s : s + 2]
        out = prefuse.preference_loss(**part, num_items=items)
        out.loss.backward()
        total += out.loss.item()
        metrics = {name: value + metrics.get(name, 0) for name, value in out.metrics.items()}
    assert total == pytest.approx(whole.loss.item(), rel=1e-6)
    torch.testing.assert_close(arguments["logps"].grad, expected, rtol=1e-6, atol=0)
    assert prefuse.reduce_metrics(metrics) == pytest.approx(prefuse.reduce_metrics(whole.metrics), rel=1e-6)


# ---- metrics -------------------------------------------------------------------------------------

PAIR_METRICS = {
    "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected",
}  # fmt: skip


@pytest.mark.parametrize("loss", [DPO(0.5), IPO(0.5)], ids=repr)
def test_metrics_of_pairs(loss):
    # Log-ratios 2, -1 | 0, 0 | 1, 3: right, a tie, wrong.
    logps = torch.tensor([-1.0, -4.0, -2.0, -2.0, -3.0, -1.0])
    ref_logps = torch.tensor([-3.0, -3.0, -2.0, -2.0, -4.0, -4.0])
    metrics = prefuse.preference_loss(logps, ref_logps, offsets([1] * 6), loss).metrics
    assert set(metrics) == PAIR_METRICS
    assert {name: value.tolist() for name, value in metrics.items()} == {
        "rewards/chosen": [0.5 * 3, 3],
        "rewards/rejected": [0.5 * 2, 3],
        "rewards/accuracies": [1, 3],
        "rewards/margins": [0.5 * 1, 3],
        "logps/chosen": [-6, 3],
        "logps/rejected": [-7, 3],
    }
    assert prefuse.reduce_metrics(metrics)["rewards/accuracies"] == pytest.approx(1 / 3)


def test_metrics_of_unpaired_sequences():
    logps = torch.tensor([-1.0, -4.0, -2.0])
    ref_logps = torch.tensor([-3.0, -3.0, -2.0])
    labels = torch.tensor([True, False, True])
    metrics = prefuse.preference_loss(logps, ref_logps, offsets([1] * 3), KTO(0.5), labels, z0=0.25).metrics
    assert {name: value.tolist() for name, value in metrics.items()} == {
        "rewards/chosen": [1.0, 2],
        "rewards/rejected": [-0.5, 1],
        "logps/chosen": [-3, 2],
        "logps/rejected": [-4, 1],
        "kl": [0.25, 1],
    }
    reduced = prefuse.reduce_metrics(metrics)
    assert reduced["rewards/margins"] == pytest.approx(0.5 - -0.5)
    assert reduced["kl"] == 0.25


@pytest.mark.parametrize("label", [True, False])
def test_a_batch_of_one_class_leaves_the_other_out(label):
    arguments = batch(KTO(), labels=torch.full((8,), label))
    out = prefuse.preference_loss(**arguments)
    assert out.loss.isfinite()
    present, absent = ("chosen", "rejected") if label else ("rejected", "chosen")
    reduced = prefuse.reduce_metrics(out.metrics)
    assert f"rewards/{present}" in reduced
    assert not {f"rewards/{absent}", f"logps/{absent}", "rewards/margins"} & reduced.keys()


def test_reduce_metrics_of_nothing_is_nothing():
    assert prefuse.reduce_metrics({}) == {}
    assert prefuse.reduce_metrics({"a": torch.zeros(2)}) == {}


# ---- KTO's reference point -----------------------------------------------------------------------


def test_the_reference_point_is_the_mean_log_ratio_of_mismatched_completions():
    logps, ref_logps = torch.randn(sum(LENGTHS)) + 0.5, torch.randn(sum(LENGTHS))
    ratios = oracle.sequence_sums(logps.double() - ref_logps.double(), LENGTHS)
    z0 = prefuse.kto_reference_point(logps, ref_logps, offsets(LENGTHS))
    assert z0.item() == pytest.approx(oracle.kto_reference_point(ratios), rel=1e-12)
    assert z0.item() > 0
    assert z0.shape == ()
    sums = torch.tensor(oracle.sequence_sums(ref_logps, LENGTHS), dtype=torch.float64)
    assert prefuse.kto_reference_point(logps, sums, offsets(LENGTHS)).item() == pytest.approx(z0.item(), rel=1e-12)


def test_the_reference_point_is_never_negative():
    z0 = prefuse.kto_reference_point(torch.tensor([-5.0, -6.0]), torch.tensor([-1.0, -1.0]), offsets([1, 1]))
    assert z0.item() == 0.0
    # The mean is clamped, not each term: 3 and -1 have mean 1.
    z0 = prefuse.kto_reference_point(torch.tensor([3.0, -1.0]), torch.zeros(2), offsets([1, 1]))
    assert z0.item() == 1.0


def test_no_mismatched_completion_means_zero():
    assert prefuse.kto_reference_point(torch.empty(0), torch.empty(0), offsets([])).item() == 0.0


def test_no_gradient_flows_through_the_reference_point():
    kl_logps = (torch.rand(4) + 1).requires_grad_()
    assert not prefuse.kto_reference_point(kl_logps, torch.zeros(4), offsets([1, 3])).requires_grad
    # Not through one that somebody computed with a graph, either.
    arguments = batch(KTO(), z0=kl_logps.mean())
    prefuse.preference_loss(**arguments).loss.backward()
    assert kl_logps.grad is None


@pytest.mark.parametrize("z0", [0.3, torch.tensor(0.3), torch.tensor(0.3, dtype=torch.float64)])
def test_a_reference_point_may_be_a_number(z0):
    arguments = batch(KTO(), z0=z0)
    expected = expected_losses(KTO(), {**arguments, "z0": float(z0)}, LENGTHS)
    out = prefuse.preference_loss(**arguments)
    torch.testing.assert_close(out.losses.double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


# ---- with the head in it -------------------------------------------------------------------------

HEAD = {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.2}


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_the_fused_loss_equals_its_two_halves(loss, impl):
    inputs = random_inputs(sum(LENGTHS), 12, 50, bias=True)
    arguments = batch(loss)
    del arguments["logps"]
    results = []
    for fused in (True, False):
        x = inputs.leaves(("hidden", "weight", "bias"))
        head = {"bias": x.bias, "impl": impl, **HEAD}
        if fused:
            out = prefuse.linear_preference_loss(x.hidden, x.weight, x.targets, **arguments, **head, workspace=0)
        else:
            logps = prefuse.linear_logprobs(x.hidden, x.weight, x.targets, **head)
            out = prefuse.preference_loss(logps, **arguments)
        out.loss.backward()
        results.append([out.loss, out.losses, out.logps, out.rewards, x.hidden.grad, x.weight.grad, x.bias.grad])
    for fused, composed in zip(*results, strict=True):
        torch.testing.assert_close(fused, composed, rtol=1e-6, atol=1e-9)


@pytest.mark.quick_cases(every=3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("options", [{}, HEAD], ids=["plain", "options"])
def test_what_the_workspace_keeps_changes_nothing_but_rounding(options, impl, dtype, device):
    """The same log-probabilities bit by bit, and gradients as near to float64 as the recomputing backward's."""
    place = device if impl == "triton" else torch.device("cpu")
    inputs = random_inputs(sum(LENGTHS), 24, 90, dtype, bias=True, device=place)
    inputs.hidden[-1] *= 30  # a row that may not fit the workspace's range
    targets = inputs.targets.clone()
    targets[3] = -100
    arguments = {name: x.to(place) for name, x in batch(prefuse.IPO()).items() if isinstance(x, torch.Tensor)}
    del arguments["logps"]
    made = {}
    for name, workspace, which in (("kept", None, impl), ("lean", 0, impl), ("truth", 0, "reference")):
        x = inputs.leaves(("hidden", "weight", "bias"))
        head = {"bias": x.bias, "impl": which, "workspace": workspace, **options}
        out = prefuse.linear_preference_loss(x.hidden, x.weight, targets, **arguments, loss=prefuse.IPO(), **head)
        out.loss.backward()
        made[name] = (out.logps, [x.hidden.grad.double(), x.weight.grad.double(), x.bias.grad.double()])
    assert torch.equal(made["kept"][0], made["lean"][0])
    for kept, lean, truth in zip(made["kept"][1], made["lean"][1], made["truth"][1], strict=True):
        bound = 2 * (lean - truth).norm() + 4 * torch.finfo(dtype).eps * truth.norm()
        assert (kept - truth).norm() <= bound
    assert not made["kept"][1][0][3].any()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_ignored_tokens_count_nowhere(loss):
    """As if they were not in the batch: in no length, mean over tokens or sum, nor is the reference read there."""
    inputs = random_inputs(sum(LENGTHS), 12, 50)
    arguments = batch(loss)
    del arguments["logps"]
    ignored = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    ignored[[0, 4, 5, 20, 28]] = True
    ignored[3] = True  # the whole of the second sequence
    masked = inputs.targets.masked_fill(ignored, -100)
    kept = ~ignored
    lengths = [int(part.sum()) for part in kept.split(LENGTHS)]
    with_holes, without = dict(arguments), {**arguments, "cu_seqlens": offsets(lengths)}
    if loss.uses_reference:
        with_holes["ref_logps"] = arguments["ref_logps"].masked_fill(ignored, float("nan"))
        without["ref_logps"] = arguments["ref_logps"][kept]
    out = prefuse.linear_preference_loss(inputs.hidden, inputs.weight, masked, **with_holes)
    expected = prefuse.linear_preference_loss(inputs.hidden[kept], inputs.weight, inputs.targets[kept], **without)
    assert lengths[1] == 0
    assert torch.equal(out.losses, expected.losses)
    assert torch.equal(out.logps, expected.logps)
    assert torch.equal(out.rewards, expected.rewards)
    torch.testing.assert_close(out.loss, expected.loss)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_a_batch_of_ignored_tokens_has_defined_values_and_zero_gradients(loss):
    inputs = random_inputs(sum(LENGTHS), 12, 50, ignored=1.0).leaves(("hidden", "weight"))
    arguments = batch(loss)
    del arguments["logps"]
    out = prefuse.linear_preference_loss(inputs.hidden, inputs.weight, inputs.targets, **arguments)
    assert out.loss.isfinite()
    out.loss.backward()
    assert not inputs.hidden.grad.any()
    assert not inputs.weight.grad.any()


def test_a_target_id_that_wraps_to_ignore_index_still_counts():
    # As a uint8, -100 is 156.
    inputs = random_inputs(4, 12, 200)
    targets = torch.full((4,), 156, dtype=torch.uint8)
    out = prefuse.linear_preference_loss(inputs.hidden, inputs.weight, targets, offsets([2, 2]), None, SFT())
    logps, _ = oracle.head(inputs.hidden, inputs.weight, targets)
    assert out.loss.item() == pytest.approx(-logps.mean().item(), rel=1e-5)


def test_no_grad_computes_the_same_without_a_graph():
    inputs = random_inputs(sum(LENGTHS), 12, 50)
    arguments = batch(DPO())
    del arguments["logps"]
    leaves = inputs.leaves(("hidden", "weight"))
    with_graph = prefuse.linear_preference_loss(leaves.hidden, leaves.weight, leaves.targets, **arguments)
    with torch.no_grad():
        without = prefuse.linear_preference_loss(leaves.hidden, leaves.weight, leaves.targets, **arguments)
    assert not without.loss.requires_grad
    assert torch.equal(without.loss, with_graph.loss.detach())
