"""What every benchmark writes down about where it ran, and how a table is printed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).with_name("checkout.py")
_IN_CHECKOUT = Path(__file__).with_name("results")
RESULTS = _IN_CHECKOUT if _IN_CHECKOUT.is_dir() else Path("bench-results")  # an installed package has none
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
PACKAGES = ("torch", "triton", "prefuse", "trl", "transformers", "liger-kernel", "cut-cross-entropy")


def again(verb: str) -> list[str]:
    """The command that runs a verb in a process of its own, installed or not."""
    return [sys.executable, str(CHECKOUT), verb]


def environment() -> dict[str, Any]:
    """Versions, processor, threads, and how busy the machine was."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "cpu": cpu_model(),
        "vector_units": vector_units(),
        "cpu_threads": torch.get_num_threads(),
        "load_average": [round(x, 2) for x in os.getloadavg()],
    }


def cpu_model() -> str:
    found = re.search(r"model name\s*:\s*(.*)", _cpuinfo())
    return found[1].replace("(R)", "").strip() if found else platform.processor() or platform.machine()


def vector_units() -> list[str]:
    """The vector extensions of the CPU, on which the speed of a matrix product depends."""
    found = re.search(r"flags\s*:\s*(.*)", _cpuinfo())
    return [x for x in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if found and x in found[1].split()]


def _cpuinfo() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def slug(text: str) -> str:
    """A file name's part."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def write_json(path: Path, result: dict[str, Any]) -> None:
    """Whole at any time, so that a run cut short leaves the rows so far."""
    write_text(path, json.dumps(result, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(text)
    aside.replace(path)


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, padded so that it reads as plain text too."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        first, *others = (
            f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "| " + " | ".join([first, *others]) + " |"

    rule = "| " + " | ".join("-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)) + " |"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
