"""The truth that tests compare with: the head and every loss, written from their definitions and papers.

    N tokens, D hidden, V vocabulary; S sequences, P pairs.

Imports nothing of the package. Eager and materializing; the losses are plain Python over numbers.
"""

import math
from decimal import Decimal, localcontext

import torch
from torch import Tensor

OUTPUTS = ("entropy", "mean_logits", "log_sum_sq_probs", "is_top1")

# ---- the head ------------------------------------------------------------------------------------


def head(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    bias: Tensor | None = None,  # (V,)
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, dict[str, Tensor]]:  # (N,), {name: (N,)}
    """Every number of one head, differentiable. In float64 it is the truth; in the dtype of the inputs, the yardstick:
    what plain PyTorch makes of them.
    """
    targets = targets.long()  # as a uint8, 156 == -100
    keep = targets != ignore_index
    # A row that does not count is replaced before anything is computed from it: 0 * NaN is NaN.
    hidden = torch.where(keep[:, None], hidden, 0.0)
    # The operation is defined in hidden's dtype, whatever the weight is kept in.
    logits = hidden.to(dtype) @ weight.to(hidden.dtype).to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    logits = logits * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature

    index = torch.where(keep, targets, 0)
    log_p = torch.log_softmax(logits, -1)
    p = log_p.exp()
    outputs = {
        "entropy": -(p * torch.where(p > 0, log_p, 0.0)).sum(-1),  # 0 log 0 = 0
        "mean_logits": logits.mean(-1).detach(),
        "log_sum_sq_probs": p.square().sum(-1).log().detach(),
        "is_top1": (logits.argmax(-1) == index).to(dtype),
    }
    logps = log_p.gather(-1, index[:, None])[:, 0]
    return torch.where(keep, logps, 0.0), {name: torch.where(keep, x, 0.0) for name, x in outputs.items()}


# ---- the losses, from sequence sums --------------------------------------------------------------


def softplus(x: float) -> float:
    """log(1 + e^x) without overflow: -log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else math.exp(x)


def dpo(chosen: float, rejected: float, beta: float, smoothing: float = 0.0) -> float:
    """Rafailov et al. 2023, eq. 7, of the two log-ratios; smoothing: Mitchell 2023, eq. 3 (cDPO)."""
    margin = beta * chosen - beta * rejected
    return (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)


def ipo(chosen: float, rejected: float, tau: float) -> float:
    """Azar et al. 2023, eq. 17: h is the difference of the two log-ratios (or of their means per token)."""
    h = chosen - rejected
    return (h - 1 / (2 * tau)) ** 2


def kto(ratio: float, desirable: bool, z0: float, beta: float, weight_d: float = 1.0, weight_u: float = 1.0) -> float:
    """Ethayarajh et al. 2024, eq. 8: lambda_y - v(x, y), v a sigmoid of the distance to z0."""
    if desirable:
        return weight_d - weight_d * sigmoid(beta * (ratio - z0))
    return weight_u - weight_u * sigmoid(beta * (z0 - ratio))


def kto_reference_point(ratios: list[float]) -> float:
    """Section 4.1 of the same: the mean log-ratio of mismatched completions, clamped at 0."""
    return max(0.0, math.fsum(ratios) / len(ratios)) if ratios else 0.0


# The losses below are their papers' equations as they stand, in numbers of 60 digits and any exponent: nothing in them
# is rearranged to be stable, and nothing overflows. A pair is (chosen, rejected); `logps` are log pi(y | x) of its two
# completions, `refs` log pi_ref(y | x), `n` their lengths in tokens.

Pair = tuple[float, float]


def exact(equation):
    """Runs an equation on Decimals: its floats, and tuples of floats, become them, and its result a float again."""

    def of_floats(*args):
        with localcontext() as context:
            context.prec = 60
            as_decimals = [tuple(map(Decimal, x)) if isinstance(x, tuple) else Decimal(x) for x in args]
            return float(equation(*as_decimals))

    return of_floats


def probability(x: Decimal) -> Decimal:
    """The logistic function."""
    return 1 / (1 + (-x).exp())


def log_probability(x: Decimal) -> Decimal:
    return -(1 + (-x).exp()).ln()


def margin(logps, refs):
    return (logps[0] - refs[0]) - (logps[1] - refs[1])


@exact
def dpo_norm(logps: Pair, refs: Pair, n: Pair, beta: float) -> float:
    """Lambert et al. 2024 (Tülu 3), length-normalized DPO."""
    chosen, rejected = (beta / n[i] * (logps[i] - refs[i]) for i in (0, 1))
    return -log_probability(chosen - rejected)


@exact
def hinge(logps: Pair, refs: Pair, n: Pair, beta: float) -> float:
    """Liu et al. 2023 (RSO), hinge-norm."""
    return max(Decimal(0), 1 - beta * margin(logps, refs))


@exact
def robust_dpo(logps: Pair, refs: Pair, n: Pair, beta: float, e: float) -> float:
    """Chowdhury et al. 2024: the unbiased estimate from DPO's loss of the label and of the flipped label."""
    given, flipped = -log_probability(beta * margin(logps, refs)), -log_probability(-beta * margin(logps, refs))
    return ((1 - e) * given - e * flipped) / (1 - 2 * e)


