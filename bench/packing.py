"""Padded batches beside flat ones with shared prompts: pairs per second of a DPO step on a CPU.

    prefuse bench packing --threads 1

Pairs whose prompts are four times as long as their answers (lengths log-normal, as in chat data), a Llama of 10 million
weights with random ones, forward and backward of trunk and head, no optimizer. Both kinds of batch are what the engine
makes of the same optimizer step; they take turns, and the ratio is the median over rounds. The ideal ratio is that of
the tokens that run: attention costs less than in proportion, the head costs both the same, and each segment of a flat
batch is a call of its own. Writes results/packing-<cpu>-<threads>-torch<version>.json and .md.
"""

from __future__ import annotations

import dataclasses
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import prefuse
from prefuse.attention import check_packing
from prefuse.bench.record import RESULTS, cpu_model, environment, markdown, slug, write_result
from prefuse.engine.config.tools import ToolParser
from prefuse.engine.data import Pair
from prefuse.engine.data.batches import Batch, Examples, collate, examples_of
from prefuse.engine.data.order import plan_epoch
from prefuse.engine.model.forward import LanguageModel, completion_logps, fused_loss
from prefuse.transformers import head_of

VOCABULARY = 8192
SHAPE = {"hidden_size": 320, "intermediate_size": 896, "num_hidden_layers": 4, "num_attention_heads": 5,
         "num_key_value_heads": 5, "max_position_embeddings": 4096}  # fmt: skip
MICROBATCH = 8  # pairs of a padded batch


def model() -> LanguageModel:
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **SHAPE)).eval()
    return LanguageModel(llama, head_of(llama), torch.device("cpu"), torch.float32, "torch")


def pairs(count: int, response: int, ratio: float) -> Examples:
    """Prompts of about `ratio * response` tokens."""
    g = torch.Generator().manual_seed(0)

    def ids(mean: float) -> list[int]:
        length = int(torch.empty(1).log_normal_(-0.08, 0.4, generator=g) * mean) + 1  # mean 1
        return torch.randint(VOCABULARY, (length,), generator=g).tolist()

    return examples_of([Pair(ids(ratio * response), ids(response), ids(response), f"{i}") for i in range(count)])


def step(lm: LanguageModel, batches: list[Batch]) -> float:
    num_items = sum(batch.num_items for batch in batches)
    loss = 0.0
    for batch in batches:
        out = fused_loss(lm, batch, prefuse.DPO(), num_items)
        out.loss.backward()
        loss += out.loss.item()
    lm.model.zero_grad()
    return loss


def batches_of(lm: LanguageModel, examples: Examples, budget: int | None) -> list[Batch]:
    """One optimizer step of all examples, in padded batches or in flat ones of so many tokens."""
    flat = dataclasses.replace(examples, padding_free=budget is not None)
    bins = None if budget is None else flat.bins(budget)
    (microbatches,) = plan_epoch(flat.lengths, MICROBATCH, len(flat) // MICROBATCH, 0, 0, bins)
    batches = [collate(flat, indices) for indices in microbatches]
    return [dataclasses.replace(batch, ref_logps=completion_logps(lm, batch)) for batch in batches]


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--response", type=int, default=64, help="mean tokens of an answer")
    parser.add_argument("--ratio", type=float, default=4.0, help="length of a prompt over that of an answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="cpu: on a machine that is busy")
    arguments = parser.parse_args()
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
    torch.set_num_threads(arguments.threads)

    lm, examples = model(), pairs(arguments.pairs, arguments.response, arguments.ratio)
    check_packing(lm.model)
    padded = batches_of(lm, examples, None)
    budget = max(batch.tokens.num_tokens for batch in padded)  # a flat batch has room for as much as the largest
    steps = {"padded": padded, "flat": batches_of(lm, examples, budget)}
    losses = {name: step(lm, batches) for name, batches in steps.items()}  # also the warm-up
    assert abs(losses["padded"] - losses["flat"]) < 1e-5, losses

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(arguments.rounds):
        for name, batches in steps.items():
            start = clock()
            step(lm, batches)
            seconds[name].append(clock() - start)
    tokens = {name: sum(batch.tokens.num_tokens for batch in batches) for name, batches in steps.items()}
    speedup = statistics.median(a / b for a, b in zip(seconds["padded"], seconds["flat"], strict=True))
    result = {
        "environment": environment(),
        "settings": vars(arguments) | {"model": SHAPE, "vocabulary": VOCABULARY, "tokens_per_flat_batch": budget},
        "unshared_tokens": sum(batch.num_tokens for batch in padded),
        "variants": {
            name: {"passes": len(steps[name]), "tokens": tokens[name], "seconds": statistics.median(times),
                   "fastest": min(times), "pairs_per_second": len(examples) / statistics.median(times)}
            for name, times in seconds.items()
        },
        "speedup": speedup,
        "ideal": tokens["padded"] / tokens["flat"],
    }  # fmt: skip
    name = f"packing-{slug(cpu_model())}-{arguments.threads}threads-torch{torch.__version__.split('+')[0]}"
    rows = [
        [name, str(v["passes"]), str(v["tokens"]), f"{v['seconds']:.2f}", f"{v['pairs_per_second']:.2f}"]
        for name, v in result["variants"].items()
    ]
    text = markdown(["batches", "passes", "tokens run", "s per step", "pairs/s"], rows)
    text += f"\nSpeed-up {speedup:.2f} (median of rounds); tokens run {result['ideal']:.2f} times fewer.\n"
    write_result(RESULTS / f"{name}.json", "packing", result)
    (RESULTS / f"{name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
