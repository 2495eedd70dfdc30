"""Every way of computing a loss's head that `prefuse bench head` measures, on any device; absent ones with the reason.

A path makes per-token log-probabilities (N,) from hidden states (N, D) and a head (V, D); a loss of sequences is then
the formula that trainers write around it. Some libraries have the loss whole, and give no log-probabilities.

    N tokens, D hidden, V vocabulary, S sequences of equal length, T tokens each; pairs are neighbours, chosen first
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

import prefuse
from prefuse.bench.record import version_of
from prefuse.kernels.logprobs.linear_logprobs import logprobs_within
from prefuse.kernels.options import HeadOptions

BETA, Z0 = 0.1, 0.05
AMPLE = 1 << 40  # bytes of workspace: everything may be kept for the backward
MODES = {"no grad": (), "frozen": ("hidden",), "trainable": ("hidden", "weight")}
UNITS = {"no grad": 1, "frozen": 2, "trainable": 4}  # products of N * D * V of a head that never keeps its logits
LOSSES = ("logps", "sft", "dpo", "kto")


class Absent(Exception):
    """Why an implementation cannot be measured here."""


@dataclass
class HeadInputs:
    """One policy and its reference, as training sees them: the reference is a little way off."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)
    grad: Tensor  # (N,) float32: dL/dlogp where log-probabilities are the result
    tokens: int  # T
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_logps: dict[str, Tensor] = field(default_factory=dict)  # (N,): each path makes its own before the clock runs

    @property
    def cu_seqlens(self) -> Tensor:  # (S + 1,)
        return torch.arange(0, len(self.targets) + 1, self.tokens, dtype=torch.int32, device=self.hidden.device)

    @property
    def desirable(self) -> Tensor:  # (S,) KTO's labels
        return torch.arange(len(self.targets) // self.tokens, device=self.hidden.device) % 2 == 0


def draw(n: int, d: int, v: int, tokens: int, dtype: torch.dtype, device: str, seed: int = 0) -> HeadInputs:
    """Logits of deviation 3 with targets near the top, as a trained model's; the reference 2% of the way off."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(v, d, generator=g) / math.sqrt(d)
    targets = torch.randint(v, (n,), generator=g)
    hidden = 3 * torch.randn(n, d, generator=g)
    own = weight[targets]
    wanted = 0.5 * math.log(v) + 6 + 3 * torch.randn(n, generator=g)
    hidden += ((wanted - (hidden * own).sum(-1)) / own.square().sum(-1))[:, None] * own
    ref_hidden = hidden + 0.06 * torch.randn(n, d, generator=g)
    ref_weight = weight + 0.002 * torch.randn(v, d, generator=g) / math.sqrt(d)
    made = (x.to(device, dtype) for x in (hidden, weight, ref_hidden, ref_weight))
    hidden, weight, ref_hidden, ref_weight = made
    return HeadInputs(
        hidden, weight, targets.to(device), torch.randn(n, generator=g).to(device) / n, tokens, ref_hidden, ref_weight
    )


# ------------------------------------------------------------------------------------------ the losses, as written


def sequence_sums(logps: Tensor, tokens: int) -> Tensor:  # (N,) -> (S,)
    return logps.view(-1, tokens).sum(-1)


def dpo_repository(logps: Tensor, ref_logps: Tensor, tokens: int) -> Tensor:  # (N,), (N,) -> ()
    """Rafailov et al. 2023, eq. 7, as eric-mitchell/direct-preference-optimization has it (f8b8c0f): each model's sums
    over tokens, the difference of log-ratios between chosen and rejected, then a log-sigmoid."""
    sums, refs = sequence_sums(logps, tokens), sequence_sums(ref_logps, tokens)
    policy, reference = sums[0::2] - sums[1::2], refs[0::2] - refs[1::2]
    return -F.logsigmoid(BETA * (policy - reference)).mean()


def halos_kto(logps: Tensor, ref_logps: Tensor, desirable: Tensor, tokens: int) -> Tensor:  # (N,), (N,), (S,) -> ()
    """Ethayarajh et al. 2024, eq. 8, as ContextualAI/HALOs has it (4831988): log-ratios of tokens, summed, then
    1 - sigmoid on both sides of the reference point."""
    ratios = sequence_sums(logps - ref_logps, tokens)
    return (1 - torch.sigmoid(BETA * torch.where(desirable, ratios - Z0, Z0 - ratios))).mean()


def loss_of_logps(loss_type: str, logps: Tensor, ref_logps: Tensor | None, x: HeadInputs) -> Tensor:
    """A trainer's loss around its log-probabilities."""
    if loss_type == "logps":
        return (logps * x.grad.to(logps.dtype)).sum()
    if loss_type == "sft":
        return -logps.mean()
    if loss_type == "dpo":
        return dpo_repository(logps, ref_logps, x.tokens)
    return halos_kto(logps, ref_logps, x.desirable, x.tokens)


def log_ratios(loss_type: str, logps: Tensor, ref_logps: Tensor, tokens: int) -> Tensor:  # (N,), (N,) -> (S,) float64
    """In the order of the loss's own formula, which decides what float32 loses."""
    if loss_type == "kto":
        return sequence_sums(logps - ref_logps, tokens).double()
    return (sequence_sums(logps, tokens) - sequence_sums(ref_logps, tokens)).double()


# ------------------------------------------------------------------------------------------ paths to log-probabilities


Path = Callable[[Tensor, Tensor, Tensor], Tensor]


def prefuse_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return prefuse.linear_logprobs(hidden, weight, targets)


def keeping_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As `linear_preference_loss` has them with room to spare: the backward recomputes nothing."""
    impl = "triton" if hidden.is_cuda else "torch"
    return logprobs_within(AMPLE, hidden, weight, targets, None, HeadOptions(), (), impl)


def trl_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    vocab_chunk = 32768  # as its trainers call it
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, vocab_chunk, None, 1.0, ())[0]


def eager_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`logits.float().log_softmax(-1)`, gathered: the forward of HALOs and of the DPO repository."""
    return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, targets[:, None])[:, 0]


