"""Loops shared by threads: every job runs once, lists and iterators of jobs work, and errors are raised."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from metazo.kernels.parallel import share


@pytest.mark.parametrize("form", [list, iter, lambda jobs: (job for job in jobs)])
@pytest.mark.parametrize("count", [0, 1, 3, 500])
def test_every_job_runs_once(threads, form, count):
    done: list[int] = []
    share(done.append, form([(k,) for k in range(count)]))
    assert Counter(done) == Counter(range(count))


def test_all_have_ended_when_it_returns(threads):
    done: list[int] = []

    def slow(k: int) -> None:
        time.sleep(0.01)
        done.append(k)

    share(slow, ((k,) for k in range(6)))
    assert sorted(done) == list(range(6))


@pytest.mark.parametrize("bad", [0, 5])
def test_an_error_is_raised(threads, bad):
    def run(k: int) -> None:
        time.sleep(0.001)
        if k == bad:
            raise MemoryError("no room")

    with pytest.raises(MemoryError):
        share(run, [(k,) for k in range(10)])


def test_an_error_in_making_jobs_is_raised(threads):
    def jobs():
        yield (1,)
        raise ValueError("no such tensor")

    with pytest.raises(ValueError, match="no such tensor"):
        share(lambda k: time.sleep(0.001), jobs())
