"""Batches of packed tokens for the preference losses' kernels, and how both implementations are compared."""

import torch

import prefuse
from prefuse import DPO, IPO, KTO, Mismatched
from prefuse.bench.truth import oracle

ops = torch.ops.prefuse
EPS32, EPS64 = 2.0**-23, 2.0**-52


# No sequence; empty ones; fewer tokens than a step, as many, one more; several steps with and without a rest. 26
# sequences are three steps of pairs and a rest, and six and a rest of labelled ones.
LENGTHS = {
    "none": [],
    "empty": [0, 0],
    "one pair": [1, 1],
    "steps": [16, 17, 15, 32],
    "unequal": [3, 0, 40, 17, 0, 0, 33, 1],
    "many": [(7 * s) % 19 for s in range(26)],
    "long": [300, 90],
}
LOSSES = [DPO(), DPO(0.3, 0.2), IPO(), IPO(0.2, average=False), KTO(), KTO(0.3, 1.3, 0.7)]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def labels_of(count):
    return torch.arange(count) % 3 != 1


def batch(loss, lengths, device, per_token=True, z0=0.15):
    """Arguments of `preference_loss`; the policy's log-probabilities wander from the reference's."""
    n = sum(lengths)
    ref_logps = -torch.rand(n) * 3
    logps = ref_logps + 0.3 * torch.randn(n)
    if not per_token:
        ref_logps = torch.tensor(oracle.sequence_sums(ref_logps, lengths), dtype=torch.float64)
    arguments = {"logps": logps, "ref_logps": ref_logps, "cu_seqlens": offsets(lengths)}
    if isinstance(loss, KTO):
        arguments |= {"labels": labels_of(len(lengths)), "z0": z0}
    return {"loss": loss, **{k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}}


def evaluate(impl, arguments, upstream=1.7, **options):
    """Every number of one call, and the gradient of `upstream` times its loss."""
    logps = arguments["logps"].detach().requires_grad_()
    out = prefuse.preference_loss(**{**arguments, "logps": logps}, **options, impl=impl)
    (upstream * out.loss).backward()
    numbers = {"loss": out.loss.detach(), "losses": out.losses, "logps": out.logps, "rewards": out.rewards}
    return {**numbers, **out.metrics, "gradient": logps.grad}


def assert_equal(made, expected, scale=1.0):
    """To rounding: float64 to 1e-12 of what was summed, float32 to its last digit."""
    assert list(made) == list(expected)
    for name, x in expected.items():
        assert (made[name].dtype, made[name].shape) == (x.dtype, x.shape), name
        exact = x.dtype == torch.float64
        torch.testing.assert_close(
            made[name], x, rtol=1e-12 if exact else EPS32, atol=1e-13 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


def mismatched(lengths, device, per_token=True, lift=0.1):
    n = sum(lengths)
    ref_logps = -torch.rand(n) * 5
    logps = ref_logps + lift + 0.3 * torch.randn(n)
    if not per_token:
        ref_logps = torch.tensor(oracle.sequence_sums(ref_logps, lengths), dtype=torch.float64)
    return Mismatched(logps.to(device), ref_logps.to(device), offsets(lengths).to(device))
