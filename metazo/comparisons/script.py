"""Methods that only the user's script defines or imports: workers run the script, as multiprocessing does, to have them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from metazo.comparisons.grid import Grid
from metazo.errors import UserError
from metazo.io.files import expanded
from metazo.optimizers import METHODS
from metazo.optimizers.registry import VARIABLE


def needs_script(grid: Grid) -> bool:
    """Whether a method of the grid is neither metazo's nor in a module that METAZO_METHODS names. Raises UserError if workers
    cannot get it: there is no script, or running it would start the comparison again.
    """
    entries = [entry.strip() for entry in os.environ.get(VARIABLE, "").split(",") if entry.strip()]
    files = {expanded(entry).resolve() for entry in entries}
    own = []
    for name in dict.fromkeys(column.optimizer for column in grid.resolved):
        module = METHODS[name].__module__ if name in METHODS else "metazo"
        file = getattr(sys.modules.get(module), "__file__", None)
        if (
            module.split(".")[0] != "metazo"
            and module not in entries
            and (not file or Path(file).resolve() not in files)
        ):
            own.append(name)
    if not own:
        return False
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is None:
        raise UserError(
            f"`columns` names {own[0]!r}, a method that workers cannot import: put it into a file, and name that in {VARIABLE}."
        )
    if b"__name__" not in Path(script).read_bytes():
        raise UserError(
            f"`columns` names {own[0]!r}, a method for which workers run {Path(script).name} too, and there they would start "
            'the comparison again: put its call under `if __name__ == "__main__":`, or the method into a file that '
            f"{VARIABLE} names."
        )
    return True
