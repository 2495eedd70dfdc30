#!/bin/bash
# liger-kernel 0.8.5: the KTO loss takes every row's KL for every row and leaves out a given reference; cDPO is plain DPO.
#
# LigerFusedLinearKTOLoss computes one chunk of rows at a time (one row, by default), and does not cut `kl` with them.
# Its docstring gives `kl` the shape (batch_size,), as KTO's estimate may differ between rows. Then each row's log-ratio
# is compared with all B estimates and the B losses are added: the loss is about B times too large, and so are its
# gradients, while the rewards that are logged look as they should. A kl of one number gives the right loss.
# And `use_ref_model` is False by default, unlike in LigerFusedLinearDPOLoss: ref_input and ref_weight that are given
# all the same are dropped without a word, and the "log-ratio" is the policy's log-probability.
# And LigerFusedLinearDPOLoss documents label_smoothing 'for "robust" / "exo_pair" / cDPO'. cDPO is the smoothed form of
# loss_type="sigmoid", the default, and that branch does not read label_smoothing.
#
# Expected: KTO's mean over rows of 1 - sigmoid(beta * (log-ratio - kl of the row) * +-1), a reference that is used or
# refused, and cDPO's loss. Seen with liger-kernel 0.8.5, torch 2.13.0, on a CPU, float64, four rows:
#   kl (4,): loss 2.489332, by the equation 0.616383; one number: loss 0.622747, by the equation 0.622747
#   reference given, use_ref_model as it comes: loss 0.509135; without any reference: 0.509135; with it: 0.622747
#   DPO sigmoid, label_smoothing 0.3: loss 0.455628; 0.0: 0.455628; cDPO by the equation: 0.633051
#
# Exit 1 if that changes. Needs python 3.11 and network access to a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check liger-kernel==0.8.5 torch==2.13.0
cd "$work"
"$work/venv/bin/python" - <<'PY'
import sys

import torch
from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss, LigerFusedLinearKTOLoss

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
B, T, D, V = 4, 6, 8, 11
x, w, ref_x, ref_w = torch.randn(B, T, D), torch.randn(V, D), torch.randn(B, T, D), torch.randn(V, D)
target, labels, beta = torch.randint(0, V, (B, T)), torch.tensor([True, False, True, False]), 0.1
kl = torch.tensor([0.5, 1.0, 1.5, 2.0])


def logps(hidden, head):
    return (hidden @ head.T).log_softmax(-1).gather(-1, target[..., None]).sum((1, 2))


def by_the_equation(kl):
    sign = torch.where(labels, 1.0, -1.0)
    return (1 - torch.sigmoid(beta * (logps(x, w) - logps(ref_x, ref_w) - kl) * sign)).mean().item()


def kto(kl, reference=True, **options):
    loss = LigerFusedLinearKTOLoss(beta=beta, compiled=False, **options)
    given = {"ref_input": ref_x, "ref_weight": ref_w} if reference else {}
    return loss(x, w, target, preference_labels=labels, kl=kl, **given)[0].item()


def dpo(smoothing):
    loss = LigerFusedLinearDPOLoss(beta=beta, compiled=False, label_smoothing=smoothing)
    return loss(w, x, target, ref_input=ref_x, ref_weight=ref_w)[0].item()


ratios = logps(x, w) - logps(ref_x, ref_w)
margin = beta * (ratios[: B // 2] - ratios[B // 2 :])
cdpo = -(0.7 * torch.nn.functional.logsigmoid(margin) + 0.3 * torch.nn.functional.logsigmoid(-margin)).mean().item()
rows, rows_right = kto(kl, use_ref_model=True), by_the_equation(kl)
one, one_right = kto(kl[1], use_ref_model=True), by_the_equation(kl[1])
ignored, none = kto(kl[1]), kto(kl[1], reference=False)
smoothed, plain = dpo(0.3), dpo(0.0)
print(f"kl ({B},): loss {rows:.6f}, by the equation {rows_right:.6f}; one number: loss {one:.6f}, by the equation {one_right:.6f}")
print(f"reference given, use_ref_model as it comes: loss {ignored:.6f}; without any reference: {none:.6f}; with it: {one:.6f}")
print(f"DPO sigmoid, label_smoothing 0.3: loss {smoothed:.6f}; 0.0: {plain:.6f}; cDPO by the equation: {cdpo:.6f}")
as_seen = (
    rows / rows_right > 3.5 and abs(one - one_right) < 1e-6
    and ignored == none != one
    and smoothed == plain and abs(plain - cdpo) > 1e-3
)
sys.exit(not as_seen)
PY