@functools.cache
def _compiled() -> Path:
    return torch.compile(eager_path, dynamic=False)


def compiled_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return _compiled()(hidden, weight, targets)


def torch_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Since torch 2.13; its result has the inputs' dtype."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Absent(f"torch {torch.__version__} has no F.linear_cross_entropy")
    from torch.nn import LinearCrossEntropyOptions

    return -F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=LinearCrossEntropyOptions())


def liger_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """CuTe kernels on Hopper and Blackwell, chunks of PyTorch elsewhere."""
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
    return -(nll[0] if isinstance(nll, tuple) else nll)


def cce_path(hidden: Tensor, weight: Tensor, targets: Tensor, filter_eps: str | None = "auto") -> Tensor:
    if not hidden.is_cuda:
        raise Absent("its kernels need CUDA")
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=filter_eps, impl="cce")


# ------------------------------------------------------------------------------------------ losses whole


Whole = Callable[[HeadInputs, str], tuple[Tensor, Tensor | None]]  # the loss (), and log-ratios (S,) where it has them


def prefuse_loss(x: HeadInputs, loss_type: str, workspace: int | None = None) -> tuple[Tensor, Tensor | None]:
    if loss_type == "sft":
        out = prefuse.linear_preference_loss(
            x.hidden, x.weight, x.targets, x.cu_seqlens, None, prefuse.SFT(), workspace=workspace
        )
        return out.loss, None
    loss = prefuse.DPO(beta=BETA) if loss_type == "dpo" else prefuse.KTO(beta=BETA)
    extra = {} if loss_type == "dpo" else {"labels": x.desirable, "z0": Z0}
    ref_logps = x.ref_logps["prefuse"]
    out = prefuse.linear_preference_loss(
        x.hidden, x.weight, x.targets, x.cu_seqlens, ref_logps, loss, workspace=workspace, **extra
    )
    return out.loss, out.rewards.double() / BETA


def liger_loss(x: HeadInputs, loss_type: str) -> tuple[Tensor, Tensor | None]:
    """Pair by pair; it takes no log-probabilities of a reference, so its reference's product is in its time."""
    from liger_kernel import chunked_loss

    shape, pairs = (-1, x.tokens, x.hidden.shape[1]), len(x.targets) // x.tokens // 2
    hidden, ref_hidden, targets = x.hidden.view(shape), x.ref_hidden.view(shape), x.targets.view(-1, x.tokens)
    if loss_type == "kto":
        loss = chunked_loss.LigerFusedLinearKTOLoss(beta=BETA, use_ref_model=True, compiled=x.hidden.is_cuda)
        kl = torch.full((1,), Z0, device=x.hidden.device)
        out = loss(hidden, x.weight, targets, preference_labels=x.desirable, ref_input=ref_hidden,
                   ref_weight=x.ref_weight, kl=kl)  # fmt: skip
        return out[0], None
    # All chosen sides first.
    order = torch.arange(2 * pairs, device=targets.device).view(pairs, 2).T.flatten()
    loss = chunked_loss.LigerFusedLinearDPOLoss(beta=BETA, compute_nll_loss=False, compiled=x.hidden.is_cuda)
    out = loss(x.weight, hidden[order], targets[order], ref_input=ref_hidden[order], ref_weight=x.ref_weight)
    return out[0], None


