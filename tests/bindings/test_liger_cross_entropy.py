"""`prefuse.liger.LigerFusedLinearCrossEntropyLoss`: torch's cross-entropy with Liger's options, against float64."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from prefuse import liger
from prefuse.bench.truth import oracle

DTYPES = [torch.float32, torch.bfloat16]
CE_OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"softcap": 2.0},
    {"ce_weight": True},
    {"ce_weight": True, "reduction": "none"},
    {"ignore_index": 3},
    {"label_smoothing": 0.2},
    {"label_smoothing": 0.2, "reduction": "sum"},
    {"lse_square_scale": 0.01, "return_z_loss": True},
    {"lse_square_scale": 0.01, "softcap": 2.0, "reduction": "sum", "return_z_loss": True},
    {"lse_square_scale": 0.01, "ce_weight": True, "reduction": "none", "return_z_loss": True},
    {"use_token_scaling": True, "lse_square_scale": 0.01},
    {"use_token_scaling": True, "reduction": "none", "return_token_accuracy": True},
    {"return_token_accuracy": True, "accum_dtype": torch.float32},
]


def cross_entropy_truth(x, weight, target, bias, options, dtype=torch.float64):
    ignore, reduction = options.get("ignore_index", -100), options.get("reduction", "mean")
    logits = x.to(dtype) @ weight.to(dtype).T + (0 if bias is None else bias.to(dtype))
    if cap := options.get("softcap"):
        logits = cap * torch.tanh(logits / cap)
    class_weight = options["ce_weight"].to(dtype) if "ce_weight" in options else None
    smoothing = options.get("label_smoothing", 0.0)
    losses = cross_entropy(
        logits, target, class_weight, ignore_index=ignore, reduction="none", label_smoothing=smoothing
    )
    kept = target != ignore
    z_losses = kept * options.get("lse_square_scale", 0.0) * logits.logsumexp(-1) ** 2
    p = logits.softmax(-1).gather(1, target.clamp(min=0)[:, None])[:, 0].detach()
    scale = p if options.get("use_token_scaling") else torch.ones_like(p)
    losses, z_losses = losses * scale, z_losses * scale
    right = (logits.argmax(-1) == target) * kept
    if reduction == "none":
        return losses + z_losses, z_losses, right.double()
    count = kept.sum()
    divisor = count if class_weight is None else class_weight[target[kept]].sum()
    if reduction == "sum":
        return losses.sum() + z_losses.sum(), z_losses.sum(), right.sum() / count
    return losses.sum() / divisor + z_losses.sum() / count, z_losses.sum() / count, right.sum() / count


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("options", CE_OPTIONS, ids=str)
def test_cross_entropy(options, bias, dtype):
    torch.manual_seed(3)
    n, width, vocabulary = 23, 16, 41
    x = torch.randn(n, width).to(dtype).requires_grad_()
    weight = (0.5 * torch.randn(vocabulary, width)).to(dtype).requires_grad_()
    b = torch.randn(vocabulary).to(dtype).requires_grad_() if bias else None
    target = torch.randint(vocabulary, (n,))
    target[torch.rand(n) < 0.3] = options.get("ignore_index", -100)
    if "ce_weight" in options:
        options = options | {"ce_weight": torch.rand(vocabulary)}
    out = liger.LigerFusedLinearCrossEntropyLoss(**options)(weight, x, target, b)
    asked = options.get("return_z_loss") or options.get("return_token_accuracy")
    loss = out.loss if asked else out
    truth, eager = (cross_entropy_truth(x, weight, target, b, options, d) for d in (torch.float64, dtype))
    upstream = torch.rand_like(truth[0])  # non-uniform where there is one for each token
    gradients, expected, plain = (
        torch.autograd.grad((y.double() * upstream).sum(), [v for v in (x, weight, b) if v is not None])
        for y in (loss, truth[0], eager[0])
    )
    size = truth[0].abs().max().item()
    bound = oracle.tolerance(truth[0].detach(), eager[0].detach(), torch.float32, max(size, 4.0), n)
    oracle.assert_within(loss, truth[0].detach(), bound, "loss")
    for a, true, yardstick in zip(gradients, expected, plain, strict=True):
        assert a.dtype == dtype
        bound = oracle.tolerance(true.double(), yardstick.double(), dtype, true.abs().max().item())
        oracle.assert_within(a.double(), true.double(), bound, "gradient")
    if asked:
        assert (out.z_loss is None) == (not options.get("return_z_loss"))
        if out.z_loss is not None:
            torch.testing.assert_close(out.z_loss.double(), truth[1].detach(), rtol=1e-5, atol=1e-6)
            assert not out.z_loss.requires_grad
        if options.get("return_token_accuracy"):
            torch.testing.assert_close(out.token_accuracy.double(), truth[2].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{}, {"ce_weight": torch.ones(7)}, {"return_token_accuracy": True}])
def test_cross_entropy_of_no_tokens_is_0_and_has_no_gradient(options):
    x, weight = torch.randn(4, 3, requires_grad=True), torch.randn(7, 3, requires_grad=True)
    out = liger.LigerFusedLinearCrossEntropyLoss(**options)(weight, x, torch.full((4,), -100))
    loss = out if isinstance(out, torch.Tensor) else out.loss
    assert loss == 0
    loss.backward()
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, 'reduction must be "mean", "sum" or "none", got \'avg\''),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1\.5"),
        ({"return_predicted_tokens": True}, "return_predicted_tokens is not computed here: use liger_kernel's own"),
        ({"label_smoothing": 0.1, "softcap": 3.0}, "label_smoothing with softcap is not computed here"),
        ({"label_smoothing": 0.1, "ce_weight": torch.ones(3)}, "label_smoothing with ce_weight is not computed here"),
    ],
)
def test_what_cross_entropy_does_not_do(options, message):
    with pytest.raises(ValueError, match=message):
        liger.LigerFusedLinearCrossEntropyLoss(**options)


def test_cross_entropy_of_padded_batches_is_refused():
    with pytest.raises(ValueError, match=r"expected _input \(N, H\) and target \(N,\), got \(2, 4, 3\) and \(2, 4\)"):
        liger.LigerFusedLinearCrossEntropyLoss()(torch.randn(7, 3), torch.randn(2, 4, 3), torch.zeros(2, 4).long())
