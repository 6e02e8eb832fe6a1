"""Loops shared by threads: every job runs once, lists and iterators of jobs work, and errors are raised."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from metazo.kernels.parallel import share, together


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


def test_jobs_of_several_calls_run_together_at_the_end(threads):
    first: list[int] = []
    second: list[int] = []
    with together():
        share(first.append, [(k,) for k in range(5)])
        share(second.append, ((k,) for k in range(3)))
        assert not first and not second
    assert sorted(first) == list(range(5)) and sorted(second) == list(range(3))
    share(first.append, [(5,)])
    assert 5 in first


def test_no_job_runs_after_an_error_between_the_calls(threads):
    done: list[int] = []
    with pytest.raises(KeyError), together():
        share(done.append, [(1,)])
        raise KeyError
    share(done.append, [(2,)])
    assert done == [2]
    with pytest.raises(ZeroDivisionError), together():
        share(lambda: 1 / 0, [()])