@exact
def exo(logps: Pair, refs: Pair, n: Pair, beta: float, e: float) -> float:
    """Ji et al. 2024, eq. 16 for K = 2: KL of the policy's softmax over the pair from the smoothed label."""
    powers = [(beta * (logps[i] - refs[i])).exp() for i in (0, 1)]
    policy = [power / sum(powers) for power in powers]
    return sum(p * (p / q).ln() for p, q in zip(policy, (1 - e, e), strict=True) if p > 0)


@exact
def disco_pop(logps: Pair, refs: Pair, n: Pair, beta: float, tau: float) -> float:
    """Lu et al. 2024, eq. 5: between logistic and exponential, by the size of the log-ratio."""
    x = beta * margin(logps, refs)
    m = probability(x / tau)
    return (1 - m) * -log_probability(x) + m * (-x).exp()


@exact
def nca(logps: Pair, refs: Pair, n: Pair, beta: float) -> float:
    """Chen et al. 2024, K = 2, rewards 1 and 0 at temperature 0."""
    rewards = [beta * (logps[i] - refs[i]) for i in (0, 1)]
    return -log_probability(rewards[0]) - sum(log_probability(-reward) for reward in rewards) / 2


@exact
def bco(logps: Pair, refs: Pair, n: Pair, beta: float, delta: float) -> float:
    """Jung et al. 2024: a classifier's cross-entropy on rewards shifted by delta."""
    chosen, rejected = (beta * (logps[i] - refs[i]) - delta for i in (0, 1))
    return -log_probability(chosen) - log_probability(-rejected)


@exact
def sppo(logps: Pair, refs: Pair, n: Pair, beta: float) -> float:
    """Wu et al. 2024, eq. 4.7: (log-ratio - eta (P - 1/2))^2 with P = 1 for the winner, 0 for the loser."""
    eta, half = 1 / beta, Decimal("0.5")
    return sum((logps[i] - refs[i] - eta * (p - half)) ** 2 for i, p in ((0, 1), (1, 0)))


@exact
def apo_zero(logps: Pair, refs: Pair, n: Pair, beta: float) -> float:
    """D'Oosterlinck et al. 2024, eq. 7, plus 1."""
    chosen, rejected = (beta * (logps[i] - refs[i]) for i in (0, 1))
    return 1 - probability(chosen) + probability(rejected)


@exact
def apo_down(logps: Pair, refs: Pair, n: Pair, beta: float) -> float:
    """Eq. 8, plus 1."""
    chosen, rejected = (beta * (logps[i] - refs[i]) for i in (0, 1))
    return probability(chosen) + 1 - probability(chosen - rejected)


@exact
def simpo(logps: Pair, refs: Pair, n: Pair, beta: float, gamma: float, e: float) -> float:
    """Meng et al. 2024, eq. 6, with the label flipped with probability e."""
    x = beta / n[0] * logps[0] - beta / n[1] * logps[1] - gamma
    return -(1 - e) * log_probability(x) - e * log_probability(-x)


@exact
def cpo(logps: Pair, refs: Pair, n: Pair, beta: float, e: float, weight: float, average: float) -> float:
    """Xu et al. 2024, eq. 3 and the NLL term, a mean per token (average = 1) or a sum (0)."""
    x = beta * logps[0] - beta * logps[1]
    nll = -logps[0] / n[0] if average else -logps[0]
    return -(1 - e) * log_probability(x) - e * log_probability(-x) + weight * nll


