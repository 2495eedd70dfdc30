"""How near the portable head is to its own bare matrix products, as one number a pass: what a change may not worsen.

    prefuse bench guard             # measures, and compares with guard.json; exit status 1 if 10% are lost
    prefuse bench guard --write     # on purpose, after a change that is worth it

One thread, seconds of this process. Products and head take turns, and the least of each over the rounds counts: what
else the machine does can only add to a time. `tests/bench/test_guard.py` measures up to three times and takes the best.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from prefuse.bench.cpuhead import OwnGemms, TimedHead, run_logps
from prefuse.bench.record import write_json
from prefuse.bench.timing import interleaved
from prefuse.engine.config.tools import ToolParser

SHAPE = (512, 512, 8000)  # N, D, V: products large enough to be at their full speed, in tenths of a second
LOSS = 0.10  # of the ratio that may be lost
COMMITTED = Path(__file__).with_name("guard.json")
PASSES = {"forward": False, "forward+backward": True}


def measure(rounds: int = 7) -> dict[str, float]:
    """Time of the own bare products over that of the head, by pass: 1 is as fast as its products."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        x = TimedHead.draw(*SHAPE)
        own, found = OwnGemms(x), {}
        for name, backward in PASSES.items():
            runs = {
                "products": lambda backward=backward: own.run(backward),
                "head": lambda backward=backward: run_logps("prefuse", x, backward),
            }
            seconds = interleaved(runs, rounds)
            found[name] = min(seconds["products"]) / min(seconds["head"])
    finally:
        torch.set_num_threads(threads)
    return found


def lost(found: dict[str, float], committed: dict[str, float]) -> list[str]:
    """Passes whose ratio fell by more than LOSS, in words."""
    return [
        f"{name}: {found[name]:.3f} of its products' speed, {ratio:.3f} is committed"
        for name, ratio in committed.items()
        if found[name] < (1 - LOSS) * ratio
    ]


def committed() -> dict[str, float]:
    return json.loads(COMMITTED.read_text(encoding="utf-8"))["ratios"]


def main() -> int:
    parser = ToolParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="commit to what is measured now")
    arguments = parser.parse_args()
    found = measure(arguments.rounds)
    print(", ".join(f"{name} {ratio:.3f}" for name, ratio in found.items()))
    if arguments.write:
        write_json(COMMITTED, {"shape": SHAPE, "ratios": {name: round(ratio, 3) for name, ratio in found.items()}})
        return 0
    worse = lost(found, committed())
    print("\n".join(worse) or "nothing is lost")
    return int(bool(worse))
