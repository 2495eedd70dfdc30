"""Over-optimization of a reward model, measured: `python examples/overoptimization.py` (two or three minutes on a CPU).

The task is the demo's: put letters in order. What is wanted (gold) is a rule, the share of places that hold the letter
which belongs there in ascending order. A reward model (proxy) has seen a few comparisons only, made by that rule.

1. `prefuse sft` teaches a small Llama the task, in both orders.
2. It answers prompts; the rule says which of two answers is better; `prefuse reward` learns from a few of these pairs.
3. Best-of-n: of n answers to a new prompt the one with the highest proxy score is taken. The larger n, the harder the
   proxy is optimized: the policy is log n - (n - 1) / n nats from where it began (Gao et al. 2022, arXiv 2210.10760).

The proxy's own score rises with n for as long as one likes. The gold score of the same answers rises, turns, and
falls: beyond the turn the proxy selects its own errors. More comparisons move the turn to the right. The picture is
overoptimization.png, its numbers are overoptimization.json; the exit code is 1 if gold does not turn.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from demo import fresh, make_model, make_pairs, make_tokenizer, prefuse
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from prefuse.models.score import sequence_scores
from prefuse.packing import pack

FOLDER = Path("runs/overoptimization")
SEED = 0
COMPARISONS = (32, 128, 1024)
NS = [2**k for k in range(10)]


def gold(prompt: str, answer: str) -> float:
    """The rule: the share of places with the right letter, less what is missing or too much."""
    wanted = sorted(prompt.removeprefix("sort ").removesuffix(" =>").split(" "))
    given = answer.split()
    right = sum(a == b for a, b in zip(wanted, given, strict=False))
    return (right - abs(len(given) - len(wanted))) / len(wanted)


@torch.no_grad()
def sample(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], count: int, temperature: float
) -> list[list[list[int]]]:
    """`count` answers to each prompt, as token ids with their end."""
    answers = []
    for prompt in prompts:
        ids = tokenizer([prompt], return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=temperature, top_k=0,
            num_return_sequences=count, max_new_tokens=12, pad_token_id=tokenizer.eos_token_id,
        )[:, ids.shape[1] :].tolist()  # fmt: skip
        ends = [row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row) - 1 for row in out]
        answers.append([[*row[:end], tokenizer.eos_token_id] for row, end in zip(out, ends, strict=True)])
    return answers


@torch.no_grad()
def scores_of(folder: Path, tokenizer, prompts: Sequence[str], answers: list[list[list[int]]]) -> torch.Tensor:
    """(prompts, answers): the proxy's, each prompt run once."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    groups = [pack([(tokenizer(p)["input_ids"], some)]) for p, some in zip(prompts, answers, strict=True)]
    return torch.stack([sequence_scores(model, group) for group in groups])


def best_of(n: int, proxy: torch.Tensor, values: torch.Tensor) -> float:
    """The mean over prompts of `values` at the best of n of N answers, over all choices of n (Nakano et al. 2021)."""
    total = proxy.shape[1]
    order = proxy.argsort(1)  # worst first
    ranks = torch.arange(1, total + 1, dtype=torch.float64)
    log_choose = lambda a, b: torch.lgamma(a + 1) - torch.lgamma(torch.tensor(b + 1.0)) - torch.lgamma(a - b + 1)  # noqa: E731
    weights = torch.zeros(total, dtype=torch.float64)
    inside = ranks >= n
    weights[inside] = torch.exp(log_choose(ranks[inside] - 1, n - 1) - log_choose(torch.tensor(float(total)), n))
    return (values.double().gather(1, order) * weights).sum(1).mean().item()


