"""The KL divergence from the reference, estimated from the sampled tokens alone; `linear_kl` computes it exactly."""

from __future__ import annotations

import torch
from torch import Tensor

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(
    logps: Tensor,  # (N,)
    ref_logps: Tensor,  # (N,)
    estimator: str = "k1",
) -> Tensor:
    """Per-token estimates of KL(policy || reference) at tokens that the policy sampled. Equals, in float64 inside::

        x = logps - ref_logps
        {"k1": x, "k2": x.square() / 2, "k3": torch.expm1(-x) + x}[estimator]

    From Schulman 2020, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html). With p the policy, r the
    reference and the token drawn from p, x = log(p / r) and E[x] = KL(p || r):

        k1  unbiased; of either sign, and its variance is that of x.
        k2  biased: its mean is KL(p || r) up to terms of third order in x. Never negative.
        k3  unbiased where p > 0 wherever r is. Never negative; varies less than k1 while the two are close,
            more where r / p is large, for it grows like r / p there.

    As a term of a loss, what counts is the mean of the *gradient*, and that is not the gradient of the mean, because
    the tokens themselves were drawn from p (so also arXiv 2512.21852, for k1 and k3):

        k1  E[grad log p] = 0: no penalty at all, only noise.
        k2  E[x grad log p] = grad KL(p || r): the right one, on-policy.
        k3  E[(1 - r / p) grad log p] = grad KL(r || p): that of the other direction.

    So use k1 or k3 (detached) to report or to shape a reward, and k2 as a penalty to differentiate. If the tokens are
    not the current policy's, weigh each by p / p_sampled first.

    Args:
        logps: (N,) per-token log-probabilities of the policy, nats; carries the gradient.
        ref_logps: (N,) the reference's; taken as a constant.
        estimator: "k1", "k2" or "k3".

    Returns:
        (N,) in float32, float64 if either input is. A k3 beyond its range, from a token e^88 times as likely under the
        reference, is inf.
    """
    for name, x in (("logps", logps), ("ref_logps", ref_logps)):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {got}")
    if logps.shape != ref_logps.shape:
        raise ValueError(
            f"expected logps and ref_logps of one shape, the same tokens in the same order, got "
            f"{tuple(logps.shape)} and {tuple(ref_logps.shape)}"
        )
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {list(ESTIMATORS)}, got {estimator!r}")
    # In float64 expm1(-x) + x is exact enough for any x that two float32 can be apart.
    x = logps.double() - ref_logps.detach().double()
    if estimator == "k1":
        k = x
    elif estimator == "k2":
        k = x.square() / 2
    else:
        k = torch.expm1(-x) + x
    return k if torch.float64 in (logps.dtype, ref_logps.dtype) else k.float()
