"""Every causal LM of the installed transformers, tiny and stirred, through all that this library does with a model.

    prefuse bench architectures                             # all of them: half an hour of CPU time
    prefuse bench architectures --only llama mixtral
    prefuse bench architectures --results sweep.jsonl       # what is in the file is kept: a sweep in parts
    prefuse bench architectures --checks engine lora        # two steps of `prefuse train`: most of the time

Each type is examined in a process of its own with a time limit, so that no failure ends the sweep. It prints one line a
type: right, refused with the reason, or WRONG; a sweep over all types, without --checks, writes
results/architectures.json, of which `prefuse bench figures` makes docs/architectures.md. The exit status is 1 if
anything is WRONG.
"""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from pathlib import Path

from prefuse.bench.record import RESULTS, environment, write_result
from prefuse.bench.tried import line_of, verdict
from prefuse.engine.config.tools import ToolParser


def main() -> int:
    parser = ToolParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types, as in config.json")
    parser.add_argument("--checks", nargs="+", metavar="CHECK", help="some of the checks (default: all)")
    parser.add_argument("--seconds", type=int, default=300, help="for each type")
    parser.add_argument("--results", type=Path, help="a .jsonl that keeps results: those in it are not run again")
    options = parser.parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    import torch

    from prefuse.bench.architecture_checks import CHECKS, RUNS, examine
    from prefuse.bench.tiny_models import causal_types

    torch.set_num_threads(1)
    checks = options.checks or list(CHECKS | RUNS)
    types = causal_types()
    unknown = [name for name in options.only or () if name not in types] + [c for c in checks if c not in CHECKS | RUNS]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    examine("llama", checks)  # imports once, before the processes fork, what each of them needs
    found = _kept(options.results)
    before = [kind for kind in types if kind in found]
    for kind in options.only or types:
        missing = [] if found.keys() & {kind} and "model" in found[kind] else checks
        missing = [check for check in missing if check not in found.get(kind, {})]
        if missing:
            result = _in_a_process(kind, missing, options.seconds)
            found[kind] = found.get(kind, {}) | result
            _keep(options.results, kind, result)
        print(f"{kind:<28} {line_of(found[kind])}", flush=True)
    if not options.only and not options.checks:
        abouts = {name: (check.__doc__ or "").strip().splitlines()[0] for name, check in (CHECKS | RUNS).items()}
        result = {"environment": environment(), "settings": {"seconds": options.seconds}, "checks": abouts}
        path = RESULTS / "architectures.json"
        said = f"{len(before)} types were tried before, in part or whole; what was kept of them was not tried again."
        result["types"] = {kind: found[kind] for kind in types}
        write_result(path, "architectures", result, seed=None, notes=[said] if before else [])
        print(f"wrote {path}; prefuse bench figures makes docs/architectures.md of it")
    return int(any(verdict(result) == "WRONG" for result in found.values()))


def _kept(file: Path | None) -> dict[str, dict[str, str]]:
    if file is None or not file.exists():
        return {}
    found: dict[str, dict[str, str]] = {}
    for line in file.read_text().splitlines():
        kind, result = json.loads(line)
        found[kind] = found.get(kind, {}) | result
    return found


def _keep(file: Path | None, kind: str, result: dict[str, str]) -> None:
    if file is not None:
        with file.open("a") as out:
            out.write(json.dumps([kind, result]) + "\n")


def _in_a_process(kind: str, checks: list[str], seconds: int) -> dict[str, str]:
    """`examine` in a fork, which has imported everything; an alarm ends it."""
    from prefuse.bench.architecture_checks import examine

    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(seconds)
        result = examine(kind, checks)
        os.write(write, json.dumps(result).encode())
        os._exit(0)
    os.close(write)
    started = time.monotonic()
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    if not said:
        late = time.monotonic() - started >= seconds - 1
        return {"process": f"WRONG: {f'took more than {seconds} s' if late else 'its process died'}"}
    return json.loads(said)
