"""Memory that the process has freed."""

from __future__ import annotations

import ctypes
from contextlib import suppress


def give_back() -> None:
    """Return freed memory to the system. glibc keeps blocks of up to 32 MB, such as the full-precision weights that were
    quantised; other allocators have no such function, and nothing happens.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
