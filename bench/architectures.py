"""Every causal LM of the installed transformers, tiny and stirred, through all that this library does with a model.

    prefuse bench architectures                             # all of them: half an hour of CPU time
    prefuse bench architectures --only llama mixtral
    prefuse bench architectures --results sweep.jsonl       # what is in the file is kept: a sweep in parts
    prefuse bench architectures --checks engine lora        # two steps of `prefuse train`: most of the time

Each type is examined in a process of its own with a time limit, so that no failure ends the sweep. It prints one line a
type: right, refused with the reason, or WRONG; a sweep over all types, without --checks, writes docs/architectures.md
and results/architectures.json. The exit status is 1 if anything is WRONG.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
import warnings
from pathlib import Path

from prefuse.bench.checkout import ROOT
from prefuse.bench.record import RESULTS, environment, write_result

PAGE = ROOT / "docs" / "architectures.md"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    for kind in options.only or types:
        missing = [] if found.keys() & {kind} and "model" in found[kind] else checks
        missing = [check for check in missing if check not in found.get(kind, {})]
        if missing:
            result = _in_a_process(kind, missing, options.seconds)
            found[kind] = found.get(kind, {}) | result
            _keep(options.results, kind, result)
        print(f"{kind:<28} {line_of(found[kind])}", flush=True)
    if not options.only and not options.checks:
        PAGE.write_text(page(types, found), encoding="utf-8")
        result = {"environment": environment(), "settings": {"seconds": options.seconds}, "types": found}
        write_result(RESULTS / "architectures.json", "architectures", result, seed=None)
        print(f"wrote {PAGE}")
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


def verdict(result: dict[str, str]) -> str:
    """The worst outcome of a type's checks."""
    words = {text.split(":")[0] for text in result.values()}
    return next((word for word in ("WRONG", "refused", "no truth") if word in words), "right")


def line_of(result: dict[str, str]) -> str:
    """`right`, or what is not, each reason once with the checks it belongs to."""
    reasons: dict[str, list[str]] = {}
    for check, text in result.items():
        if text != "right":
            reasons.setdefault(text, []).append(check)
    return "; ".join(f"{', '.join(names)} {text}" for text, names in reasons.items()) or "right"


def page(types: dict[str, str], found: dict[str, dict[str, str]]) -> str:
    """docs/architectures.md."""
    import torch
    import transformers

    from prefuse.bench.architecture_checks import CHECKS, RUNS

    checks = CHECKS | RUNS
    count = {word: sum(verdict(found[kind]) == word for kind in types) for word in ("right", "refused", "no truth")}
    wrong = len(types) - sum(count.values())
    lines = [
        "# Which models run, tried one by one",
        "",
        f"`prefuse bench architectures` wrote this page with transformers {transformers.__version__} and torch "
        f"{torch.__version__}: every type of `AutoModelForCausalLM`, {len(types)} of them, made tiny, with stirred "
        "weights, windows and chunks shorter than the sequences, in float64 on a CPU (`engine` and `lora` in float32).",
        "",
        *(f"* `{name}`: {(check.__doc__ or '').strip().splitlines()[0]}" for name, check in checks.items()),
        "",
        f"{count['right']} types are right in all, {count['refused']} are refused in part or whole, each by one line "
        f"that says why, {count['no truth']} could not be compared (their own forward does not run so), {wrong} are "
        "wrong.",
        "",
        "| type | " + " | ".join(checks) + " | why |",
        "|---|" + "---|" * (len(checks) + 1),
    ]
    for kind in types:
        result = found[kind]
        words = [result.get(name, next(iter(result.values()))).split(":")[0] for name in checks]
        marks = ["yes" if word == "right" else word for word in words]
        why = "" if verdict(result) == "right" else line_of(result).replace("|", "\\|")
        lines.append(f"| {kind} | {' | '.join(marks)} | {why} |")
    return "\n".join(lines) + "\n"
