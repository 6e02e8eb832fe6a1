"""The planted faults of tests/mutate.py can be planted."""

from __future__ import annotations

from dataclasses import replace

from tests.mutate import MUTANTS, stale


def test_no_planted_fault_is_stale():
    assert stale() == []


def test_a_stale_fault_is_found():
    first = MUTANTS[0]
    gone, idle = replace(first, old="no such text"), replace(first, new=first.old)
    assert len(stale([first, gone, idle])) == 2
