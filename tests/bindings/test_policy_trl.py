"""Policy losses beside TRL's own, on the same tensors: values, gradients and metrics to 1e-6."""

import pytest
import torch

from prefuse.bench import policy

pytest.importorskip("trl")


@pytest.mark.parametrize("name", policy.LOSSES)
def test_a_loss_is_trls(name):
    for seed in range(3):
        found = policy.compare(policy.LOSSES[name], policy.draw(seed))
        assert max(found["loss"], found["gradient"], found["metrics"]) < 1e-6, found
        assert found["compared"] >= 1


def test_float32_log_probabilities_lose_no_digits_here():
    """TRL computes in float32 what here is float64: it is TRL's last digits that differ."""
    loss = policy.LOSSES["GRPO dapo"]
    exact, single = policy.draw(), policy.draw(dtype=torch.float32)
    truth = policy.ours(exact, exact.logps, loss)[0].item()
    assert policy.ours(single, single.logps, loss)[0].item() == pytest.approx(truth, abs=2e-7)


def test_a_wrong_sign_would_be_seen():
    """The comparison itself: another loss than TRL's is not within the bound."""
    batch = policy.draw()
    theirs = policy.trl_grpo(batch, batch.logps, policy.GRPO("grpo"))[0].item()
    assert abs(policy.ours(batch, batch.logps, policy.GRPO("dapo"))[0].item() - theirs) > 1e-4
