"""What a run is about, written once before its first step: about.json, for whoever reads the run later.

Counts and lengths of the rows, one example token by token, and the machine. Settings are in config.yaml, skipped rows
in skipped.jsonl.
"""

import os
import platform
from pathlib import Path

import torch

from prefuse.engine.data.pieces import sides_as_json, sides_of
from prefuse.engine.data.stats import quantiles
from prefuse.engine.data.table import Examples
from prefuse.engine.run.files import json_text, write_whole

ABOUT = "about.json"
MOST_TOKENS = 600  # of the shown example


def write_about(
    folder: Path, command: str, tokenizer, examples: Examples, held: Examples | None, device: torch.device
) -> None:
    shown = _shown(examples)
    about = {
        "rows": {"train": len(examples), "held_out": 0 if held is None else len(held)},
        "lengths": {
            "prompt": [float(value) for value in quantiles(examples.prompts.lengths.tolist())],
            "completion": [float(value) for value in quantiles(examples.completions.lengths.tolist())],
        },
        "chat_template": getattr(tokenizer, "chat_template", None),
        "example": {
            "row": examples.rows[shown],
            "sides": sides_as_json(sides_of(examples, shown, tokenizer, command)),
        },
        "environment": environment(device),
    }
    write_whole(folder / ABOUT, json_text(about, indent=1))


def _shown(examples: Examples) -> int:
    """The first example that is not too long to read; else the shortest."""
    for index, length in enumerate(examples.lengths[:1000].tolist()):
        if length <= MOST_TOKENS:
            return index
    return int(examples.lengths.argmin())


def environment(device: torch.device) -> dict[str, str | int | float]:
    found: dict[str, str | int | float] = {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "cpus": len(os.sched_getaffinity(0)),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "gpu_memory_gib": round(properties.total_memory / 2**30, 1)}
    return found
