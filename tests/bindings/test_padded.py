"""Padded batches: `prefuse.padded` gives the numbers of the original DPO repository's functions, without its logits."""

import copy
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import prefuse
from largest_tensor import LargestTensor
from prefuse.bench.truth import oracle
from prefuse.padded import batch_logps, concatenated_forward, concatenated_inputs, pack_rows, preference_loss
from tiny_run import SHAPE

ROOT = Path(__file__).resolve().parents[2]
V, D = 97, 24
B, T = 5, 11


def rows(seed=0, dtype=torch.float64, **changes):
    """Hidden states, a head and labels: a row whose first label counts in vain, one of which none counts, one full."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, T, D, generator=g, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, V, (B, T), generator=g)
    counts = torch.rand(B, T, generator=g) < 0.6
    counts[0, :4] = torch.tensor([True, False, True, True])
    counts[1], counts[2] = False, True
    return hidden.requires_grad_(), weight.requires_grad_(), labels.masked_fill(~counts, -100)


def by_definition(hidden, weight, labels, average=False, **head):
    """Row by row and token by token, from float64 logits."""
    result = []
    for states, row in zip(hidden, labels, strict=True):
        at = [t for t in range(1, len(row)) if row[t] != -100]
        logps, _ = oracle.head(states[[t - 1 for t in at]].double(), weight.double(), row[at], **head)
        result.append(logps.sum() / (max(len(at), 1) if average else 1))
    return torch.stack(result)


HEADS = {
    "plain": {},
    "capped": {"softcap": 3.0, "logit_scale": 0.5},
    "biased": {"bias": torch.linspace(-1, 1, V, dtype=torch.float64), "temperature": 0.7},
}


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_batch_logps_is_its_definition(head, average):
    hidden, weight, labels = rows()
    wanted = by_definition(hidden, weight, labels, average, **head)
    got = batch_logps(hidden, weight, labels, average, **head, impl="torch")
    assert got.dtype == torch.float64
    assert got[1] == 0
    torch.testing.assert_close(got, wanted, rtol=1e-11, atol=1e-11)
    upstream = torch.linspace(-1, 2, B, dtype=torch.float64)
    expected = torch.autograd.grad((wanted * upstream).sum(), (hidden, weight))
    found = torch.autograd.grad((got * upstream).sum(), (hidden, weight))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_half_precision_is_as_close_as_its_inputs_allow():
    """Against float64 of the same rounded inputs: what is left is float32's rounding of some 20 nats per token."""
    hidden, weight, labels = rows(dtype=torch.bfloat16)
    got = batch_logps(hidden, weight, labels)
    error = (got - by_definition(hidden, weight, labels)).abs().max().item()
    assert error <= T * 32 * torch.finfo(torch.float32).eps * 20


def test_pack_rows_takes_what_counts_in_order():
    hidden, _, labels = rows()
    packed = pack_rows(hidden, labels)
    keep = labels[:, 1:] != -100
    assert torch.equal(packed.hidden, hidden[:, :-1][keep])
    assert torch.equal(packed.targets, labels[:, 1:][keep])
    assert packed.cu_seqlens.tolist() == [0, *keep.sum(1).cumsum(0).tolist()]
    assert packed.cu_seqlens.dtype == torch.int32


def test_packed_rows_go_straight_to_the_fused_loss():
    hidden, weight, labels = rows()
    packed = pack_rows(hidden[:4], labels[:4])
    reference = torch.tensor([-3.0, -4.0, -5.0, -2.0], dtype=torch.float64)
    got = prefuse.linear_preference_loss(
        packed.hidden, weight, packed.targets, packed.cu_seqlens, reference, loss=prefuse.DPO(beta=0.3)
    )
    logps = (by_definition(hidden[:4], weight, labels[:4]) - reference).tolist()
    wanted = [oracle.dpo(logps[0], logps[1], 0.3), oracle.dpo(logps[2], logps[3], 0.3)]
    assert got.losses.tolist() == pytest.approx(wanted, rel=1e-6)


