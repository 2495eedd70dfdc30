"""`kl_estimate` has the means, variances and gradients that its docstring says, by exact enumeration of a vocabulary.

p the policy, r the reference, x = log(p / r); an expectation is a sum over every token, weighted by p.
"""

import math
import re

import pytest
import torch

import prefuse

ESTIMATORS = ["k1", "k2", "k3"]
V = 9


def models(apart=1.0, v=V):
    """Logits of the policy, a leaf, and log-probabilities of the reference, both (V,) float64."""
    logits = 2 * torch.randn(v, dtype=torch.float64)
    ref_logps = torch.log_softmax(logits + apart * torch.randn(v, dtype=torch.float64), -1)
    return logits.requires_grad_(), ref_logps


def kl(logp, logq):
    return (logp.exp() * (logp - logq)).sum()


def expectation(logps, values):
    return (logps.detach().exp() * values).sum()


# ---- the value -----------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [1e-3, 0.1, 1.0, 4.0])
@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator, apart):
    logits, ref_logps = models(apart)
    logps = torch.log_softmax(logits, -1)
    mean = expectation(logps, prefuse.kl_estimate(logps, ref_logps, estimator))
    torch.testing.assert_close(mean, kl(logps, ref_logps), rtol=1e-9, atol=1e-13)


def test_k2_is_biased_by_terms_of_third_order():
    logits = 2 * torch.randn(V, dtype=torch.float64)
    direction = torch.randn(V, dtype=torch.float64)
    logps = torch.log_softmax(logits, -1)
    biases = []
    for step in (0.02, 0.01, 0.005):
        ref_logps = torch.log_softmax(logits + step * direction, -1)
        mean = expectation(logps, prefuse.kl_estimate(logps, ref_logps, "k2"))
        biases.append((mean - kl(logps, ref_logps)).item())
    # Half of the step, an eighth of the bias; the divergence itself falls to a quarter.
    assert biases[0] / biases[1] == pytest.approx(8, rel=0.1)
    assert biases[1] / biases[2] == pytest.approx(8, rel=0.1)
    assert biases[0] != 0


def test_k2_and_k3_are_never_negative_and_k1_is():
    for apart in (1e-6, 0.1, 5.0):
        logits, ref_logps = models(apart, v=1000)
        logps = torch.log_softmax(logits, -1)
        for estimator in ("k2", "k3"):
            assert (prefuse.kl_estimate(logps, ref_logps, estimator) >= 0).all()
            assert (prefuse.kl_estimate(logps.float(), ref_logps.float(), estimator) >= 0).all()
        assert (prefuse.kl_estimate(logps, ref_logps, "k1") < 0).any()


def variance(logps, values):
    return expectation(logps, values**2) - expectation(logps, values) ** 2


def test_k3_varies_less_than_k1_near_the_reference_and_more_where_the_reference_is_much_likelier():
    logits, ref_logps = models(0.1)
    logps = torch.log_softmax(logits, -1)
    k1, k3 = (variance(logps, prefuse.kl_estimate(logps, ref_logps, name)) for name in ("k1", "k3"))
    assert k3 < 0.1 * k1
    # One token that the policy hardly ever draws and the reference half of the time.
    logps, ref_logps = torch.tensor([0.999, 0.001]).double().log(), torch.tensor([0.5, 0.5]).double().log()
    k1, k3 = (variance(logps, prefuse.kl_estimate(logps, ref_logps, name)) for name in ("k1", "k3"))
    assert k3 > 10 * k1


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_mean_of_samples_is_the_exact_divergence_of_linear_kl(estimator):
    hidden, ref_hidden, weight = torch.randn(1, 8), torch.randn(1, 8), 0.5 * torch.randn(50, 8)
    exact = prefuse.linear_kl(hidden, weight, ref_hidden, weight).item()
    drawn = torch.multinomial(torch.softmax(hidden @ weight.T, -1)[0], 40_000, replacement=True)
    logps, ref_logps = (
        prefuse.linear_logprobs(h.expand(50, 8), weight, torch.arange(50)) for h in (hidden, ref_hidden)
    )
    samples = prefuse.kl_estimate(logps[drawn], ref_logps[drawn], estimator)
    assert abs(samples.mean().item() - exact) <= 5 * samples.std().item() / math.sqrt(len(drawn))
    assert exact > 0.1


# ---- the gradient --------------------------------------------------------------------------------


def mean_gradient(logits, ref_logps, estimator):
    """E[grad of the estimate], the tokens being the policy's."""
    logps = torch.log_softmax(logits, -1)
    loss = expectation(logps, prefuse.kl_estimate(logps, ref_logps, estimator))
    return torch.autograd.grad(loss, logits)[0]


