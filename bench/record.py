"""The one form of every result: what was measured, on which device, with which versions, commit, seed and command.

    {"format": "prefuse.bench/1", "verb": "packing", "command": "prefuse bench packing --threads 1",
     "commit": "4fa5280...", "seed": 0, "device": {...}, "environment": {...}, "settings": {...}, "keys": ["batches"],
     "measures": {"pairs_per_second": {"unit": "pairs/s", "better": "higher"}}, "rows": [{...}], "peers": {},
     "notes": [], "details": {...}}

`schema.json` is that form; a file is held against it when it is written and when it is read. A verb hands its own
numbers to `write_result`, and `summaries.py` makes flat rows of them. Files from before this form are read through the
same door.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

CHECKOUT = Path(__file__).with_name("checkout.py")
ROOT = Path(__file__).resolve().parents[1]
_IN_CHECKOUT = Path(__file__).with_name("results")
RESULTS = _IN_CHECKOUT if _IN_CHECKOUT.is_dir() else Path("bench-results")  # an installed package has none
SCHEMA = Path(__file__).with_name("schema.json")
FORMAT = "prefuse.bench/1"
PACKAGES = (
    "torch", "triton", "prefuse", "trl", "transformers", "liger-kernel", "cut-cross-entropy", "fla-core",
    "quack-kernels",
)  # fmt: skip


@dataclasses.dataclass
class Record:
    """One result, as schema.json describes it."""

    verb: str
    command: str | None
    commit: str | None
    seed: int | None
    device: dict[str, Any]
    environment: dict[str, Any]
    settings: dict[str, Any]
    keys: list[str]
    measures: dict[str, dict[str, str]]
    rows: list[dict[str, Any]]
    peers: dict[str, dict[str, str | None]]
    notes: list[str]
    details: dict[str, Any]
    format: str = FORMAT
    path: Path | None = None  # where it was read from; not part of the file

    def data(self) -> dict[str, Any]:
        """What stands in the file."""
        names = ["format", *(field.name for field in dataclasses.fields(self) if field.name not in ("format", "path"))]
        return {name: getattr(self, name) for name in names}

    def key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        """What a row says was measured."""
        return tuple(row.get(name) for name in self.keys)

    @property
    def title(self) -> str:
        """One line: verb, device, versions."""
        device, packages = self.device, self.environment["packages"]
        count = device["threads"]
        threads = f", {count} thread{'s' * (count > 1)}" if count else ""
        return f"{self.verb}: {device['name']}{threads}, torch {packages['torch']}"


class BadRecord(ValueError):
    """A file that is no result, or a result in no known form."""


# ------------------------------------------------------------------------------------------ writing


def write_result(
    path: Path,
    verb: str,
    found: dict[str, Any],  # "environment", "settings" and what the verb measured, in its own form
    *,
    seed: int | None = 0,
    peers: dict[str, dict[str, str | None]] | None = None,
    notes: Sequence[str] = (),
) -> Record:
    """Makes the record, holds it against the schema, writes it whole: a run cut short leaves the rows so far."""
    from prefuse.bench.summaries import OF_THE_MACHINE

    environment = found["environment"]
    found = found | {"settings": {name: _without_folder(value) for name, value in found["settings"].items()}}
    record = made(verb, found, command(), commit(), seed, peers or {}, [*notes])
    if OF_THE_MACHINE & {measure["unit"] for measure in record.measures.values()}:
        record.notes += _busy(environment)
    check(record, str(path))
    write_json(path, record.data())
    record.path = path
    return record


def made(
    verb: str,
    found: dict[str, Any],
    command: str | None,
    commit: str | None,
    seed: int | None,
    peers: dict[str, dict[str, str | None]],
    notes: list[str],
) -> Record:
    """A record of what a verb found."""
    from prefuse.bench.summaries import KEYS, MEASURES, ROWS

    rows = ROWS[verb](found)
    used = {name for row in rows for name in row} - set(KEYS[verb])
    if unknown := used - MEASURES.keys():
        raise BadRecord(f"{verb} has measures without a unit: {sorted(unknown)}: add them to summaries.MEASURES")
    environment = found["environment"]
    return Record(
        verb, command, commit, seed, device_of(environment, found["settings"]), environment, found["settings"],
        list(KEYS[verb]), {name: dict(zip(("unit", "better"), MEASURES[name], strict=True)) for name in sorted(used)},
        rows, peers, notes, {name: x for name, x in found.items() if name not in ("environment", "settings")},
    )  # fmt: skip


def device_of(environment: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    if "gpu" in environment:
        return {"kind": "cuda", "name": environment["gpu"], "threads": None}
    if settings.get("device") == "interpreter":
        return {"kind": "interpreter", "name": environment.get("cpu") or "a CPU", "threads": None}
    threads = settings.get("threads") or environment.get("cpu_threads")
    return {"kind": "cpu", "name": _cpu_alone(environment.get("cpu") or "a CPU"), "threads": threads}


def _cpu_alone(name: str) -> str:
    """Without the vector units that early records wrote behind it."""
    return re.sub(r"( (avx|amx)\w+)+$", "", name.replace("(R)", "")).strip()


def _busy(environment: dict[str, Any]) -> list[str]:
    load, cores = environment.get("load_average"), os.cpu_count() or 1
    if not load or load[0] <= cores:
        return []
    said = "Ratios compare times of one round; times alone say little."
    return [f"The machine was shared: load average {load[0]:g} on {cores} cores. {said}"]


def _without_folder(value: Any) -> Any:
    """Of a path, the last part: folders are the machine's and no part of the measurement."""
    return Path(value).name if isinstance(value, Path) or (isinstance(value, str) and value.startswith("/")) else value