def fla_loss(x: HeadInputs, loss_type: str) -> tuple[Tensor, Tensor | None]:
    """A mean cross-entropy alone; in Triton, so also under its interpreter (TRITON_INTERPRET=1)."""
    from triton import knobs

    if not (x.hidden.is_cuda or knobs.runtime.interpret):
        raise Absent("its Triton kernels need a GPU, or TRITON_INTERPRET=1")
    from fla.modules import FusedLinearCrossEntropyLoss

    return FusedLinearCrossEntropyLoss()(x.hidden, x.targets, x.weight), None


def quack_loss(x: HeadInputs, loss_type: str) -> tuple[Tensor, Tensor | None]:
    """A mean cross-entropy alone; in CUTLASS' DSL."""
    if not x.hidden.is_cuda:
        raise Absent("its kernels need CUDA")
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(x.hidden, x.weight, x.targets, reduction="mean"), None


# ------------------------------------------------------------------------------------------ all of them


@dataclass(frozen=True)
class Implementation:
    package: str  # the distribution it comes from
    path: Path | None = None
    whole: Whole | None = None
    losses: tuple[str, ...] = LOSSES  # what `whole` has, or what the path is measured for


IMPLEMENTATIONS: dict[str, Implementation] = {
    "prefuse": Implementation("prefuse", prefuse_path, prefuse_loss, ("sft", "dpo", "kto")),
    "prefuse, kept": Implementation("prefuse", keeping_path, losses=("logps",)),
    "prefuse, workspace=0": Implementation(
        "prefuse", None, functools.partial(prefuse_loss, workspace=0), ("sft", "dpo", "kto")
    ),
    "TRL": Implementation("trl", trl_path),
    "HALOs, DPO repository (eager)": Implementation("torch", eager_path),
    "torch.compile": Implementation("torch", compiled_path, losses=("logps",)),
    "F.linear_cross_entropy": Implementation("torch", torch_path),
    "Liger scaled CE": Implementation("liger-kernel", liger_path),
    "Liger chunked": Implementation("liger-kernel", None, liger_loss, ("dpo", "kto")),
    "cut-cross-entropy": Implementation("cut-cross-entropy", cce_path),
    "cut-cross-entropy, no filter": Implementation("cut-cross-entropy", functools.partial(cce_path, filter_eps=None)),
    "flash-linear-attention": Implementation("fla-core", None, fla_loss, ("sft",)),
    "quack": Implementation("quack-kernels", None, quack_loss, ("sft",)),
}


def absence(name: str) -> str | None:
    """Why an implementation cannot even begin: its package is not there."""
    package = IMPLEMENTATIONS[name].package
    return None if version_of(package) else f"{package} is not installed"


def applies(name: str, loss_type: str) -> bool:
    made = IMPLEMENTATIONS[name]
    return loss_type in made.losses or (made.path is not None and made.whole is not None)


def compute(name: str, x: HeadInputs, loss_type: str) -> tuple[Tensor, Tensor | None]:
    """The loss, differentiable, and what it says of log-ratios (S,); "logps": log-probabilities (N,) in their stead."""
    made = IMPLEMENTATIONS[name]
    if made.whole is not None and loss_type in made.losses:
        return made.whole(x, loss_type)
    logps = made.path(x.hidden, x.weight, x.targets)
    ref_logps = x.ref_logps.get(name)
    ratios = None if ref_logps is None else log_ratios(loss_type, logps.detach(), ref_logps, x.tokens)
    return loss_of_logps(loss_type, logps, ref_logps, x), logps.detach() if loss_type == "logps" else ratios


@torch.no_grad()
def reference(name: str, x: HeadInputs) -> None:
    """A path's own log-probabilities of the reference, as its trainer has them before the step."""
    path = IMPLEMENTATIONS[name].path
    if path is not None:
        x.ref_logps[name] = path(x.ref_hidden, x.ref_weight, x.targets)
