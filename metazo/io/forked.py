"""Processes that are forked from a server with the imports that they share: each of them would take seconds to import them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING

from metazo.errors import UserError
from metazo.io.system import refuse_windows

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext

refuse_windows()  # which has neither this kind of context nor these signals
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def context(*modules: str, environment: Mapping[str, str] | None = None) -> ForkServerContext:
    """The context whose processes are forked from a server that has imported the modules; it is started unless it runs.

    The server blocks the signals in STOPPING, and so do the processes until they have decided what to do with them: Ctrl-C
    reaches all of a group, and would show the traceback of an import. environment: variables that libraries read when they are
    imported. Raises UserError if the folder of temporary files cannot hold the server's socket.
    """
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([*modules])
    resource_tracker.ensure_running()  # it would lift the mask below
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    before = dict(os.environ)
    os.environ.update(environment or {})
    try:
        forkserver.ensure_running()
    except OSError as error:
        if error.errno is not None:
            raise
        where = tempfile.gettempdir()  # Python refuses a path of more than 107 bytes, of which 32 are names of its own
        raise UserError(
            f"The folder of temporary files, {where}, has a path of {len(os.fsencode(where))} characters, which is too long "
            "for a socket in it; set TMPDIR to a shorter one, such as /tmp."
        ) from error
    finally:
        for name in environment or {}:
            os.environ.pop(name) if name not in before else os.environ.update({name: before[name]})
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return made


def start(process: BaseProcess, script: bool = False) -> None:
    """Start a process of the context. script: it runs the main module of this one first, as multiprocessing would have it, for
    what that defines; without the usual guard, a script would start its whole work again.
    """
    main = vars(sys.modules["__main__"])
    kept = {} if script else {name: main[name] for name in ("__file__", "__spec__") if name in main}
    try:
        for name in kept:  # by these alone multiprocessing finds the script
            main[name] = None
        process.start()
    finally:
        main.update(kept)
