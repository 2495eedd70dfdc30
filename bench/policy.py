"""The policy losses beside TRL's own, on the same numbers: values, gradients and metrics.

    prefuse bench policy            # a table and results/policy-float64.json; exit status 1 beyond 1e-6

`GRPOTrainer._compute_loss` and `RLOOTrainer._compute_loss` run as they stand, on a stand-in for the trainer that has
their settings and hands them log-probabilities and entropies. What is compared: the loss, its gradient of every
log-probability relative to the largest one, and every metric that both have. TRL 1.16 has no PPO trainer any more, so
the clip of PPO is compared with GRPO's over token advantages, which is the same expression.
"""

from __future__ import annotations

import collections
import types
from dataclasses import dataclass

import torch
from torch import Tensor

import prefuse
from prefuse.bench.record import RESULTS, environment, markdown, write_result
from prefuse.engine.config.tools import ToolParser
from prefuse.losses.sampled import PolicyObjective

LENGTHS = (7, 12, 1, 9, 16, 4, 12, 3)
BOUND = 1e-6


@dataclass(frozen=True)
class PolicyTensors:
    """Sampled answers: packed numbers of tokens, and one advantage for each answer."""

    logps: Tensor  # (N,)
    old_logps: Tensor
    ref_logps: Tensor
    entropy: Tensor
    advantages: Tensor  # (S,)
    lengths: tuple[int, ...] = LENGTHS

    @property
    def mask(self) -> Tensor:  # (S, T) bool
        return torch.arange(max(self.lengths)) < torch.tensor(self.lengths)[:, None]

    @property
    def cu_seqlens(self) -> Tensor:  # (S + 1,)
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    def padded(self, x: Tensor) -> Tensor:  # (N,) -> (S, T)
        return torch.zeros(self.mask.shape, dtype=x.dtype).masked_scatter(self.mask, x)


def draw(seed: int = 0, dtype: torch.dtype = torch.float64) -> PolicyTensors:
    """Policies some way apart, so that every clip is met."""
    g = torch.Generator().manual_seed(seed)
    logps = -3 * torch.rand(sum(LENGTHS), generator=g, dtype=torch.float64) - 0.01
    near = [logps + spread * torch.randn(len(logps), generator=g, dtype=torch.float64) for spread in (0.2, 0.5)]
    entropy, advantages = 2 * torch.rand(len(logps), generator=g), torch.randn(len(LENGTHS), generator=g)
    return PolicyTensors(*(x.to(dtype) for x in (logps, *near, entropy, advantages)))


