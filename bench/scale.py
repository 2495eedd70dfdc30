"""How the head's time and memory grow with tokens, vocabulary and ranks: measured, and the exponents fitted.

    prefuse bench scale

Log-probabilities and their gradients, everything trained, on one thread of a CPU each. Tokens and vocabulary double,
one at a time; ranks share the head, each with its own rows of it (`vocab_group=`, gloo), and the slowest rank counts.
The exponent is the slope of a straight line through the logarithms (numpy's polyfit), `residual` the largest distance
from it: 1 is work in proportion, 0 none of its business, and -1 on ranks a work that is shared without loss.
"""

from __future__ import annotations

import functools
import multiprocessing
import socket
import statistics
from typing import Any

import numpy as np
import torch

from prefuse.bench.head import Row, device_environment, first_line, leaves, one_step, peers, result_path
from prefuse.bench.implementations import IMPLEMENTATIONS, HeadInputs, absence, applies, draw
from prefuse.bench.record import write_result
from prefuse.bench.timing import interleaved, peak_bytes, seconds_of
from prefuse.engine.config.tools import ToolParser

D, TOKENS = 128, 64
LENGTHS = (256, 512, 1024)  # N, at V_FIXED
VOCABULARIES = (4000, 8000, 16000)  # V, at N_FIXED
N_FIXED, V_FIXED = 512, 8000
RANKS = (1, 2, 4)  # gloo, one thread each
CHOSEN = ("prefuse", "prefuse, kept", "TRL", "HALOs, DPO repository (eager)", "Liger scaled CE")


def measure_sizes(what: str, shapes: list[tuple[int, int]], names: list[str], rounds: int, seed: int) -> list[Row]:
    """Milliseconds and MiB beyond the inputs at each (N, V)."""
    rows = []
    for n, v in shapes:
        x = draw(n, D, v, TOKENS, torch.float32, "cpu", seed)
        steps = {name: functools.partial(one_step, name, leaves(x, "trainable"), "logps") for name in names}
        seconds = interleaved(steps, rounds)
        for name, step in steps.items():
            row: Row = {"what": what, "implementation": name, "size": n if what == "tokens" else v}
            rows.append(row | {"ms": 1e3 * statistics.median(seconds[name]), "peak_mib": peak_bytes(step) / 2**20})
            print(rows[-1], flush=True)
    return rows


# ------------------------------------------------------------------------------------------ ranks


def step_on_rank(rank: int, ranks: int, port: int, rounds: int, seed: int, answers: Any) -> None:
    """Seconds of every round, and the peak, of one rank's own rows of the head."""
    import torch.distributed as dist

    import prefuse

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    x: HeadInputs = draw(N_FIXED, D, max(VOCABULARIES), TOKENS, torch.float32, "cpu", seed)
    own = x.weight.tensor_split(ranks)[rank].clone().requires_grad_()
    hidden = x.hidden.clone().requires_grad_()

    def step() -> None:
        hidden.grad = own.grad = None
        logps = prefuse.linear_logprobs(hidden, own, x.targets, vocab_group=dist.group.WORLD)
        logps.backward(x.grad)

    step()
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        seconds.append(seconds_of(step))
    answers.put((rank, seconds, peak_bytes(step), hidden.grad.norm().item()))
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def measure_ranks(rounds: int, seed: int) -> list[Row]:
    rows, norms = [], []
    context = multiprocessing.get_context("spawn")
    for ranks in RANKS:
        answers, port = context.Queue(), free_port()
        arguments = [(rank, ranks, port, rounds, seed, answers) for rank in range(ranks)]
        processes = [context.Process(target=step_on_rank, args=given) for given in arguments]
        for process in processes:
            process.start()
        found = [answers.get(timeout=300) for _ in processes]
        for process in processes:
            process.join()
        slowest = statistics.median(max(at) for at in zip(*(seconds for _, seconds, _, _ in found), strict=True))
        peak = max(peak for _, _, peak, _ in found) / 2**20
        rows.append(
            {"what": "ranks", "implementation": "prefuse", "size": ranks, "ms": 1e3 * slowest, "peak_mib": peak}
        )
        norms += [norm for *_, norm in found]
        print(rows[-1], flush=True)
    if max(norms) - min(norms) > 1e-4 * max(norms):
        raise SystemExit(f"the gradient of the hidden states depends on the ranks: norms {norms}")
    return rows


# ------------------------------------------------------------------------------------------ exponents


def fit(sizes: list[float], numbers: list[float]) -> tuple[float, float]:
    """(slope, largest distance) of the line through the logarithms."""
    x, y = np.log(sizes), np.log(numbers)
    line = np.polyfit(x, y, 1)
    return float(line[0]), float(np.abs(np.polyval(line, x) - y).max())


def fitted(rows: list[Row]) -> list[Row]:
    """Exponents of time and memory of every implementation along every axis."""
    found = []
    for what, name in dict.fromkeys((row["what"], row["implementation"]) for row in rows):
        own = [row for row in rows if (row["what"], row["implementation"]) == (what, name)]
        for measure in ("ms", "peak_mib"):
            slope, distance = fit([row["size"] for row in own], [row[measure] for row in own])
            about = {"what": f"exponent of {measure} in {what}", "implementation": name, "size": 0}
            found.append({**about, "exponent": slope, "residual": distance})
    return found


def main() -> int:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(CHOSEN))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="", help="a word for the name of the result's file")
    arguments = parser.parse_args()
    arguments.device, arguments.threads = "cpu", 1
    torch.set_num_threads(1)
    names, rows = [], []
    for name in arguments.implementations:
        try:
            if absence(name) is None and applies(name, "logps"):
                one_step(name, leaves(draw(128, D, 512, TOKENS, torch.float32, "cpu"), "trainable"), "logps")
                names.append(name)
        except Exception as error:
            rows.append({"what": "tokens", "implementation": name, "size": 0, "error": first_line(error)})
    looked = peers(arguments.implementations, rows + [{"implementation": name} for name in names])
    rows += measure_sizes("tokens", [(n, V_FIXED) for n in LENGTHS], names, arguments.rounds, arguments.seed)
    rows += measure_sizes("vocabulary", [(N_FIXED, v) for v in VOCABULARIES], names, arguments.rounds, arguments.seed)
    rows += measure_ranks(arguments.rounds, arguments.seed)
    settings = vars(arguments) | {"D": D, "N": N_FIXED, "V": V_FIXED, "V_of_ranks": max(VOCABULARIES)}
    table = rows + fitted([row for row in rows if "ms" in row])
    found = {"environment": device_environment("cpu"), "settings": settings, "table": table}
    path = result_path("scale", arguments)
    write_result(path, "scale", found, seed=arguments.seed, peers=looked)
    return 0
