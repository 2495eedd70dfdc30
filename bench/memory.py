"""Peak memory of every implementation's forward and backward, by tokens and by vocabulary.

    prefuse bench memory                              # three numbers of tokens, three vocabularies
    prefuse bench memory --device cuda --dtypes bfloat16 --tokens_each 2048 8192 --vocabularies 128256 --dim 4096

The most that torch's allocator held at once beyond hidden states, head and targets, gradients included: on a CPU as the
profiler counts it, which is the same number on every machine. `peak_mib_beyond_gradients` leaves out the gradients that
the mode asks for, which nobody can save. An implementation that is wrong has no row here; `prefuse bench head` says so.
"""

from __future__ import annotations

import functools
import itertools

import torch

from prefuse.bench.head import Row, device_environment, first_line, leaves, one_step, peers, result_path
from prefuse.bench.implementations import IMPLEMENTATIONS, MODES, HeadInputs, absence, applies, draw, reference
from prefuse.bench.record import write_result
from prefuse.bench.timing import peak_bytes
from prefuse.engine.config.tools import ToolParser

MIB = 2**20


def gradients_bytes(x: HeadInputs, mode: str) -> int:
    return sum(getattr(x, name).numel() * getattr(x, name).element_size() for name in MODES[mode])


def measure_one(name: str, inputs: HeadInputs, mode: str, loss_type: str) -> dict[str, float]:
    reference(name, inputs)
    x = leaves(inputs, mode)
    step = functools.partial(one_step, name, x, loss_type)
    step()  # imports, caches and compilation are no part of it
    x.hidden.grad = x.weight.grad = None
    peak = peak_bytes(step, x.hidden.device.type)
    return {"peak_mib": peak / MIB, "peak_mib_beyond_gradients": (peak - gradients_bytes(x, mode)) / MIB}


def main() -> int:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens_each", type=int, nargs="+", default=[256, 512, 1024], metavar="N")
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8000, 16000, 32000], metavar="V")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=("float32",))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=("frozen", "trainable"))
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--loss_type", choices=("logps", "sft", "dpo", "kto"), default="dpo")
    parser.add_argument("--tokens", type=int, default=64, help="of a sequence (default 64)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="", help="a word for the name of the result's file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    largest = (max(arguments.tokens_each), max(arguments.vocabularies))
    # Each axis alone, and both at their largest: the growth is seen, the grid is not paid for.
    shapes = {(n, largest[1]) for n in arguments.tokens_each} | {(largest[0], v) for v in arguments.vocabularies}
    rows: list[Row] = []
    for (n, v), dtype in itertools.product(sorted(shapes), arguments.dtypes):
        inputs = draw(n, arguments.dim, v, arguments.tokens, getattr(torch, dtype), arguments.device, arguments.seed)
        for mode, name in itertools.product(arguments.modes, arguments.implementations):
            if absence(name) or not applies(name, arguments.loss_type):
                continue
            row: Row = {"shape": f"{n}x{arguments.dim}x{v}", "dtype": dtype, "mode": mode, "implementation": name}
            try:
                row |= measure_one(name, inputs, mode, arguments.loss_type)
            except Exception as error:  # a peer that fails is a line, and no more
                row["error"] = first_line(error)
            rows.append(row)
            print(f"{' '.join(map(str, row.values()))}", flush=True)
    found = {"environment": device_environment(arguments.device), "settings": vars(arguments), "table": rows}
    looked = peers(arguments.implementations, rows)
    write_result(result_path("memory", arguments), "memory", found, seed=arguments.seed, peers=looked)
    return int(any("error" in row for row in rows if row["implementation"].startswith("prefuse")))
