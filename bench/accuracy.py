"""How far a sequence's log-ratio is from float64, by sequence length and by the path that computes it.

    prefuse bench accuracy

A preference loss reads `sum over tokens of (log pi - log pi_ref)`, a small difference of two large sums. Every path
gets the same bf16 hidden states and heads; what differs is whether the logits are rounded to bf16 on the way. CPU only,
under three minutes on two cores. Writes results/logratio_error.json and docs/figures/logratio_error.png.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
from collections.abc import Callable

import torch
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

import prefuse
from prefuse.bench.record import FIGURES, RESULTS, environment, markdown, write_result

LENGTHS = (64, 128, 256, 512, 1024, 2048, 4096)
TOKENS, DIM, VOCAB = LENGTHS[-1], 512, 32000
TRL_VOCAB_TILE = 32768  # the default of its trainers
TRL = "TRL " + ".".join(importlib.metadata.version("trl").split(".")[:2])
EAGER = "eager, bf16 logits"

Path = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (N, D), weight (V, D), targets (N,) -> logps (N,)


def prefuse_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return prefuse.linear_logprobs(hidden, weight, targets, impl="torch")


def trl_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, TRL_VOCAB_TILE, None, 1.0, ())[0]


def eager_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`model(...).logits` in bf16, and a float32 log-softmax of it."""
    blocks = zip(hidden.split(512), targets.split(512), strict=True)
    return torch.cat([torch.log_softmax((x @ weight.T).float(), -1).gather(1, y[:, None])[:, 0] for x, y in blocks])


def torch_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Float32 logits inside, but the result comes back in bf16."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions()
    return -linear_cross_entropy(hidden, weight, targets, reduction="none", options=options).float()


def float64_path(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    exact = weight.double()
    blocks = zip(hidden.double().split(256), targets.split(256), strict=True)
    return torch.cat([-torch.nn.functional.cross_entropy(x @ exact.T, y, reduction="none") for x, y in blocks])


def paths() -> dict[str, Path]:
    named = {"prefuse": prefuse_path, EAGER: eager_path, TRL: trl_path}
    if hasattr(torch.nn.functional, "linear_cross_entropy"):  # since torch 2.13
        named["F.linear_cross_entropy"] = torch_path
    return named


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


def measure(seeds: int) -> dict:
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
        for name, path in paths().items():
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


def draw(result: dict) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    # TRL's tiles hold the same bf16 logits as eager's, so one line is drawn over the other.
    styles = {"prefuse": ("#1b7f5c", "o-"), EAGER: ("#8fa3c8", "o-"), TRL: ("#b5432e", "o:")}
    figure, axes = plt.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    for name, errors in result["paths"].items():
        by_length = errors["sequence_log_ratio"]
        color, line = styles.get(name, ("#a07d1c", "o-"))
        mean, worst = ([e[key] for e in by_length.values()] for key in ("mean", "max"))
        axes.plot(list(by_length), mean, line, color=color, linewidth=2, markersize=4, label=name)
        axes.fill_between(list(by_length), mean, worst, color=color, alpha=0.12, linewidth=0)
    axes.set(xscale="log", yscale="log", xticks=LENGTHS, xticklabels=[str(x) for x in LENGTHS])
    axes.minorticks_off()
    axes.set_xlabel("completion length (tokens)")
    axes.set_ylabel("error of a sequence's log-ratio (nats)")
    axes.set_title("Log-ratio log π(y|x) − log π$_{ref}$(y|x): error against float64, same bf16 inputs", fontsize=12)
    axes.grid(which="major", color="#dddddd", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="line: mean, shade: up to the worst sequence", loc="center left", alignment="left")
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / "logratio_error.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="heads and token sets drawn (default 3)")
    seeds = parser.parse_args().seeds
    settings = {"N": TOKENS, "D": DIM, "V": VOCAB, "seeds": seeds, "device": "cpu", "dtype": "bfloat16", "unit": "nats"}
    with torch.no_grad():
        result = {"environment": environment(), "settings": settings, **measure(seeds)}
    write_result(RESULTS / "accuracy.json", "accuracy", result)
    draw(result)
    print("\n|error| in nats: mean (max)\n")
    print(table(result))


if __name__ == "__main__":
    main()