def test_what_does_not_count_changes_no_bit_and_gets_no_gradient():
    hidden, weight, labels = rows()
    sums = batch_logps(hidden, weight, labels)
    used = torch.zeros(B, T, dtype=torch.bool)
    used[:, :-1] = labels[:, 1:] != -100
    other = torch.where(used[..., None], hidden, torch.tensor(float("nan"), dtype=torch.float64))
    assert torch.equal(batch_logps(other, weight, labels), sums)
    grad = torch.autograd.grad(sums.sum(), hidden)[0]
    assert not grad[~used].any()
    assert (grad[used].abs().sum(-1) > 0).all()


def test_no_logits_are_made():
    hidden, weight, labels = torch.randn(4, 200, 16), torch.randn(3000, 16), torch.randint(0, 3000, (4, 200))
    with LargestTensor() as largest:
        batch_logps(hidden.requires_grad_(), weight.requires_grad_(), labels).sum().backward()
    assert largest.largest <= 4 * 256 * 2048  # a tile of the portable head; the logits have 4 * 800 * 3000 bytes


@pytest.mark.parametrize(
    ("hidden", "labels"), [((3, 4), (3, 4)), ((2, 5, 8), (2, 4)), ((2, 5, 8), (2, 5, 1)), ((2, 5, 8), (5, 2))]
)
def test_shapes_that_do_not_fit(hidden, labels):
    with pytest.raises(
        ValueError, match=r"expected hidden \(B, T, D\) and labels \(B, T\), got .*; labels are shifted"
    ):
        batch_logps(torch.zeros(hidden), torch.zeros(7, 8), torch.zeros(labels, dtype=torch.long))


# ---------------------------------------------------------------------------------------------------------
# Whole models


