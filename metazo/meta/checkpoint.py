"""Checkpoints of a meta-training run: everything that decides what follows, in one file, whole or not there at all."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from metazo.errors import UserError
from metazo.meta.run import MetaRun
from metazo.tensorfile import read_tensors, write_tensors

NAME = "checkpoint.safetensors"


def save(run: MetaRun, folder: Path) -> None:
    """Write the run's state; extra memory: one tensor. The disk holds two checkpoints for a moment."""
    write_tensors(folder / NAME, run.state(), {"steps": str(run.steps)})


def load(run: MetaRun, folder: Path) -> bool:
    """Go on where the folder's checkpoint stands. Returns: whether there is one. UserError where it is damaged."""
    path = folder / NAME
    if not path.is_file():
        return False
    try:
        tensors = read_tensors(path)[0]
    except (SafetensorError, OSError) as error:
        raise UserError(f"The checkpoint {path} cannot be read ({error}); start in another --out.") from error
    run.load(tensors)
    return True
