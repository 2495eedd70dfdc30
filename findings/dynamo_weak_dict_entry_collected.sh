#!/bin/bash
# torch.compile of a function that looks itself up in a module's WeakKeyDictionary raises a bare IndexError when an entry
# of somebody else is collected while it compiles.
#
# Caches of what is known of each model are often kept so: a global weakref.WeakKeyDictionary, read in a forward. Dynamo
# (torch 2.13.0) traces through `setdefault` and guards every key of the dictionary by its place, list(dict.keys(...))[3].
# The places are read when the guards are built, after the backend has run. Where the garbage collector has removed a
# key meanwhile, as of a model that another part of the program has dropped, the place is not there any more. A compilation
# makes much garbage, so collections fall into it: a suite of tests that drop models met it by chance.
#
# Expected: the result of the eager function, or a new trace. Seen with torch 2.13.0, and with 2.14.1 and 2.15.0:
#   eager: 0.8415
#   compiled, others kept: 0.8415
#   compiled, others collected: IndexError: list index out of range
#
# Exit 1 if that changes. Needs python 3.11 and network access to a package index.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$work/run.py" <<'PY'
import gc
import weakref

import torch


class Model:
    pass


known = weakref.WeakKeyDictionary()
mine = Model()


def step(x):
    return x.sin() + len(known.setdefault(mine, set()))


def compiled(drop):
    """`step` compiled while three other models are known; with `drop`, the others are collected on the way."""
    torch._dynamo.reset()
    known.clear()
    others = [Model() for _ in range(3)]
    for model in (*others, mine):
        known[model] = set()

    def backend(graph, inputs):  # the backend of "eager", on a machine where a collection falls into it
        if drop:
            others.clear()
            gc.collect()
        return graph

    try:
        return f"{torch.compile(step, backend=backend)(torch.ones(1)).item():.4f}"
    except IndexError as error:
        return f"IndexError: {str(error).strip()}"


print(f"eager: {step(torch.ones(1)).item():.4f}")
print(f"compiled, others kept: {compiled(drop=False)}")
print(f"compiled, others collected: {compiled(drop=True)}")
PY
cd "$work"
seen=$("$work/venv/bin/python" run.py 2>/dev/null)
echo "$seen"
[[ $seen == "eager: 0.8415
compiled, others kept: 0.8415
compiled, others collected: IndexError: list index out of range" ]]
