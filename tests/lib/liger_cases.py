"""Batches in Liger's form, and what Liger's losses should make of them, written from the definitions in plain torch.

B rows of T positions, the chosen half first; H hidden size, V vocabulary.
"""

import torch
from torch.nn.functional import logsigmoid

from prefuse.bench.truth import oracle

# Pairs, positions, hidden size, vocabulary: Liger's odd shape made smaller, and one of even sizes.
SHAPES = [(3, 11, 31, 123), (4, 8, 16, 32)]


class Case:
    """A batch in Liger's form: the chosen half of the rows, then the rejected half, unequally masked."""

    def __init__(self, shape, dtype=torch.float32, *, bias=False, ref_bias=False, ignore_index=-100, rows=None, seed=0):
        torch.manual_seed(seed)
        pairs, length, width, vocabulary = shape
        rows = rows or 2 * pairs

        def leaf(*size, scale=1.0):
            return (scale * torch.randn(*size)).to(dtype).requires_grad_()

        self.dtype, self.ignore_index = dtype, ignore_index
        self.x, self.weight = leaf(rows, length, width), leaf(vocabulary, width, scale=0.3)
        self.bias = leaf(vocabulary) if bias else None
        self.ref_x, self.ref_weight = leaf(rows, length, width).detach(), leaf(vocabulary, width, scale=0.3).detach()
        self.ref_bias = leaf(vocabulary).detach() if ref_bias else None
        self.target = torch.randint(vocabulary, (rows, length))
        self.target[torch.rand(rows, length) < 0.3] = ignore_index
        self.target[:, 0] = 1  # no row is empty
        for row in range(rows):  # padding at the end, prompts at the start
            self.target[row, length - row % 4 :] = ignore_index
        self.labels = torch.rand(rows) < 0.5
        self.labels[:2] = torch.tensor([True, False])

    def leaves(self):
        return [x for x in (self.x, self.weight, self.bias) if x is not None]

    def reference(self):
        return {"ref_input": self.ref_x, "ref_weight": self.ref_weight, "ref_bias": self.ref_bias}


# ---- the truth -----------------------------------------------------------------------------------


def sequence_logps(x, weight, target, bias, ignore_index, dtype, average):
    """(B,) log-probabilities, sums or means per token, and (B, T) those of tokens."""
    flat, _ = oracle.head(x.flatten(0, 1), weight, target.flatten(), bias, ignore_index=ignore_index, dtype=dtype)
    tokens = flat.view(target.shape)
    sums = tokens.sum(1)
    return (sums / (target != ignore_index).sum(1).clamp(min=1) if average else sums), tokens


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


PAIR_LOSSES = {  # of beta times the log-ratios of both sides, b = beta, e = smoothing, t = tau
    "sigmoid": lambda c, r, b, e, t: -(1 - e) * logsigmoid(c - r) - e * logsigmoid(r - c),
    "hinge": lambda c, r, b, e, t: (1 - (c - r)).clamp(min=0),
    "robust": lambda c, r, b, e, t: (e * logsigmoid(r - c) - (1 - e) * logsigmoid(c - r)) / (1 - 2 * e),
    "exo_pair": lambda c, r, b, e, t: (
        sigmoid(c - r) * torch.log(sigmoid(c - r) / (1 - e)) + sigmoid(r - c) * torch.log(sigmoid(r - c) / e)
    ),
    "nca_pair": lambda c, r, b, e, t: -torch.log(sigmoid(c)) - 0.5 * (torch.log(sigmoid(-c) * sigmoid(-r))),
    "bco_pair": lambda c, r, b, e, t: -torch.log(sigmoid(c)) - torch.log(sigmoid(-r)),
    "sppo_hard": lambda c, r, b, e, t: (c / b - 0.5 / b) ** 2 + (r / b + 0.5 / b) ** 2,
    "apo_zero": lambda c, r, b, e, t: 1 - sigmoid(c) + sigmoid(r),
    "apo_down": lambda c, r, b, e, t: sigmoid(c) + 1 - sigmoid(c - r),
    "discopop": lambda c, r, b, e, t: (
        -(1 - sigmoid((c - r) / t)) * logsigmoid(c - r) + sigmoid((c - r) / t) * torch.exp(r - c)
    ),
    "ipo": lambda c, r, b, e, t: ((c - r) / b - 1 / (2 * b)) ** 2,
    "sigmoid_norm": lambda c, r, b, e, t: -logsigmoid(c - r),
}