def gradient_of(divergence, logits):
    return torch.autograd.grad(divergence(torch.log_softmax(logits, -1)), logits)[0]


@pytest.mark.parametrize("apart", [0.01, 1.0, 3.0])
def test_what_each_gradient_estimates(apart):
    logits, ref_logps = models(apart)
    reverse = gradient_of(lambda logps: kl(logps, ref_logps), logits)
    forward = gradient_of(lambda logps: kl(ref_logps, logps), logits)
    assert (reverse - forward).norm() > 0.1 * apart * reverse.norm() > 0
    k1, k2, k3 = (mean_gradient(logits, ref_logps, name) for name in ESTIMATORS)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(k1, torch.zeros_like(k1), **close)
    torch.testing.assert_close(k2, reverse, **close)
    torch.testing.assert_close(k3, forward, **close)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_agree_with_finite_differences(estimator):
    logps = torch.log_softmax(torch.randn(V, dtype=torch.float64), -1).requires_grad_()
    ref_logps = torch.log_softmax(torch.randn(V, dtype=torch.float64), -1)
    assert torch.autograd.gradcheck(lambda x: prefuse.kl_estimate(x, ref_logps, estimator), logps)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_reference_is_a_constant(estimator):
    logps, ref_logps = torch.randn(V, requires_grad=True), torch.randn(V, requires_grad=True)
    prefuse.kl_estimate(logps, ref_logps, estimator).sum().backward()
    assert logps.grad.shape == (V,)
    assert ref_logps.grad is None


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equal_log_probabilities_have_exactly_no_divergence_and_default_is_k1(estimator):
    logps = -10 * torch.rand(100)
    assert not prefuse.kl_estimate(logps, logps.clone(), estimator).any()
    assert torch.equal(prefuse.kl_estimate(logps, 2 * logps), logps - 2 * logps)


@pytest.mark.parametrize("x", [2.0**-22, -(2.0**-20), 1e-4, -1e-4, 0.3, -0.3, 30.0, -30.0, 80.0, 1000.0])
def test_k3_keeps_its_digits_from_the_smallest_difference_to_the_largest(x):
    logps, ref_logps = torch.tensor([-1.0 + x], requires_grad=True), torch.tensor([-1.0])
    x = logps.item() - ref_logps.item()
    # expm1(-x) + x as a series where it cancels
    terms = [(-x) ** k / math.factorial(k) for k in range(2, 30)]
    truth = math.fsum(terms) if abs(x) < 1 else math.expm1(-x) + x
    k3 = prefuse.kl_estimate(logps, ref_logps, "k3")
    k3.sum().backward()
    assert k3.item() == pytest.approx(truth, rel=2e-7, abs=0)
    assert logps.grad.item() == pytest.approx(-math.expm1(-x), rel=2e-7, abs=0)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_difference_makes_a_nan(estimator):
    logps, ref_logps = torch.tensor([-1.0, -1e4, -1.0]), torch.tensor([-1e4, -1.0, -math.inf])
    assert not prefuse.kl_estimate(logps, ref_logps, estimator).isnan().any()


@pytest.mark.parametrize(
    ("dtype", "ref_dtype", "made"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_the_result_is_float32_or_the_float64_of_an_input(dtype, ref_dtype, made):
    logps = torch.randn(4, dtype=dtype, requires_grad=True)
    k = prefuse.kl_estimate(logps, torch.randn(4, dtype=ref_dtype), "k2")
    assert k.dtype == made
    k.sum().backward()
    assert logps.grad.dtype == dtype


def test_half_types_are_subtracted_as_the_numbers_that_they_are():
    logps, ref_logps = (
        torch.tensor([-100.5, -7.0], dtype=torch.bfloat16),
        torch.tensor([-0.0078125, -7.03125]).bfloat16(),
    )
    assert prefuse.kl_estimate(logps, ref_logps).tolist() == [-100.4921875, 0.03125]


def test_no_tokens_are_no_trouble():
    assert prefuse.kl_estimate(torch.zeros(0), torch.zeros(0), "k3").shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([0.0], torch.zeros(1)), TypeError, "logps must be a floating-point tensor, got list"),
        (
            (torch.zeros(1), torch.zeros(1).long()),
            TypeError,
            "ref_logps must be a floating-point tensor, got torch.int64",
        ),
        ((torch.zeros(3), torch.zeros(1)), ValueError, "expected logps and ref_logps of one shape"),
        ((torch.zeros(1), torch.zeros(1), "k4"), ValueError, "estimator must be one of ['k1', 'k2', 'k3'], got 'k4'"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=re.escape(message)):
        prefuse.kl_estimate(*arguments)
