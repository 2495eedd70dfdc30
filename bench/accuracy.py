"""How far a sequence's log-ratio is from float64, by sequence length and by the path that computes it.

    prefuse bench accuracy

A preference loss reads `sum over tokens of (log pi - log pi_ref)`, a small difference of two large sums. Every path
gets the same bf16 hidden states and heads; what differs is whether logits or log-probabilities are rounded to bf16 on
the way. Minutes on a CPU. Writes results/accuracy.json; `prefuse bench figures` draws it.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

import prefuse
from prefuse.bench.head import first_line
from prefuse.bench.implementations import IMPLEMENTATIONS, Path, absence
from prefuse.bench.record import RESULTS, environment, markdown, version_of, write_result
from prefuse.engine.config.tools import ToolParser

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
TOKENS, DIM, VOCAB = LENGTHS[-1], 512, 32000
MATERIALIZED = ("HALOs, DPO repository (eager)", "torch.compile")  # run in blocks of rows, which changes no row


def in_blocks(path: Path, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    blocks = zip(hidden.split(512), targets.split(512), strict=True)
    return torch.cat([path(x, weight, y) for x, y in blocks])


def float64_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    exact = weight.double()
    blocks = zip(hidden.double().split(256), targets.split(256), strict=True)
    return torch.cat([-torch.nn.functional.cross_entropy(x @ exact.T, y, reduction="none") for x, y in blocks])


def paths() -> tuple[dict[str, Path], dict[str, dict[str, str | None]]]:
    """Those that run here, and of every one its version or why it does not."""
    found, looked = {}, {}
    sample = torch.randn(64, 64).bfloat16(), torch.randn(128, 64).bfloat16(), torch.arange(64)
    for name, made in IMPLEMENTATIONS.items():
        if made.path is None or name == "prefuse, kept":  # losses whole give no log-probabilities; kept: the same bits
            continue
        reason = absence(name)
        try:
            reason or made.path(*sample)
        except Exception as error:
            reason = first_line(error)
        looked[name] = {"version": version_of(made.package), "absent": reason}
        if reason is None:
            found[name] = functools.partial(in_blocks, made.path) if name in MATERIALIZED else made.path
    return found, looked


def case(seed: int) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """targets (N,), logits of the targets (N,), then (hidden (N, D), weight (V, D)) of the policy and of the reference.

    Other tokens' logits have deviation 3, so their logsumexp is about log(V) + 4.5 = 14.9; the target's is drawn around
    15.5. That gives a mean log-probability near -1 and logits up to about 25, as a trained model's.
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, DIM, generator=g) / math.sqrt(DIM)
    targets = torch.randint(VOCAB, (TOKENS,), generator=g)
    z_target = 15.5 + 3 * torch.randn(TOKENS, generator=g)
    hidden = 3 * torch.randn(TOKENS, DIM, generator=g)
    own = weight[targets]
    hidden += ((z_target - (hidden * own).sum(-1)) / own.square().sum(-1))[:, None] * own
    # What a little training changes: 2% of the hidden states, 0.2% of the head.
    moved = hidden + 0.02 * 3 * torch.randn(TOKENS, DIM, generator=g)
    moved_weight = weight + 0.002 * torch.randn(VOCAB, DIM, generator=g) / math.sqrt(DIM)
    reference = hidden.bfloat16(), weight.bfloat16()
    return targets, z_target, (moved.bfloat16(), moved_weight.bfloat16()), reference


def sequence_log_ratios(name: str, policy: Tensor, reference: Tensor, length: int) -> Tensor:
    """Per-token logps (N,) twice -> one log-ratio per sequence of `length` tokens, float64."""
    if name == "prefuse":
        cu_seqlens = torch.arange(0, TOKENS + 1, length, dtype=torch.int32)
        zeros = policy.new_zeros(len(cu_seqlens) - 1, dtype=torch.float64)
        # With z0 = 0, beta = 1 the reward is the log-ratio.
        out = prefuse.preference_loss(
            policy, reference, cu_seqlens, loss=prefuse.KTO(beta=1.0), labels=zeros == 0, z0=0.0
        )
        return out.rewards.double()
    if name == "float64":
        return (policy - reference).view(-1, length).sum(-1)
    # As trainers do: a float32 sum of each, then the difference.
    return (policy.float().view(-1, length).sum(-1) - reference.float().view(-1, length).sum(-1)).double()


def measure(seeds: int, named: dict[str, Path]) -> dict:
    """Errors of every path over all seeds, in nats."""
    token_errors: dict[str, list[Tensor]] = {}
    ratio_errors: dict[str, list[Tensor]] = {}
    sequence_errors: dict[str, dict[int, list[Tensor]]] = {}
    exact_ratios, exact_logps, largest = [], [], 0.0
    for seed in range(seeds):
        targets, z_target, policy, reference = case(seed)
        largest = max(largest, float(z_target.max()))
        truth = [float64_path(*model, targets) for model in (policy, reference)]
        exact_logps.append(truth[0])
        exact_ratios.append(truth[0] - truth[1])
        for name, path in named.items():
            got = [path(*model, targets) for model in (policy, reference)]
            token_errors.setdefault(name, []).append(got[0].double() - truth[0])
            ratio_errors.setdefault(name, []).append((got[0].double() - got[1].double()) - exact_ratios[-1])
            for length in LENGTHS:
                error = sequence_log_ratios(name, *got, length) - sequence_log_ratios("float64", *truth, length)
                sequence_errors.setdefault(name, {}).setdefault(length, []).append(error)
        print(f"seed {seed}: done", flush=True)
    ratios = torch.cat(exact_ratios)
    return {
        "data": {
            "mean_logp": torch.cat(exact_logps).mean().item(),
            "largest_target_logit": largest,
            "token_log_ratio_deviation": ratios.std().item(),
        },
        "paths": {
            name: {
                "token_logp": summary(token_errors[name]),
                "token_log_ratio": summary(ratio_errors[name]),
                "sequence_log_ratio": {length: summary(e) for length, e in sequence_errors[name].items()},
            }
            for name in token_errors
        },
    }


def summary(errors: list[Tensor]) -> dict[str, float]:
    absolute = torch.cat(errors).abs()
    return {"mean": absolute.mean().item(), "max": absolute.max().item(), "count": len(absolute)}


def table(result: dict) -> str:
    header = ["path", "token logp"] + [f"{length} tokens" for length in LENGTHS]
    rows = []
    for name, errors in result["paths"].items():
        cells = [errors["token_logp"], *errors["sequence_log_ratio"].values()]
        rows.append([name] + [f"{e['mean']:.1e} ({e['max']:.1e})" for e in cells])
    return markdown(header, rows)


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="heads and token sets drawn (default 3)")
    seeds = parser.parse_args().seeds
    settings = {"N": TOKENS, "D": DIM, "V": VOCAB, "seeds": seeds, "device": "cpu", "dtype": "bfloat16", "unit": "nats"}
    with torch.no_grad():
        named, looked = paths()
        result = {"environment": environment(), "settings": settings, **measure(seeds, named)}
    write_result(RESULTS / "accuracy.json", "accuracy", result, peers=looked)
    print("\n|error| in nats: mean (max)\n")
    print(table(result))


if __name__ == "__main__":
    main()
