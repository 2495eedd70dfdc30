"""Time and error of the head's sparse backward (`gradient_tolerance`) on a trained model's hidden states.

    prefuse bench sparse --model FOLDER --data dpo.json --tokens 2048        # pairs: prompt, chosen, rejected
    prefuse bench sparse --states states.pt                                  # {"hidden", "targets", "weight", "grad"}

A random model says nothing here: what may be skipped depends on how few columns a trained softmax has left. Time is the
process's CPU time, on one thread unless told otherwise; every variant runs in turn in one process, and ratios are
paired. Errors are those of the gradients relative to float64, on the first `--rows` tokens; for comparison, what
rounding dlogits to bfloat16 costs on the same tokens, and what eager bfloat16 costs. g = dL/dlogp is +1 for chosen
tokens and -1 for rejected ones.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import prefuse
from prefuse.bench.record import RESULTS, cpu_model, environment, markdown, read_result, slug, write_result
from prefuse.bench.timing import resident
from prefuse.engine.config.tools import ToolParser
from prefuse.kernels import record_skipped_mass

KINDS = ("all weights", "frozen head")  # what is trained
Gradients = tuple[Tensor, Tensor | None]  # dhidden (N, D), dweight (V, D)


@dataclass
class States:
    """A head and the states that predict completion tokens."""

    hidden: Tensor  # (N, D)
    targets: Tensor  # (N,)
    weight: Tensor  # (V, D)
    grad: Tensor  # (N,) dL/dlogp

    def first(self, rows: int) -> States:
        return States(self.hidden[:rows], self.targets[:rows], self.weight, self.grad[:rows])


# ---------------------------------------------------------------------------------------------- the states


def states_of(folder: str, gguf_file: str | None, data: Path, tokens: int) -> States:
    """Hidden states of at least `tokens` completion tokens of a file's pairs, as many chosen sides as rejected ones."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from prefuse.transformers import trunk_hidden

    more = {} if gguf_file is None else {"gguf_file": gguf_file}
    tokenizer = AutoTokenizer.from_pretrained(folder, **more)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more).eval()
    hidden, targets, grad = [], [], []
    for prompt, *sides in pairs(data):
        for sign, side in zip((1.0, -1.0), sides, strict=True):
            start = prompt_ids(tokenizer, prompt)
            completion = tokenizer(side, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([start + completion])
            with torch.no_grad():
                states = trunk_hidden(model, ids)[0]
            hidden.append(states[len(start) - 1 : -1].clone())
            targets.append(ids[0, len(start) :])
            grad.append(torch.full((len(completion),), sign))
        if sum(map(len, targets)) >= tokens:
            break
    weight = model.get_output_embeddings().weight.detach().clone()
    return States(torch.cat(hidden), torch.cat(targets), weight, torch.cat(grad))


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    if tokenizer.chat_template is None:
        return tokenizer(prompt + "\n")["input_ids"]
    turn = [{"role": "user", "content": prompt}]
    return list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"])


def pairs(path: Path) -> Iterator[tuple[str, str, str]]:
    """prompt, chosen, rejected of each row: strings, or turns of which the last one counts."""
    for row in json.loads(path.read_text()):
        yield tuple(
            text_of(row[name]) for name in ("prompt" if "prompt" in row else "conversations", "chosen", "rejected")
        )


def text_of(value: str | dict | list) -> str:
    turn = value[-1] if isinstance(value, list) else value
    return turn if isinstance(turn, str) else turn.get("value", turn.get("content"))


# ------------------------------------------------------------------------------------------------- variants


def head(x: States, tolerance: float, trainable: bool, dtype: torch.dtype = torch.float32) -> Gradients:
    hidden, weight = (t.detach().to(dtype).requires_grad_(n) for t, n in ((x.hidden, True), (x.weight, trainable)))
    logps = prefuse.linear_logprobs(hidden, weight, x.targets, impl="torch", gradient_tolerance=tolerance)
    logps.backward(x.grad.to(logps.dtype))
    return hidden.grad, weight.grad


def trl_head(x: States, trainable: bool) -> Gradients:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    hidden, weight = x.hidden.detach().requires_grad_(), x.weight.detach().requires_grad_(trainable)
    logps = ChunkedLogProbFunction.apply(hidden, weight, None, x.targets, 1.0, 32768, None, 1.0, ())[0]
    logps.backward(x.grad)
    return hidden.grad, weight.grad


def rounded_dlogits(x: States) -> Gradients:
    """The exact gradients but for dlogits, which are rounded to bfloat16."""
    logits = x.hidden @ x.weight.T
    dz = torch.softmax(logits, -1).mul_(-x.grad[:, None])
    dz[torch.arange(len(dz)), x.targets] += x.grad
    dz = dz.bfloat16().float()
    return dz @ x.weight, dz.T @ x.hidden


def eager_bfloat16(x: States) -> Gradients:
    """bfloat16 states, weight and logits, a float32 log-softmax, bfloat16 dlogits and gradients; products add up in
    float32, as matrix units do."""

    def rounded(t: Tensor) -> Tensor:
        return t.bfloat16().float()

    hidden, weight = rounded(x.hidden), rounded(x.weight)
    dz = torch.softmax(rounded(hidden @ weight.T), -1).mul_(-x.grad[:, None])
    dz[torch.arange(len(dz)), x.targets] += x.grad
    dz = rounded(dz)
    return rounded(dz @ weight), rounded(dz.T @ hidden)


def measure_times(
    x: States, tolerances: list[float], rounds: int, trl: bool, kinds: tuple[str, ...] = KINDS
) -> dict[str, dict]:
    """{variant: CPU seconds of each round, and how many times as fast as the exact mode of the same gradients; the most
    memory beyond what was there before, gradients included}"""
    steps = {}
    for kind in kinds:
        trainable = kind == KINDS[0]
        for tolerance in (0.0, *tolerances):
            steps[f"{kind}, {name_of(tolerance)}"] = lambda t=tolerance, w=trainable: head(x, t, w)
    if trl:
        steps["all weights, TRL"] = lambda: trl_head(x, True)
    few = x.first(64)
    head(few, tolerances[0], True)  # imports and a BLAS's own memory are no part of a step
    if trl:
        trl_head(few, True)
    times: dict[str, list[float]] = {name: [] for name in steps}
    peaks: dict[str, list[int]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            before = memory_anew()
            start = time.process_time()
            step()
            times[name].append(time.process_time() - start)
            peaks[name].append(resident("VmHWM") - before)
    rows = {}
    for name, seconds in times.items():
        exact = times[f"{name.split(',')[0]}, exact"]
        speedups = [a / b for a, b in zip(exact, seconds, strict=True)]
        rows[name] = {"cpu_seconds": seconds, "times_as_fast_as_exact": statistics.median(speedups)}
        rows[name]["peak_bytes"] = min(peaks[name])
    return rows


def memory_anew() -> int:
    """The process's resident bytes now, where its peak begins anew (on Linux)."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return resident("VmHWM")


def name_of(tolerance: float) -> str:
    return "exact" if tolerance == 0.0 else f"tolerance 2^{torch.tensor(tolerance).log2().item():.4g}"


def measure_errors(x: States, tolerances: list[float]) -> dict[str, dict]:
    """{variant: errors relative to float64, and what was skipped}"""
    truth = head(x, 0.0, True, torch.float64)

    def errors(gradients: Gradients) -> dict[str, float]:
        pairs = zip(("dhidden", "dweight"), gradients, truth, strict=True)
        return {name: ((a - b).norm() / b.norm()).item() for name, a, b in pairs}

    rows = {
        "eager bfloat16": errors(eager_bfloat16(x)),
        "dlogits rounded to bfloat16": errors(rounded_dlogits(x)),
        "exact": errors(head(x, 0.0, True)),
    }
    for tolerance in tolerances:
        with record_skipped_mass(bounds=True) as record:
            gradients = head(x, tolerance, True)
        sparse = record.blocks - record.exact_blocks
        rows[name_of(tolerance)] = errors(gradients) | {
            "skipped_share": record.share, "blocks": record.blocks, "exact_blocks": record.exact_blocks,
            "kept_columns": record.kept_columns / max(sparse, 1) / len(x.weight),
            "dhidden_bound": (record.dhidden_bounds[0].norm() / truth[0].norm()).item(),
            "dweight_bound": record.dweight_bound / truth[1].norm().item(),
        }  # fmt: skip
    return rows


# --------------------------------------------------------------------------------------------------- report


def report(result: dict) -> str:
    times = [
        [
            name, f"{statistics.median(row['cpu_seconds']):.2f}", f"{row['times_as_fast_as_exact']:.2f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        for name, row in result["times"].items()
    ]  # fmt: skip
    keys = ("dhidden", "dweight", "skipped_share", "kept_columns", "dhidden_bound", "dweight_bound")
    errors = [
        [name, *(f"{row[key]:.1e}" if key in row else "" for key in keys), str(row.get("exact_blocks", ""))]
        for name, row in result["errors"].items()
    ]
    settings = result["settings"]
    shape = f"N = {settings['N']}, D = {settings['D']}, V = {settings['V']}"
    title = f"# {settings['name']}: {shape}, float32, {cpu_model()}, {settings['threads']} thread(s), CPU time"
    header = ["variant", "CPU seconds", "times as fast as exact", "peak MiB, gradients included"]
    return "\n".join(
        [
            title, "", markdown(header, times), "",
            f"Relative to float64, on the first {settings['error_rows']} tokens:", "",
            markdown(["variant", *keys, "exact blocks"], errors),
        ]
    )  # fmt: skip


def main() -> None:
    parser = ToolParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="folder of a model, with --data")
    source.add_argument("--states", type=Path, help="a file of states that --save wrote")
    parser.add_argument("--gguf_file", help="the file in the model's folder, if it is in GGUF form")
    parser.add_argument("--data", type=Path, help="JSON list of rows with prompt (or conversations), chosen, rejected")
    parser.add_argument("--tokens", type=int, default=2048, help="completion tokens to measure on (default 2048)")
    parser.add_argument("--rows", type=int, default=512, help="tokens for the errors (default 512)")
    parser.add_argument("--tolerance", type=float, nargs="+", default=[2**-8, 2**-9, 2**-10])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", help="what to call the model (default: its folder)")
    parser.add_argument("--save", type=Path, help="write the states to this file")
    parser.add_argument("--trl", action="store_true", help="time TRL's head too, all weights trained")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is trained (default: each)")
    args = parser.parse_args()
    if args.model and not args.data:
        parser.error("--model needs --data: the pairs whose completion tokens are measured")
    torch.set_num_threads(args.threads)
    if args.states:
        x = States(**torch.load(args.states, weights_only=True))
    else:
        x = states_of(args.model, args.gguf_file, args.data, args.tokens)
    if args.save:
        torch.save(vars(x), args.save)
    x = x.first(args.tokens)
    name = args.name or Path(args.model or args.states).name
    settings = {
        "name": name, "N": len(x.hidden), "D": x.hidden.shape[1], "V": len(x.weight), "threads": args.threads,
        "rounds": args.rounds, "error_rows": min(args.rows, len(x.hidden)), "tolerances": args.tolerance,
    }  # fmt: skip
    if args.trl and KINDS[0] not in args.kinds:
        parser.error(f"--trl times the head with all weights trained: add '{KINDS[0]}' to --kinds")
    path = RESULTS / f"sparse-{slug(name)}-{slug(cpu_model())}-{args.threads}threads.json"
    before = read_result(path) if path.is_file() else None
    known = before.details if before is not None and before.settings == settings else {}  # the other kind of training
    result = {"environment": environment(), "settings": settings}
    result["errors"] = known.get("errors") or measure_errors(x.first(args.rows), args.tolerance)
    times = measure_times(x, args.tolerance, args.rounds, args.trl, tuple(args.kinds))
    result["times"] = known.get("times", {}) | times
    result["load_average_after"] = [round(load, 2) for load in os.getloadavg()]
    write_result(path, "sparse", result)
    path.with_suffix(".md").write_text(report(result) + "\n")
    print(report(result))


if __name__ == "__main__":
    main()
