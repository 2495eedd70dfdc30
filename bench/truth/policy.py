"""The truth about policy losses: the papers' equations in plain Python over numbers, one token at a time.

Imports nothing of the package. An answer is a list of tokens; its token is (log pi, log pi_old, advantage), and what
else an equation reads stands in lists beside it.
"""

import math
from typing import NamedTuple


class Token(NamedTuple):
    logp: float
    old: float
    advantage: float
    ref: float = 0.0
    entropy: float = 0.0
    kl: float = 0.0


Answer = list[Token]


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def ratio(answer: Answer, t: int, level: str) -> float:
    """pi / pi_old of token t, or GSPO's s_i(theta): the answer's, to the power 1 / length (arXiv 2507.18071, eq. 7)."""
    if level == "token":
        return math.exp(answer[t].logp - answer[t].old)
    likelihood = math.fsum(token.logp for token in answer) - math.fsum(token.old for token in answer)
    return math.exp(likelihood / len(answer))


def divergence(token: Token, estimator: str) -> float:
    """Schulman 2020, of r = pi_ref / pi at a token of pi: -log r, (log r)^2 / 2, (r - 1) - log r."""
    log_r = token.ref - token.logp
    return {
        "k1": -log_r, "k2": log_r * log_r / 2, "k3": (math.exp(log_r) - 1) - log_r, "exact": token.kl,
    }[estimator]  # fmt: skip


def grpo_token(answer: Answer, t: int, loss) -> float:
    """The summand of GRPO's objective (arXiv 2402.03300, eq. 3), its sign turned, with the variants of `loss`."""
    token, w = answer[t], ratio(answer, t, loss.importance_sampling_level)
    high = loss.epsilon if loss.epsilon_high is None else loss.epsilon_high
    if loss.loss_type == "cispo":  # arXiv 2506.13585, eq. 4 and 5: the clipped weight is a constant
        objective = min(w, high) * token.advantage * token.logp
    elif loss.loss_type == "sapo":  # arXiv 2511.20347
        tau = loss.sapo_temperature_pos if token.advantage > 0 else loss.sapo_temperature_neg
        objective = 4 / tau / (1 + math.exp(-tau * (w - 1))) * token.advantage
    else:
        above = w if loss.delta is None else min(w, loss.delta)  # arXiv 2505.07291: two-sided clipping
        objective = min(above * token.advantage, clip(w, 1 - loss.epsilon, 1 + high) * token.advantage)
    kl = divergence(token, loss.kl_estimator) if loss.beta else 0.0
    kl *= w if loss.use_bias_correction_kl else 1.0
    return -objective + loss.beta * kl - loss.entropy_coef * token.entropy


def grpo(answers: list[Answer], loss) -> float:
    """The whole loss by name."""
    rows = [[grpo_token(answer, t, loss) for t in range(len(answer))] for answer in answers]
    if loss.loss_type in ("grpo", "sapo"):
        return math.fsum(math.fsum(row) / max(len(row), 1) for row in rows) / len(rows)
    total = math.fsum(x for row in rows for x in row)
    if loss.loss_type == "dr_grpo":  # arXiv 2503.20783
        return total / (len(rows) * loss.max_completion_length)
    if loss.loss_type == "luspo":  # arXiv 2602.05261
        return total / len(rows)
    return total / sum(map(len, rows))  # arXiv 2503.14476, eq. 8


def rloo(answers: list[Answer], loss) -> float:
    """Of whole answers: a clipped ratio of their probabilities, and their advantage."""
    high = loss.epsilon if loss.epsilon_high is None else loss.epsilon_high
    total = 0.0
    for answer in answers:
        if not answer:
            continue
        w = math.exp(math.fsum(token.logp - token.old for token in answer))
        advantage = answer[0].advantage
        total -= min(w * advantage, clip(w, 1 - loss.epsilon, 1 + high) * advantage)
        total -= loss.entropy_coef * math.fsum(token.entropy for token in answer) / len(answer)
    return total / len(answers)


def reduced(answers: list[Answer], token_loss, reduction: str) -> float:
    rows = [[token_loss(token) for token in answer] for answer in answers]
    if reduction == "token":
        return math.fsum(x for row in rows for x in row) / sum(map(len, rows))
    return math.fsum(math.fsum(row) / (max(len(row), 1) if reduction == "sequence" else 1) for row in rows) / len(rows)


def reinforce(answers: list[Answer], loss) -> float:
    """Williams 1992: the score function times what the answer was better than expected."""

    def token_loss(token: Token) -> float:
        kl = divergence(token, loss.kl_estimator) if loss.beta else 0.0
        kl *= math.exp(token.logp - token.old) if loss.use_bias_correction_kl else 1.0
        return -token.advantage * token.logp + loss.beta * kl - loss.entropy_coef * token.entropy

    return reduced(answers, token_loss, loss.reduction)


def ppo_clip(answers: list[Answer], loss) -> float:
    """Schulman et al. 2017, eq. 7, with the entropy bonus of eq. 9."""
    high = loss.clip if loss.clip_high is None else loss.clip_high

    def token_loss(token: Token) -> float:
        w = math.exp(token.logp - token.old)
        objective = min(w * token.advantage, clip(w, 1 - loss.clip, 1 + high) * token.advantage)
        return -objective - loss.entropy_coef * token.entropy

    return reduced(answers, token_loss, loss.reduction)


# ---- advantages ----------------------------------------------------------------------------------


def gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, eq. 16, as the sum it is: sum over l of (gamma lam)^l delta_{t+l}."""
    after = [*values[1:], *([0.0] if values else [])]
    deltas = [r + gamma * nxt - v for r, v, nxt in zip(rewards, values, after, strict=True)]
    return [math.fsum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]


def leave_one_out(rewards: list[float]) -> list[float]:
    """Ahmadian et al. 2024: each against the mean of the others."""
    return [r - math.fsum(rewards[:i] + rewards[i + 1 :]) / (len(rewards) - 1) for i, r in enumerate(rewards)]


def group_relative(rewards: list[float], scaled: bool, epsilon: float = 1e-4) -> list[float]:
    """Shao et al. 2024, section 4.1.2, with what TRL adds to the standard deviation."""
    mean = math.fsum(rewards) / len(rewards)
    std = math.sqrt(math.fsum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + epsilon) if scaled else r - mean for r in rewards]


def value(v: float, old: float, target: float, bound: float) -> float:
    return 0.5 * max((v - target) ** 2, (clip(v, old - bound, old + bound) - target) ** 2)
