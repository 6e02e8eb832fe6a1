"""Two ways for a child of the harness to die: at a line of Python, or in the middle of a write."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

# Files whose lines are counted: those that step, log and save. Data and models are left out, because they write nothing.
_COUNTED = re.compile(r"/metazo/(io|meta|noise|optimizers|runs|step|steplog)/")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_line(target: int, count: Callable[[int], None] = lambda n: None) -> None:
    """Die at the `target`-th line of metazo that runs from now on (0: never; `count` gets the number of lines so far)."""
    lines = 0

    def local(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            count(lines)
            if lines == target:
                die()
        return local

    counted = cache(lambda name: bool(_COUNTED.search(name)))
    sys.settrace(lambda frame, event, arg: local if counted(frame.f_code.co_filename) else None)


def at_write(target: int, share: float, count: Callable[[int], None] = lambda n: None) -> None:
    """Die in the `target`-th write, after `share` of its bytes; the writes of one file under its temporary name count as
    one, so that a snapshot's many tensors do not hide the log's lines.
    """
    writes, write, open_ = 0, os.write, Path.open

    def due() -> bool:
        nonlocal writes
        writes += 1
        count(writes)
        return writes == target

    def torn_write(file: int, data: bytes) -> int:
        if file > 2 and due():
            write(file, data[: int(share * len(data))])
            die()
        return write(file, data)

    def torn_open(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = open_(path, mode, *args, **kwargs)
        return _Torn(file, share) if mode == "xb" and due() else file

    os.write, Path.open = torn_write, torn_open  # type: ignore[assignment]


_CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


def at_change(target: int, folder: Path, count: Callable[[int], None] = lambda n: None) -> None:
    """Die before the `target`-th change of a file under a folder, as the interpreter reports them (PEP 578): a file that is
    opened for writing, renamed, removed or cut, a folder that is made or removed; and in the middle of a write to an open
    file. What libraries in Rust write between two such changes is not counted.
    """
    changes, write, root = 0, os.write, os.path.realpath(folder)

    def due() -> bool:
        nonlocal changes
        changes += 1
        count(changes)
        return changes == target

    def inside(path: Any) -> bool:
        return isinstance(path, int) or os.path.realpath(os.fsdecode(path)).startswith(root + os.sep)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changed = flags & (os.O_WRONLY | os.O_RDWR) and not isinstance(path, int) and inside(path)
        elif event in _CHANGES:  # a path that is relative to an open folder is that of shutil.rmtree
            changed = inside(arguments[0]) or (event in ("os.remove", "os.rmdir") and arguments[-1] != -1)
        else:
            return
        if changed and due():
            die()

    def torn_write(file: int, data: bytes) -> int:
        if file > 2 and due():
            write(file, data[: len(data) // 2])
            die()
        return write(file, data)

    os.write = torn_write  # type: ignore[assignment]
    sys.addaudithook(hook)


class _Torn:
    """A new file that dies when it is complete: with `share` of its bytes written, none of them under its name."""

    def __init__(self, file: Any, share: float):
        self.file, self.share = file, share

    def __enter__(self) -> _Torn:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, data: Any) -> int:
        return self.file.write(data)

    def fileno(self) -> int:
        return self.file.fileno()

    def flush(self) -> None:
        self.file.flush()
        self.file.truncate(int(self.share * self.file.tell()))
        die()
