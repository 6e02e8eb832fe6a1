"""Calls on what strangers wrote that may never return or take all memory: each in a forked process with limits."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from metazo.errors import UserError

SECONDS = 10
"""Processor time of one call, to which EACH is added for every further one."""
EACH = 0.05
ROOM = 2**28
"""Bytes by which the address space may grow."""


def bounded(function: Callable[[Any], Any], calls: Sequence[tuple[str, Any]]) -> Iterator[Any]:
    """What the function makes of each value, as JSON; calls: for each a name for messages, and the value. All are made in one
    process, which is forked for them and can end without harm: so weights in memory are not copied, and nothing of it is left
    when training begins.

    Raises UserError for a call that exceeds its time or memory, and with the text of whatever it raises. Elsewhere than on
    Linux, where a process with threads cannot be forked safely, the calls are made here, without limits.
    """
    if sys.platform != "linux" or not calls:
        yield from (_answer(function, *call) for call in calls)
        return
    reads, writes = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, whose locks are not used below
        child = os.fork()
    if child == 0:
        try:
            gc.disable()  # it could free tensors of a device
            _limit(SECONDS + int(EACH * len(calls)))
            with open(writes, "w", encoding="utf-8") as out:
                for call in calls:
                    try:
                        answer = [_answer(function, *call), None]
                    except UserError as error:
                        answer = [None, str(error)]
                    out.write(json.dumps(answer) + "\n")
                    out.flush()
        finally:
            os._exit(0)
    process = os.pidfd_open(child)  # its number may be another's once somebody else has waited for it
    os.close(writes)
    try:
        with open(reads, encoding="utf-8") as answers:
            for name, _ in calls:
                line = answers.readline()
                if not line:
                    raise UserError(
                        f"{name} ends its process, or takes more than {SECONDS} s or {ROOM >> 20} MiB, and cannot be used."
                    )
                found, error = json.loads(line)
                if error is not None:
                    raise UserError(error)
                yield found
    finally:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(process, signal.SIGKILL)
        os.close(process)
        with suppress(ChildProcessError):  # somebody else waits for all children, or they are ignored
            os.waitpid(child, 0)


def _answer(function: Callable[[Any], Any], name: str, value: Any) -> Any:
    try:
        return function(value)
    except Exception as error:
        raise UserError(f"{name} fails ({str(error) or type(error).__name__})") from error


def _limit(seconds: int) -> None:
    import resource

    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, pages * resource.getpagesize() + ROOM),
    ):
        hard = resource.getrlimit(kind)[1]
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(kind, (most, most))
