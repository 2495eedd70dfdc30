"""What the compiler makes of every kernel in every tile of the table, as JSON: to compare before and after a change.

    python tests/lib/resources.py --out before.json
    python tests/lib/resources.py --compare before.json       # names each kernel that differs, and exits 1

Of each kernel: registers, spills, shared memory, matrix instructions, and a sha256 of its machine code (SASS, or AMD's
assembly, without lines and file names). No GPU is needed. It takes every row of tiles.toml with all that runs in it,
the paths of these chips that have no rows of their own, and the kernels without a tile. On two idle cores that is some
five minutes; `--chips sm_90 gfx942` takes some chips alone.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import re
import sys
from pathlib import Path

import torch

CHIPS = (80, 90, 100, 120, "gfx942")
DTYPES = {"half": torch.bfloat16, "float32": torch.float32}
# (chip, dtype, operands by descriptor) that run in another chip's rows, or in another dtype than the rows' own.
BORROWED = [
    (90, torch.bfloat16, False),
    (90, torch.float16, True),
    (90, torch.float32, False),
    (120, torch.bfloat16, False),
    (120, torch.float32, False),
]


def jobs(chips: list) -> list[tuple]:
    """(chip, dtype, descriptors, kernel's name, D, V); for a kernel without a tile (chip, its name)."""
    from prefuse.kernels.tiles.shipped import TAIL_VARIANTS, shipped, users
    from prefuse.kernels.tiles.table import TABLE, read

    made = []
    for row in read(TABLE):
        place = (row.chip, DTYPES[row.dtype], row.config.descriptors)
        made += [(*place, kernel.name, row.min_d, row.min_v) for kernel in users(row)]
    made += [(*path, kernel.name, 4096, 128256) for path in BORROWED for kernel in shipped(*path)]
    made += [(chip, name) for chip in CHIPS for name in TAIL_VARIANTS]
    return [job for job in dict.fromkeys(made) if job[0] in chips]


def compiled(job: tuple) -> tuple[str, dict]:
    """Its key, and what the compiler made of it. Runs where Triton's interpreter is off."""
    from prefuse.kernels.tiles import aot, shipped
    from prefuse.kernels.tiles.table import chip_name

    seen = []

    def resources(made: aot.Compiled) -> aot.Resources:
        seen.append(made)
        return aot.resources(made)

    shipped.resources = resources  # to get at the machine code
    chip, *rest = job
    if len(job) == 2:
        found, key = shipped.compile_tail(*job), f"{chip_name(chip)} / {rest[0]}"
    else:
        dtype, descriptors, name, d, v = rest
        c = next(k for k in shipped.shipped(*job[:3], d, v) if k.name == name).config
        tile = f"{c.block_n}x{c.block_v}x{c.block_d} w{c.warps} s{c.stages}{' halves' if c.halves else ''}"
        operands = "descriptors" if descriptors else "pointers"
        key = f"{chip_name(chip)} / {name} / {dtype} {operands} D>={d} V>={v} / {tile}"
        found = shipped.compile_shipped(*job)
    return key, dataclasses.asdict(found) | {"code": code(seen[-1])}


def code(made) -> str:
    """sha256 of the instructions."""
    from prefuse.kernels.tiles import aot

    if "cubin" in made.kernel.asm:
        lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/.*?;", aot._disassemble(made.kernel.asm["cubin"]), re.MULTILINE)
    else:
        lines = re.findall(r"^\t[a-z][^;\n]*", made.kernel.asm["amdgcn"], re.MULTILINE)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def main() -> int:
    from aot_worker import compiling_processes
    from prefuse.kernels.tiles.table import chip_name

    names = {chip_name(chip): chip for chip in CHIPS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file to write to")
    parser.add_argument("--compare", type=Path, help="JSON file of another run")
    parser.add_argument("--chips", nargs="+", choices=names, default=list(names))
    arguments = parser.parse_args()
    before = json.loads(arguments.compare.read_text()) if arguments.compare else None
    asked = jobs([names[name] for name in arguments.chips])
    found = {}
    with compiling_processes(2) as pool:
        for i, (key, made) in enumerate(pool.map(compiled, asked), 1):
            found[key] = made
            summary = f"registers {made['registers']}  spills {made['spill_bytes']}  shared {made['shared']}"
            print(f"{i}/{len(asked)}  {key}: {summary}  code {made['code'][:16]}", flush=True)
    assert len(found) == len(asked), "no two kernels have one key"
    found = json.loads(json.dumps(found))  # as it is read back
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if before is None:
        return 0
    before = {key: made for key, made in before.items() if key.split(" / ")[0] in arguments.chips}
    wrong = [key for key in before | found if before.get(key) != found.get(key)]
    print("\n".join(f"differs: {key}" for key in wrong) or f"all {len(found)} kernels are the same")
    return 1 if wrong else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    sys.exit(main())
