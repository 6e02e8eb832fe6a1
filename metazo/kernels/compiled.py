"""Loops over weights on the CPU, compiled by numba. metazo/kernels/parallel.py runs them in several threads."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from numba import config, njit

from metazo.errors import UserError
from metazo.kernels import casts, pieces, vectors
from metazo.kernels.vectors import PREFERENCE


def kernel(function: Callable, *sources: ModuleType) -> Callable:
    """Compile a loop at its first call for a type, and keep it on disk if there is a writable folder.

    Args: sources: the other modules from which the loop takes functions and constants. numba notices changes in the loop's
        own file alone, so the name of its cache has a checksum of these modules and the width of vectors.
    Raises UserError if numba is told not to compile, because such loops would take a million times as long.
    """
    if getattr(config, "DISABLE_JIT", False):
        raise UserError("NUMBA_DISABLE_JIT is set, and metazo's loops over weights must be compiled: unset it.")
    checksum = zlib.crc32(PREFERENCE.encode())
    for source in (casts, pieces, vectors, *sources):
        checksum = zlib.crc32(Path(str(source.__file__)).read_bytes(), checksum)
    function.__qualname__ += f"-{checksum:08x}"
    try:
        with _home_if_unknown():
            return njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba found no such folder
        return njit(nogil=True, error_model="numpy")(function)


@contextmanager
def _home_if_unknown() -> Iterator[None]:
    """A context in which a user without a home folder has one that cannot be written (docker run --user 12345): numba's last
    resort for its cache would be a folder of the name ~ in the working directory.
    """
    if "HOME" in os.environ or os.path.expanduser("~") != "~":
        yield
        return
    os.environ["HOME"] = os.devnull
    try:
        yield
    finally:
        del os.environ["HOME"]
