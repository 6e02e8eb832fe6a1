"""The user's script, which workers run if it has the usual guard, as multiprocessing does, for what it defines or imports."""

from __future__ import annotations

import ast
import os
import sys
from pathlib import Path

from metazo.comparisons.grid import Grid
from metazo.errors import UserError
from metazo.io.files import expanded
from metazo.optimizers import METHODS
from metazo.optimizers.registry import VARIABLE


def needs_script(grid: Grid) -> bool:
    """Whether workers run the script first: if that does not start its whole work again. It may register an architecture or set
    something that counts for numbers. Raises UserError for a method of the grid that is neither metazo's nor in a module that
    METAZO_METHODS names, if workers cannot get it from the script either.
    """
    main = sys.modules["__main__"]
    script = getattr(main, "__file__", None)
    # multiprocessing runs no __main__.py of a package
    runs = (
        script is not None and getattr(main.__spec__, "name", "").rpartition(".")[2] != "__main__" and _guarded(script)
    )
    entries = [entry.strip() for entry in os.environ.get(VARIABLE, "").split(",") if entry.strip()]
    files = {expanded(entry).resolve() for entry in entries}
    for name in () if runs else dict.fromkeys(column.optimizer for column in grid.resolved):
        module = METHODS[name].__module__ if name in METHODS else "metazo"
        file = getattr(sys.modules.get(module), "__file__", None)
        if any(module == known or module.startswith(f"{known}.") for known in ("metazo", *entries)):
            continue
        if not file or Path(file).resolve() not in files:
            raise UserError(_without_script(name) if script is None else _without_guard(name, Path(script).name))
    return runs


def _guarded(script: str) -> bool:
    """Whether a file has an `if` of `__name__` and "__main__"; not if it cannot be read, as in a zip file."""
    try:
        tree = ast.parse(Path(script).read_bytes())
    except (OSError, ValueError, SyntaxError):
        return False
    tests = [ast.unparse(node.test) for node in tree.body if isinstance(node, ast.If)]
    return any("__name__" in test and "__main__" in test for test in tests)


def _without_script(name: str) -> str:
    return f"`columns` names {name!r}, a method that workers cannot import: put it into a file, and name that in {VARIABLE}."


def _without_guard(name: str, script: str) -> str:
    return (
        f"`columns` names {name!r}, a method for which workers run {script} too, and there they would start the comparison "
        f'again: put its call under `if __name__ == "__main__":`, or the method into a file that {VARIABLE} names.'
    )
