"""The wheel, installed elsewhere, is whole.

An editable install, as the other tests use, hides what pyproject.toml does not list under `packages`.
"""

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"bindings": "prefuse", "kernels": "prefuse/kernels", "engine": "prefuse/engine", "bench": "prefuse/bench"}
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def run(command, **kwargs):
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, **kwargs)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: a build/ left in the repository would find its way into the wheel."""
    source = tmp_path_factory.mktemp("source")
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    built = tmp_path_factory.mktemp("built")
    run([*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, source])
    return next(built.glob("prefuse-*.whl"))


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory):
    """A new environment with the wheel in it, which borrows the dependencies of this one through a path file.

    Python reads no path files in a folder that a path file added, so the editable prefuse stays out.
    """
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    run([*PIP, "--python", python, "install", "--no-deps", "--no-index", wheel])
    packages = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def test_the_wheel_has_every_module_its_tiles_its_type_marker_and_its_license(wheel):
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    in_repository = {
        f"{package}/{file.relative_to(ROOT / folder).as_posix()}"
        for folder, package in FOLDERS.items()
        for file in (ROOT / folder).rglob("*.py")
    }
    assert {name for name in in_wheel if name.endswith(".py")} == in_repository
    assert {"prefuse/py.typed", "prefuse/kernels/tiles/tiles.toml"} <= in_wheel
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in in_wheel)


def import_everything(environment):
    script = """
import importlib, pkgutil
import prefuse
for module in pkgutil.walk_packages(prefuse.__path__, "prefuse."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(prefuse.__file__)
"""
    where = run([environment / "bin" / "python", "-c", script], cwd=environment)
    assert Path(where.strip()).is_relative_to(environment)


def show_help(environment):
    help_text = run([environment / "bin" / "prefuse", "--help"], cwd=environment)
    for command in ["sft", "train", "eval", "generate"]:
        assert command in help_text


@pytest.mark.slow
def test_the_installed_wheel_imports_everything(environment):
    import_everything(environment)


@pytest.mark.slow
def test_the_installed_wheel_runs_its_command(environment):
    show_help(environment)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_extras_bring_what_the_wheel_imports(wheel, tmp_path):
    """The same in an environment that is empty in truth, filled from the package index: about 700 MB."""
    venv.create(tmp_path, with_pip=True, symlinks=True)
    # The CPU build of torch does not bring Triton.
    wanted = [f"{wheel}[train,trl]", "triton", "--constraint", ROOT / "constraints.txt"]
    run([*PIP, "--python", tmp_path / "bin" / "python", "install", *wanted])
    import_everything(tmp_path)
    show_help(tmp_path)
