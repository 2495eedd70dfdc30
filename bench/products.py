"""What a product of bfloat16 matrices costs on a CPU, and how exact it is: why the portable head takes float32.

    prefuse bench products

PyTorch has no CPU product of bfloat16 matrices with a float32 result. Three ways round it: a float32 product of the
same numbers; a product that is rounded to bfloat16; and that one with a second product of what the first lost (`addmm`
with beta -1). Errors are against float64, the largest of all logits. One thread, seconds of the process.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from prefuse.bench.record import RESULTS, cpu_model, environment, slug, write_result
from prefuse.bench.timing import interleaved, paired_ratio
from prefuse.engine.config.tools import ToolParser

N, D, V = 256, 576, 2048  # a tile of a small model's head


def float32_product(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden.float() @ weight.float().T


def rounded_product(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight.T


def two_products(hidden: Tensor, weight: Tensor) -> Tensor:
    """The second product is of the same factors, less the first, rounded: what the first lost."""
    first = hidden @ weight.T
    lost = torch.addmm(first, hidden, weight.T, beta=-1)
    return first.float() + lost.float()


WAYS = {
    "float32": float32_product,
    "rounded to bfloat16": rounded_product,
    "rounded, and what that lost": two_products,
}


def main() -> None:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    hidden = (3 * torch.randn(N, D, generator=g)).bfloat16()
    weight = (torch.randn(V, D, generator=g) / math.sqrt(D)).bfloat16()
    exact = hidden.double() @ weight.double().T
    # The factors of the float32 product are float32 before: the portable head converts a weight once for all tiles.
    factors = {name: (hidden.float(), weight.float()) if name == "float32" else (hidden, weight) for name in WAYS}
    runs = {name: lambda name=name: WAYS[name](*factors[name]) for name in WAYS}
    seconds = interleaved(runs, arguments.rounds)
    rows = [
        {"implementation": name, "ms": 1e3 * statistics.median(seconds[name]),
         "ratio_to_float32": paired_ratio(seconds, name, "float32"),
         "largest_difference": (run(*factors[name]).double() - exact).abs().max().item()}
        for name, run in WAYS.items()
    ]  # fmt: skip
    for row in rows:
        print("  ".join(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()))
    settings = {"N": N, "D": D, "V": V, "rounds": arguments.rounds, "threads": 1}
    path = RESULTS / f"products-{slug(cpu_model())}-1threads-torch{torch.__version__.split('+')[0]}.json"
    write_result(path, "products", {"environment": environment(), "settings": settings, "table": rows})
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