@exact
def orpo(logps: Pair, refs: Pair, n: Pair, beta: float, weight: float) -> float:
    """Hong et al. 2024, eq. 6 and 7: odds of the geometric mean of the tokens' probabilities."""
    p = [(logps[i] / n[i]).exp() for i in (0, 1)]
    odds = [x / (1 - x) for x in p]
    return weight * -logps[0] / n[0] - beta * log_probability((odds[0] / odds[1]).ln())


@exact
def slic(logps: Pair, refs: Pair, n: Pair, delta: float, weight: float) -> float:
    """Zhao et al. 2023: the calibration loss, and the cross-entropy of the target."""
    return max(Decimal(0), delta - logps[0] + logps[1]) - weight * logps[0]


@exact
def rpo(logps: Pair, refs: Pair, n: Pair, beta: float, weight: float) -> float:
    """Pang et al. 2024, eq. 1, divided by their alpha = 1 / weight."""
    return weight * -logps[0] / n[0] - log_probability(beta * margin(logps, refs))


@exact
def chosen_nll(logps: Pair, refs: Pair, n: Pair, divisor: float) -> float:
    return -logps[0] / (divisor or n[0])


def aot(logps: list[Pair], refs: list[Pair], beta: float, e: float, paired: bool) -> list[float]:
    """Melnyk et al. 2024: the k-th smallest of one distribution against the k-th smallest of the other."""
    if paired:
        upper, lower = [c - r for c, r in logps], [c - r for c, r in refs]
    else:
        upper = [c - ref for (c, _), (ref, _) in zip(logps, refs, strict=True)]
        lower = [r - ref for (_, r), (_, ref) in zip(logps, refs, strict=True)]
    gaps = [beta * (u - v) for u, v in zip(sorted(upper), sorted(lower), strict=True)]
    return [(1 - e) * softplus(-gap) + e * softplus(gap) for gap in gaps]


def sequence_sums(values: Tensor, lengths: list[int]) -> list[float]:
    """(N,) -> S sums, each correctly rounded."""
    numbers, sums, start = values.double().tolist(), [], 0
    for length in lengths:
        sums.append(math.fsum(numbers[start : start + length]))
        start += length
    return sums


# ---- how close is close --------------------------------------------------------------------------


def tolerance(truth: Tensor, yardstick: Tensor, dtype: torch.dtype, magnitude: float, length: int = 1) -> float:
    """Twice what plain PyTorch is off, plus the rounding of sums of `length` terms of `magnitude` kept in `dtype`.

    The second term is for a yardstick that happens to be exact. Rounding errors of a sum grow with the square root
    of its length.
    """
    finite = truth.isfinite()
    off = (yardstick.to(truth.dtype) - truth)[finite].abs()
    off = off[off.isfinite()]
    rounding = torch.finfo(dtype).eps * math.sqrt(length) * magnitude
    return 2.0 * ((off.max().item() if len(off) else 0.0) + rounding)


def assert_within(actual: Tensor, truth: Tensor, bound: float, what: str) -> None:
    """|actual - truth| <= bound; infinities equal; no NaN where the truth is a number."""
    actual, known = actual.detach().to(truth.dtype), ~truth.isnan()
    infinite = truth.isinf()
    assert torch.equal(actual[infinite], truth[infinite]), f"{what}: {actual[infinite]} for {truth[infinite]}"
    error = (actual - truth)[known & ~infinite].abs()
    assert not error.isnan().any(), f"{what}: NaN where the truth is a number"
    largest = error.max().item() if len(error) else 0.0
    assert largest <= bound, f"{what}: off by {largest:.3g}, allowed {bound:.3g}"


# ---- the divergence from the reference -----------------------------------------------------------


