"""Signals that ask a run to stop: recorded, or left alone if the process ignores them."""

from __future__ import annotations

import os
import signal

import pytest

from metazo.runs.interrupt import interruptible


def test_the_first_signal_is_noted_and_the_second_ends() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with interruptible() as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == ["SIGTERM"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup, and in a worker of a comparison, whose parent decides about Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as caught:
            os.kill(os.getpid(), signal.SIGINT)
            assert caught == []
    finally:
        signal.signal(signal.SIGINT, before)
