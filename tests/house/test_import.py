"""Imports run one way, name only what is declared, and `import prefuse` needs torch alone."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"kernels": "prefuse.kernels", "bindings": "prefuse", "engine": "prefuse.engine"}

# What each room may import from the house, and what it may import from elsewhere when it is imported itself.
INNER = {
    "kernels": {"prefuse.kernels"},
    "bindings": {"prefuse.kernels", "prefuse"},
    "engine": {"prefuse.kernels", "prefuse", "prefuse.engine"},
}
OUTER_AT_IMPORT = {"kernels": {"torch", "triton"}, "bindings": {"torch"}}

# Adapters for a library are imported by those who have it.
NEEDS_ITS_LIBRARY = {"bindings/models/logps.py": {"transformers"}, "bindings/trl/base.py": {"trl"}}


def files_of(folder):
    return sorted((ROOT / folder).rglob("*.py"))


def imports_of(file, folder):
    """Yields (module name, whether it runs at import) for every import statement, relative ones resolved."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    deferred = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    } | {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("TYPE_CHECKING")
        for node in ast.walk(branch)
    }
    package = FOLDERS[folder].split(".") + list(file.relative_to(ROOT / folder).parent.parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # `from prefuse import kernels` names a package, `from prefuse import DPO` an attribute.
            names = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in FOLDERS.values() else base for alias in node.names
            ]
        else:
            continue
        yield from ((name, id(node) not in deferred) for name in names)


def room_of(module):
    """prefuse.kernels.logprobs.portable -> prefuse.kernels; prefuse.losses -> prefuse"""
    return max((p for p in FOLDERS.values() if f"{module}.".startswith(f"{p}.")), key=len)


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_run_one_way(folder):
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in files_of(folder)
        for module, _ in imports_of(file, folder)
        if module.split(".")[0] == "prefuse" and room_of(module) not in INNER[folder]
    ]
    assert not wrong


@pytest.mark.parametrize("folder", OUTER_AT_IMPORT)
def test_kernels_and_bindings_import_other_libraries_where_they_are_used(folder):
    wrong = []
    for file in files_of(folder):
        path = str(file.relative_to(ROOT))
        allowed = OUTER_AT_IMPORT[folder] | NEEDS_ITS_LIBRARY.get(path, set()) | sys.stdlib_module_names
        for module, at_import in imports_of(file, folder):
            if at_import and module.split(".")[0] not in allowed | {"prefuse"}:
                wrong.append(f"{path} imports {module}")
    assert not wrong


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_import_is_a_declared_dependency(folder):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    listed = project["dependencies"] + extras["train"] + ["triton"]  # torch's GPU builds bring Triton
    if folder == "bindings":
        listed = listed + extras["trl"] + extras["bench"]
    elif folder == "kernels":
        listed.append("flash-attn")  # whose build is nobody's dependency: used where it is installed
    else:
        # The same: only who asks for its optimizers, that scorer or those logs needs it, and is told so.
        listed += ["bitsandbytes", "math-verify", "tensorboard", "trackio", "wandb"]
    declared = {canonicalize_name(Requirement(line).name) for line in listed}
    distributions = packages_distributions()
    wrong = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in files_of(folder)
        for module, _ in imports_of(file, folder)
        if (top := module.split(".")[0]) not in sys.stdlib_module_names | {"prefuse"}
        and not {canonicalize_name(name) for name in distributions.get(top, [top])} & declared
    ]
    assert not wrong


def required_by(distribution, seen):
    """Adds to `seen` the names of `distribution` and of all that it requires."""
    if distribution in seen:
        return
    seen.add(distribution)
    for line in requires(distribution) or []:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            required_by(canonicalize_name(requirement.name), seen)


def test_prefuse_needs_torch_alone():
    needed = set()
    required_by("torch", needed)
    hidden = [
        module
        for module, distributions in packages_distributions().items()
        if not {canonicalize_name(name) for name in distributions} & {*needed, "prefuse"}
    ]
    assert {"numpy", "transformers", "trl"} <= set(hidden)
    assert ("triton" in hidden) == ("triton" not in needed)  # torch's CUDA builds require it
    script = """
import importlib.util
import sys

class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"{name} is hidden from this test", name=name)

sys.meta_path.insert(0, Hide())

def find_spec(name, package=None, found=importlib.util.find_spec):
    return None if name.split(".")[0] in sys.argv[1:] else found(name, package)

importlib.util.find_spec = find_spec  # who asks before importing is told the same

import torch
import prefuse

assert "torch._dynamo" not in sys.modules  # a second and more, which only torch.compile and a tolerance need

hidden = torch.randn(10, 8, requires_grad=True)
weight = torch.randn(33, 8, requires_grad=True)
cu_seqlens = torch.tensor([0, 3, 10], dtype=torch.int32)
out = prefuse.linear_preference_loss(
    hidden, weight, torch.arange(10), cu_seqlens, torch.zeros(10), loss=prefuse.DPO(beta=0.1), impl="torch"
)
out.loss.backward()
assert hidden.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0
print("done")
"""
    command = [sys.executable, "-c", script, *hidden]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "done\n"
