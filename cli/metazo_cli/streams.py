"""Standard output and open files at the edges of a process: what cannot be shown, is not read, or is not written yet."""

from __future__ import annotations

import gc
import io
import select
import sys
from typing import Any


def encode_all() -> None:
    """Have characters that the terminal does not have escaped, as Python does on standard error."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def unread() -> bool:
    """Whether nobody reads standard output any more: it is a pipe without another end."""
    try:
        look = select.poll()
        look.register(1, 0)
        return any(event & select.POLLERR for _, event in look.poll(0))
    except (AttributeError, OSError):  # this system has no such call
        return True


def says_rich(end: SystemExit) -> bool:
    """Whether rich ended the process, because nobody reads what its console prints, as the help of typer does."""
    trace = end.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_name == "on_broken_pipe"


def open_files() -> list[Any]:
    kinds = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)  # texts first: they hold what the others write
    return sorted((one for one in gc.get_objects() if type(one) in kinds), key=lambda one: kinds.index(type(one)))


def flushed(*streams: Any) -> bool:
    """Write out what these hold. Returns: whether that was possible; if not, the interpreter ends as ever, and reports it."""
    try:
        for stream in streams:
            if not stream.closed and stream.writable():
                stream.flush()
    except (OSError, ValueError):
        return False
    return True