def main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    folder, rng = fresh(FOLDER), random.Random(SEED)
    pairs = make_pairs(arguments.prompts + max(COMPARISONS) + 16_000, rng)
    tested, compared = pairs[: arguments.prompts], pairs[arguments.prompts : arguments.prompts + max(COMPARISONS)]
    shown = [{"prompt": x["prompt"], "completion": x[rng.choice(("chosen", "rejected"))]} for x in pairs[-16_000:]]
    write(folder / "demonstrations.jsonl", shown)
    tokenizer = make_tokenizer()
    make_model(tokenizer).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    prefuse(
        "sft", model_name_or_path=folder / "base", dataset_name=folder / "demonstrations.jsonl",
        output_dir=folder / "sft", num_train_epochs=arguments.epochs, per_device_train_batch_size=64,
        learning_rate=4e-3, lr_scheduler_type="cosine", logging_steps=100, eval_steps=1000, save_steps=0,
    )  # fmt: skip
    policy = AutoModelForCausalLM.from_pretrained(folder / "sft").eval()

    prompts = [x["prompt"] for x in compared]
    rows = [
        comparison(prompt, [tokenizer.decode(ids[:-1]) for ids in some])
        for prompt, some in zip(prompts, sample(policy, tokenizer, prompts, 6, arguments.temperature), strict=True)
    ]
    rows = [row for row in rows if row is not None]
    prompts = [x["prompt"] for x in tested]
    answers = sample(policy, tokenizer, prompts, NS[-1], arguments.temperature)
    texts = [[tokenizer.decode(ids[:-1]) for ids in some] for some in answers]
    golds = torch.tensor([[gold(p, t) for t in some] for p, some in zip(prompts, texts, strict=True)])
    curves = {}
    for count in COMPARISONS:
        write(folder / f"comparisons-{count}.jsonl", rows[:count])
        prefuse(
            "reward", model_name_or_path=folder / "sft", dataset_name=folder / f"comparisons-{count}.jsonl",
            output_dir=folder / f"proxy-{count}", num_train_epochs=max(4, 2000 // count), learning_rate=1e-3,
            per_device_train_batch_size=32, eval_fraction=0.0, logging_steps=50, save_steps=0,
        )  # fmt: skip
        proxy = scores_of(folder / f"proxy-{count}", tokenizer, prompts, answers).double()
        proxy = (proxy - proxy.mean()) / proxy.std()
        curves[count] = [
            {
                "n": n,
                "kl": math.log(n) - (n - 1) / n,
                "proxy": best_of(n, proxy, proxy),
                "gold": best_of(n, proxy, golds),
            }
            for n in NS
        ]
    (folder / "overoptimization.json").write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    draw(curves, folder / "overoptimization.png")
    few = curves[COMPARISONS[0]]
    turn = max(few, key=lambda point: point["gold"])
    for count, points in curves.items():
        print(f"{count} comparisons: gold", *(f"{point['gold']:.3f}" for point in points))
        print(f"{' ' * len(str(count))}              proxy", *(f"{point['proxy']:.3f}" for point in points))
    print(f"{COMPARISONS[0]} comparisons: gold is highest at n = {turn['n']} ({turn['gold']:.3f}), then falls to "
          f"{few[-1]['gold']:.3f}; picture: {folder / 'overoptimization.png'}")  # fmt: skip
    turned = turn["gold"] > few[0]["gold"] and few[-1]["gold"] < turn["gold"] - 0.01
    return 0 if turned and few[-1]["proxy"] > turn["proxy"] else 1


def comparison(prompt: str, answers: list[str]) -> dict[str, str] | None:
    """The first two answers that the rule tells apart."""
    values = [(gold(prompt, answer), answer) for answer in answers if answer]
    other = next((value for value in values if value[0] != values[0][0]), None)
    if other is None:
        return None
    better, worse = (values[0], other) if values[0][0] > other[0] else (other, values[0])
    return {"prompt": prompt, "chosen": f" {better[1]}", "rejected": f" {worse[1]}"}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def draw(curves: dict[int, list[dict]], image: Path) -> None:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    titles = {
        "gold": "gold: places that are right, by the rule",
        "proxy": "proxy: the reward model's score (standardized)",
    }
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for count, points in curves.items():
            x, y = ([point[name] for point in points] for name in ("kl", key))
            axes.plot([math.sqrt(kl) for kl in x], y, marker="o", markersize=3, label=f"{count} comparisons")
            if key == "gold":
                top = max(range(len(y)), key=y.__getitem__)
                axes.plot(math.sqrt(x[top]), y[top], marker="*", markersize=11, color=axes.lines[-1].get_color())
        axes.set(title=title, xlabel="sqrt(KL from the initial policy, nats), best of 1 to 512")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(image, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--epochs", type=float, default=2.0, help="of sft")
    parser.add_argument("--temperature", type=float, default=1.3)
    sys.exit(main(parser.parse_args()))