def model(seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(vocab_size=300, bos_token_id=0, eos_token_id=1, initializer_range=0.2, **SHAPE)
    return transformers.LlamaForCausalLM(config).eval()


def pairs():
    """Three pairs; the rejected side is the longer one, so the chosen are padded to it."""
    batch = {}
    for name, width, lengths, prompts in (("chosen", 9, (9, 4, 7), (3, 2, 6)), ("rejected", 12, (5, 12, 8), (3, 2, 6))):
        g = torch.Generator().manual_seed(len(name))
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        ids = torch.randint(3, 300, (3, width), generator=g) * mask
        labels = ids.masked_fill(~mask | (torch.arange(width) < torch.tensor(prompts)[:, None]), -100)
        batch |= {f"{name}_input_ids": ids, f"{name}_attention_mask": mask.long(), f"{name}_labels": labels}
    return batch | {"prompt": ["a", "b", "c"]}


def side_by_definition(model, batch, side, average):
    """Each row by itself, cut to its length: no padding, no concatenation."""
    result = []
    for ids, mask, labels in zip(
        *(batch[f"{side}_{x}"] for x in ("input_ids", "attention_mask", "labels")), strict=True
    ):
        length = int(mask.sum())
        logps = torch.log_softmax(model(ids[None, :length]).logits[0], -1)
        at = [t for t in range(1, length) if labels[t] != -100]
        result.append(sum(logps[t - 1, labels[t]] for t in at) / (len(at) if average else 1))
    return torch.stack(result)


@pytest.mark.parametrize("average", [False, True])
def test_concatenated_forward_is_its_definition(average):
    policy = model().double()
    batch = pairs()
    wanted = [side_by_definition(policy, batch, side, average) for side in ("chosen", "rejected")]
    got = concatenated_forward(policy, batch, average_log_prob=average)
    torch.testing.assert_close(list(got), wanted, rtol=1e-9, atol=1e-9)
    parameters = list(policy.parameters())
    expected = torch.autograd.grad((wanted[0] - 2 * wanted[1]).sum(), parameters)
    found = torch.autograd.grad((got[0] - 2 * got[1]).sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_concatenated_inputs_pad_each_kind_with_its_own():
    batch = pairs()
    got = concatenated_inputs(batch)
    assert {name: tuple(x.shape) for name, x in got.items()} == {
        f"concatenated_{x}": (6, 12) for x in ("input_ids", "attention_mask", "labels")
    }
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
        assert torch.equal(got[f"concatenated_{name}"][:3, :9], batch[f"chosen_{name}"])
        assert (got[f"concatenated_{name}"][:3, 9:] == fill).all()
        assert torch.equal(got[f"concatenated_{name}"][3:], batch[f"rejected_{name}"])


def test_a_batch_with_other_keys():
    batch = pairs()
    del batch["rejected_labels"]
    with pytest.raises(
        ValueError, match=r"expected tensors \(P, T\) under rejected_labels, got a batch of \['chosen_att"
    ):
        concatenated_forward(model(), batch)


# ---------------------------------------------------------------------------------------------------------
# The loss


@pytest.mark.parametrize(
    ("loss", "formula"),
    [
        (prefuse.DPO(beta=0.2), lambda c, r: oracle.dpo(c, r, 0.2)),
        (prefuse.DPO(beta=0.2, label_smoothing=0.1), lambda c, r: oracle.dpo(c, r, 0.2, 0.1)),
        (prefuse.IPO(beta=0.2), lambda c, r: oracle.ipo(c, r, 0.2)),
        (prefuse.IPO(beta=0.2, average=False), lambda c, r: oracle.ipo(c, r, 0.2)),
    ],
)
def test_losses_and_rewards_are_the_repositorys(loss, formula):
    sides = [torch.randn(7).sub(9).requires_grad_() for _ in range(4)]
    losses, chosen, rejected = preference_loss(*sides, loss)
    ratios = [(sides[i].double() - sides[i + 2].double()).tolist() for i in (0, 1)]
    assert losses.tolist() == pytest.approx([formula(c, r) for c, r in zip(*ratios, strict=True)], rel=1e-9)
    assert chosen.tolist() == pytest.approx([0.2 * c for c in ratios[0]], rel=1e-9)
    assert rejected.tolist() == pytest.approx([0.2 * r for r in ratios[1]], rel=1e-9)
    assert not chosen.requires_grad
    assert not rejected.requires_grad
    losses.mean().backward()
    assert (sides[0].grad == -sides[1].grad).all()
    assert sides[0].grad.abs().min() > 0
    assert sides[2].grad is None
    assert sides[3].grad is None


def test_a_policy_that_is_its_reference_has_ln_2_and_rewards_of_exactly_zero():
    policy = model()
    with torch.no_grad():
        reference = concatenated_forward(copy.deepcopy(policy), pairs())
    losses, chosen, rejected = preference_loss(*concatenated_forward(policy, pairs()), *reference)
    assert losses.tolist() == [math.log(2)] * 3
    assert chosen.tolist() == rejected.tolist() == [0, 0, 0]


def test_numbers_that_are_no_pairs():
    x = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"expected four tensors \(P,\), one number for each pair, got \[\(3,\), \(2,\)"
    ):
        preference_loss(x, x[:2], x, x)
    with pytest.raises(ValueError, match=r"expected a loss over pairs with a reference \(DPO, IPO\), got KTO"):
        preference_loss(x, x, x, x, prefuse.KTO())


# ---------------------------------------------------------------------------------------------------------
# The example


@pytest.mark.slow
def test_the_example_runs_and_learns():
    command = [sys.executable, "-W", "error", ROOT / "examples/padded_loop.py"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = re.findall(r"^(.*): loss ([\d.]+) reward accuracy ([\d.]+)$", run.stdout, re.MULTILINE)
    assert lines[0] == ("step 0", "0.6931", "0.00")  # the policy is its reference, and no reward is above another
    where, loss, accuracy = lines[-1]
    assert where == "held out"
    assert float(loss) < 0.65
    assert float(accuracy) >= 0.9


def test_the_examples_loop_is_of_sixty_lines():
    source = (ROOT / "examples/padded_loop.py").read_text().splitlines()
    code = [line for line in source if line.strip() and not line.strip().startswith(("#", '"""'))]
    assert len(code) <= 60
