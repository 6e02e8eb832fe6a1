"""Import a user's own Python: a module by its dotted name, or a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import zlib
from pathlib import Path
from traceback import extract_tb
from types import ModuleType

from metazo.io.files import expanded

_FILES: set[str] = set()
"""Names in `sys.modules` of files that were imported here, and that another file of the same stem may replace."""


def import_from(entry: str) -> ModuleType:
    """The module of a dotted name, or of a path that ends in .py, which is put into `sys.modules` under its stem; if
    that is the name of another module (random, torch), under a name that has the checksum of the path.

    Raises ImportError or OSError if there is none, and whatever its own code raises.
    """
    path = expanded(entry)
    if path.suffix != ".py":
        return importlib.import_module(entry)
    name = _name(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    _FILES.add(name)
    spec.loader.exec_module(module)
    return module


def place(error: Exception) -> str:
    """Where a user's code that was called or imported failed, as " in line 12 of reward.py"; empty if no frame is known."""
    frames = extract_tb(error.__traceback__)[1:]  # without that of the caller
    importing = (__file__, importlib.__file__, importlib.util.__file__)
    own = [frame for frame in frames if frame.filename not in importing and not frame.filename.startswith("<frozen")]
    return f" in line {own[0].lineno} of {Path(own[0].filename).name}" if own else ""


def _name(path: Path) -> str:
    """The name of a file's module, the same in every process, because objects are pickled with it."""
    there = sys.modules.get(path.stem)
    if there is None:
        try:
            spec = importlib.util.find_spec(path.stem)
        except (ImportError, ValueError, AttributeError):
            spec = None
        place = spec and spec.origin  # None for a mere folder
    else:
        place = None if path.stem in _FILES else getattr(there, "__file__", None) or "built-in"
    if place is None or Path(place).resolve() == path.resolve():
        return path.stem
    return f"{path.stem}_of_file_{zlib.crc32(bytes(path.resolve())):08x}"