def trl_grpo(batch: PolicyTensors, logps: Tensor, loss: prefuse.GRPO) -> tuple[Tensor, dict[str, float]]:
    """TRL's loss, differentiable in `logps` (N,), and its metrics."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    settings = types.SimpleNamespace(
        delta=loss.delta, use_bias_correction_kl=loss.use_bias_correction_kl, steps_per_generation=1,
        sapo_temperature_pos=loss.sapo_temperature_pos, sapo_temperature_neg=loss.sapo_temperature_neg,
    )  # fmt: skip
    trainer = _trainer(batch, logps) | {
        "args": settings, "beta": loss.beta, "loss_type": loss.loss_type, "epsilon_low": loss.epsilon,
        "epsilon_high": loss.upper, "importance_sampling_level": loss.importance_sampling_level,
        "max_completion_length": loss.max_completion_length, "entropy_coef": loss.entropy_coef,
        "_entropy_bonus_enabled": loss.entropy_coef != 0, "use_adaptive_entropy": False, "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "use_vllm": False, "current_gradient_accumulation_steps": 1,
    }  # fmt: skip
    given = {"old_per_token_logps": batch.padded(batch.old_logps), "ref_per_token_logps": batch.padded(batch.ref_logps)}
    return _computed(GRPOTrainer, trainer, _inputs(batch) | given)


def trl_rloo(batch: PolicyTensors, logps: Tensor, loss: prefuse.RLOO) -> tuple[Tensor, dict[str, float]]:
    from trl.trainer.rloo_trainer import RLOOTrainer

    trainer = _trainer(batch, logps) | {"epsilon_low": loss.epsilon, "epsilon_high": loss.upper}
    given = {"old_logps": batch.padded(batch.old_logps).sum(1)}
    return _computed(RLOOTrainer, trainer, _inputs(batch) | given)


def _trainer(batch: PolicyTensors, logps: Tensor) -> dict:
    """What both losses ask a trainer for; its forward gives `logps`."""
    accelerator = types.SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )  # fmt: skip
    forward = (batch.padded(logps), batch.padded(batch.entropy.to(logps.dtype)), None)
    return {
        "_get_per_token_logps_and_entropies": lambda *args, **kwargs: forward, "aux_loss_enabled": False,
        "accelerator": accelerator, "model": types.SimpleNamespace(training=True),
        "_metrics": {"train": collections.defaultdict(list)},
    }  # fmt: skip


def _inputs(batch: PolicyTensors) -> dict[str, Tensor]:
    ids, mask = torch.zeros(batch.mask.shape, dtype=torch.long), batch.mask.long()
    return {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": batch.advantages, "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def _computed(trainer: type, settings: dict, inputs: dict) -> tuple[Tensor, dict[str, float]]:
    stand_in = types.SimpleNamespace(**settings)
    loss = trainer._compute_loss(stand_in, stand_in.model, inputs)
    return loss, {name: sum(values) / len(values) for name, values in stand_in._metrics["train"].items()}


def ours(batch: PolicyTensors, logps: Tensor, loss: PolicyObjective) -> tuple[Tensor, dict[str, float]]:
    out = prefuse.policy_loss(
        logps, batch.old_logps, batch.advantages, batch.cu_seqlens, loss, entropy=batch.entropy,
        ref_logps=batch.ref_logps if "ref_logps" in loss.policy_needs else None,
    )  # fmt: skip
    return out.loss, prefuse.reduce_metrics(out.metrics)


def compare(loss: PolicyObjective, batch: PolicyTensors) -> dict[str, float]:
    """Both losses and what lies between them."""
    theirs, values, grads, metrics = trl_rloo if isinstance(loss, prefuse.RLOO) else trl_grpo, [], [], []
    asked = prefuse.GRPO("grpo", epsilon=loss.clip, epsilon_high=loss.clip_high) if _is_ppo(loss) else loss
    for function, used in ((ours, loss), (theirs, asked)):
        logps = batch.logps.clone().requires_grad_()
        value, means = function(batch, logps, used)
        values.append(value.item())
        grads.append(torch.autograd.grad(value, logps)[0])
        metrics.append(means)
    common = metrics[0].keys() & metrics[1].keys()
    return {
        "ours": values[0],
        "TRL": values[1],
        "loss": abs(values[0] - values[1]) / max(1.0, abs(values[1])),
        "gradient": ((grads[0] - grads[1]).abs().max() / grads[1].abs().max()).item(),
        "metrics": max(abs(metrics[0][name] - metrics[1][name]) for name in common),
        "compared": len(common),
    }


def _is_ppo(loss: PolicyObjective) -> bool:
    return isinstance(loss, prefuse.PPOClip)


GRPO = prefuse.GRPO
LOSSES: dict[str, PolicyObjective] = {
    "GRPO grpo": GRPO("grpo"),
    "GRPO bnpo": GRPO("bnpo"),
    "GRPO dapo": GRPO("dapo"),
    "GRPO dr_grpo": GRPO("dr_grpo", max_completion_length=16),
    "GRPO cispo, epsilon_high 1.1": GRPO("cispo", epsilon_high=1.1),
    "GRPO sapo": GRPO("sapo"),
    "GRPO luspo (sequence)": GRPO("luspo", importance_sampling_level="sequence"),
    "GRPO grpo, sequence (GSPO)": GRPO("grpo", importance_sampling_level="sequence", epsilon=0.02, epsilon_high=0.03),
    "GRPO dapo, epsilon_high 0.28": GRPO("dapo", epsilon_high=0.28),
    "GRPO grpo, epsilon 0.05, delta 1.1": GRPO("grpo", epsilon=0.05, delta=1.1),
    "GRPO grpo, beta 0.04 (k3)": GRPO("grpo", beta=0.04),
    "GRPO dapo, beta 0.04, bias correction": GRPO("dapo", beta=0.04, use_bias_correction_kl=True),
    "GRPO dapo, entropy_coef 0.01": GRPO("dapo", entropy_coef=0.01),
    "RLOO": prefuse.RLOO(),
    "RLOO, epsilon_high 0.4": prefuse.RLOO(epsilon_high=0.4),
    "PPOClip (TRL: grpo's clip)": prefuse.PPOClip(),
}


def main() -> int:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    args = parser.parse_args()
    import trl

    batch, rows, worst = draw(dtype=getattr(torch, args.dtype)), [], 0.0
    losses = {name: compare(loss, batch) for name, loss in LOSSES.items()}
    for name, found in losses.items():
        worst = max(worst, found["loss"], found["gradient"], found["metrics"])
        numbers = [f"{found[key]:.7f}" for key in ("ours", "TRL")]
        differences = [f"{found[key]:.1e}" for key in ("loss", "gradient", "metrics")]
        rows.append([name, *numbers, *differences, str(found["compared"])])
    header = ["loss", "prefuse", f"TRL {trl.__version__}", "loss", "gradient", "metrics", "of them"]
    print(f"Policy losses on {len(LENGTHS)} answers of {min(LENGTHS)} to {max(LENGTHS)} tokens, {args.dtype}\n")
    print(markdown(header, rows))
    print(f"\nlargest difference: {worst:.1e}, expected at most {BOUND:.0e}")
    settings = {"dtype": args.dtype, "answers": len(LENGTHS), "lengths": list(LENGTHS), "bound": BOUND}
    peers = {"TRL": {"version": trl.__version__, "absent": None}}
    path = RESULTS / f"policy-{args.dtype}.json"
    write_result(path, "policy", {"environment": environment(), "settings": settings, "losses": losses}, peers=peers)
    return int(worst > BOUND)
