"""Answers as `prefuse online` samples them, beside transformers' own batched `generate`: CPU seconds, same prompts.

    prefuse bench sampling            # 64 prompts, 16 at once, answers of very unequal length, one thread, float32

transformers' side is `generate` on left-padded batches, with the same settings and seeds, and its answers as text: what
a trainer needs of them. Both make the same tokens. The third way is use_transformers_continuous_batching, in which a
new prompt takes the place of an answer that has ended; it draws other samples, so its seconds are per token.
All by turns in one process; ratios are medians over rounds. Writes results/sampling-<cpu>-1threads-torch<version>.json
and .md.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from prefuse.bench.online import MODEL, make_model
from prefuse.bench.record import RESULTS, cpu_model, environment, markdown, slug, write_result
from prefuse.engine.config.tools import ToolParser

PROMPTS, AT_ONCE, PROMPT, ANSWER = 64, 16, (32, 128), 128  # prompts, beside each other, tokens of each, most of answers
ENDS = 400  # tokens of the vocabulary that end an answer: one in 41


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(MODEL["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w1")


def draw_prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(1)
    lengths = torch.randint(PROMPT[0], PROMPT[1] + 1, (PROMPTS,), generator=g).tolist()
    return [torch.randint(ENDS + 1, MODEL["vocab_size"], (n,), generator=g).tolist() for n in lengths]


def transformers_generate(model, tokenizer, prompts: list[list[int]], seed: int) -> list[list[int]]:
    """As its documentation has it: padding on the left, one call a batch, cut at the token that ends an answer."""
    answers = []
    tokenizer.padding_side = "left"
    for number, start in enumerate(range(0, len(prompts), AT_ONCE)):
        torch.manual_seed(seed + number)
        batch = tokenizer.pad({"input_ids": prompts[start : start + AT_ONCE]}, return_tensors="pt")
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": ANSWER}
        out = model.generate(**batch, **settings, pad_token_id=1)[:, batch["input_ids"].shape[1] :]
        for row in out.tolist():
            end = next((i for i, token in enumerate(row) if 1 <= token <= ENDS), len(row) - 1)
            answers.append(row[: end + 1])
        tokenizer.batch_decode(out, skip_special_tokens=True)
    return answers


def measure(rounds: int) -> dict:
    from prefuse.engine.config.settings import Config
    from prefuse.engine.model.forward import LanguageModel
    from prefuse.engine.model.sampling import Shape, sample
    from prefuse.models.head import head_of

    model, tokenizer, prompts = make_model().eval(), make_tokenizer(), draw_prompts()
    model.generation_config.eos_token_id = list(range(1, ENDS + 1))
    lm = LanguageModel(model, head_of(model), torch.device("cpu"), torch.float32, Config().impl)

    def ours(seed: int, continuous: bool = False) -> list[list[int]]:
        answers = sample(lm, tokenizer, prompts, Shape(ANSWER), AT_ONCE, lambda n: seed + n, continuous=continuous)
        return [answer.ids for answer in answers]

    sides: dict[str, Callable[[int], list[list[int]]]] = {
        "transformers' generate": lambda seed: transformers_generate(model, tokenizer, prompts, seed),
        "prefuse": ours,
        "prefuse, continuous batching": lambda seed: ours(seed, continuous=True),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    tokens: dict[str, list[int]] = {name: [] for name in sides}
    answers = {name: side(0) for name, side in sides.items()}  # warm-up
    same = answers["prefuse"] == answers["transformers' generate"]
    for number in range(1, rounds + 1):
        for name in sorted(sides, reverse=number % 2 == 0):
            start = time.process_time()
            found = sides[name](100 * number)
            seconds[name].append(time.process_time() - start)
            tokens[name].append(sum(map(len, found)))
    cost = {name: [s / t for s, t in zip(seconds[name], tokens[name], strict=True)] for name in sides}
    ratios = {
        name: statistics.median(a / b for a, b in zip(cost["transformers' generate"], own, strict=True))
        for name, own in cost.items()
    }
    return {"seconds": seconds, "tokens": tokens, "same_tokens": same, "generate_over": ratios}


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(args.rounds)
    shape = {"prompts": PROMPTS, "at_once": AT_ONCE, "prompt": PROMPT, "answer": ANSWER, "ends": ENDS, **MODEL}
    path = RESULTS / f"sampling-{slug(cpu_model())}-1threads-torch{torch.__version__.split('+')[0]}.json"
    settings = shape | {"rounds": args.rounds}
    write_result(path, "sampling", {"environment": environment(), "settings": settings, **found}, seed=1)
    rows = [
        [
            name, f"{statistics.median(found['seconds'][name]):.2f}", f"{statistics.median(found['tokens'][name]):.0f}",
            f"{found['generate_over'][name]:.2f}",
        ]
        for name in found["seconds"]
    ]  # fmt: skip
    title = (
        f"# {PROMPTS} answers of at most {ANSWER} tokens, {AT_ONCE} at once, {MODEL['num_hidden_layers']} layers of "
        f"{MODEL['hidden_size']}, V = {MODEL['vocab_size']}, float32, {cpu_model()}, one thread, torch "
        f"{torch.__version__}, transformers {environment()['packages']['transformers']}"
    )
    table = markdown(["", "CPU seconds", "tokens", "generate's CPU seconds a token over these"], rows)
    last = "Both make the same tokens." if found["same_tokens"] else "They do not make the same tokens."
    text = "\n".join([title, "", table, "", f"{last} Medians of {args.rounds} rounds."])
    path.with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
