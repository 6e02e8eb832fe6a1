"""Ends a run in an orderly way if a signal asks it to stop, and notices that it was suspended (Ctrl-Z, SIGSTOP)."""

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


_LEFT_ALONE = signal.SIG_IGN, None  # None: the handler of a library in C, which could not be put back
_continued = 0


def times_continued() -> int:
    """How often this process was continued within `interruptible` after it had been suspended (SIGCONT)."""
    return _continued


@contextmanager
def interruptible() -> Iterator[list[str]]:
    """A context in which SIGINT and SIGTERM are appended to the given list; a second one ends the process as usual.

    Check the list after each step; if it is not empty, save and stop. A signal that the process ignores stays ignored
    (nohup, a worker whose parent decides), and outside the main thread signals are left alone. SIGCONT is counted.
    """
    caught: list[str] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number).name)

    def count(number: int, frame: Any) -> None:
        global _continued
        _continued += 1
        if callable(handler := before.get(number)):
            handler(number, frame)

    handlers = {signal.SIGINT: note, signal.SIGTERM: note, signal.SIGCONT: count}
    heard = [number for number in handlers if signal.getsignal(number) not in _LEFT_ALONE]
    before: dict[int, Any] = {}
    with suppress(ValueError):  # not the main thread
        for number in heard:
            before[number] = signal.signal(number, handlers[number])
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def ends_at_once(what: str) -> Iterator[None]:
    """A context that SIGINT and SIGTERM end where they come, for work that has nothing to save: Interrupted, with the signal's
    name and `what` as its message.

    Also usable as a decorator. A signal that the process ignores stays ignored; outside the main thread signals are left alone.
    """
    by = "SIGINT"

    def end(number: int, frame: Any) -> None:
        nonlocal by
        by = signal.Signals(number).name
        raise KeyboardInterrupt  # which, unlike Interrupted, no library takes for an error of its own

    before = signal.getsignal(signal.SIGTERM)
    heard = before not in _LEFT_ALONE
    try:
        with suppress(ValueError):  # not the main thread
            if heard:
                signal.signal(signal.SIGTERM, end)
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"{by} {what}", by) from None
    finally:
        with suppress(ValueError):
            if heard:
                signal.signal(signal.SIGTERM, before)
