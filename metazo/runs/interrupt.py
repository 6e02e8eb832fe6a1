"""Ends a run in an orderly way if a signal asks it to stop."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any


class Interrupted(Exception):
    """A run was asked to stop by a signal and has saved what it needs to continue; the message says how."""

    def __init__(self, message: str, by: str = "SIGINT"):
        super().__init__(message)
        self.by = by
        self.exit_code = 128 + signal.Signals[by].value  # as a shell reports it: 130, 143


@contextmanager
def interruptible() -> Iterator[list[str]]:
    """A context in which SIGINT and SIGTERM are appended to the given list; a second one ends the process as usual.

    Check the list after each step; if it is not empty, save and stop. A signal that the process ignores stays ignored
    (nohup, a worker whose parent decides), and outside the main thread signals are left alone.
    """
    caught: list[str] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    heard = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    before = {}
    with suppress(ValueError):  # not the main thread
        before = {number: signal.signal(number, note) for number in heard}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
