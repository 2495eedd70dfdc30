"""The rooms of the house: who imports whom, no circles, and sizes that a reader can take in (docs/architecture.md)."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"kernels": "prefuse.kernels", "bindings": "prefuse", "engine": "prefuse.engine", "bench": "prefuse.bench"}


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