def logits(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None = None,  # (V,)
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:  # (N, V)
    """What enters the softmax of one model, made in `dtype` of the operands that `hidden`'s dtype holds."""
    z = hidden.to(dtype) @ weight.to(hidden.dtype).to(dtype).T
    if bias is not None:
        z = z + bias.to(dtype)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def kl(z: Tensor, ref_z: Tensor) -> Tensor:  # (N, V) twice -> (N,)
    """KL(p || r) = sum of p (log p - log r), with 0 log 0 = 0; r is a constant."""
    log_p, log_r = torch.log_softmax(z, -1), torch.log_softmax(ref_z.detach(), -1)
    # The inner `where` keeps what is not a number out of the gradient, which `where` multiplies by 0.
    possible = log_p.detach() > -math.inf
    log_p, log_r = torch.where(possible, log_p, -math.inf), torch.where(possible, log_r, 0.0)
    return (log_p.exp() * (torch.where(possible, log_p, 0.0) - log_r)).sum(-1)


# ---- losses that see tokens, labels, scores or margins -------------------------------------------

# A completion is a list of (log pi, log pi_ref), one for each token. Plain floats: their sizes are ordinary.

Completion = list[tuple[float, float]]


def log_ratio(completion: Completion) -> float:
    return math.fsum(logp - ref for logp, ref in completion)


def f_dpo(chosen: Completion, rejected: Completion, beta: float, divergence: str, alpha: float, e: float) -> float:
    """Wang et al. 2023 (f-DPO), eq. 8, with the derivatives of its table 1 in u = pi / pi_ref."""

    def derivative(completion: Completion) -> float:
        u = math.exp(log_ratio(completion))
        return {
            "reverse_kl": math.log(u),
            "forward_kl": 1 - 1 / u,
            "js_divergence": math.log(2 * u / (1 + u)),
            "alpha_divergence": math.log(u) if alpha == 1 else (u ** (alpha - 1) - 1) / (alpha - 1),
        }[divergence]

    x = beta * (derivative(chosen) - derivative(rejected))
    return (1 - e) * softplus(-x) + e * softplus(x)


def ld_dpo(chosen: Completion, rejected: Completion, beta: float, alpha: float, e: float) -> float:
    """Liu et al. 2024 (LD-DPO), eq. 9: log pi of the public length, and alpha times the rest."""
    public = min(len(chosen), len(rejected))
    first, second = (log_ratio(y[:public]) + alpha * log_ratio(y[public:]) for y in (chosen, rejected))
    return dpo(first, second, beta, e)


def beta_dpo(pairs: list[tuple[Completion, Completion]], beta: float, alpha: float, baseline: float) -> list[float]:
    """Wu et al. 2024 (beta-DPO), eq. 7, of a whole batch."""
    gaps = [log_ratio(chosen) - log_ratio(rejected) for chosen, rejected in pairs]
    strength = (1 + alpha * (math.fsum(beta * gap for gap in gaps) / len(gaps) - baseline)) * beta
    return [softplus(-max(strength, beta / 100) * gap) for gap in gaps]


def odpo(chosen: Completion, rejected: Completion, beta: float, margin: float, scale: float) -> float:
    """Amini et al. 2024 (ODPO), eq. 8."""
    return softplus(-(beta * log_ratio(chosen) - beta * log_ratio(rejected) - scale * margin))


def modpo(chosen: Completion, rejected: Completion, beta: float, margin: float, weight: float) -> float:
    """Zhou et al. 2023 (MODPO), eq. 9."""
    return softplus(-1 / weight * (beta * log_ratio(chosen) - beta * log_ratio(rejected) - margin))


def kto_ablation(y: Completion, good: bool, z0: float, beta: float, weights: tuple[float, float], value: str) -> float:
    """Ethayarajh et al. 2024, section 4.3: other value functions in eq. 8, without constants that no policy changes."""
    sign, weight = (1, weights[0]) if good else (-1, weights[1])
    x = sign * beta * (log_ratio(y) - z0)
    return weight * {"logistic": 1 - sigmoid(x), "concave": softplus(-x), "linear": -x}[value]


def ppo_clip(y: Completion, good: bool, clip: float) -> float:
    """Ethayarajh et al. 2024, section 3.2: offline PPO with an advantage of +1 or -1 at every token."""
    advantage, total = (1.0 if good else -1.0), 0.0
    for logp, ref in y:
        q = math.exp(logp - ref)
        total += min(q * advantage, min(max(q, 1 - clip), 1 + clip) * advantage)
    return -total / max(len(y), 1)


def una(y: Completion, target: float, beta: float, distance: str) -> float:
    """Wang et al. 2024 (UNA): the implicit reward's probability against the explicit one."""
    x = beta * log_ratio(y)
    if distance == "mse":
        return (sigmoid(x) - target) ** 2
    return target * softplus(-x) + (1 - target) * softplus(x)


def wpo_weight(chosen: list[tuple[float, float]], rejected: list[tuple[float, float]]) -> float:
    """Zhou et al. 2024 (WPO), eq. 2 and 5; a token is (log pi, log sum over v of pi(v)^2)."""
    return math.prod(math.exp(math.fsum(a - b for a, b in y) / max(len(y), 1)) for y in (chosen, rejected))
