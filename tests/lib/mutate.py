"""Plants a bug in a copy of the packages, and runs tests against the copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Folder in the repository -> package, as setuptools maps them.
PACKAGES = {"bindings": "prefuse", "kernels": "prefuse/kernels", "engine": "prefuse/engine", "bench": "prefuse/bench"}


@dataclass(frozen=True)
class Mutation:
    """One planted bug: `old`, which stands once in `file`, becomes `new`."""

    name: str
    why: str  # what is wrong with it, in a sentence
    file: str
    old: str
    new: str
    killed_by: str  # the test that must fail

    @staticmethod
    def read(path: Path) -> Mutation:
        return Mutation(path.stem, **tomllib.loads(path.read_text()))

    def plant(self, site: Path) -> None:
        """Copies the packages to `site`, which is to stand first on PYTHONPATH, with the bug in them."""
        for folder, package in PACKAGES.items():
            shutil.copytree(ROOT / folder, site / package, ignore=shutil.ignore_patterns("__pycache__"))
        folder, _, name = self.file.partition("/")
        target = site / PACKAGES[folder] / name
        text = target.read_text()
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: what it replaces stands {count} times in {self.file}, expected once")
        target.write_text(text.replace(self.old, self.new))


def run_tests(site: Path, tests: list[str], timeout: float) -> subprocess.CompletedProcess:
    """pytest on `tests` of this repository, with the packages of `site`; stops at the first that fails."""
    assert_imports_from(site)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--no-header", "-rf"]
    return subprocess.run(
        [*command, *tests], cwd=ROOT, env=environment(site), timeout=timeout, capture_output=True, text=True
    )


def assert_imports_from(site: Path) -> None:
    code = "import prefuse, prefuse.kernels; print(prefuse.__file__, prefuse.kernels.__file__)"
    command = [sys.executable, "-c", code]
    files = subprocess.run(command, cwd=site, env=environment(site), check=True, capture_output=True, text=True).stdout
    assert all(Path(file).is_relative_to(site) for file in files.split()), files


def environment(site: Path) -> dict[str, str]:
    paths = [str(site), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONDONTWRITEBYTECODE": "1"}
