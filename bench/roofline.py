"""What the fused head must take on named chips, by arithmetic: a prediction from data sheets, never a measurement.

    N tokens, D hidden, V vocabulary; one product of N * D * V is 2NDV operations; numbers are bf16, sums float32

A pass takes at least the longer of two times: its operations at the dense bf16 rate, or its bytes at the memory's
bandwidth. Bytes are what the launchers report (prefuse.kernels.cost): every operand read once, every result written
once, sums over slices of the vocabulary read and written once a slice, and nothing kept in a cache between passes.
`prefuse bench figures` writes docs/roofline.md's tables and its figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from prefuse.bench.record import markdown
from prefuse.kernels.slices import BUFFER_BYTES
from prefuse.kernels.tiles.heads import RELEASED_HEADS
from prefuse.kernels.tiles.report import DATA_SHEETS, DataSheet

TOKENS = 8192
GPUS = sorted([*DATA_SHEETS.values(), DataSheet("H200 SXM", 989, 4.8)], key=lambda sheet: sheet.tflops)
# Vendors' numbers, without sparsity.
SOURCES = {
    "A100 80 GB SXM": "NVIDIA A100 Tensor Core GPU datasheet",
    "L40S": "NVIDIA L40S datasheet, half of the rate with sparsity",
    "H100 SXM": "NVIDIA H100 datasheet, half of the rate with sparsity",
    "H200 SXM": "NVIDIA H200 datasheet, half of the rate with sparsity",
    "B200": "NVIDIA HGX B200 datasheet, half of the rate with sparsity",
    "RTX 5090": "NVIDIA RTX Blackwell GPU architecture whitepaper, float32 accumulation",
    "MI300X": "AMD Instinct MI300X datasheet",
}
MODELS = ("Llama-3-8B", "Qwen2.5-7B", "Gemma-3-4B", "SmolLM2-1.7B", "SmolLM2-135M")
MODES = {
    "no grad": ("fold",),
    "frozen": ("fold and direction", "dhidden"),
    "trainable, kept": ("fold and keep", "dhidden", "dweight"),
    "trainable": ("fold", "dlogits", "dhidden", "dweight"),
}


@dataclass(frozen=True)
class Pass:
    """One product of N * D * V and what is moved for it."""

    operations: int
    bytes: int

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.operations / self.bytes

    def seconds(self, gpu: DataSheet) -> float:
        return max(self.operations / (gpu.tflops * 1e12), self.bytes / (gpu.tb_per_s * 1e12))

    def binds(self, gpu: DataSheet) -> str:
        return "compute" if self.intensity >= ridge(gpu) else "memory"


def ridge(gpu: DataSheet) -> float:
    """Operations a byte above which the chip's products are what takes the time."""
    return gpu.tflops / gpu.tb_per_s