def command() -> str:
    """The command line, folders left out."""
    words = [re.sub(r"(^|=)/(?:[^/]*/)*([^/]+)/?$", r"\1\2", word) for word in sys.argv]
    name = [words[0]] if words[0].startswith("prefuse bench") else ["python", Path(sys.argv[0]).name]
    return " ".join([*name, *map(shlex.quote, words[1:])])


@functools.cache
def commit() -> str | None:
    """Of the checkout that this file stands in, as the verb began; results and docs are no part of what is measured."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        state = [*git, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results", ":!docs"]
        changed = subprocess.run(state, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changed else "")


def check(record: Record, name: str) -> None:
    """BadRecord where the record is not what schema.json says, or two rows say that they measured the same."""
    data = json.loads(json.dumps(record.data(), default=str))
    try:
        import jsonschema
    except (
        ImportError
    ):  # a GPU machine with torch and Triton alone: the file is held against the schema when it is read
        print(
            f"{name}: not validated, for jsonschema is not installed; `prefuse bench show` validates it",
            file=sys.stderr,
        )
    else:
        validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))
        if errors := sorted(validator.iter_errors(data), key=lambda error: list(map(str, error.path))):
            raise BadRecord(f"{name}: {'.'.join(map(str, errors[0].path)) or 'the file'}: {errors[0].message[:300]}")
    seen = set()
    for row in record.rows:
        if extra := row.keys() - set(record.keys) - record.measures.keys():
            raise BadRecord(f"{name}: a row has {sorted(extra)}, which are neither keys nor measures")
        if bad := [x for x in row.values() if isinstance(x, float) and not math.isfinite(x)]:
            raise BadRecord(f"{name}: {record.key(row)} has {bad[0]}, which is no measurement")
        if record.key(row) in seen:
            raise BadRecord(f"{name}: two rows have the keys {record.key(row)}")
        seen.add(record.key(row))


# ------------------------------------------------------------------------------------------ reading


def load_results(paths: Iterable[Path | str]) -> list[Record]:
    """Records of files, and of all JSON files of folders, in the order of their names. BadRecord says what is wrong."""
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.exists():
            raise BadRecord(f"{path} does not exist: expected a JSON file of bench/results, or a folder of them")
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    return [read_result(path) for path in files]


def read_result(path: Path) -> Record:
    """One file, in this form or in that of before, held against the schema."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRecord(f"{path}: {error}") from error
    if not isinstance(data, dict):
        raise BadRecord(f"{path}: expected a JSON object, found {type(data).__name__}")
    if "format" not in data:
        record = _of_before(path, data)
    elif data["format"] != FORMAT:
        raise BadRecord(f"{path}: its format is {data['format']!r}, this version reads {FORMAT!r}")
    else:
        names = {field.name for field in dataclasses.fields(Record)} - {"path"}
        if wrong := names ^ data.keys():
            raise BadRecord(f"{path}: expected the fields of schema.json; missing or unknown: {sorted(wrong)}")
        record = Record(**data)
    check(record, str(path))
    record.path = path
    return record


OLD_NAMES = {
    "cpu_head": "cpuhead", "liger_losses": "losses", "model_loss": "model",
    "real": "real", "trainers": "train", "trl_seam": "seam", "loading": "data",
}  # fmt: skip


def _of_before(path: Path, data: dict[str, Any]) -> Record:
    """Before the form, a file's verb was the first word of its name, and its commit was not kept."""
    from prefuse.bench.summaries import ROWS

    name = path.name.split("-")[0].removesuffix(".json")
    verb = OLD_NAMES.get(name, name)
    if verb not in ROWS or not {"environment", "settings"} <= data.keys():
        raise BadRecord(f"{path}: neither a record ({FORMAT}) nor a result of before it")
    try:
        return made(verb, data, None, None, 0, {}, ["Measured before records kept their commit and command."])
    except (KeyError, TypeError, AttributeError) as error:
        raise BadRecord(f"{path}: not what `prefuse bench {verb}` writes: {type(error).__name__} {error}") from error


# ------------------------------------------------------------------------------------------ the machine


def again(verb: str) -> list[str]:
    """The command that runs a verb in a process of its own, installed or not."""
    return [sys.executable, str(CHECKOUT), verb]


def environment() -> dict[str, Any]:
    """Versions, processor, threads, and how busy the machine was."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
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


def version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------ files


def slug(text: str) -> str:
    """A file name's part."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")


def write_json(path: Path, data: dict[str, Any]) -> None:
    write_text(path, json.dumps(data, indent=1, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written aside and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(text, encoding="utf-8")
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
