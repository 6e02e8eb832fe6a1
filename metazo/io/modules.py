"""Import a user's own Python: a module by its dotted name, or a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def import_from(entry: str) -> ModuleType:
    """The module of a dotted name, or of a path that ends in .py, which is put into `sys.modules` under its stem.

    Raises ImportError or OSError if there is none, and whatever its own code raises.
    """
    path = Path(entry).expanduser()
    if path.suffix != ".py":
        return importlib.import_module(entry)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
