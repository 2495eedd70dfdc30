"""The rooms of the house: who imports whom, no circles, and sizes that a reader can take in (docs/architecture.md)."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"kernels": "prefuse.kernels", "bindings": "prefuse", "engine": "prefuse.engine", "bench": "prefuse.bench"}

OPERATIONS = ("kernels/logprobs", "kernels/kl", "kernels/preference", "kernels/attention")
KERNELS = {"kernels", *OPERATIONS}
# What every room of the engine may use.
LOW = {"engine/config", "engine/errors.py", "engine/hub.py", "engine/run/files.py"}
SAID = {"engine/report/log.py", "engine/report/clock.py", "engine/report/screen.py"}
# Room -> the rooms and files that it may import, beside itself.
MAY_IMPORT = {
    "kernels": {"kernels/tiles/table.py"},
    **{operation: {"kernels", "kernels/tiles/table.py"} for operation in OPERATIONS},
    "kernels/tiles": {*KERNELS},
    "bindings": {*KERNELS, "bindings/losses", "bindings/models"},
    "bindings/losses": set(),
    "bindings/models": {*KERNELS, "bindings"},
    "bindings/trl": {*KERNELS, "bindings", "bindings/losses", "bindings/models"},
    "bindings/liger": {*KERNELS, "bindings", "bindings/losses"},
    "engine/config": {"engine/errors.py", "engine/run/files.py", "bindings/losses"},
    "engine/data": {*LOW, *SAID, "bindings", "bindings/losses"},
    "engine/model": {
        *LOW, *SAID, "engine/data", "engine/run/ranks.py", "bindings", "bindings/losses", "bindings/models",
    },
    "engine/report": {*LOW, "engine/data/stats.py", "engine/data/pieces.py", "bindings", "bindings/losses"},
    "engine/run": {
        *LOW, "engine/data", "engine/model", "engine/report", "bindings", "bindings/losses", "bindings/models",
    },
    "engine/score": {*LOW, *SAID, "engine/data", "engine/model", "bindings", "bindings/models"},  # no run
    "engine/rounds": {
        *LOW, "engine/data", "engine/model", "engine/report", "engine/run", "engine/score", "bindings",
        "bindings/losses",
    },
    "bench/development": {"bench", "bindings", "bindings/losses"},
    "bench/truth": {*KERNELS, "bindings", "bindings/losses"},
}  # fmt: skip
CONTENTS = {"kernels/__init__.py"}  # a table of contents imports what it lists


@cache
def modules():
    """{dotted name: path from the root} of every module of the house."""
    found = {}
    for folder, package in PACKAGES.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join([package, *parts])] = file.relative_to(ROOT)
    return found


def room_of(path):
    """kernels/logprobs/portable.py -> kernels/logprobs; kernels/gemm.py -> kernels"""
    return "/".join(path.parts[: min(2, len(path.parts) - 1)])


@cache
def imports_of(path):
    """{(imported module, whether at import time)} of the house's own modules."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    later = {id(node) for part in [*functions, *checks] for node in ast.walk(part)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules() else node.module for name in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {(name, id(node) not in later) for name in names if name in modules()}
    return found


def test_no_circle_of_imports():
    graph = {name: [other for other, now in imports_of(path) if now] for name, path in modules().items()}
    done, way = set(), []

    def walk(name):
        if name in way:
            circle = [*way[way.index(name) :], name]
            pytest.fail(f"a circle of imports: {' -> '.join(circle)}")
        if name in done:
            return
        way.append(name)
        for other in graph[name]:
            walk(other)
        done.add(way.pop())

    # `import prefuse` inside the package names the table of contents, which is complete before anybody calls.
    graph = {name: [other for other in others if other != "prefuse"] for name, others in graph.items()}
    for name in graph:
        walk(name)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room):
    wrong = []
    for path in modules().values():
        if room_of(path) != room or str(path) in CONTENTS:
            continue
        for name, _ in imports_of(path):
            other = modules()[name]
            if room_of(other) != room and not {room_of(other), str(other)} & MAY_IMPORT[room]:
                wrong.append(f"{path} imports {other}")
    assert not wrong


def test_every_room_has_its_rule():
    """The stories at the top of the engine and the verbs of the benchmarks may import any room below them."""
    assert {room_of(path) for path in modules().values()} == MAY_IMPORT.keys() | {"engine", "bench"}


def test_stories_import_no_story_and_nobody_imports_the_benchmarks():
    at_the_top = {name: path for name, path in modules().items() if str(path.parent) == "engine"}
    stories = {name for name, path in at_the_top.items() if path.stem not in ("errors", "hub")}
    for name, path in modules().items():
        inside = {(other, now) for other, now in imports_of(path) if other in stories - {name, "prefuse.engine"}}
        allowed = path.stem in ("cli", "__main__") or path.parts[0] == "bench"
        assert allowed or not inside, f"{path} imports the stories {inside}"
        bench = [other for other, now in imports_of(path) if other.startswith("prefuse.bench")]
        assert not bench or path.parts[0] == "bench" or str(path) == "engine/cli.py", f"{path} imports {bench}"


# Tables, and device code that one kernel shares: a cut would part what is read together.
LONG_FILES = {"kernels/logprobs/device.py", "kernels/tiles/tune.py"}


def size_of(function):
    """Lines of a function, its signature and docstring among them."""
    return function.end_lineno - function.lineno + 1


def test_sizes_that_a_reader_can_take_in():
    """Files of at most 400 lines and functions of at most 60 in the library, test files of at most 500."""
    long = []
    for path in modules().values():
        text = (ROOT / path).read_text(encoding="utf-8")
        if path.parts[0] == "bench":
            continue
        if text.count("\n") > 400 and str(path) not in LONG_FILES:
            long.append(f"{path}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (size := size_of(node)) > 60:
                long.append(f"{path}: {node.name} has {size} lines")
    tests = list((ROOT / "tests").rglob("*.py"))
    long += [f"{path.name}: {n} lines" for path in tests if (n := path.read_text().count("\n")) > 500]
    assert not long, "\n".join(long)


# What a command runs, and its parser; the halves of an implementation that its operation calls; the names that the
# reference implementation and the padded interface give to the same thing.
SHARED_NAMES = {
    "main", "parser", "forward", "backward", "backward_measured", "backward_stashed", "backward_slices",
    "empty_forward", "linear_logprobs", "linear_kl", "preference_loss",
}  # fmt: skip


def test_a_public_name_means_one_thing():
    """No two modules of the library define one public name at their top."""
    places = {}
    for path in modules().values():
        if path.parts[0] == "bench":
            continue
        for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path))
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice.keys() - SHARED_NAMES, {name: twice[name] for name in twice.keys() - SHARED_NAMES}
    assert twice.keys() >= SHARED_NAMES
