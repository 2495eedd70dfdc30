"""Makes `import prefuse` work from a checkout that is not installed, and the tests' oracle importable.

A GPU machine often has torch and no way to install; import this before prefuse.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = {"prefuse": ROOT / "bindings", "prefuse.kernels": ROOT / "kernels", "prefuse.engine": ROOT / "engine"}


class _Folders(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name not in FOLDERS:
            return None
        folder = FOLDERS[name]
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


if importlib.util.find_spec("prefuse") is None:
    sys.meta_path.append(_Folders())
sys.path.append(str(ROOT / "tests" / "lib"))
