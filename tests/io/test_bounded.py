"""Calls in a process with limits."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from metazo.errors import UserError
from metazo.io.bounded import bounded

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="calls are made in a process of their own on Linux alone"
)


def reap(*_: object) -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


@pytest.mark.parametrize("handler", [signal.SIG_IGN, reap])
def test_whoever_waits_for_children_the_answers_arrive(handler):
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        assert list(bounded(lambda n: n + 1, [("one", 1), ("two", 2)])) == [2, 3]
        with pytest.raises(UserError, match="one fails"):
            list(bounded(lambda n: 1 / n, [("one", 0), ("two", 2)]))
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_call_that_goes_on_is_ended_with_the_first_error():
    began = time.monotonic()
    with pytest.raises(UserError, match="first fails"):
        list(bounded(lambda n: 1 / n if n == 0 else time.sleep(60), [("first", 0), ("second", 1)]))
    assert time.monotonic() - began < 30


def test_a_call_that_ends_its_process_is_named():
    with pytest.raises(UserError, match="^one ends its process, or takes more than 10 s or 256 MiB"):
        list(bounded(lambda n: os._exit(3), [("one", 1)]))
