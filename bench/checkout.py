"""Runs a benchmark from a checkout that is not installed: `python3 bench/checkout.py gpu --minutes 9`.

A GPU machine often has torch and no way to install. Where prefuse is installed, `prefuse bench gpu` does the same.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {
    "prefuse": ROOT / "bindings",
    "prefuse.kernels": ROOT / "kernels",
    "prefuse.engine": ROOT / "engine",
    "prefuse.bench": ROOT / "bench",
}


class _Folders(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in FOLDERS:
            return None
        folder = FOLDERS[name]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != ROOT / "bench"]  # it would shadow others
    if importlib.util.find_spec("prefuse") is None:
        sys.meta_path.append(_Folders())
    from prefuse.bench.cli import main

    sys.exit(main(sys.argv[1:]))