def paired_truth(
    case, kind, dtype=torch.float64, *, average, beta=0.1, alpha=None, nll_target=None, reference=True, **o
):
    """What Liger returns for a paired loss: (loss, aux...), differentiable."""
    b, n = beta, len(case.target) // 2
    ignore = case.ignore_index
    logps, _ = sequence_logps(case.x, case.weight, case.target, case.bias, ignore, dtype, average)
    refs = torch.zeros_like(logps)
    if kind in PAIR_LOSSES and reference:
        refs, _ = sequence_logps(case.ref_x, case.ref_weight, case.target, case.ref_bias, ignore, dtype, average)
    rewards = b * (logps - refs)
    c, r = rewards[:n], rewards[n:]
    extra = ()
    if kind in PAIR_LOSSES:
        losses = PAIR_LOSSES[kind](c, r, b, o.get("label_smoothing", 0.0), o.get("discopop_tau", 0.05))
    elif kind in ("simpo", "cpo"):
        margin, e = c - r - o.get("gamma", 0.0), o.get("label_smoothing", 0.0)
        losses = -(1 - e) * logsigmoid(margin) - e * logsigmoid(-margin)
    elif kind == "orpo":
        odds = torch.exp(logps) / (1 - torch.exp(logps))
        log_odds = torch.log(odds[:n] / odds[n:])
        losses = -b * torch.log(sigmoid(log_odds))
        extra = (torch.log(sigmoid(log_odds)).mean(), log_odds.mean())
    nll = torch.zeros((), dtype=dtype)
    if alpha is not None:
        labels = case.target if nll_target is None else nll_target
        _, of_labels = sequence_logps(case.x, case.weight, labels, case.bias, ignore, dtype, False)
        nll = -of_labels[:n].sum() / (labels[:n] != ignore).sum()
    logits = case.x.to(dtype) @ case.weight.to(dtype).T + (0 if case.bias is None else case.bias.to(dtype))
    loss = losses.mean() + (alpha or 0.0) * nll
    return loss, (logps[:n], logps[n:], logits[:n].mean(), logits[n:].mean(), nll, c, r, *extra)


def kto_truth(case, dtype=torch.float64, *, average=False, beta=0.1, kl=0.0, reference=True):
    ignore = case.ignore_index
    logps, _ = sequence_logps(case.x, case.weight, case.target, case.bias, ignore, dtype, average)
    refs = torch.zeros_like(logps)
    if reference:
        refs, _ = sequence_logps(case.ref_x, case.ref_weight, case.target, case.ref_bias, ignore, dtype, average)
    good = case.labels
    ratios = logps - refs
    losses = torch.where(good, 1 - sigmoid(beta * (ratios - kl)), 1 - sigmoid(beta * (kl - ratios)))
    logits = case.x.to(dtype) @ case.weight.to(dtype).T + (0 if case.bias is None else case.bias.to(dtype))
    of_row = logits.sum((1, 2))
    sums = [x[side].sum() for x in (logps, of_row, beta * ratios) for side in (good, ~good)]
    return losses.mean(), tuple(sums)


def assert_as_good_as_eager(got, truth, eager, case, scale=1.0):
    """Loss, every aux output, and the gradients of `scale` times the loss, against float64; plain torch in the dtype of
    the inputs is the yardstick."""
    (loss, aux), (true_loss, true_aux), (eager_loss, eager_aux) = got, truth, eager
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert len(aux) == len(true_aux)
    rounding = {"dtype": torch.float32, "length": case.x.shape[1]}
    outputs = zip((loss, *aux), (true_loss, *true_aux), (eager_loss, *eager_aux), strict=True)
    for number, (x, true, plain) in enumerate(outputs):
        assert x.shape == true.shape
        assert x.requires_grad == (number == 0)
        size = max(true.abs().max().item(), 4.0)
        bound = oracle.tolerance(true.detach(), plain.detach(), magnitude=size, **rounding)
        oracle.assert_within(x, true.detach(), bound, f"output {number}")
    leaves = case.leaves()
    gradients = torch.autograd.grad(scale * loss, leaves)
    true_gradients = torch.autograd.grad(scale * true_loss, leaves)
    eager_gradients = torch.autograd.grad(scale * eager_loss, leaves)
    for leaf, x, true, plain in zip(leaves, gradients, true_gradients, eager_gradients, strict=True):
        assert x.dtype == leaf.dtype
        bound = oracle.tolerance(true.double(), plain.double(), leaf.dtype, true.abs().max().item())
        oracle.assert_within(x.double(), true.double(), bound, f"gradient {tuple(leaf.shape)}")
    # Exactly nothing where nothing counts.
    masked = case.target == case.ignore_index
    assert masked.any()
    assert (gradients[0][masked] == 0).all()