def columns(n: int) -> int:
    """Of the backward's slice: as many as leave N rows of dlogits within the buffer."""
    return max(1, BUFFER_BYTES // (2 * n))


def passes(n: int, d: int, v: int) -> dict[str, Pass]:
    """What each pass multiplies and moves."""
    slices = math.ceil(v / columns(n))
    operands, tile, sums = 2 * d * (n + v), 2 * n * v, 8 * n
    moved = {
        "fold": operands + sums,  # W and hidden -> a maximum and a sum for each row
        "fold and direction": operands + tile + sums,  # the same, and unnormalised weights in bf16
        "fold and keep": operands + tile + sums,
        "dlogits": operands + tile,
        "dhidden": tile + 2 * v * d + 8 * n * d * slices,  # the float32 sum is read and written for each slice
        "dweight": tile + 2 * n * d * slices + (4 + 4 + 2) * v * d,  # a float32 slice, then cast
    }
    return {name: Pass(2 * n * d * v, count) for name, count in moved.items()}


def seconds(mode: str, gpu: DataSheet, n: int, d: int, v: int) -> float:
    found = passes(n, d, v)
    return sum(found[name].seconds(gpu) for name in MODES[mode])


def fewest_tokens(gpu: DataSheet, d: int, v: int) -> int | None:
    """The smallest N, in steps of 32, from which the forward's products take longer than its bytes; None: never."""
    return next((n for n in range(32, 65537, 32) if passes(n, d, v)["fold"].binds(gpu) == "compute"), None)


# ------------------------------------------------------------------------------------------ pages


def heads() -> list[tuple[str, int, int]]:
    """(model, D, V)"""
    return [(name, RELEASED_HEADS[name].d, RELEASED_HEADS[name].v) for name in MODELS]


def chips_table(_: Any) -> str:
    rows = [[gpu.gpu, f"{gpu.tflops:g}", f"{gpu.tb_per_s:g}", f"{ridge(gpu):.0f}", SOURCES[gpu.gpu]] for gpu in GPUS]
    return markdown(["chip", "bf16 TFLOP/s", "TB/s", "ridge, FLOP/byte", "source"], rows)


def passes_table(_: Any) -> str:
    gpu, rows = DATA_SHEETS[90], []
    for model, d, v in heads():
        for name, one in passes(TOKENS, d, v).items():
            if name == "fold and keep":
                continue  # moves what "fold and direction" moves
            rows.append([
                f"{model}, {name}", f"{one.operations / 1e12:.2f}", f"{one.bytes / 1e9:.2f}", f"{one.intensity:.0f}",
                f"{1e3 * one.seconds(gpu):.2f}", one.binds(gpu),
            ])  # fmt: skip
    header = ["model, pass", "TFLOP", "GB moved", "FLOP/byte", f"at least ms on {gpu.gpu}", "bound by"]
    return markdown(header, rows)


def bounds_table(_: Any) -> str:
    rows = []
    for model, d, v in heads():
        for gpu in GPUS:
            found = passes(TOKENS, d, v)
            times = [f"{1e3 * seconds(mode, gpu, TOKENS, d, v):.1f}" for mode in MODES]
            slow = [name for name in MODES["trainable"] if found[name].binds(gpu) == "memory"]
            fewest = fewest_tokens(gpu, d, v)
            rows.append([f"{model}, {gpu.gpu}", *times, ", ".join(slow) or "none", str(fewest or "never")])
    header = [
        "model, chip",
        *(f"{mode}, ms" for mode in MODES),
        "memory-bound passes",
        "forward compute-bound from N =",
    ]
    return markdown(header, rows)


def draw(figure: Any, _: Any) -> None:
    """Roofs of the chips, and where each model's passes stand under the H100's."""
    import numpy as np

    from prefuse.bench.plots import MARKS, PEERS

    axes, x = figure.subplots(), np.logspace(1, 4.3, 200)
    for gpu, color in zip(GPUS, PEERS, strict=True):
        axes.plot(x, np.minimum(gpu.tflops, x * gpu.tb_per_s), color=color, linewidth=1.5, label=gpu.gpu)
    roof = DATA_SHEETS[90]
    for (model, d, v), mark in zip(heads(), MARKS, strict=False):
        found = [one for name, one in passes(TOKENS, d, v).items() if name != "fold and keep"]
        rate = [one.operations / one.seconds(roof) / 1e12 for one in found]
        axes.plot([one.intensity for one in found], rate, mark, color="#333333", markersize=5, label=f"{model}, passes")
    axes.set(xscale="log", yscale="log", xlim=(10, 20000), ylim=(8, 4000))
    axes.set_xlabel("operations a byte of memory traffic")
    axes.set_ylabel("bf16 TFLOP/s, at most")
    title = f"Predicted, not measured: roofs by data sheet, passes of {TOKENS} tokens under the {roof.gpu}'s"
    axes.set_title(title, fontsize=11)
    axes.legend(loc="lower right", fontsize=8, ncols=2)
