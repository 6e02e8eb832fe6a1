"""Processes that are forked from a server with imports: what they and their parent have afterwards."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection

from metazo.io import forked


def _blocked(connection: Connection) -> None:
    connection.send({int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())})


def test_signals_wait_in_the_process_and_nothing_changes_in_its_parent(monkeypatch):
    monkeypatch.setenv("METAZO_TEST_KEPT", "1")
    before, mask = dict(os.environ), signal.pthread_sigmask(signal.SIG_BLOCK, ())
    context = forked.context(__name__, {"METAZO_TEST_KEPT": "2", "METAZO_TEST_NEW": "3"})
    assert dict(os.environ) == before and signal.pthread_sigmask(signal.SIG_BLOCK, ()) == mask
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_blocked, args=(theirs,))
    process.start()
    assert {int(number) for number in forked.STOPPING} <= ours.recv()
    process.join()
    assert process.exitcode == 0
