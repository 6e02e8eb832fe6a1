"""The oracle: a reader returns something valid or raises UserError with one line, and does nothing else."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metazo.errors import UserError

SECONDS = 10
"""Seconds of processor time after which a case has failed; it also fails after ten minutes of wall-clock time."""
LONGEST = 1200
"""Characters of a message."""
_CODE = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile", "subprocess.", "pty.", "ctypes.", "pickle.",
         "code.__new__", "socket.connect", "socket.getaddrinfo", "urllib.Request", "webbrowser.", "ftplib.",
         "smtplib.", "os.kill")  # fmt: skip
_CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
            "shutil.")  # fmt: skip
_BUILDERS = ("typing.py", "dataclasses.py", "ast.py", "pydantic", "importlib")
"""Modules that compile text of metazo's own: annotations, docstrings, imports."""


class Violation(AssertionError):
    """A forbidden action of a reader."""


class Watch:
    """Notes what the interpreter reports (PEP 578) while a reader runs: code, processes, sockets, changed files."""

    def __init__(self) -> None:
        self.on = False
        self.folder = ""
        self.seen: list[str] = []
        sys.addaudithook(self._note)  # stays until the process ends

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, _, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) and not self._inside(path):
                self.seen.append(f"opened {path!r} for writing")
        elif event in ("compile", "exec", "marshal.loads"):
            frame = sys._getframe(1)
            if not any(name in frame.f_code.co_filename for name in _BUILDERS):
                self.seen.append(f"{event} in {frame.f_code.co_filename}:{frame.f_lineno}")
        elif event.startswith(_CODE) or (event.startswith(_CHANGES) and not self._inside(arguments[0])):
            self.seen.append(f"{event} {arguments!r}"[:300])

    def _inside(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a file descriptor that is open already
        where = os.path.realpath(os.fsdecode(path))
        return where == self.folder or where.startswith(self.folder + os.sep)

    def check(self, read: Callable[[Path], object], folder: Path) -> tuple[bool, float]:
        """Run `read(folder)`. Returns: whether it was accepted, and the seconds. Raises Violation."""
        self.folder, self.seen = os.path.realpath(folder), []
        for number, timer, seconds in _TIMERS:
            signal.signal(number, _late)
            signal.setitimer(timer, seconds)
        started, accepted = time.process_time(), True
        self.on = True
        try:
            read(folder)
        except UserError as error:
            accepted = False
            check_message(str(error))
        finally:
            self.on = False
            for _, timer, _ in _TIMERS:
                signal.setitimer(timer, 0)
        if self.seen:
            raise Violation("; ".join(self.seen[:3]))
        return accepted, time.process_time() - started


def check_message(message: str) -> None:
    """Check that the message is one line that any terminal can show."""
    if not message or len(message) > LONGEST or not message.isprintable():
        raise Violation(f"a message of {len(message)} characters that is no plain line: {message[:300]!a}")


def _late(number: int, frame: Any) -> None:
    raise Violation(f"took more than {SECONDS} seconds" if number == signal.SIGPROF else "does not come back")


_TIMERS = ((signal.SIGPROF, signal.ITIMER_PROF, SECONDS), (signal.SIGALRM, signal.ITIMER_REAL, 600))


_watch: list[Watch] = []


def watch() -> Watch:
    """The one watch of this process."""
    if not _watch:
        _watch.append(Watch())
    return _watch[0]
